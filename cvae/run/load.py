"""A trained model, ready to use: of a run, of a `.safetensors` file, of Pyro's example; or to begin another with."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from cvae.console import called
from cvae.data.masks import is_picture, make_task, mask_name
from cvae.data.tasks import FixedMask, Task
from cvae.errors import DataError, taken_for_damage
from cvae.model.cvae import CVAE
from cvae.model.densities import widen
from cvae.model.networks import build, upgraded
from cvae.run import checkpoint
from cvae.run.folder import BEST, LAST, WEIGHTS, RunFolder, find_run, known_settings, quoted
from cvae.settings import VERSION, Settings

MISFITS = (KeyError, TypeError, ValueError, AttributeError, RuntimeError)  # what weights of another model raise
SUFFIX = Path(WEIGHTS).suffix
SIDE, MASKED = 28, -1.0  # in Pyro's example: the images' size, and what the baseline sees of a hidden pixel


class Trained(NamedTuple):
    """A trained model, the settings of its run, and what identifies its images, as `RunFolder.record` gives it."""

    model: CVAE
    settings: Settings
    images: dict[str, Any]


def load(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> CVAE:
    """Return the CVAE of a run with its best weights, or of a `.safetensors` file, frozen, in evaluation mode.

    Args:
        run: The run's folder, or its name below the folder `runs`, or `reference/q1` and the like, which come with the
            program; or the path of the file.
        device: Where the model is to be.
        runs: The folder of runs.

    Raises:
        DataError: There is no such run, or its weights cannot be read or are not of its settings.
    """
    return load_trained(run, device, runs).model


def load_trained(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> Trained:
    """Return the model as `load` does, with the settings and what identifies the images."""
    path = Path(run)
    if path.suffix != SUFFIX or path.is_dir():
        folder = RunFolder(find_run(run, runs))
        path = folder.path / (WEIGHTS if folder.is_passed_on else BEST)
    content, state = read_weights(path)
    if path.suffix == SUFFIX:
        with taken_for_damage(f"{path}: holds no CVAE of this program, by its metadata", *MISFITS):
            settings, images = known_settings(json.loads(content["settings"]), path), json.loads(content["images"])
            rows = [[{"0": False, "1": True}[letter] for letter in row] for row in content["observed"].split("\n")]
            task = FixedMask(torch.tensor(rows), mask_name(settings))
    else:
        settings, images, task = folder.settings, folder.record, folder.task
        if content.get("phase") != "cvae":
            resume = f"{called('train.py')} --resume {quoted(folder.path)}"
            raise DataError(f"{folder.path}: only its baseline is trained so far; go on with {resume}")
    return Trained(assembled(path, settings, task, state).to(device), settings, images)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a checkpoint or `.safetensors` file says, and its weights, in float32, as they are named today."""
    content: dict[str, Any] = {} if path.suffix == SUFFIX else checkpoint.load(path)
    with taken_for_damage(f"{path}: is damaged, or no weights of this program", Exception):  # anywhere in the reader
        if path.suffix != SUFFIX:
            return content, upgraded(content["average" if path.name == LAST else "model"])
        with safetensors.safe_open(path, "pt") as file:
            state = {name: widen(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, upgraded(state)


def assembled(path: Path, settings: Settings, task: Task, state: dict[str, Tensor]) -> CVAE:
    """Return the model of these settings with these weights, in float32, frozen; raise DataError if they do not fit."""
    with taken_for_damage(f"{path}: does not hold the weights of a CVAE of the run's settings", *MISFITS):
        model = build(task, settings).float()  # whatever the default type is
        model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def save_safetensors(model: CVAE, settings: Settings, path: Path, half: bool = False) -> None:
    """Write a model that was built from these settings; half: weights in float16. Raises DiskError."""
    images = {"height": model.task.height, "width": model.task.width}
    checkpoint.write_atomically(path, as_safetensors(Trained(model, settings, images), half))


def as_safetensors(trained: Trained, half: bool = False) -> bytes:
    """Return what the file of a trained model holds; half: weights in float16."""
    state = trained.model.state_dict().items()
    stored = {name: (t.half() if half and t.is_floating_point() else t).cpu() for name, t in state}
    return safetensors.torch.save(stored, description(trained))


def description(trained: Trained) -> dict[str, str]:
    """Return the metadata of a trained model's file, each a text; docs/export.md says what they are."""
    assert isinstance(trained.model.task, FixedMask)
    return {
        "settings": json.dumps(passed_on(trained.settings).to_dict()),
        "observed": "\n".join("".join(map(str, row)) for row in trained.model.task.observed.int().tolist()),
        "images": json.dumps(trained.images),
        "version": VERSION,
        "format": "pt",
    }


def passed_on(s: Settings) -> Settings:
    """Return the settings without the folders of the machine that a run was trained on: the names of files stay."""
    data = s.data and PureWindowsPath(s.data).name
    observed = str(PurePosixPath("/", PureWindowsPath(str(s.observed)).name)) if is_picture(s) else s.observed
    return replace(s, data=data, data_root=None, observed=observed)


def start_from(folder: Path, model: CVAE) -> tuple[str, dict[str, Any]]:
    """Put the best weights of a run into a model, or the last ones, as far as name and shape fit; of a baseline too.

    Weights that face pixels, by their size, do not fit if the runs' masks differ: each stands for one pixel. Return a
    line for the user, and what `config.json` is to say of it. Raises DataError if none fit.
    """
    path = next((folder / name for name in (BEST, LAST, WEIGHTS) if os.path.lexists(folder / name)), folder / BEST)
    content, state = read_weights(path)
    if content.get("phase") == "baseline":
        state = {f"baseline_net.{name}": tensor for name, tensor in state.items()}
    task, begun, remark, pixels = model.task, model.state_dict(), "", set[int]()
    with suppress(DataError):  # else the masks are the same, as far as is known
        if isinstance(task, FixedMask) and not torch.equal(RunFolder(folder).task.observed, task.observed):
            pixels, remark = {task.x_dim, task.y_dim, task.x_dim + task.y_dim}, "; their mask is another"
    shapes = {name: tensor.shape for name, tensor in begun.items() if pixels.isdisjoint(tensor.shape)}
    fitting = {name: tensor for name, tensor in state.items() if tensor.shape == shapes.get(name)}
    if not fitting:
        raise DataError(f"{path}: has no weights that fit this network; leave --init out, or give that run's settings")
    model.load_state_dict({**begun, **fitting})
    new = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in begun if name not in fitting))
    line = f"begins with the weights of {path}" + (f"; drawn anew, as these do not fit: {new}" if new else "") + remark
    digest = hashlib.sha256(checkpoint.read(path)).hexdigest()
    return line, {"run": str(folder.resolve()), "file": path.name, "sha256": digest, "not_fitting": new}


def load_tutorial(path: str | Path, quadrants: int = 1, device: torch.device | str = "cpu") -> CVAE:
    """Return the CVAE in a `cvae_net.pth` of Pyro 1.9's example `cvae`, frozen; it computes the same functions.

    Its layers see whole images, −1 in the place of each hidden pixel of the baseline's inputs, and have an output for
    each pixel. Ours see the observed pixels first, and hold what is constant in the biases.

    Args:
        path: The file, a state_dict. Nothing in it is run; sizes are those of the file.
        quadrants: How many are observed, 1, 2 or 3, as in its training: the file does not say.
        device: Where the model is to be.

    Raises:
        DataError: It is no such file.
    """
    path, state, task = Path(path), dict[str, Tensor](), make_task(Settings(quadrants=quadrants), SIDE, SIDE)
    with taken_for_damage(f"{path}: is no state_dict of the CVAE of Pyro's example", Exception):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for network in ("baseline_net", "prior_net", "recognition_net", "generation_net"):
            ends = ("fc31", "fc32") if f"{network}.fc31.bias" in weights else ("fc3",)  # loc and scale, or logits
            for kind in ("weight", "bias"):
                first, second, *last = (weights[f"{network}.{layer}.{kind}"] for layer in ("fc1", "fc2", *ends))
                end = torch.cat(last) if len(last) == 2 else last[0][task.order[task.x_dim :]]
                state |= {f"{network}.layers.{i}.{kind}": part for i, part in enumerate((first, second, end))}
        for network in ("baseline_net", "prior_net", "recognition_net"):
            state[f"{network}.layers.0.weight"] = state[f"{network}.layers.0.weight"][:, task.order]
        given, masked = state["baseline_net.layers.0.weight"].split([task.x_dim, task.y_dim], dim=1)
        state["baseline_net.layers.0.weight"] = given
        state["baseline_net.layers.0.bias"] += MASKED * masked.sum(1)
        *hidden, latent_dim = (len(weights[f"prior_net.{layer}.bias"]) for layer in ("fc1", "fc2", "fc31"))
        settings = Settings(quadrants=quadrants, hidden=tuple(hidden), latent_dim=latent_dim)
    return assembled(path, settings, task, state).to(device)
