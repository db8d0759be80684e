"""Run folders: where they are, and what they say.

A run folder holds `config.json` (settings, images, machine, when it was resumed where), `metrics.jsonl` (a line per
epoch and phase), TensorBoard's events, `last.pt` (everything to go on from), `best.pt` (the best weights) and, once it
is finished, `summary.json` and figures; `observed.png` if the mask was a picture; `init.pt`, the weights that it began
with, if they are another run's. A run that is passed on has `model.safetensors` in the place of the checkpoints.
"""

import json
import math
import os
import reprlib
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cvae.data.masks import MASKS, is_picture, make_task
from cvae.data.tasks import FixedMask
from cvae.errors import DataError, taken_for_damage
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run import checkpoint
from cvae.run.checkpoint import read_json
from cvae.settings import LARGEST_SIDE, PRECISIONS, Settings

CONFIG, METRICS, SUMMARY, OBSERVED = "config.json", "metrics.jsonl", "summary.json", "observed.png"
BEST, LAST, INIT, EVENTS = "best.pt", "last.pt", "init.pt", "events.out.tfevents."
WEIGHTS, COMPLETIONS, LEARNING, CURVES = "model.safetensors", "completions.png", "learning.gif", "curves.png"
FILES = (SUMMARY, COMPLETIONS, LEARNING, CURVES, LAST, BEST, WEIGHTS, METRICS, INIT, OBSERVED, CONFIG)
"""The files of a run but its events; `config.json`, by which it is known, is moved and written last."""

REFERENCE, PACKAGE = "reference", Path(__file__).resolve().parents[1]
COME_WITH = (PACKAGE.parent / "runs", PACKAGE)
"""Where the folder of the runs that come with the program may be: in a clone, in the installed package."""

CHOICES: dict[str, Collection[str]] = {"network": NETWORKS, "objective": OBJECTIVES}
"""Settings that are names of something in the code, each with the table in which it is found."""


@dataclass
class Progress:
    """How far a phase has come; `best_loss` is the lowest validation loss, minus the objective, in nats per image."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0

    def is_over(self, epochs: int, patience: int, unbent: int = 0) -> bool:
        """Return whether the phase has had its epochs, or `patience` without gain; the last, unbent ones count anew."""
        begin = max(0, epochs - unbent) if unbent else 0
        return self.epoch >= epochs or self.epoch - max(self.best_epoch, begin) >= patience


class RunFolder:
    """A run on the disk; its `config.json` is read once. Whatever cannot be read raises DataError, naming the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that `config.json` says."""
        if not os.path.isfile(self.path / CONFIG):
            raise DataError(f"{self.path} is no run folder: it has no {CONFIG}")
        config = read_json(self.path / CONFIG)
        return config if isinstance(config, dict) else {}

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run."""
        return known_settings(self.config.get("settings"), self.path / CONFIG)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What identifies the images that the run is trained on, as `data.sources.record` gives it."""
        return known_record(self.config.get("images"), self.path / CONFIG)

    @cached_property
    def task(self) -> FixedMask:
        """What turns images into x and y."""
        return make_task(self.settings, self.record["height"], self.record["width"], picture=self.path / OBSERVED)

    @property
    def precision(self) -> str:
        """The precision that the run was begun in."""
        begun = self.config.get("precision")
        return begun if begun in PRECISIONS else self.settings.precision

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run has come to; None as long as it is not finished."""
        if not os.path.isfile(self.path / SUMMARY):
            return None
        summary = read_json(self.path / SUMMARY)
        return summary if isinstance(summary, dict) else {}

    @property
    def is_passed_on(self) -> bool:
        """Whether it has published weights in the place of checkpoints: it can be evaluated, and cannot go on."""
        return os.path.isfile(self.path / WEIGHTS) and not os.path.lexists(self.path / BEST)

    def metrics(self, size: int | None = None) -> list[dict[str, Any]]:
        """Return the whole lines in the first `size` bytes of `metrics.jsonl`, None: in all."""
        content = checkpoint.read(self.path / METRICS)
        if size is not None and len(content) < size:
            raise DataError(f"{self.path / METRICS}: is cut off")
        lines = content[:size].split(b"\n")[:-1]  # the last one is still being written
        with taken_for_damage(f"{self.path / METRICS}: is damaged", ValueError, TypeError):
            return [dict(json.loads(line)) for line in lines]

    def last(self) -> dict[str, Any]:
        """Return the checkpoint to go on from, {} before the first one, unless going on from it would lose something.

        `best.pt` may be missing where the last weights are the best, and an epoch may be logged that is not saved yet.
        """
        path = self.path / LAST
        if not os.path.lexists(path):
            logged = self.metrics() if os.path.lexists(self.path / METRICS) else []
            if len(logged) > 1 or any(os.path.lexists(self.path / name) for name in (BEST, SUMMARY, WEIGHTS)):
                raise DataError(f"{path}: is missing, and the run is past its first epoch")
            return {}
        last = checkpoint.load(path)
        with taken_for_damage(f"{path}: is no checkpoint of a training", KeyError, TypeError, AttributeError):
            progress, size = Progress(**last["progress"]), last["log"].get(METRICS, 0)
            is_last_best = progress.best_epoch in (0, progress.epoch)
            epoch = last["phase"], progress.best_epoch, progress.best_loss
        if len(self.metrics()) - len(self.metrics(size)) > 1:
            raise DataError(f"{self.path / METRICS}: has later epochs than {LAST}")
        if not is_last_best:
            best = checkpoint.load(self.path / BEST)
            if (best.get("phase"), best.get("epoch"), best.get("loss")) != epoch:
                raise DataError(f"{self.path / BEST}: is of another epoch than the best one of {LAST}")
        return last


def find_run(run: str | Path, runs: str | Path) -> Path:
    """Return the folder of a run: of this path, or else below the folder of runs; `reference/NAME` from anywhere.

    Where there is none, a plain name is meant below the folder of runs, and a path as it is.
    """
    path, below = Path(run), Path(runs) / run
    known = [place / path for place in COME_WITH] if path.parts[:1] == (REFERENCE,) else []
    default = below if len(path.parts) <= 1 else path
    return next((folder for folder in (path, below, *known) if os.path.isdir(folder)), default)


def quoted(path: Path) -> str:
    """Return a path as it is to be pasted into a shell."""
    return shlex.quote(str(path))


def known_settings(values: object, file: Path) -> Settings:
    """Return the settings that a file holds, as `Settings.to_dict` gives them. Raises DataError."""
    try:
        settings = Settings.from_dict(values)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    is_named = settings.observed is not None and not is_picture(settings)
    for name, choices in (CHOICES | {"observed": MASKS} if is_named else CHOICES).items():
        if (chosen := getattr(settings, name)) not in choices:
            raise DataError(f"{file}: this version knows no {name} {reprlib.repr(chosen)}; was a later one here?")
    return settings


def known_record(images: Any, file: Path) -> dict[str, Any]:
    """Return what a file says of images. Raises DataError if it does not say their size."""
    record: dict[str, Any] = images if isinstance(images, dict) else {}
    sizes_known = all(
        type(record.get(side)) is int and 2 <= record[side] <= LARGEST_SIDE for side in ("height", "width")
    )
    if not sizes_known or not all(
        isinstance(record.get(part), dict | None) for part in ("train", "validation", "test")
    ):
        raise DataError(f"{file}: does not say the size of the images; train anew with this version")
    return record
