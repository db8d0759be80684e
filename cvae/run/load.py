"""A trained model, ready to use."""

import hashlib
import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch

from cvae.console import called
from cvae.data.masks import Split
from cvae.errors import DataError, first_line
from cvae.model.cvae import CVAE
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds
from cvae.run.folder import BEST, LAST, WEIGHTS, find_run, quoted, read_record, read_settings, read_split
from cvae.run.weights_file import Trained, assembled, read_trained, read_weights

SUFFIX = Path(WEIGHTS).suffix


def start_from(folder: Path, model: CVAE) -> tuple[str, dict[str, Any]]:
    """Put the best weights of the run in a folder into a model, those whose name and shape it has.

    Those that face pixels, by their size, do not fit either if the runs' masks differ: each stands for one pixel.

    Returns what is said of it, in a line: which did not fit; and what `config.json` is to say: the folder, and the
    SHA-256 of the file. Where there are no best weights that can be read, the last ones are taken. The weights of a
    run whose baseline alone is trained so far go into the baseline. Raises DataError if none can be read, or none fit.
    """
    path, key, content = _weights(folder)
    prefix = "baseline_net." if content.get("phase") == "baseline" else ""
    found = {prefix + name: kind for name, kind in (kinds(content.get(key)) or {}).items()}
    own = model.state_dict()
    wanted, pixels, remark = kinds(own) or {}, *_of_another_mask(folder, model.split)
    fitting = {
        name: content[key][name.removeprefix(prefix)]
        for name, kind in found.items()
        if kind == wanted.get(name) and pixels.isdisjoint(kind[0])
    }
    if not fitting:
        raise DataError(f"{path}: has no weights that fit this network; leave --init out, or give that run's settings")
    model.load_state_dict({**own, **fitting})
    new = _groups(own, fitting)
    line = f"begins with the weights of {path}" + (f"; drawn anew, as these do not fit: {new}" if new else "") + remark
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return line, {"run": str(folder.resolve()), "file": path.name, "sha256": digest, "not_fitting": new}


def _weights(folder: Path) -> tuple[Path, str, dict[str, Any]]:
    """The file of a run's best weights, or else of the last ones, the key by which it has them, and what it holds."""
    if is_passed_on(folder):
        return folder / WEIGHTS, "model", {"phase": "cvae", "model": read_weights(folder / WEIGHTS)[1]}
    try:
        return folder / BEST, "model", checkpoint.load(folder / BEST)
    except DataError as error:
        try:
            return folder / LAST, "average", checkpoint.load(folder / LAST)
        except DataError:
            raise error from None


def _of_another_mask(folder: Path, split: Split) -> tuple[set[int], str]:
    """The sizes of the layers that face pixels if a run's mask is another, for they stand for others; what to say."""
    try:
        other = read_split(folder)
    except DataError:
        return set(), "; its mask cannot be read, and is taken for the same"
    if torch.equal(other.observed, split.observed):
        return set(), ""
    pixels = {split.num_observed, split.num_hidden, split.num_pixels}
    sizes = ", ".join(map(str, sorted(pixels)))
    return pixels, f"; the mask is another, and so nothing fits that is as large as a part of the image ({sizes})"


def _groups(names: Iterable[str], known: Container[str]) -> str:
    """The names that are not known, in short: as many of their last parts left out as leaves no known one in."""
    rest = list(names)
    groups: list[str] = []
    for name in rest:
        if name in known or any(name.startswith(f"{group}.") for group in groups):
            continue
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        groups.append(
            next(
                prefix
                for prefix in prefixes
                if not any(other in known and f"{other}.".startswith(f"{prefix}.") for other in rest)
            )
        )
    return ", ".join(groups)


def load(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> CVAE:
    """The CVAE of a run with its best weights, or that of a `.safetensors` file, frozen, in evaluation mode.

    run: the run's folder, or its name below the folder `runs`, or `reference/q1` and the like, which come with the
    program; or the path of the file. The model's `split` says what it sees of an image.
    Raises DataError if there is no such run, or its weights cannot be read or are not of its settings, and ValueError
    for a device that there is not.
    """
    return load_trained(run, device, runs).model


def load_trained(run: str | Path, device: torch.device | str = "cpu", runs: str | Path = "runs") -> Trained:
    """The same, with the settings and what identifies the images."""
    check_device(device)
    path = Path(run)
    if path.suffix == SUFFIX and not os.path.isdir(path):
        return read_trained(path, device)
    folder = find_run(run, runs)
    if is_passed_on(folder):
        return read_trained(folder / WEIGHTS, device)
    settings, split = read_settings(folder), read_split(folder)
    state = checkpoint.load(folder / BEST)
    if state.get("phase") != "cvae":
        resume = f"{called('train.py')} --resume {quoted(folder)}"
        raise DataError(f"{folder}: only its baseline is trained so far; go on with {resume}")
    model = assembled(folder / BEST, settings, split, state.get("model")).to(device)
    return Trained(model, settings, read_record(folder))


def is_passed_on(folder: Path) -> bool:
    """Whether the weights in a folder are in a file that others can read, in the place of the run's own."""
    return os.path.isfile(folder / WEIGHTS) and not os.path.lexists(folder / BEST)


def check_device(device: torch.device | str) -> None:
    """Raises ValueError for a device that there is not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} cannot be used: {first_line(error).split('. ')[0]}") from None
