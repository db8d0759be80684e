"""A trained model, ready to use."""

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch

from cvae.data.masks import Split
from cvae.errors import DataError, first_line
from cvae.model.cvae import CVAE
from cvae.model.networks import build
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds
from cvae.run.folder import BEST, LAST, find_run, quoted, read_settings, read_split
from cvae.terminal import called


def start_from(folder: Path, model: CVAE) -> tuple[str, dict[str, Any]]:
    """Put the best weights of the run in a folder into a model, those whose name and shape it has.

    Those that face pixels, by their size, do not fit either if the runs' masks differ: each stands for one pixel.

    Returns what is said of it, in a line: which did not fit; and what `config.json` is to say: the folder, and the
    SHA-256 of the file. Where there are no best weights that can be read, the last ones are taken. The weights of a
    run whose baseline alone is trained so far go into the baseline. Raises DataError if none can be read, or none fit.
    """
    path, key = folder / BEST, "model"
    try:
        content = checkpoint.load(path)
    except DataError as error:
        path, key = folder / LAST, "average"
        try:
            content = checkpoint.load(path)
        except DataError:
            raise error from None
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
    """The CVAE of a run with its best weights, frozen, in evaluation mode.

    run: its folder, or its name below the folder `runs`. The model's `split` says what it sees of an image.
    Raises DataError if there is no such run, or its weights cannot be read or are not of its settings, and ValueError
    for a device that there is not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} cannot be used: {first_line(error).split('. ')[0]}") from None
    folder = find_run(run, runs)
    settings, split = read_settings(folder), read_split(folder)
    state = checkpoint.load(folder / BEST)
    if state.get("phase") != "cvae":
        resume = f"{called('train.py')} --resume {quoted(folder)}"
        raise DataError(f"{folder}: only its baseline is trained so far; go on with {resume}")
    try:
        with torch.device("meta"):  # no memory is taken before the weights are known to fit
            wanted = build(split, settings).state_dict()
        if kinds(state["model"]) != kinds(wanted):
            raise ValueError
        model = build(split, settings)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        raise DataError(f"{folder / BEST}: does not hold the weights of a CVAE of the run's settings") from None
    return model.to(device).requires_grad_(False).eval()
