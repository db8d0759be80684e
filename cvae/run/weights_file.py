"""A trained model as one `.safetensors` file: its weights, and in the metadata all that is needed to build it again.

Metadata, each a text: `settings` (JSON), `observed` (the mask, a line of 0 and 1 for each row, 1 = given), `images`
(JSON: their size, and what identifies them as far as it is known), `version` of the program, and `format`: pt.
"""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from cvae.data.masks import is_picture, mask_name
from cvae.data.tasks import FixedMask, Task
from cvae.errors import DataError, is_out_of_memory, taken_for_damage
from cvae.model.cvae import CVAE
from cvae.model.densities import widen
from cvae.model.networks import build, upgraded
from cvae.run.checkpoint import kinds, read, write_atomically
from cvae.run.folder import known_record, known_settings
from cvae.settings import VERSION, Settings


class Trained(NamedTuple):
    """A trained model, the settings of its run, and what identifies its images, as `RunFolder.record` gives it."""

    model: CVAE
    settings: Settings
    images: dict[str, Any]


def save_safetensors(model: CVAE, settings: Settings, path: Path, half: bool = False) -> None:
    """Write a model that was built from these settings; half: weights in float16. Raises DiskError."""
    images = {"height": model.task.height, "width": model.task.width}
    write_atomically(path, as_safetensors(Trained(model, settings, images), half))


def as_safetensors(trained: Trained, half: bool = False) -> bytes:
    """Return what the file of a trained model holds; half: weights in float16."""
    tensors = trained.model.state_dict()
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    tensors = {name: t.cpu().clone() for name, t in tensors.items()}  # training keeps all weights in one vector
    return safetensors.torch.save(tensors, description(trained))


def description(trained: Trained) -> dict[str, str]:
    """Return the metadata of a trained model."""
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


def read_trained(path: Path, device: torch.device | str = "cpu") -> Trained:
    """Return what is in a file that `save_safetensors` wrote, the weights in float32. Raises DataError."""
    metadata, tensors = read_weights(path)
    with taken_for_damage(f"{path}: holds no CVAE of this program, by its metadata", KeyError, ValueError, TypeError):
        settings = known_settings(json.loads(metadata["settings"]), path)
        images = known_record(json.loads(metadata["images"]), path)
        rows = [[{"0": False, "1": True}[letter] for letter in row] for row in metadata["observed"].split("\n")]
        task = FixedMask(torch.tensor(rows), mask_name(settings))
        if (images["height"], images["width"]) != (task.height, task.width):
            raise ValueError
    return Trained(assembled(path, settings, task, tensors).to(device), settings, images)


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file, those of half precision as float32. Raises DataError."""
    content = read(path)
    with taken_for_damage(f"{path}: is damaged, or no weights of this program", Exception):  # anywhere in the reader
        tensors = safetensors.torch.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        return json.loads(header)["__metadata__"], {name: widen(tensor) for name, tensor in tensors.items()}


def assembled(path: Path, settings: Settings, task: Task, state: object) -> CVAE:
    """Return the model of these settings with these weights, in float32, frozen; raise DataError if they do not fit."""
    try:
        state = upgraded(state) if isinstance(state, dict) else state
        with torch.device("meta"):  # no memory is taken before the weights are known to fit
            wanted = build(task, settings).float().state_dict()
        if kinds(state) != kinds(wanted):
            raise ValueError
        model = build(task, settings).float()  # whatever the default type is
        model.load_state_dict(state)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{path}: does not hold the weights of a CVAE of the run's settings") from None
    return model.requires_grad_(False).eval()
