"""One training as it runs: where, what it goes on from, and what it leaves after each epoch."""

import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from cvae.console import called, complain, say
from cvae.context import Context, Interruption
from cvae.data.masks import is_picture, make_task, mask_png
from cvae.data.sources import TrainImages, refuse_others
from cvae.data.tasks import FixedMask
from cvae.errors import DataError, Interrupted, NonFiniteError, UsageError, first_line, taken_for_damage
from cvae.model.cvae import CVAE
from cvae.model.networks import build
from cvae.run import checkpoint, folder
from cvae.run.folder import BEST, CONFIG, FILES, INIT, LAST, OBSERVED, SUMMARY, Progress, RunFolder, quoted
from cvae.run.load import MISFITS, start_from
from cvae.run.log import RunLog
from cvae.settings import Settings
from cvae.training.phase import Phase


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


@dataclass
class Run(AbstractContextManager["Run"]):
    """A run that is trained. All processes call its methods; the main one alone reads and writes."""

    folder: Path
    settings: Settings
    context: Context
    interruption: Interruption
    resume: bool = False
    overwrite: bool = False
    init: Path | None = None  # the run whose weights it begins with
    words: Sequence[str] = ()  # of the command line
    _held: ExitStack = field(default_factory=ExitStack)  # the lock and the log
    _last: dict[str, Any] = field(default_factory=dict)  # the checkpoint that it goes on from
    _config: dict[str, Any] = field(default_factory=dict)  # what `config.json` is to say of a run that goes on
    _is_begun: bool = False

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def warn(self, line: str) -> None:
        """Print a warning."""
        complain(line, "train.py")

    def leave_if_interrupted(self) -> None:
        """Raise Interrupted, in all processes at once, if a signal came to one of them."""
        if number := self.context.processes.maximum(self.interruption.signal_number):
            way = f"; to go on: {called('train.py')} --resume {quoted(self.folder)}"
            raise Interrupted(f"interrupted{way if self._is_begun else ' before the training began'}", number)

    def load_images(self, load: Callable[[], TrainImages]) -> TrainImages:
        """Return the images that `load` reads. Raises Interrupted, DataError, UsageError."""
        processes, s = self.context.processes, self.settings
        self.interruption.at_once = processes.count == 1
        images = processes.on_all(load)
        self.interruption.at_once = False
        self.leave_if_interrupted()
        say(images.about)
        processes.share_of_batch(min(s.batch_size, len(images.train[: s.train_limit])))  # before a folder is made
        return images._replace(train=images.train[: s.train_limit])

    def open(self, images: dict[str, Any]) -> tuple[CVAE, dict[str, Any] | None]:
        """Return the model and the checkpoint to go on from, {} at the beginning, None if nothing is left to do.

        The folder is held from now on, and made unless it is resumed. images: what identifies them, as
        `data.sources.record` gives it. Raises UsageError, DataError, DiskError.
        """
        processes, s = self.context.processes, self.settings
        run = processes.on_main(self._held_folder) if self.resume else None
        # Other machines may see neither the folder nor the picture of a mask, and need the same images.
        recorded = run.record if run else processes.on_main(lambda: images)
        processes.on_all(partial(refuse_others, self.folder, recorded, images))
        task = run.task if run else processes.on_main(partial(make_task, s, images["height"], images["width"]))
        model = build(task, s)
        if task.about:
            say(task.about)
        begin = partial(self._go_on, run, model, images) if run else partial(self._begin, model, images)
        last = processes.on_main(begin)
        model.load_state_dict(processes.on_main(model.state_dict))
        self._is_begun = True
        return model, last

    def _machine(self) -> dict[str, Any]:
        """Return what a run's numbers and times may depend on beside its settings: versions, revision, hardware."""
        device, count, revision = self.context.device, self.context.processes.count, None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        git = ["git", "-C", str(folder.PACKAGE), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):  # there may be no git, or no repository
            revision = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        return {
            "git_revision": revision or None,  # `+` behind it where the source was changed since
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": {"type": device.type, "name": name, "threads": torch.get_num_threads(), "processes": count},
            "precision": self.context.precision,
            "command": ["train.py", *self.words],
        }

    def _held_folder(self) -> RunFolder:
        self._held.enter_context(folder.hold(self.folder))
        return RunFolder(self.folder)

    def _begin(self, model: CVAE, images: dict[str, Any]) -> dict[str, Any]:
        """Make the folder, and give the model another run's weights if it begins with these; return no checkpoint."""
        config = {"settings": self.settings.to_dict(), "images": images, **self._machine()}
        files: dict[str, Callable[[Path], None]] = {CONFIG: partial(checkpoint.write_json, value=config)}
        if self.init is not None:
            line, config["init"] = start_from(self.init, model)
            say(line)
            files[INIT] = partial(checkpoint.save, content={"model": model.state_dict()})
        if is_picture(self.settings) and isinstance(model.task, FixedMask):
            files[OBSERVED] = partial(checkpoint.write_atomically, content=mask_png(model.task.observed))
        self._held.enter_context(folder.create(self.folder, files, self.overwrite))
        return {}

    def _go_on(self, run: RunFolder, model: CVAE, images: dict[str, Any]) -> dict[str, Any] | None:
        """Give the model the weights that the run goes on from; return its checkpoint, None if it is finished."""
        s = self.settings
        with self._left_as_it_is():
            last = run.last()
            is_cvae, progress = last.get("phase") == "cvae", Progress(**last.get("progress", {}))
        if is_cvae and progress.epoch > s.epochs:
            raise UsageError(f"{self.folder} has had {progress.epoch} epochs; --epochs cannot be less")
        is_finished = is_cvae and progress.is_over(s.epochs, s.patience, s.unbent_epochs)
        if is_finished and run.summary is not None and (self.folder / BEST).is_file():
            say(f"{self.folder} is finished: nothing is left to do")
            return None
        with self._left_as_it_is():
            if is_cvae or "init" in run.config:
                model.load_state_dict((last if is_cvae else checkpoint.load(self.folder / INIT))["model"])
        before, now = run.settings.to_dict(), s.to_dict()
        machine, history = self._machine(), run.config.get("resumed", [])
        changed = {name: [before[name], value] for name, value in now.items() if value != before[name]}
        resumed = {"phase": last.get("phase", "baseline"), "epoch": progress.epoch, "changed": changed, **machine}
        known = {part: recorded for part, recorded in run.record.items() if recorded is not None}
        self._config = {**run.config, "settings": now, "images": {**images, **known}, "resumed": [*history, resumed]}
        self._last = last
        there, here = ({**each["device"], **each["versions"]} for each in ([run.config, *history][-1], machine))
        if changes := [f"{k} {here[k]} in place of {there.get(k)}" for k in here if here[k] != there.get(k)]:
            say(f"{self.folder}: from here on not bit for bit as it began: {', '.join(changes)}")
        return last

    def restore(self, last: dict[str, Any], parts: Mapping[str, Any]) -> Progress:
        """Put a checkpoint's states into models and optimizer, by name. Raises DataError if they do not fit."""
        with self._left_as_it_is():
            for name, part in parts.items():
                part.load_state_dict(last[name])
        self.context.processes.on_main(partial(self._save_best, last))  # the process may have ended before it did so
        return Progress(**last["progress"])

    @contextmanager
    def _left_as_it_is(self) -> Iterator[None]:
        """Add what can be done to a DataError, which a state that does not fit raises too."""
        try:
            with taken_for_damage(f"{self.folder / LAST}: does not fit the run's settings, or this version", *MISFITS):
                yield
        except DataError as error:
            ways = "--init begins a new one with its weights, --overwrite begins it anew"
            raise DataError(f"{error}. The run cannot go on and is left as it is: {ways}") from None

    @cached_property
    def _log(self) -> RunLog:
        """The log. When it is first asked for, all that can be wrong was seen, and the run begins to write."""
        if self.resume:
            checkpoint.write_json(self.folder / CONFIG, self._config)
        left = [path for name in FILES for path in self.folder.glob(f".*{name}*.tmp*")]  # by a killed process
        with checkpoint.telling_of_disk(f"{self.folder}: cannot be written to"):
            for path in [self.folder / SUMMARY, *left]:
                path.unlink(missing_ok=True)
            return self._held.enter_context(RunLog(self.folder, self._last.get("log", {}), self.settings.to_dict()))

    def save_epoch(self, phase: Phase, progress: Progress, parts: Mapping[str, Any], record: dict[str, Any]) -> None:
        """Write an epoch: the log, `last.pt`, which says how much of the log there is, and `best.pt`, in this order.

        Whenever the process is killed, what the log has beyond `last.pt` can be dropped, and `best.pt` made from it.
        """

        def save() -> None:
            log, picture = self._log, phase.picture(parts["average"])
            with checkpoint.telling_of_disk(f"{self.folder}: the log cannot be written"):
                log.epoch(phase.name, record, picture)
                position = log.position()
            states = {name: part.state_dict() for name, part in parts.items()}
            last = {"phase": phase.name, "progress": asdict(progress), **states, "log": position}
            checkpoint.save(self.folder / LAST, last)
            self._save_best(last)

        self.context.processes.on_main(save)

    def _save_best(self, last: dict[str, Any]) -> None:
        """Write `best.pt` if the epoch that this checkpoint holds is the best one."""
        progress = last["progress"]
        if progress["epoch"] == progress["best_epoch"]:
            best = {"phase": last["phase"], "epoch": progress["epoch"], "loss": progress["best_loss"]}
            checkpoint.save(self.folder / BEST, {**best, "model": last["average"]})

    def load_best(self, phase: str, progress: Progress, model: torch.nn.Module) -> None:
        """Put the best weights of the phase trained last into a model. Raises NonFiniteError if no epoch had any."""
        if progress.best_epoch == 0:
            problem = f"the validation loss was NaN or infinite after each of {progress.epoch} epochs"
            raise NonFiniteError(f"{phase}: {problem}. Try a lower --learning-rate, or look at the data")
        model.load_state_dict(self.context.processes.on_main(lambda: checkpoint.load(self.folder / BEST)["model"]))

    def finish(self, progress: Progress, draw: Callable[[Path], None]) -> None:
        """Draw the run's figures, or warn of what fails; write `summary.json`, by which a finished run is known."""

        def write() -> None:
            try:
                draw(self.folder)
            except Exception as error:
                self.warn(f"{self.folder}: its figures are not all drawn ({first_line(error)})")
            results = {"validation_loss": progress.best_loss, "seconds": progress.seconds}
            with checkpoint.telling_of_disk(f"{self.folder}: the log cannot be written"):
                self._log.finish(self.settings.to_dict(), results)
            checkpoint.write_json(self.folder / SUMMARY, asdict(progress))

        self.context.processes.on_main(write)
