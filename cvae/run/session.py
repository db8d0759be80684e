"""One training as it runs: what it runs on, where it writes, and what it leaves after each epoch."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cvae.data.masks import Split
from cvae.distributed import Processes
from cvae.errors import DataError, Interrupted, NonFiniteError, UsageError
from cvae.run import checkpoint
from cvae.run.folder import (
    BEST,
    LAST,
    SUMMARY,
    create_run,
    describe_machine,
    lock_run,
    read_settings,
    read_size,
    write_config,
    write_json,
)
from cvae.run.log import RunLog
from cvae.runtime import Interruption
from cvae.settings import Settings
from cvae.training.optimizer import GuardedAdam


@dataclass
class Progress:
    """How far a phase has come; `best_loss` is the lowest validation loss, minus the objective, in nats per image."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0

    def is_over(self, epochs: int, patience: int) -> bool:
        """Whether the phase has had its epochs, or has gone so many of them without improvement."""
        return self.epoch >= epochs or self.epoch - self.best_epoch >= patience


@dataclass
class Run:
    """A run: its folder and settings, and what it runs on."""

    folder: Path
    settings: Settings
    device: torch.device
    precision: str
    processes: Processes
    interruption: Interruption
    quiet: bool = False
    init: Path | None = None  # the run whose weights it begins with
    log: RunLog | None = None  # open in the main process
    lock: TextIO | None = None
    images: dict[str, Any] = field(default_factory=dict)  # what identifies them, as `data.sources.record` gives it

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the log, and let go of the folder."""
        try:
            if self.log is not None:
                self.log.close()
        finally:
            if self.lock is not None:
                self.lock.close()

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.processes.is_main and not self.quiet:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # nobody reads any more: go on without
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def warn(self, line: str) -> None:
        """Print a warning, once for all processes."""
        if self.processes.is_main:
            print(f"train.py: {line}", file=sys.stderr, flush=True)

    def progress_bar(self, where: str, total: int) -> "tqdm[NoReturn]":
        """A bar over the images of an epoch; on a terminal only."""
        hidden = self.quiet or not self.processes.is_main or not sys.stderr.isatty()
        return tqdm(desc=where, total=total, unit="img", unit_scale=True, leave=False, disable=hidden)

    def claim(self, split: Split, images: dict[str, Any], resume: bool, overwrite: bool) -> dict[str, Any]:
        """Hold the folder, made now unless it is resumed; returns the checkpoint to go on from, {} for a fresh start.

        split: of the images. Raises UsageError if the folder is taken, DataError if it cannot go on, DiskError.
        """
        self.images = images
        self.processes.on_main(lambda: self._claim(split, resume, overwrite))
        path = self.folder / LAST
        last = checkpoint.load(path) if path.exists() else {}
        if resume and not last and (self.folder / BEST).exists():
            raise DataError(
                f"{path}: is missing, so that the run cannot go on and is left as it is; eval.py can use its best "
                "weights if it was finished, and --overwrite in the place of --resume begins it anew"
            )
        if last and not _is_checkpoint(last):
            raise DataError(f"{path}: is no checkpoint of a training")
        if last.get("phase") == "cvae" and last["progress"]["epoch"] > self.settings.epochs:
            raise UsageError(f"{self.folder} has had {last['progress']['epoch']} epochs; --epochs cannot be less")
        self.processes.on_main(self._record_epochs)
        return last

    def _claim(self, split: Split, resume: bool, overwrite: bool) -> None:
        if resume:
            self.lock = lock_run(self.folder)
            begun = read_size(self.folder)
            if begun != (self.images["height"], self.images["width"]):
                sizes = ["×".join(map(str, size)) for size in (begun, self.images.values())]
                raise DataError(f"{self.folder}: was begun on images of {sizes[0]} pixels; these have {sizes[1]}")
        else:
            self.lock = create_run(self.folder, self.settings, self._about(), overwrite, split)

    def _record_epochs(self) -> None:
        if self.settings != read_settings(self.folder):  # it goes on with other --epochs
            write_config(self.folder, self.settings, self._about())

    def _about(self) -> dict[str, Any]:
        return {"images": self.images, **describe_machine(self.device, self.precision, self.processes.count)}

    def is_finished(self, last: dict[str, Any]) -> bool:
        """Whether the run whose last checkpoint this is has nothing left to do."""
        if not (self.folder / SUMMARY).exists() or last.get("phase") != "cvae":
            return False
        return Progress(**last["progress"]).is_over(self.settings.epochs, self.settings.patience)

    def open_log(self, last: dict[str, Any]) -> None:
        """Open the log, taken back to where the checkpoint was written."""
        self.processes.on_main(lambda: self._open_log(last))

    def _open_log(self, last: dict[str, Any]) -> None:
        self.log = RunLog(self.folder, last.get("log", {}))
        if not last:
            self.log.describe(self.settings.to_dict())

    def restore(self, last: dict[str, Any], model: nn.Module, average: nn.Module, optimizer: GuardedAdam) -> Progress:
        """Put model, average and optimizer where the checkpoint has them. Raises DataError if it does not fit them."""
        with _fitting(self.folder / LAST):
            model.load_state_dict(last["model"])
            average.load_state_dict(last["average"])
            optimizer.load_state_dict(last["optimizer"])
        optimizer.weights.refresh()
        progress = Progress(**last["progress"])
        self.processes.on_main(lambda: self.save_best(last))  # the process may have ended between the two files
        return progress

    def load_last(self, last: dict[str, Any], model: nn.Module) -> None:
        """Put the checkpoint's weights into a model. Raises DataError if they do not fit it."""
        with _fitting(self.folder / LAST):
            model.load_state_dict(last["model"])

    def load_best(self, phase: str, progress: Progress, model: nn.Module) -> None:
        """Put the best weights of the phase trained last into a model.

        Raises NonFiniteError if not one epoch had any, DataError if they cannot be read or do not fit the model.
        """
        if progress.best_epoch == 0:
            raise NonFiniteError(
                f"{phase}: the validation loss was NaN or infinite after each of {progress.epoch} epochs. "
                "Try a lower --learning-rate, or look at the data"
            )
        best = checkpoint.load(self.folder / BEST)
        with _fitting(self.folder / BEST):
            model.load_state_dict(best["model"])

    def save_epoch(
        self,
        phase: str,
        progress: Progress,
        state: dict[str, Any],
        record: dict[str, Any],
        picture: Callable[[], Tensor],
    ) -> None:
        """Write an epoch: the log first, so that `last.pt` can say how much of it there is, and `best.pt` after that.

        Whatever moment the process is killed in, `last.pt` is whole, what the log has beyond it can be dropped, and a
        `best.pt` that it is ahead of can be made from it.
        """
        assert self.log is not None
        (self.folder / SUMMARY).unlink(missing_ok=True)  # that of a finished run which goes on with more epochs
        self.log.epoch(phase, record, picture())
        content = {"phase": phase, "progress": asdict(progress), **state, "log": self.log.position()}
        checkpoint.save(self.folder / LAST, content)
        self.save_best(content)

    def save_best(self, last: dict[str, Any]) -> None:
        """Write `best.pt` if the epoch that this checkpoint holds is the best one."""
        if last["progress"]["epoch"] == last["progress"]["best_epoch"]:
            checkpoint.save(self.folder / BEST, {"phase": last["phase"], "model": last["average"]})

    def finish(self, progress: Progress) -> None:
        """Write `summary.json`, by which `eval.py` knows a finished run."""
        assert self.log is not None
        self.log.finish(self.settings.to_dict(), {"validation_loss": progress.best_loss, "seconds": progress.seconds})
        write_json(self.folder / SUMMARY, asdict(progress))

    def leave_if_interrupted(self) -> None:
        """Raises Interrupted, in all processes at once, if a signal came to one of them."""
        if number := self.processes.maximum(self.interruption.signal_number):
            raise Interrupted(f"interrupted; to go on: python train.py --resume {self.folder}", number)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Raises DataError, naming the file, for what a model or an optimizer says of a state that is not its own."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: does not fit the run's settings ({type(error).__name__})") from None


def _is_checkpoint(last: dict[str, Any]) -> bool:
    """Whether a `last.pt` has the parts that it should have, as far as they are not tensors."""
    if not {"model", "average", "optimizer"} <= last.keys() or last.get("phase") not in ("baseline", "cvae"):
        return False
    progress, log = last.get("progress"), last.get("log")
    types = {each.name: type(each.default) for each in fields(Progress)}
    return (
        isinstance(progress, dict)
        and {name: type(value) for name, value in progress.items()} == types
        and isinstance(log, dict)
        and all(type(name) is str and type(size) is int and size >= 0 for name, size in log.items())
    )
