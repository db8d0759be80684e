"""One training as it runs: what it says, what it goes on from, and what it leaves after each epoch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cvae.console import Bar, called, complain, program, say
from cvae.context import Context, Interruption
from cvae.data.masks import is_picture, make_task, mask_png
from cvae.data.sources import difference
from cvae.data.tasks import FixedMask
from cvae.errors import DataError, Interrupted, NonFiniteError, UsageError, first_line, taken_for_damage
from cvae.model.cvae import CVAE
from cvae.run import checkpoint, history
from cvae.run.claim import create_run, hold, settle
from cvae.run.folder import BEST, CONFIG, FILES, INIT, LAST, OBSERVED, SUMMARY, Progress, RunFolder, quoted
from cvae.run.load import start_from
from cvae.run.log import RunLog
from cvae.settings import Settings


@dataclass
class Run:
    """A run that is trained. All processes call its methods; the main one alone reads, writes and prints."""

    folder: Path
    settings: Settings
    context: Context
    interruption: Interruption
    quiet: bool = False
    init: Path | None = None  # the run whose weights it begins with
    words: Sequence[str] = ()  # of the command line
    _open: ExitStack = field(default_factory=ExitStack)  # the lock and the log
    _log: RunLog | None = None
    _config: dict[str, Any] | None = None  # what `config.json` is to say from the moment at which the run goes on

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.context.processes.is_main and not self.quiet:
            say(line)

    def warn(self, line: str) -> None:
        """Print a warning, once for all processes."""
        if self.context.processes.is_main:
            complain(f"{program('train.py')}: {line}")

    def progress_bar(self, where: str, total: int) -> Bar:
        """Return a bar over so many images, once for all processes."""
        return Bar(where, total, "img", self.context.processes.is_main and not self.quiet)

    def leave_if_interrupted(self) -> None:
        """Raise Interrupted, in all processes at once, if a signal came to one of them."""
        if number := self.context.processes.maximum(self.interruption.signal_number):
            raise Interrupted(f"interrupted; to go on: {called('train.py')} --resume {quoted(self.folder)}", number)

    def task(self, resume: bool, height: int, width: int) -> FixedMask:
        """Return the task of images of this size, or of the run that is resumed. Raises DataError."""

        def make() -> FixedMask:  # other machines may see neither the folder nor the picture of a mask
            return RunFolder(self.folder).task if resume else make_task(self.settings, height, width)

        return self.context.processes.on_main(make)

    def open(self, model: CVAE, images: dict[str, Any], resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Hold the folder, made now unless it is resumed, and give the new model the weights that it goes on from.

        A folder that is resumed is not written into before all that is needed was read, here and in `restore`.
        images: what identifies them, as `data.sources.record` gives it. Raises UsageError, DataError, DiskError.

        Returns:
            The checkpoint to go on from, {} at the beginning; None if nothing is left to do.
        """
        processes = self.context.processes
        first = processes.on_main(lambda: images)
        alike = "the first process has {}: each machine needs the same"
        processes.on_all(partial(_refuse_others, first, images, alike))
        begin = partial(self._go_on, images) if resume else partial(self._begin, model, images, overwrite)
        last, weights = processes.on_main(begin)
        if weights is not None:
            with left_as_it_is(self.folder, LAST if last else INIT):
                model.load_state_dict(weights)
        if last == {}:
            processes.on_main(partial(self._begin_writing, last))
        return last

    def _begin(self, model: CVAE, images: dict[str, Any], overwrite: bool) -> tuple[dict[str, Any], Any]:
        """Make the folder; return no checkpoint, and the weights that the run begins with, if they are another's."""
        config = {"settings": self.settings.to_dict(), "images": images}
        config |= history.describe_machine(self.context, self.words)
        files, weights = {}, None
        if self.init is not None:
            line, config["init"] = start_from(self.init, model)
            self.say(line)
            weights = model.state_dict()
            files[INIT] = checkpoint.packed({"model": weights})
        if is_picture(self.settings) and isinstance(model.task, FixedMask):
            files[OBSERVED] = mask_png(model.task.observed)
        files[CONFIG] = checkpoint.as_json(config)
        self._open.enter_context(create_run(self.folder, files, overwrite, self.warn))
        return {}, weights

    def _go_on(self, images: dict[str, Any]) -> tuple[dict[str, Any] | None, Any]:
        """Return the checkpoint and the weights that a run goes on from; None if it is finished."""
        self._open.enter_context(hold(self.folder, self.warn))
        settle(self.folder)
        run, s = RunFolder(self.folder), self.settings
        _refuse_others(run.record, images, f"{self.folder}: was begun on {{}}; --data says where its own are")
        with left_as_it_is(self.folder):
            last = run.last()
            is_cvae = last.get("phase") == "cvae"
            begun = checkpoint.load(self.folder / INIT) if "init" in run.config and not is_cvae else {}
        machine = history.describe_machine(self.context, self.words)
        self._config = history.resumed(run.config, images, s, last, machine)
        if is_cvae:
            progress = Progress(**last["progress"])
            if progress.epoch > s.epochs:
                raise UsageError(f"{self.folder} has had {progress.epoch} epochs; --epochs cannot be less")
            is_whole = (run.summary or {}).get("epoch") == progress.epoch and (self.folder / BEST).is_file()
            if is_whole and progress.is_over(s.epochs, s.patience, s.unbent_epochs):
                if self._config["resumed"][-1]["changed"]:
                    checkpoint.write_json(self.folder / CONFIG, self._config)
                return None, None
        if found := history.differences(run.config, machine):
            self.say(f"{self.folder}: from here on not bit for bit as it began: {', '.join(found)}")
        return last, (last if is_cvae else begun).get("model")

    def _begin_writing(self, last: dict[str, Any]) -> None:
        """Begin to write, since all that can be wrong was looked at."""
        if self._config is not None:
            checkpoint.write_json(self.folder / CONFIG, self._config)
        with checkpoint.telling_of_disk(f"{self.folder}: cannot be written to"):
            for path in [self.folder / SUMMARY, *self.folder.glob(".*.tmp")]:
                if path.name.removeprefix(".").startswith(FILES):  # a killed process may have left half a file of ours
                    path.unlink(missing_ok=True)
        if last:
            self._save_best(last)  # the process may have ended between the two files
        self._log = RunLog(self.folder, last.get("log", {}))
        self._open.callback(self._log.close)
        if not last:
            self._log.describe(self.settings.to_dict())

    def restore(self, last: dict[str, Any], parts: Mapping[str, Any]) -> Progress:
        """Put a checkpoint's states into models and optimizer, by name. Raises DataError if they do not fit."""
        with left_as_it_is(self.folder, LAST):
            for name, part in parts.items():
                part.load_state_dict(last[name])
        self.context.processes.on_main(partial(self._begin_writing, last))
        return Progress(**last["progress"])

    def save_epoch(
        self, phase: str, progress: Progress, parts: Mapping[str, Any], record: dict[str, Any],
        picture: Callable[[Any], Tensor],
    ) -> None:  # fmt: skip
        """Write an epoch: the log first, so that `last.pt` can say how much of it there is, and `best.pt` after that.

        Whatever moment the process is killed in, `last.pt` is whole, what the log has beyond it can be dropped, and a
        `best.pt` that it is ahead of can be made from it. Arguments as `restore` and `Phase` have them.
        """

        def save() -> None:
            assert self._log is not None
            self._log.epoch(phase, record, picture(parts["average"]))
            states = {name: part.state_dict() for name, part in parts.items()}
            last = {"phase": phase, "progress": asdict(progress), **states, "log": self._log.position()}
            checkpoint.save(self.folder / LAST, last)
            self._save_best(last)

        self.context.processes.on_main(save)

    def _save_best(self, last: dict[str, Any]) -> None:
        """Write `best.pt` if the epoch that this checkpoint holds is the best one."""
        progress = last["progress"]
        if progress["epoch"] == progress["best_epoch"]:
            best = {"phase": last["phase"], "epoch": progress["epoch"], "loss": progress["best_loss"]}
            checkpoint.save(self.folder / BEST, {**best, "model": last["average"]})

    def load_best(self, phase: str, progress: Progress, model: nn.Module) -> None:
        """Put the best weights of the phase trained last into a model. Raises NonFiniteError if no epoch had any."""
        if progress.best_epoch == 0:
            problem = f"the validation loss was NaN or infinite after each of {progress.epoch} epochs"
            raise NonFiniteError(f"{phase}: {problem}. Try a lower --learning-rate, or look at the data")
        model.load_state_dict(self.context.processes.on_main(lambda: checkpoint.load(self.folder / BEST)["model"]))

    def finish(self, progress: Progress, draw: Callable[[Path], Sequence[str]]) -> None:
        """Have the run's figures drawn, and write `summary.json`, by which `eval.py` knows a finished run.

        draw: draws into a folder, and returns a line about each thing that is missing; if it fails, that is told.
        """

        def write() -> None:
            assert self._log is not None
            try:
                for line in draw(self.folder):
                    self.warn(line)
            except Exception as error:
                self.warn(f"{self.folder}: its figures are not all drawn ({first_line(error)})")
            results = {"validation_loss": progress.best_loss, "seconds": progress.seconds}
            self._log.finish(self.settings.to_dict(), results)
            checkpoint.write_json(self.folder / SUMMARY, asdict(progress))

        self.context.processes.on_main(write)


@contextmanager
def left_as_it_is(folder: Path, name: str = "") -> Iterator[None]:
    """Add what can be done to a DataError, which a state that does not fit a model raises too if it has a file name."""
    kinds = (KeyError, TypeError, ValueError, AttributeError, RuntimeError) if name else ()
    try:
        with taken_for_damage(f"{folder / name}: does not fit the run's settings, or is of another version", *kinds):
            yield
    except DataError as error:
        ways = "--init begins a new one with its weights, --overwrite begins it anew"
        raise DataError(f"{error}. The run cannot go on and is left as it is: {ways}") from None


def _refuse_others(recorded: dict[str, Any], images: dict[str, Any], words: str) -> None:
    """Raise DataError unless two records are of the same images."""
    if differs := difference(recorded, images):
        raise DataError(words.format(differs))
