"""One training as it runs: what it runs on, where it writes, and what it leaves after each epoch."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import BaseFileLock
from torch import Tensor, nn
from tqdm import tqdm

from cvae.data.masks import Split
from cvae.data.sources import difference
from cvae.distributed import Processes
from cvae.errors import DataError, Interrupted, NonFiniteError, UsageError
from cvae.model.cvae import CVAE
from cvae.run import checkpoint
from cvae.run.folder import BEST, CONFIG, LAST, SUMMARY, create_run, quoted, read_json, read_record, write_json
from cvae.run.load import start_from
from cvae.run.lock import hold
from cvae.run.log import RunLog
from cvae.run.machine import describe_machine, differences
from cvae.run.state import Progress, State, advice, look_at
from cvae.runtime import Interruption
from cvae.settings import Settings
from cvae.terminal import complain, say
from cvae.training.optimizer import GuardedAdam


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
    lock: BaseFileLock | None = None
    config: dict[str, Any] = field(default_factory=dict)  # what `config.json` says, or is to say before it begins
    remarks: list[str] = field(default_factory=list)  # what there is to say if it goes on
    is_resumed: bool = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the log, and let go of the folder."""
        try:
            if self.log is not None:
                self.log.close()
        finally:
            if self.lock is not None:
                self.lock.release()

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.processes.is_main and not self.quiet:
            say(line)

    def warn(self, line: str) -> None:
        """Print a warning, once for all processes."""
        if self.processes.is_main:
            complain(f"train.py: {line}")

    def progress_bar(self, where: str, total: int) -> "tqdm[NoReturn]":
        """A bar over the images of an epoch; on a terminal only."""
        hidden = self.quiet or not self.processes.is_main or not sys.stderr.isatty()
        return tqdm(desc=where, total=total, unit="img", unit_scale=True, leave=False, disable=hidden)

    def begin_with(self, other: Path, model: CVAE) -> None:
        """Put the best weights of another run into a model, before `claim` makes the folder. Raises DataError."""
        line, self.config["init"] = start_from(other, model)
        self.say(line)

    def claim(self, split: Split, images: dict[str, Any], resume: bool, overwrite: bool) -> State:
        """Hold the folder, made now unless it is resumed; returns the state to go on from.

        split: of the images. images: what identifies them, as `data.sources.record` gives it.
        Where a run is resumed, nothing is written before all that is needed to go on has been looked at, here and in
        `restore`. Raises UsageError if the folder is taken, DataError if it cannot go on without loss, DiskError.
        """
        here = State({}, False, [])

        def claim() -> bool:
            nonlocal here
            if resume:
                here = self._open(images)
            else:
                self._create(split, images, overwrite)
            return here.is_complete

        is_complete = self.processes.on_main(claim)
        if resume and not self.processes.is_main and (self.folder / LAST).exists():
            here = State(checkpoint.load(self.folder / LAST), is_complete, [])
        if here.last.get("phase") == "cvae" and (epoch := here.last["progress"]["epoch"]) > self.settings.epochs:
            raise UsageError(f"{self.folder} has had {epoch} epochs; --epochs cannot be less")
        if self.is_finished(here):
            self.processes.on_main(self._record_changes)
        elif not here.last:
            self.processes.on_main(lambda: self._begin_writing({}))
        return here

    def _create(self, split: Split, images: dict[str, Any], overwrite: bool) -> None:
        if overwrite and os.path.islink(self.folder):
            self.say(f"{self.folder} is a link: the run is replaced to which it leads, {os.path.realpath(self.folder)}")
        self.config = {"settings": self.settings.to_dict(), "images": images, **self._machine(), **self.config}
        self.lock = create_run(self.folder, self.config, split, overwrite, self.warn)

    def _open(self, images: dict[str, Any]) -> State:
        self.lock = hold(self.folder, self.warn)
        state, recorded = look_at(self.folder), read_record(self.folder)
        if differs := difference(recorded, images):
            raise DataError(f"{self.folder}: was begun on {differs}; --data says where those are that it was begun on")
        self.config = read_json(self.folder / CONFIG)
        unknown = [part for part in images if recorded.get(part) is None]
        if any(part not in recorded for part in unknown):
            state.remarks.append(f"{self.folder}: does not say on which images it was begun; these are taken for them")
        before = self._resumptions()[-1] if self._resumptions() else self.config
        if found := differences(before, self._machine()):
            state.remarks.append(f"{self.folder}: from here on not bit for bit as it began: {', '.join(found)}")
        self.config["images"] = {**recorded, **{part: images[part] for part in unknown}}
        self.remarks, self.is_resumed = state.remarks, True
        return state

    def _machine(self) -> dict[str, Any]:
        return describe_machine(self.device, self.precision, self.processes.count)

    def _resumptions(self) -> list[dict[str, Any]]:
        found = self.config.get("resumed")
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    def _record_changes(self) -> None:
        """Write the settings that are others than before into `config.json`, and when they became so, if any are."""
        if self._changes():
            self._record_resumption({})

    def _changes(self) -> dict[str, list[Any]]:
        before = Settings.from_dict(self.config["settings"]).to_dict()
        return {name: [before[name], value] for name, value in self.settings.to_dict().items() if value != before[name]}

    def _record_resumption(self, last: dict[str, Any]) -> None:
        """Add to `config.json` that the run goes on now: how it was begun stays."""
        progress = last.get("progress", {"epoch": 0})
        where = {"phase": last.get("phase", "baseline"), "epoch": progress["epoch"], "changed": self._changes()}
        self.config["resumed"] = [*self._resumptions(), {**where, **self._machine()}]
        self.config["settings"] = self.settings.to_dict()
        write_json(self.folder / CONFIG, self.config)

    def is_finished(self, state: State) -> bool:
        """Whether a run in this state has nothing left to do."""
        return state.is_complete and Progress(**state.last["progress"]).is_over(
            self.settings.epochs, self.settings.patience
        )

    def restore(self, last: dict[str, Any], model: nn.Module, average: nn.Module, optimizer: GuardedAdam) -> Progress:
        """Put model, average and optimizer where the checkpoint has them. Raises DataError if it does not fit them."""
        with self._fitting(LAST):
            model.load_state_dict(last["model"])
            average.load_state_dict(last["average"])
            optimizer.load_state_dict(last["optimizer"])
        optimizer.weights.refresh()
        self.processes.on_main(lambda: self._begin_writing(last))
        return Progress(**last["progress"])

    def _begin_writing(self, last: dict[str, Any]) -> None:
        """All that can be wrong has been looked at: open the log, taken back to where the checkpoint was written."""
        for remark in self.remarks:
            self.say(remark)
        if self.is_resumed:
            self._record_resumption(last)
        if last:
            self.save_best(last)  # the process may have ended between the two files
        self.log = RunLog(self.folder, last.get("log", {}))
        if not last:
            self.log.describe(self.settings.to_dict())

    def load_last(self, last: dict[str, Any], model: nn.Module) -> None:
        """Put the checkpoint's weights into a model. Raises DataError if they do not fit it."""
        with self._fitting(LAST):
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
        with self._fitting(BEST):
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
        progress = last["progress"]
        if progress["epoch"] == progress["best_epoch"]:
            content = {"phase": last["phase"], "epoch": progress["epoch"], "loss": progress["best_loss"]}
            checkpoint.save(self.folder / BEST, {**content, "model": last["average"]})

    def finish(self, progress: Progress) -> None:
        """Write `summary.json`, by which `eval.py` knows a finished run."""
        assert self.log is not None
        self.log.finish(self.settings.to_dict(), {"validation_loss": progress.best_loss, "seconds": progress.seconds})
        write_json(self.folder / SUMMARY, asdict(progress))

    def leave_if_interrupted(self) -> None:
        """Raises Interrupted, in all processes at once, if a signal came to one of them."""
        if number := self.processes.maximum(self.interruption.signal_number):
            raise Interrupted(f"interrupted; to go on: python train.py --resume {quoted(self.folder)}", number)

    @contextmanager
    def _fitting(self, name: str) -> Iterator[None]:
        """Raises DataError, naming the file, for what a model or an optimizer says of a state that is not its own."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            with advice(self.folder):
                raise DataError(
                    f"{self.folder / name}: does not fit the run's settings ({type(error).__name__})"
                ) from None
