"""One training as it runs: what it runs on, where it writes, and what it leaves after each epoch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from torch import Tensor, nn

from cvae.console import Bar, called, complain, program, say
from cvae.context import Context, Interruption
from cvae.data.mask_pictures import mask_png
from cvae.data.masks import Split, is_picture, make_split
from cvae.data.sources import difference
from cvae.errors import DataError, Interrupted, NonFiniteError, UsageError, first_line
from cvae.model.cvae import CVAE
from cvae.run import checkpoint
from cvae.run.checkpoint import kinds
from cvae.run.folder import (
    BEST,
    CONFIG,
    INIT,
    LAST,
    OBSERVED,
    SUMMARY,
    as_json,
    create_run,
    hold,
    quoted,
    read_json,
    read_split,
    write_json,
)
from cvae.run.history import changes, last_machine, resumed
from cvae.run.images import recognised
from cvae.run.load import start_from
from cvae.run.log import RunLog
from cvae.run.machine import describe_machine, differences
from cvae.run.state import Progress, State, advice, fitting, look_at
from cvae.settings import Settings


@dataclass
class Run:
    """A run: its folder and settings, and what it runs on."""

    folder: Path
    settings: Settings
    context: Context
    interruption: Interruption
    quiet: bool = False
    init: Path | None = None  # the run whose weights it begins with
    words: Sequence[str] = ()  # of the command line
    log: RunLog | None = None  # open in the main process
    lock: BaseFileLock | None = None
    start: dict[str, Tensor] | None = None  # the weights that it begins with, if they are another run's
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
        if self.context.processes.is_main and not self.quiet:
            say(line)

    def warn(self, line: str) -> None:
        """Print a warning, once for all processes."""
        if self.context.processes.is_main:
            complain(f"{program('train.py')}: {line}")

    def progress_bar(self, where: str, total: int) -> Bar:
        """A bar over so many images, once for all processes."""
        return Bar(where, total, "img", self.context.processes.is_main and not self.quiet)

    def begin_with(self, other: Path, model: CVAE) -> None:
        """Put the best weights of another run into a model, before `claim` makes the folder. Raises DataError."""

        def begin() -> tuple[str, dict[str, Any], dict[str, Tensor]]:
            return *start_from(other, model), model.state_dict()

        line, self.config["init"], weights = self.context.processes.on_main(begin)
        model.load_state_dict(weights)
        self.start = weights
        self.say(line)

    def load_start(self, model: nn.Module) -> None:
        """Put the weights into a model that the run began with, where they were another run's. Raises DataError."""
        start = self.context.processes.on_main(lambda: self.start)
        if start is not None:
            with fitting(self.folder, INIT):
                model.load_state_dict(start)

    def split(self, resume: bool, height: int, width: int) -> Split:
        """The split of images of this size, or that of the run which is resumed. Raises DataError."""

        def read() -> Split:  # other machines may see neither the folder nor the picture of a mask
            if not resume:
                return make_split(self.settings, height, width)
            with advice(self.folder):
                return read_split(self.folder)

        return self.context.processes.on_main(read)

    def claim(self, split: Split, images: dict[str, Any], resume: bool, overwrite: bool) -> State:
        """Hold the folder, made now unless it is resumed; returns the state to go on from.

        split: of the images. images: what identifies them, as `data.sources.record` gives it.
        Where a run is resumed, nothing is written before all that is needed to go on has been looked at, here and in
        `restore`. Raises UsageError if the folder is taken, DataError if it cannot go on without loss, DiskError.
        """
        first = self.context.processes.on_main(lambda: images)

        def compare() -> None:
            if differs := difference(first, images):
                raise DataError(f"the first process has {differs}: each machine needs the same")

        def claim() -> State:
            if resume:
                return self._open(images)
            self._create(split, images, overwrite)
            return State({}, False, [])

        self.context.processes.on_all(compare)
        here = self.context.processes.on_main(claim)
        if here.last.get("phase") == "cvae" and (epoch := here.last["progress"]["epoch"]) > self.settings.epochs:
            raise UsageError(f"{self.folder} has had {epoch} epochs; --epochs cannot be less")
        if self.is_finished(here):
            self.context.processes.on_main(lambda: self._record_changes(here.last))
        elif not here.last:
            self.context.processes.on_main(lambda: self._begin_writing({}))
        return here

    def _create(self, split: Split, images: dict[str, Any], overwrite: bool) -> None:
        if overwrite and os.path.islink(self.folder):
            self.say(f"{self.folder} is a link: the run is replaced to which it leads, {os.path.realpath(self.folder)}")
        self.config = {"settings": self.settings.to_dict(), "images": images, **self._machine, **self.config}
        files = {CONFIG: as_json(self.config)}
        if is_picture(self.settings):
            files[OBSERVED] = mask_png(split.observed)
        if (start := self.start) is not None:
            files[INIT] = checkpoint.packed({"model": start})
        self.lock = create_run(self.folder, files, overwrite, self.warn)

    def _open(self, images: dict[str, Any]) -> State:
        self.lock = hold(self.folder, self.warn)
        state, (images, remarks) = look_at(self.folder), recognised(self.folder, images, self.settings.data)
        state.remarks.extend(remarks)
        self.config = read_json(self.folder / CONFIG)
        if found := differences(last_machine(self.config), self._machine):
            state.remarks.append(f"{self.folder}: from here on not bit for bit as it began: {', '.join(found)}")
        if "init" in self.config and state.last.get("phase") != "cvae":
            with advice(self.folder):
                self.start = checkpoint.load(self.folder / INIT).get("model")
                if kinds(self.start) is None:
                    raise DataError(f"{self.folder / INIT}: does not hold the weights that the run began with")
        self.config["images"] = images
        self.remarks, self.is_resumed = state.remarks, True
        return state

    @cached_property  # it asks git
    def _machine(self) -> dict[str, Any]:
        return describe_machine(self.context.device, self.context.precision, self.context.processes.count, self.words)

    def _record_changes(self, last: dict[str, Any]) -> None:
        """Have the settings in `config.json` that are others than before, if any are."""
        if changes(self.config, self.settings):
            self._record_resumption(last)

    def _record_resumption(self, last: dict[str, Any]) -> None:
        self.config = resumed(self.config, self.settings, last, self._machine)
        write_json(self.folder / CONFIG, self.config)

    def is_finished(self, state: State) -> bool:
        """Whether a run in this state has nothing left to do."""
        return state.is_complete and Progress(**state.last["progress"]).is_over(
            self.settings.epochs, self.settings.patience, self.settings.unbent_epochs
        )

    def restore(self, last: dict[str, Any], parts: Mapping[str, Any]) -> Progress:
        """Put the models and the optimizer, by their names in the checkpoint, where it has them.

        Raises DataError if it does not fit them.
        """
        with fitting(self.folder, LAST):
            for name, part in parts.items():
                part.load_state_dict(last[name])
        self.context.processes.on_main(lambda: self._begin_writing(last))
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
        with fitting(self.folder, LAST):
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
        best = self.context.processes.on_main(
            lambda: checkpoint.load(self.folder / BEST)
        )  # other machines may not see it
        with fitting(self.folder, BEST):
            model.load_state_dict(best["model"])

    def save_epoch(
        self,
        phase: str,
        progress: Progress,
        parts: Mapping[str, Any],
        record: dict[str, Any],
        picture: Callable[[Any], Tensor],
    ) -> None:
        """Write an epoch: the log first, so that `last.pt` can say how much of it there is, and `best.pt` after that.

        Whatever moment the process is killed in, `last.pt` is whole, what the log has beyond it can be dropped, and a
        `best.pt` that it is ahead of can be made from it. parts, picture: as `restore` and `Phase` have them.
        """
        assert self.log is not None
        (self.folder / SUMMARY).unlink(missing_ok=True)  # that of a finished run which goes on with more epochs
        self.log.epoch(phase, record, picture(parts["average"]))
        states = {name: part.state_dict() for name, part in parts.items()}
        content = {"phase": phase, "progress": asdict(progress), **states, "log": self.log.position()}
        checkpoint.save(self.folder / LAST, content)
        self.save_best(content)

    def save_best(self, last: dict[str, Any]) -> None:
        """Write `best.pt` if the epoch that this checkpoint holds is the best one."""
        progress = last["progress"]
        if progress["epoch"] == progress["best_epoch"]:
            content = {"phase": last["phase"], "epoch": progress["epoch"], "loss": progress["best_loss"]}
            checkpoint.save(self.folder / BEST, {**content, "model": last["average"]})

    def finish(self, progress: Progress, draw: Callable[[Path], Sequence[str]]) -> None:
        """Have the run's figures drawn, and write `summary.json`, by which `eval.py` knows a finished run.

        draw: what draws into a folder, and returns a line about each thing that is missing. Whatever it raises is no
        more than a warning.
        """
        assert self.log is not None
        try:
            missing = draw(self.folder)
        except Exception as error:
            missing = [f"{self.folder}: its figures are not all drawn ({first_line(error)})"]
        for line in missing:
            self.warn(line)
        self.log.finish(self.settings.to_dict(), {"validation_loss": progress.best_loss, "seconds": progress.seconds})
        write_json(self.folder / SUMMARY, asdict(progress))

    def leave_if_interrupted(self) -> None:
        """Raises Interrupted, in all processes at once, if a signal came to one of them."""
        if number := self.context.processes.maximum(self.interruption.signal_number):
            raise Interrupted(f"interrupted; to go on: {called('train.py')} --resume {quoted(self.folder)}", number)
