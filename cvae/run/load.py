"""A trained model, ready to use; and a model that begins with the weights of another one."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from cvae.console import called
from cvae.data.tasks import FixedMask, Task
from cvae.errors import DataError, first_line
from cvae.model.cvae import CVAE
from cvae.model.networks import upgraded
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds
from cvae.run.folder import BEST, LAST, WEIGHTS, RunFolder, find_run, quoted
from cvae.run.weights_file import Trained, assembled, read_trained, read_weights

SUFFIX = Path(WEIGHTS).suffix


def load(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> CVAE:
    """Return the CVAE of a run with its best weights, or of a `.safetensors` file, frozen, in evaluation mode.

    Args:
        run: The run's folder, or its name below the folder `runs`, or `reference/q1` and the like, which come with the
            program; or the path of the file.
        device: Where the model is to be.
        runs: The folder of runs.

    Returns:
        The model; its `task` says what it sees of an image.

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
    task, begun, remark = model.task, model.state_dict(), ""
    pixels = set()
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
