"""Run folders: found, read, and made; each is held by one training at a time.

A run folder holds `config.json` (settings, images, machine, when it was resumed where), `metrics.jsonl` (a line per
epoch and phase), TensorBoard's events, `last.pt` (everything to go on from), `best.pt` (the best weights) and, once it
is finished, `summary.json` and figures; `observed.png` if the mask was a picture; `init.pt`, the weights that it began
with, if they are another run's. A run that is passed on has `model.safetensors` in the place of the checkpoints.
"""

import json
import os
import reprlib
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from cvae.data.tasks import MASKS, FixedMask, is_picture, make_task
from cvae.errors import DataError, DiskError, UsageError
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run.checkpoint import write_atomically
from cvae.settings import LARGEST_SIDE, PRECISIONS, Settings

CONFIG, METRICS, SUMMARY, OBSERVED = "config.json", "metrics.jsonl", "summary.json", "observed.png"
BEST, LAST, INIT, EVENTS, LOCK = "best.pt", "last.pt", "init.pt", "events.out.tfevents.", ".lock"
WEIGHTS = "model.safetensors"
COMPLETIONS, LEARNING, CURVES = "completions.png", "learning.gif", "curves.png"
FILES = (SUMMARY, COMPLETIONS, LEARNING, CURVES, LAST, BEST, WEIGHTS, INIT, METRICS, OBSERVED, CONFIG)
"""Files of a run, its events apart; `config.json`, by which a run is known, is removed last and written last."""

REFERENCE, PACKAGE = "reference", Path(__file__).resolve().parents[1]
COME_WITH = (PACKAGE.parent / "runs", PACKAGE)
"""Folders that may hold the folder of the runs that come with the program: of a clone, of the installed package."""

CHOICES: dict[str, Collection[str]] = {"network": NETWORKS, "objective": OBJECTIVES}
"""Settings that are names of something in the code, each with the table in which it is found."""


class RunFolder:
    """A run on the disk; its `config.json` is read once. All properties raise DataError, naming the file.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that `config.json` says."""
        file = self.path / CONFIG
        if not os.path.isfile(file):
            raise DataError(f"{self.path} is no run folder: it has no {CONFIG}")
        config = read_json(file)
        return config if isinstance(config, dict) else {}

    @cached_property
    def settings(self) -> Settings:
        """The settings of the run."""
        return known_settings(self.config.get("settings"), self.path / CONFIG)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What identifies the images that the run is trained on, as `data.sources.record` gives it."""
        return known_record(self.config.get("images"), self.path / CONFIG)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.record["height"], self.record["width"]

    @cached_property
    def task(self) -> FixedMask:
        """What turns images into x and y."""
        return make_task(self.settings, *self.size, picture=self.path / OBSERVED)

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
        """Whether it has published weights in the place of checkpoints: it can be evaluated, and not go on."""
        checkpoints = [os.path.lexists(self.path / name) for name in (BEST, LAST)]
        return os.path.isfile(self.path / WEIGHTS) and not any(checkpoints)

    def metrics(self, size: int | None = None) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`; a last line that is still being written is left out.

        Args:
            size: The bytes to read; None: all.
        """
        return read_metrics(self.path / METRICS, size)


def find_run(run: str | Path, runs: str | Path) -> Path:
    """Return the folder of a run: the one of this path, or else the one below the folder of runs.

    Where there is neither, a plain name is meant as the second, and a path as the first; `reference/NAME` is also found
    where it comes with the program.
    """
    path, below = Path(run), Path(runs) / run
    known = [place / path for place in COME_WITH] if path.parts[:1] == (REFERENCE,) else []
    for folder in (path, below, *known):
        if os.path.isdir(folder):
            return folder
    return below if len(path.parts) <= 1 else path


def quoted(path: Path) -> str:
    """Return a path as it is to be pasted into a shell."""
    return shlex.quote(str(path))


# What is read


def known_settings(values: object, file: Path) -> Settings:
    """Return the settings that a file holds, as `Settings.to_dict` gives them. Raises DataError."""
    try:
        settings = Settings.from_dict(values)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    is_named = settings.observed is not None and not is_picture(settings)
    for name, choices in {**CHOICES, **({"observed": MASKS} if is_named else {})}.items():
        if (chosen := getattr(settings, name)) not in choices:
            raise DataError(f"{file}: this version knows no {name} {reprlib.repr(chosen)}; was a later one here?")
    return settings


def known_record(images: Any, file: Path) -> dict[str, Any]:
    """Return what a file says of images. Raises DataError if it does not say their size."""
    sides = [images.get(side) for side in ("height", "width")] if isinstance(images, dict) else [None]
    if not all(type(side) is int and 2 <= side <= LARGEST_SIDE for side in sides):
        raise DataError(f"{file}: does not say the size of the images; train anew with this version")
    if not all(isinstance(images.get(part), dict | None) for part in ("train", "validation", "test")):
        raise DataError(f"{file}: does not say what the images are; train anew with this version")
    return images  # type: ignore[no-any-return]


def read_json(path: Path) -> Any:
    """Return what a JSON file says. Raises DataError, naming the file, if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid JSON ({error})") from None


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Return the whole lines in the first `size` bytes of a `metrics.jsonl`. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if size is not None and len(content) < size:
        raise DataError(f"{path}: is cut off")
    records = []
    for number, line in enumerate(content[:size].split(b"\n")[:-1], start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise DataError(f"{path}, line {number}: is no record of an epoch") from None
    return records


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. Raises DiskError."""
    write_atomically(path, as_json(value))


def as_json(value: object) -> bytes:
    """Return what a JSON file of this value holds."""
    return (json.dumps(value, indent=2) + "\n").encode()


# How a run comes into being


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise UsageError if there is something at `path` that a new run must not replace; hidden files count as none."""
    with suppress(OSError):
        if not os.path.lexists(path) or all(name.startswith(".") for name in os.listdir(path)):
            return
    if not is_run(path):
        raise UsageError(f"{path} is no run folder and is left as it is; choose another --name")
    if not overwrite:
        raise UsageError(f"{path} exists already: --resume {quoted(path)} goes on with it, --overwrite starts it anew")


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run, by its `config.json`, or by the metrics beside a damaged one."""
    with suppress(DataError):
        if isinstance(RunFolder(path).config.get("settings"), dict):
            return True
    return os.path.isfile(path / CONFIG) and os.path.isfile(path / METRICS)


def hold(folder: Path, warn: Callable[[str], None]) -> BaseFileLock | None:
    """Return the lock on a folder, until it is released or the process ends, however it ends.

    None where the file system has no locks: `warn` is told in one line. The file of the lock stays where it is; that
    it is there says nothing.

    Raises:
        UsageError: another process holds the folder.
        DiskError: it is not writable.
    """
    try:
        open(folder / LOCK, "a").close()
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written to ({error.strerror or error})") from None
    hard: dict[str, Any] = {} if sys.platform == "win32" else {"fallback_to_soft": False}
    lock = FileLock(folder / LOCK, thread_local=False, preserve_lock_file=True, **hard)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{folder} is held by another training; wait for it, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warn(f"{folder} cannot be locked on this file system ({reason}): see that no other training uses it")
        return None
    return lock


def create_run(
    path: Path, files: Mapping[str, bytes], overwrite: bool, warn: Callable[[str], None]
) -> BaseFileLock | None:
    """Make a run folder, or with `overwrite` begin the one that is there anew.

    Whatever fails, and wherever the process is killed, there is the old run, whole, or the new one, or a free folder.
    What somebody else has put into the folder stays.

    Args:
        path: The folder, or a link to it.
        files: What is in it from the beginning, by name; `config.json` is one of them.
        overwrite: Whether an old run may be replaced.
        warn: As `hold` takes it.

    Returns:
        The lock on it, as `hold` returns it.

    Raises:
        UsageError: something is there that must not be replaced, or a training holds the folder.
        DiskError: it cannot be written.
    """
    is_new = not os.path.isdir(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{path}: cannot be made ({error.strerror or error})") from None
    lock = hold(path, warn)
    try:
        settle(path)
        refuse_existing(path, overwrite)
        _replace(path, files)
    except BaseException as error:
        with suppress(OSError):
            settle(path)
            if is_new:
                (path / LOCK).unlink()
                path.rmdir()
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DiskError(f"{path}: cannot be written to ({reason}); what stood there is intact") from None
        raise
    return lock


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put the files of a new run in the place of an old one's, which are moved aside first and removed at last."""
    stage = folder / f".new-{secrets.token_hex(6)}"
    (stage / "old").mkdir(parents=True)
    for name in sorted(files, key=FILES.index):
        with open(stage / name, "wb") as file:
            file.write(files[name])
            file.flush()
            os.fsync(file.fileno())
    for path in [*folder.glob(EVENTS + "*"), *(folder / name for name in FILES)]:
        if os.path.lexists(path):
            os.rename(path, stage / "old" / path.name)
    for name in sorted(files, key=FILES.index):
        os.rename(stage / name, folder / name)
    shutil.rmtree(stage, ignore_errors=True)


def settle(folder: Path) -> None:
    """Undo a replacement that did not come to its end: until the new `config.json` is in its place, the old run stays.

    Only who holds the folder may do so. Raises OSError.
    """
    for stage in folder.glob(".new-*"):
        if os.path.isfile(stage / CONFIG):
            for path in sorted((stage / "old").iterdir(), key=lambda path: path.name == CONFIG):
                os.rename(path, folder / path.name)
            if not os.path.lexists(folder / CONFIG):  # there was no old run, and no other file
                for name in (OBSERVED, INIT):
                    (folder / name).unlink(missing_ok=True)
        shutil.rmtree(stage)


# Old names, for rooms that are not moved yet


def read_settings(path: Path) -> Settings:
    """Return `RunFolder(path).settings`."""
    return RunFolder(path).settings


def read_size(path: Path) -> tuple[int, int]:
    """Return `RunFolder(path).size`."""
    return RunFolder(path).size


def read_record(path: Path) -> dict[str, Any]:
    """Return `RunFolder(path).record`."""
    return RunFolder(path).record


def read_split(path: Path) -> FixedMask:
    """Return `RunFolder(path).task`."""
    return RunFolder(path).task


def read_precision(path: Path) -> str:
    """Return `RunFolder(path).precision`."""
    return RunFolder(path).precision
