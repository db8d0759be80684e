"""Run folders: made, found again, and what their `config.json` says.

A run folder holds `config.json` (settings, images, machine, and when it was resumed where), `metrics.jsonl` (a line
per epoch and phase), TensorBoard's events, `last.pt` (everything to go on from), `best.pt` (the best weights) and, once
it is finished, `summary.json` and the figures that `cvae.report.replay` draws; where the mask was a picture,
`observed.png`, the mask itself; where it began with the weights of another run, `init.pt`, all weights as they were
then. A run that is passed on may have `model.safetensors` in the place of the checkpoints.
"""

import json
import os
import reprlib
import shlex
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock

from cvae.data.masks import MASKS, Split, is_picture, make_split
from cvae.errors import DataError, DiskError, UsageError
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run.checkpoint import atomic_file, temporary_of, write_atomically
from cvae.run.lock import LOCK, hold
from cvae.settings import LARGEST_SIDE, PRECISIONS, Settings

CONFIG, METRICS, SUMMARY, OBSERVED = "config.json", "metrics.jsonl", "summary.json", "observed.png"
BEST, LAST, INIT, EVENTS = "best.pt", "last.pt", "init.pt", "events.out.tfevents."
WEIGHTS = "model.safetensors"
COMPLETIONS, LEARNING, CURVES = "completions.png", "learning.gif", "curves.png"

REFERENCE, PACKAGE = "reference", Path(__file__).resolve().parents[1]
COME_WITH = (PACKAGE.parent / "runs", PACKAGE)
"""Where the folder of the runs that come with the program is: in a clone, and in the installed package."""

CHOICES: dict[str, Collection[str]] = {"network": NETWORKS, "objective": OBJECTIVES}
"""Settings that are names of something in the code, each with the table in which it is found."""


def create_run(
    path: Path, files: Mapping[str, Callable[[BinaryIO], object]], overwrite: bool, warn: Callable[[str], None]
) -> BaseFileLock | None:
    """Make a run folder, or with `overwrite` begin the one that is there anew; returns the lock on it, as `hold` does.

    files: what is in it from the beginning, by name, each with what writes it. Where a folder is begun anew, the
    files of the run go, and all others stay; where `path` is a link, it is the folder that it leads to. A process that
    is killed in between leaves the old run, the new one, or a folder that counts as free.

    Raises UsageError if `refuse_existing` does, or a training holds the folder, and DiskError if it cannot be written:
    then what stood there still does.
    """
    try:
        is_new = not os.path.isdir(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{path}: cannot be made ({error.strerror or error})") from None
    lock, is_ours = None, False
    try:
        lock, is_ours = hold(path, warn), True
        refuse_existing(path, overwrite)
        with ExitStack() as stack:
            for name in sorted(files, key=CONFIG.__ne__):  # the first one takes its place last: by it a run is known
                file = stack.enter_context(atomic_file(path / name))
                files[name](file)
                file.flush()
                os.fsync(file.fileno())
            _clear(path)  # the new files are on the disk: now the old run may go
    except BaseException:
        with suppress(OSError):
            if is_new and is_ours:
                (path / LOCK).unlink()
            if is_new:
                path.rmdir()
        if lock is not None:
            lock.release()
        raise
    return lock


def quoted(path: Path) -> str:
    """A path as it is to be pasted into a shell."""
    return shlex.quote(str(path))


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises UsageError if there is something at `path` that a new run must not replace.

    An empty folder is none, nor is one that has only hidden files in it, or what a killed `create_run` has left.
    """
    with suppress(OSError):
        half_made = {OBSERVED, INIT} if os.path.isfile(temporary_of(path / CONFIG)) else set()
        if not os.path.lexists(path) or {name for name in os.listdir(path) if name[0] != "."} <= half_made:
            return
    if not is_run(path):
        raise UsageError(f"{path} is no run folder and is left as it is; choose another --name")
    if not overwrite:
        raise UsageError(f"{path} exists already: --resume {quoted(path)} goes on with it, --overwrite starts it anew")


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, by its `config.json`, or by the metrics beside a damaged one."""
    with suppress(DataError):
        config = read_json(path / CONFIG)
        if isinstance(config, dict) and isinstance(config.get("settings"), dict):
            return True
    return os.path.isfile(path / CONFIG) and os.path.isfile(path / METRICS)


def _clear(path: Path) -> None:
    """Remove the files of a run, that by which it is known as one last."""
    names = (SUMMARY, COMPLETIONS, LEARNING, CURVES, LAST, BEST, WEIGHTS, INIT, METRICS, OBSERVED)
    for file in [*path.glob(EVENTS + "*"), *(path / name for name in names), path / CONFIG]:
        file.unlink(missing_ok=True)


def find_run(run: str | Path, runs: str | Path) -> Path:
    """The folder of a run: the one of this path, or else the one below the folder of runs.

    Where there is neither, a plain name is meant as the second, and a path as the first; `reference/NAME` is also found
    where it comes with the program.
    """
    path, below = Path(run), Path(runs) / run
    known = [place / path for place in COME_WITH] if path.parts[:1] == (REFERENCE,) else []
    for folder in (path, below, *known):
        if os.path.isdir(folder):
            return folder
    return below if len(path.parts) <= 1 else path


def read_settings(path: Path) -> Settings:
    """The settings of the run in a folder. Raises DataError if it has none that can be read."""
    file = path / CONFIG
    if not os.path.isfile(file):
        raise DataError(f"{path} is no run folder: it has no {CONFIG}")
    config = read_json(file)
    return known_settings(config.get("settings") if isinstance(config, dict) else None, file)


def known_settings(values: object, file: Path) -> Settings:
    """The settings that a file holds, as `Settings.to_dict` gives them. Raises DataError if they cannot be read."""
    try:
        settings = Settings.from_dict(values)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    named = settings.observed is not None and not is_picture(settings)
    for name, choices in {**CHOICES, **({"observed": MASKS} if named else {})}.items():
        if (chosen := getattr(settings, name)) not in choices:
            raise DataError(f"{file}: this version knows no {name} {reprlib.repr(chosen)}; was a later one here?")
    return settings


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of the images that a run is trained on. Raises DataError."""
    return known_size(_images(path), path / CONFIG)


def _images(path: Path) -> Any:
    config = read_json(path / CONFIG)
    return config.get("images") if isinstance(config, dict) else None


def known_size(images: Any, file: Path) -> tuple[int, int]:
    """Height and width in what a file says of images. Raises DataError."""
    height, width = (images.get(side) for side in ("height", "width")) if isinstance(images, dict) else (None, None)
    if not (type(height) is type(width) is int and 2 <= height <= LARGEST_SIDE and 2 <= width <= LARGEST_SIDE):
        raise DataError(f"{file}: does not say the size of the images; train anew with this version")
    return height, width


def read_record(path: Path) -> dict[str, Any]:
    """What identifies the images that a run is trained on, as `data.sources.record` gives it.

    That of an older run may have no more than their height and width. Raises DataError.
    """
    return known_record(_images(path), path / CONFIG)


def known_record(images: Any, file: Path) -> dict[str, Any]:
    """The same of what a file says of images."""
    known_size(images, file)
    for part in ("train", "validation", "test"):
        found = images.get(part)
        is_good = isinstance(found, dict) and (type(found.get("count")), type(found.get("sha256"))) == (int, str)
        if found is not None and not is_good:
            raise DataError(f"{file}: does not say what the {part} images are")
    return images  # type: ignore[no-any-return]


def read_split(path: Path) -> Split:
    """The split of the images that a run is trained on. Raises DataError."""
    return make_split(read_settings(path), *read_size(path), picture=path / OBSERVED)


def read_precision(path: Path) -> str:
    """The precision that a run was begun in: that of its settings if its `config.json` has no other."""
    config = read_json(path / CONFIG)
    begun = config.get("precision") if isinstance(config, dict) else None
    return begun if begun in PRECISIONS else read_settings(path).precision


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises DataError, naming the file, if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid JSON ({error})") from None


def read_metrics(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, each a dict; a last line that is still being written is left out.

    size: bytes to read, all by default. Raises DataError, naming the file, if they cannot be read or are not there.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if size is not None and len(content) < size:
        raise DataError(f"{path}: is cut off")
    records = []
    for number, line in enumerate(content[:size].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: is no valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: is no record of an epoch")
        records.append(record)
    return records


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. Raises DiskError."""
    write_atomically(path, as_json(value))


def as_json(value: object) -> bytes:
    """What a JSON file of this value holds."""
    return (json.dumps(value, indent=2) + "\n").encode()
