"""A trained model, ready to use, of a run or of Pyro's example; and a model that begins with another's weights."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvae.console import called
from cvae.data.masks import make_task
from cvae.data.tasks import FixedMask, Task
from cvae.errors import DataError, first_line
from cvae.model.cvae import CVAE
from cvae.model.networks import upgraded
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds, unpickled
from cvae.run.folder import BEST, LAST, WEIGHTS, RunFolder, find_run, quoted
from cvae.run.weights_file import Trained, assembled, read_trained, read_weights
from cvae.settings import Settings

SUFFIX = Path(WEIGHTS).suffix
LAYERS = ("baseline_net.fc1", "baseline_net.fc2", "prior_net.fc31")  # of Pyro's example, which tell its sizes
SIDE, MASKED = 28, -1.0  # the images' size; what the tutorial shows its baseline in the place of a hidden pixel


def load(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> CVAE:
    """Return the CVAE of a run with its best weights, or of a `.safetensors` file, frozen, in evaluation mode.

    Args:
        run: The run's folder, or its name below the folder `runs`, or `reference/q1` and the like, which come with the
            program; or the path of the file.
        device: Where the model is to be.
        runs: The folder of runs.

    Raises:
        DataError: There is no such run, or its weights cannot be read or are not of its settings.
        ValueError: There is no such device.
    """
    return load_trained(run, device, runs).model


def load_trained(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> Trained:
    """Return the model as `load` does, with the settings and what identifies the images."""
    check_device(device)
    path = Path(run)
    if path.suffix == SUFFIX and not os.path.isdir(path):
        return read_trained(path, device)
    folder = RunFolder(find_run(run, runs))
    if folder.is_passed_on:
        return read_trained(folder.path / WEIGHTS, device)
    settings, task, path = folder.settings, folder.task, folder.path / BEST
    state = checkpoint.load(path)
    if state.get("phase") != "cvae":
        resume = f"{called('train.py')} --resume {quoted(folder.path)}"
        raise DataError(f"{folder.path}: only its baseline is trained so far; go on with {resume}")
    return Trained(assembled(path, settings, task, state.get("model")).to(device), settings, folder.record)


def check_device(device: torch.device | str) -> None:
    """Raise ValueError for a device that there is not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} cannot be used: {first_line(error).split('. ')[0]}") from None


def start_from(folder: Path, model: CVAE) -> tuple[str, dict[str, Any]]:
    """Put the best weights of a run into a model, or the last ones if it has no best, as far as name and shape fit.

    Weights that face pixels, by their size, do not fit either if the runs' masks differ: each stands for one pixel. If
    the baseline alone is trained so far, the weights go into the baseline. Raises DataError if none fit.

    Returns:
        A line for the user, and what `config.json` is to say: the folder, the file, its SHA-256, and what did not fit.
    """
    path = next((folder / name for name in (BEST, LAST, WEIGHTS) if os.path.lexists(folder / name)), folder / BEST)
    content = {"model": read_weights(path)[1]} if path.name == WEIGHTS else checkpoint.load(path)
    state: Any = content.get("average" if path.name == LAST else "model")
    prefix = "baseline_net." if content.get("phase") == "baseline" else ""
    weights = {prefix + name: tensor for name, tensor in upgraded(state).items()} if kinds(state) else {}
    task, begun, remark, pixels = model.task, model.state_dict(), "", set[int]()
    if not _same_mask(folder, task):
        pixels = {task.x_dim, task.y_dim, task.x_dim + task.y_dim}
        sizes = ", ".join(map(str, sorted(pixels)))
        remark = f"; the mask is another, and so nothing fits that is as large as a part of the image ({sizes})"
    wanted = {name: kind for name, kind in kinds(begun).items() if pixels.isdisjoint(kind[0])}
    fitting = {name: weights[name] for name, kind in kinds(weights).items() if kind == wanted.get(name)}
    if not fitting:
        raise DataError(f"{path}: has no weights that fit this network; leave --init out, or give that run's settings")
    model.load_state_dict({**begun, **fitting})
    new = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in begun if name not in fitting))
    line = f"begins with the weights of {path}" + (f"; drawn anew, as these do not fit: {new}" if new else "") + remark
    digest = hashlib.sha256(checkpoint.read(path)).hexdigest()
    return line, {"run": str(folder.resolve()), "file": path.name, "sha256": digest, "not_fitting": new}


def _same_mask(folder: Path, task: Task) -> bool:
    """Return whether a run has the mask of a task; one that cannot be read is taken for the same."""
    try:
        return isinstance(task, FixedMask) and torch.equal(RunFolder(folder).task.observed, task.observed)
    except DataError:
        return True


def load_tutorial(path: str | Path, quadrants: int = 1, device: torch.device | str = "cpu") -> CVAE:
    """Return the CVAE in a `cvae_net.pth` of Pyro 1.9's example `cvae`, frozen; it computes the same functions.

    Its layers see whole images of 28×28 pixels, −1 in the place of each hidden pixel of the baseline's inputs, and have
    an output for each pixel. Ours see the observed pixels first, and hold what is constant in the biases.

    Args:
        path: The file, a state_dict. Nothing in it is run; sizes are those of the file.
        quadrants: How many are observed, 1, 2 or 3, as in its training: the file does not say.
        device: Where the model is to be.

    Raises:
        DataError: It is no such file.
        ValueError: For another number, and a device that there is not.
    """
    check_device(device)
    settings, path = Settings(quadrants=quadrants), Path(path)
    weights = unpickled(path, "holds more than tensors, or is damaged: save the state_dict of the CVAE")
    task, state = make_task(settings, SIDE, SIDE), dict[str, Tensor]()
    try:
        for network in ("baseline_net", "prior_net", "recognition_net", "generation_net"):
            names = ("fc1", "fc2", "fc31", "fc32") if f"{network}.fc31.bias" in weights else ("fc1", "fc2", "fc3")
            layers = [(weights[f"{network}.{name}.weight"], weights[f"{network}.{name}.bias"]) for name in names]
            state |= _converted(network, layers, task)
        first, second, z = (len(weights[f"{n}.bias"]) for n in LAYERS)
        settings = replace(settings, hidden=(first, second), latent_dim=z)
        if not kinds(weights) or len(weights) != 2 * 14:
            raise ValueError("it has other weights than that")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise DataError(f"{path}: is no CVAE of Pyro's example ({type(error).__name__}: {error})") from None
    return assembled(path, settings, task, state).to(device)


def _converted(network: str, layers: list[tuple[Tensor, Tensor]], task: FixedMask) -> dict[str, Tensor]:
    """Return the layers of one of its networks as those of ours with this mask."""
    given, hidden = task.order.split([task.x_dim, task.y_dim])
    (weight, bias), second, *last = layers
    if network == "baseline_net":
        weight, bias = weight[:, given], bias + MASKED * weight[:, hidden].sum(1)
    elif network != "generation_net":
        weight = weight[:, task.order]  # and loc and log-scale become one layer:
    end = [torch.cat(parts) for parts in zip(*last, strict=True)]
    end = end if len(last) == 2 else [part[hidden] for part in end]
    names = (f"{network}.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
    return dict(zip(names, (weight, bias, *second, *end), strict=True))
