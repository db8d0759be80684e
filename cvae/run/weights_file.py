"""A trained model as one `.safetensors` file: its weights, and in the metadata all that is needed to build it again.

Metadata, each a text: `settings` (JSON), `observed` (the mask, a line of 0 and 1 for each row, 1 = given), `images`
(JSON: their size, and what identifies them as far as it is known), `version` of the program, `format` (pt, as other
programs that read such files want it), and `sha256` of all of these and of the tensors. What says where files are on
the machine of the training is left out.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from cvae import __version__
from cvae.data.masks import Split, is_picture, mask_name
from cvae.errors import DataError, is_out_of_memory, taken_for_damage
from cvae.model.cvae import CVAE
from cvae.model.densities import widen
from cvae.model.networks import build, upgraded
from cvae.run.checkpoint import kinds, write_atomically
from cvae.run.folder import known_record, known_settings
from cvae.settings import Settings

Weights = dict[str, Tensor]


class Trained(NamedTuple):
    """A trained model, the settings of its run, and what identifies its images, as `folder.read_record` gives it."""

    model: CVAE
    settings: Settings
    images: dict[str, Any]


def load_safetensors(path: Path, device: torch.device | str = "cpu") -> CVAE:
    """The CVAE in a file that `save_safetensors` wrote, in float32, frozen, in evaluation mode. Raises DataError."""
    return read_trained(path, device).model


def save_safetensors(model: CVAE, settings: Settings, path: Path, half: bool = False) -> None:
    """Write a model that was built from these settings, wholly or not at all. half: weights in float16, half the size.

    Raises DiskError.
    """
    images = {"height": model.split.height, "width": model.split.width}
    write_atomically(path, as_safetensors(Trained(model, settings, images), half))


def as_safetensors(trained: Trained, half: bool = False) -> bytes:
    """What the file of a trained model holds. half: weights in float16."""
    tensors = {name: _stored(tensor, half) for name, tensor in trained.model.state_dict().items()}
    return with_digest(tensors, description(trained))


def with_digest(tensors: Weights, metadata: dict[str, str]) -> bytes:
    """What a file of tensors on the CPU and of texts holds, which `read_weights` reads."""
    return safetensors.torch.save(tensors, {**metadata, "sha256": _digest(metadata, tensors)})


def description(trained: Trained) -> dict[str, str]:
    """The metadata of a trained model, but for the digest."""
    rows = trained.model.split.observed.int().tolist()
    return {
        "settings": json.dumps(passed_on(trained.settings).to_dict()),
        "observed": "\n".join("".join(map(str, row)) for row in rows),
        "images": json.dumps(trained.images),
        "version": __version__,
        "format": "pt",
    }


def passed_on(s: Settings) -> Settings:
    """The settings without the folders of the machine that a run was trained on: the names of files stay."""
    data = s.data and PureWindowsPath(s.data).name
    observed = str(PurePosixPath("/", PureWindowsPath(str(s.observed)).name)) if is_picture(s) else s.observed
    return replace(s, data=data, data_root=None, observed=observed)


def read_trained(path: Path, device: torch.device | str = "cpu") -> Trained:
    """All that is in a file that `save_safetensors` wrote, the weights in float32. Raises DataError."""
    metadata, tensors = read_weights(path)
    if missing := {"settings", "images", "observed"} - metadata.keys():
        raise DataError(f"{path}: holds no CVAE: its metadata has no {min(missing)}")
    try:
        settings = known_settings(json.loads(metadata["settings"]), path)
        images = known_record(json.loads(metadata["images"]), path)
        split = Split(_mask(metadata["observed"]), mask_name(settings))
        if (images["height"], images["width"]) != (split.height, split.width):
            raise ValueError("images of another size than the mask's")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: its metadata cannot be read ({type(error).__name__})") from None
    return Trained(assembled(path, settings, split, tensors).to(device), settings, images)


def read_weights(path: Path) -> tuple[dict[str, str], Weights]:
    """The metadata and the tensors of a file, those of half precision as float32.

    Raises DataError if it is missing, damaged, or not of this program.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    with taken_for_damage(f"{path}: is damaged, or no weights of this program", Exception):  # anywhere in the reader
        tensors = safetensors.torch.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        metadata = json.loads(header)["__metadata__"]
        if metadata.pop("sha256") != _digest(metadata, tensors):
            raise ValueError("the digest does not match")
    return metadata, {name: widen(tensor) for name, tensor in tensors.items()}


def assembled(path: Path, settings: Settings, split: Split, state: object) -> CVAE:
    """The model of these settings with these weights, frozen, in evaluation mode.

    Raises DataError, naming the file at `path`, if they are not of these settings.
    """
    try:
        if isinstance(state, dict):
            state = upgraded(state)
        with torch.device("meta"):  # no memory is taken before the weights are known to fit
            wanted = build(split, settings).state_dict()
        if kinds(state) != kinds(wanted):
            raise ValueError
        model = build(split, settings)
        model.load_state_dict(state)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{path}: does not hold the weights of a CVAE of the run's settings") from None
    return model.requires_grad_(False).eval()


def _stored(tensor: Tensor, half: bool) -> Tensor:
    """A copy of its own on the CPU: training keeps all weights in one vector."""
    dtype = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _mask(text: str) -> Tensor:
    rows = [[{"0": False, "1": True}[letter] for letter in row] for row in text.split("\n")]
    return torch.tensor(rows)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types, shapes and bytes."""
    sha256 = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
