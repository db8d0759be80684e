"""How far a run has come, as its folder says, and whether it can go on without losing anything that is in it."""

import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from cvae.console import called
from cvae.data.masks import is_picture
from cvae.errors import DataError, taken_for_damage
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds
from cvae.run.folder import (
    BEST,
    EVENTS,
    LAST,
    METRICS,
    OBSERVED,
    SUMMARY,
    is_run,
    quoted,
    read_json,
    read_metrics,
    read_settings,
    read_split,
)
from cvae.run.load import load
from cvae.settings import flag


@dataclass
class Progress:
    """How far a phase has come; `best_loss` is the lowest validation loss, minus the objective, in nats per image."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0

    def is_over(self, epochs: int, patience: int, unbent: int = 0) -> bool:
        """Return whether the phase has had its epochs, or `patience` of them without improvement.

        unbent: The last epochs without bent images, which are worth the most: patience begins anew with them.
        """
        begin = max(0, epochs - unbent) if unbent else 0
        return self.epoch >= epochs or self.epoch - max(self.best_epoch, begin) >= patience


class State(NamedTuple):
    """The state of a run: its last checkpoint, {} if there is none yet, and what is to be said of the others.

    is_complete: whether it was finished at that checkpoint, and has all that a finished run has.
    """

    last: dict[str, Any]
    is_complete: bool
    remarks: list[str]


@contextmanager
def advice(folder: Path) -> Iterator[None]:
    """Adds to a DataError within it what can still be done with the run."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}{_what_can_be_done(folder)}") from None


@contextmanager
def fitting(folder: Path, name: str) -> Iterator[None]:
    """Raises DataError, naming the file, for what a model or an optimizer says of a state that is not its own."""
    problem = f"{folder / name}: does not fit the run's settings"
    with advice(folder), taken_for_damage(problem, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        yield


def _what_can_be_done(folder: Path) -> str:
    """Commands that do what they say when they are pasted, as far as the flags of the run are known."""
    run, ways = quoted(folder), []
    with suppress(DataError):
        load(folder)
        if os.path.isfile(folder / SUMMARY):
            ways.append(f"evaluate it, {called('eval.py')} --runs {run}")
    flags = " and the flags that it was begun with"
    with suppress(DataError):
        flags = _flags(folder)
    for name in (BEST, LAST):
        with suppress(DataError):
            checkpoint.load(folder / name)
            ways.append(f"begin anew from its weights, {called('train.py')} --init {run} --name NEW{flags}")
            break
    if not ways and is_run(folder):
        place = Path(os.path.abspath(folder))
        where = f"--runs {quoted(place.parent)} --name {quoted(Path(place.name))}"
        ways = [f"begin it anew, {called('train.py')} {where} --overwrite{flags}"]
    return f". The run cannot go on and is left as it is. What can be done: {'; or '.join(ways)}" if ways else ""


def _flags(folder: Path) -> str:
    """The flags that a run was begun with; the device is not among them. Raises DataError if there is no saying."""
    s = read_settings(folder)
    if is_picture(s) and not os.path.isfile(str(s.observed)):
        read_split(folder)
        s = replace(s, observed=os.path.abspath(folder / OBSERVED))
    words = []
    for each in fields(s):
        value = getattr(s, each.name)
        if value != each.default and each.name != "device":
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [flag(each.name), *map(str, values)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def look_at(folder: Path) -> State:
    """The state of a run; nothing is changed.

    What can be made anew or is not needed may be missing: the best weights if the last ones are the best, events, the
    summary. Raises DataError, with advice, if the rest is not all there or is not of one and the same moment.
    """
    with advice(folder):
        if not os.path.lexists(folder / LAST):
            _refuse_unless_new(folder)
            return State({}, False, [])
        last = checkpoint.load(folder / LAST)
        if not _is_checkpoint(last):
            raise DataError(f"{folder / LAST}: is no checkpoint of a training")
        progress = Progress(**last["progress"])
        _compare_metrics(folder, last, progress)
        has_best = _compare_best(folder, last, progress)
        is_finished = _compare_summary(folder, last["phase"], progress)
    short = [name for name, size in last["log"].items() if name != METRICS and not _has_size(folder / name, size)]
    remarks = []
    if short:
        what = "an event file is" if len(short) == 1 else f"{len(short)} event files are"
        remarks.append(f"{folder}: {what} missing or cut off; TensorBoard does not show those epochs")
    if is_finished and not has_best:
        remarks.append(f"{folder / BEST}: is missing or damaged, and is made anew from {LAST}")
    return State(last, is_finished and has_best, remarks)


def _refuse_unless_new(folder: Path) -> None:
    """Without a checkpoint, a run can only begin: if it has had no epoch, or was in the middle of its first one."""
    for name in (BEST, SUMMARY):
        if os.path.lexists(folder / name):
            raise DataError(f"{folder / LAST}: is missing, and {name} is there")
    metrics = folder / METRICS
    if os.path.lexists(metrics) and len(epochs := read_metrics(metrics)) > 1:
        raise DataError(f"{folder / LAST}: is missing, and the run has had {len(epochs)} epochs")
    if not os.path.lexists(metrics) and any(folder.glob(EVENTS + "*")):
        raise DataError(f"{folder / LAST}: is missing, and so is {METRICS}; there are events of a training")


def _compare_metrics(folder: Path, last: dict[str, Any], progress: Progress) -> None:
    """The metrics up to the checkpoint are those of all epochs up to it, and there is at most one epoch more."""
    path, size = folder / METRICS, last["log"].get(METRICS, 0)
    records = read_metrics(path, size)
    epochs = [(record.get("phase"), record.get("epoch")) for record in records]
    before = [epoch for epoch in epochs if epoch[0] == "baseline"] if last["phase"] == "cvae" else []
    wanted = [("baseline", n + 1) for n in range(len(before))]
    wanted += [(last["phase"], n + 1) for n in range(progress.epoch)]
    if epochs != wanted:
        raise DataError(f"{path}: is not that of a training whose {last['phase']} has had {progress.epoch} epochs")
    if progress.best_epoch:
        best = records[len(before) + progress.best_epoch - 1]
        if -progress.best_loss not in [value for name, value in best.items() if name.startswith("validation_")]:
            raise DataError(f"{path}: has another loss in epoch {progress.best_epoch} than {LAST}")
    with open(path, "rb") as file:
        file.seek(size)
        later = file.read().count(b"\n")
    if later > 1:
        raise DataError(f"{path}: has {later} epochs more than {LAST}, which is of an earlier time")


def _compare_best(folder: Path, last: dict[str, Any], progress: Progress) -> bool:
    """Whether the best weights so far are there; they have to be unless the last ones are the best, or none are."""
    path, is_needed = folder / BEST, 0 < progress.best_epoch < progress.epoch
    try:
        best = checkpoint.load(path)
        if best.get("phase") != last["phase"] or kinds(best.get("model")) != kinds(last["average"]):
            raise DataError(f"{path}: is not of the same model as {LAST}")
        if (best.get("epoch", progress.best_epoch), best.get("loss", progress.best_loss)) != (
            progress.best_epoch, progress.best_loss
        ):  # fmt: skip
            raise DataError(f"{path}: is of another epoch than the best one of {LAST}")
    except DataError:
        if is_needed:
            raise
        return False
    return True


def _compare_summary(folder: Path, phase: str, progress: Progress) -> bool:
    """Whether there is a summary of this very moment; one of a later moment must not be there."""
    try:
        summary = read_json(folder / SUMMARY)
        epoch = int(summary["epoch"])
    except (DataError, KeyError, TypeError, ValueError, OverflowError):
        return False
    if phase != "cvae" or epoch > progress.epoch:
        raise DataError(f"{folder / SUMMARY}: is of {epoch} epochs, and {LAST} of an earlier time")
    return epoch == progress.epoch


def _has_size(path: Path, size: int) -> bool:
    """Whether there is a file of at least so many bytes."""
    return os.path.isfile(path) and path.stat().st_size >= size


def _is_checkpoint(last: dict[str, Any]) -> bool:
    """Whether a `last.pt` has the parts that it should have, as far as they are not tensors."""
    if not {"model", "average", "optimizer"} <= last.keys() or last.get("phase") not in ("baseline", "cvae"):
        return False
    progress, log = last.get("progress"), last.get("log")
    types = {each.name: type(each.default) for each in fields(Progress)}
    return (
        isinstance(progress, dict)
        and {name: type(value) for name, value in progress.items()} == types
        and 0 <= progress["best_epoch"] <= progress["epoch"]
        and progress["epoch"] > 0
        and isinstance(log, dict)
        and all(type(name) is str and type(size) is int and size >= 0 for name, size in log.items())
    )
