"""Run folders: where they are, what they say, how one comes into being, and the lock that a training holds on it.

docs/reliability.md says what each file holds. A run that is passed on has `model.safetensors` in place of checkpoints.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cvae.console import complain
from cvae.data.masks import make_task
from cvae.errors import DataError, UsageError, first_line, taken_for_damage
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run import checkpoint
from cvae.run.checkpoint import read_json, telling_of_disk
from cvae.settings import Settings

CONFIG, METRICS, SUMMARY, OBSERVED = "config.json", "metrics.jsonl", "summary.json", "observed.png"
BEST, LAST, INIT, EVENTS = "best.pt", "last.pt", "init.pt", "events.out.tfevents."
WEIGHTS, COMPLETIONS, LEARNING, CURVES = "model.safetensors", "completions.png", "learning.gif", "curves.png"
FILES = (SUMMARY, COMPLETIONS, LEARNING, CURVES, LAST, BEST, WEIGHTS, METRICS, INIT, OBSERVED, CONFIG)
"""The files of a run but its events, in the order in which `create` removes them."""

REFERENCE, PACKAGE = "reference", Path(__file__).resolve().parents[1]
COME_WITH = (PACKAGE.parent / "runs", PACKAGE)  # where the folder of the reference runs is: in a clone, if installed
CHOICES: dict[str, Mapping[str, Any]] = {"network": NETWORKS, "objective": OBJECTIVES}  # settings that name an item


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
    """A run on the disk, as it is now. Whatever cannot be read raises DataError, naming the file."""

    def __init__(self, path: str | Path):
        self.path, file = Path(path), Path(path) / CONFIG
        if not os.path.isfile(file):
            raise DataError(f"{path} is no run folder: it has no {CONFIG}")
        self.config = read_json(file)
        with taken_for_damage(f"{file}: does not describe a run; train anew with this version", Exception):
            self.settings = known_settings(self.config["settings"], file)
            self.record = dict(self.config["images"])  # what identifies them, as `data.sources.record` gives it
            height, width = int(self.record["height"]), int(self.record["width"])
            self.task = make_task(self.settings, height, width, picture=self.path / OBSERVED)
        self.precision: str = self.config.get("precision", self.settings.precision)  # that it was begun in
        self.summary = read_json(self.path / SUMMARY) if os.path.isfile(self.path / SUMMARY) else None  # if finished
        # Published weights in the place of checkpoints can be evaluated, and cannot go on.
        self.is_passed_on = os.path.isfile(self.path / WEIGHTS) and not os.path.lexists(self.path / BEST)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the whole lines of `metrics.jsonl`; the last one may be half written."""
        lines = checkpoint.read(self.path / METRICS).split(b"\n")[:-1]
        with taken_for_damage(f"{self.path / METRICS}: is damaged", ValueError, TypeError):
            return [dict(json.loads(line)) for line in lines]

    def last(self) -> dict[str, Any]:
        """Return the checkpoint to go on from, {} before the first one, unless going on from it would lose something.

        `best.pt` may be missing where the last weights are the best, and an epoch may be logged that is not saved yet.
        """
        path, log = self.path / LAST, self.path / METRICS
        last = checkpoint.load(path) if os.path.lexists(path) else {}
        if not last and any(os.path.lexists(self.path / name) for name in (BEST, SUMMARY, WEIGHTS)):
            raise DataError(f"{path}: is missing, and the run is past its first epoch")
        progress, size = Progress(**last.get("progress", {})), last["log"][METRICS] if last else 0
        logged = checkpoint.read(log) if last or os.path.lexists(log) else b""
        if len(logged) < size or logged[size:].count(b"\n") > 1:
            raise DataError(f"{log}: has other epochs than {LAST}")
        if progress.best_epoch not in (0, progress.epoch):
            best = checkpoint.load(self.path / BEST)
            if (best.get("phase"), best.get("epoch")) != (last["phase"], progress.best_epoch):
                raise DataError(f"{self.path / BEST}: is of another epoch than the best one of {LAST}")
        return last


def find_run(run: str | Path, runs: str | Path) -> Path:
    """Return the folder of a run: of this path, or else below the folder of runs; `reference/NAME` from anywhere.

    Where there is none, a plain name is meant below the folder of runs, and a path as it is.
    """
    path, below = Path(run), Path(runs) / run
    places = [path, below, *(place / path for place in COME_WITH if path.parts[:1] == (REFERENCE,))]
    return next(filter(os.path.isdir, places), below if len(path.parts) <= 1 else path)


def quoted(path: Path) -> str:
    """Return a path as it is to be pasted into a shell."""
    return shlex.quote(str(path))


def known_settings(values: Any, file: Path) -> Settings:
    """Return the settings that a file holds, as `Settings.to_dict` gives them. Raises DataError."""
    try:
        settings = Settings.from_dict(values)
        for name, table in CHOICES.items():
            settings.chosen(name, table)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    return settings


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise UsageError if there is something at `path` that a new run must not replace; hidden files count as none."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.glob("[!.]*"))):
        return
    try:
        read_json(path / CONFIG)["settings"]
    except (DataError, KeyError, TypeError):
        raise UsageError(f"{path} is no run folder and is left as it is; choose another --name") from None
    if not overwrite:
        raise UsageError(f"{path} exists already: --resume {quoted(path)} goes on with it, --overwrite starts it anew")


def hold(folder: Path) -> AbstractContextManager[Any]:
    """Lock a folder until the returned context or the process ends; a line says so if the file system has no locks.

    Raises UsageError if another process holds the folder, DiskError if it is not writable.
    """
    with telling_of_disk(f"{folder}: cannot be written to"):
        open(folder / ".lock", "a").close()
    hard: dict[str, Any] = {} if sys.platform == "win32" else {"fallback_to_soft": False}
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False, preserve_lock_file=True, **hard)
    try:
        return lock.acquire()
    except Timeout:
        raise UsageError(f"{folder} is held by another training; wait for it, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        complain(f"{folder} cannot be locked here ({first_line(error)}): see that no other training uses it")
        return nullcontext()


def create(path: Path, files: Mapping[str, Callable[[Path], None]], overwrite: bool) -> ExitStack:
    """Make a run folder, or with `overwrite` begin the one that is there anew, and hold it as `hold` does.

    Nothing of an old run is removed before the new files are on the disk beside it; what is not a run's stays. files:
    what writes the first ones, by name, `config.json` among them. Raises UsageError, DiskError.
    """
    with telling_of_disk(f"{path}: cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(hold(path))
        refuse_existing(path, overwrite)
        staged = {name: path / f".{name}.new.tmp" for name in reversed(FILES) if name in files}  # `config.json` first
        for name, file in staged.items():
            files[name](file)
        with telling_of_disk(f"{path}: cannot be written to"):
            for file in [*path.glob(EVENTS + "*"), *(path / name for name in FILES if name != CONFIG)]:
                file.unlink(missing_ok=True)
            for name, file in staged.items():
                os.replace(file, path / name)
        return held.pop_all()
