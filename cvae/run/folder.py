"""Run folders: made whole or not at all, held by one training at a time, found again by `eval.py`.

A run folder holds `config.json` (settings, versions, machine), `metrics.jsonl` (a line per epoch and phase),
TensorBoard's events, `last.pt` (everything to go on from), `best.pt` (the best weights) and, once it is finished,
`summary.json`; where the mask was a picture, `observed.png`, the mask itself.
"""

import errno
import fcntl
import json
import os
import platform
import reprlib
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

import torch

from cvae.data.mask_pictures import mask_png
from cvae.data.masks import Split, is_picture, make_split
from cvae.errors import CvaeError, DataError, DiskError, UsageError
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run.checkpoint import write_atomically
from cvae.settings import LARGEST_SIDE, PRECISIONS, Settings

CONFIG, METRICS, SUMMARY, OBSERVED = "config.json", "metrics.jsonl", "summary.json", "observed.png"
BEST, LAST, LOCK = "best.pt", "last.pt", ".lock"

CHOICES: dict[str, Collection[str]] = {"network": NETWORKS, "objective": OBJECTIVES}
"""Settings that are names of something in the code, each with the table in which it is found."""


def create_run(path: Path, settings: Settings, about: dict[str, Any], overwrite: bool, split: Split) -> TextIO:
    """Make a run folder with its `config.json`, and return the lock on it, which holds while it is kept open.

    about: as in `write_config`. split: of the images; its mask is kept where the settings name a picture.

    Raises UsageError if the folder stands already (with `overwrite`: if it is no run folder, or a training holds it)
    and DiskError if it cannot be made.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        refuse_existing(path, overwrite)
        staging.mkdir(parents=True)
        try:
            write_config(staging, settings, about)
            if is_picture(settings):
                write_atomically(staging / OBSERVED, mask_png(split.observed))
            lock = lock_run(staging)
            if overwrite and path.exists():
                _remove_run(path)  # now that its successor could be written
            os.rename(staging, path)
        except (OSError, CvaeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise UsageError(f"{path} was just made by another training") from None
            raise
    except OSError as error:
        raise DiskError(f"{path}: cannot be made ({error.strerror or error})") from None
    return lock


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises UsageError if there is something at `path` that a new run must not replace."""
    if os.path.lexists(path):
        if not overwrite:
            raise UsageError(f"{path} exists already: --resume {path} goes on with it, --overwrite starts it anew")
        if not (path / CONFIG).is_file():
            raise UsageError(f"{path} is no run folder and is left as it is; choose another --name")


def _remove_run(path: Path) -> None:
    with lock_run(path):
        doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def lock_run(path: Path) -> TextIO:
    """Hold a run folder for this process; the lock dies with it. Raises UsageError if another training holds it."""
    try:
        lock = open(path / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise DiskError(f"{path}: cannot be written to ({error.strerror or error})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UsageError(f"{path} is held by another training; wait for it, or choose another --name") from None
    return lock


def write_config(path: Path, settings: Settings, about: dict[str, Any]) -> None:
    """Write the `config.json` of a run; about: what else it says, by name. Raises DiskError."""
    write_json(path / CONFIG, {"settings": settings.to_dict(), **about})


def find_run(run: str | Path, runs: str | Path) -> Path:
    """The folder of a run: the one of this path, or else, for a plain name, the one below the folder of runs."""
    path = Path(run)
    return path if os.path.isdir(path) or len(path.parts) > 1 else Path(runs) / path


def read_settings(path: Path) -> Settings:
    """The settings of the run in a folder. Raises DataError if it has none that can be read."""
    file = path / CONFIG
    if not os.path.isfile(file):
        raise DataError(f"{path} is no run folder: it has no {CONFIG}")
    config = read_json(file)
    try:
        settings = Settings.from_dict(config.get("settings") if isinstance(config, dict) else None)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    for name, choices in CHOICES.items():
        if (chosen := getattr(settings, name)) not in choices:
            raise DataError(f"{file}: this version knows no {name} {reprlib.repr(chosen)}; was a later one here?")
    return settings


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of the images that a run is trained on. Raises DataError."""
    config = read_json(path / CONFIG)
    images = config.get("images") if isinstance(config, dict) else None
    height, width = (images.get(side) for side in ("height", "width")) if isinstance(images, dict) else (None, None)
    if not (type(height) is type(width) is int and 2 <= height <= LARGEST_SIDE and 2 <= width <= LARGEST_SIDE):
        raise DataError(f"{path / CONFIG}: does not say the size of the images; train anew with this version")
    return height, width


def read_split(path: Path) -> Split:
    """The split of the images that a run is trained on. Raises DataError."""
    return make_split(read_settings(path), *read_size(path), picture=path / OBSERVED)


def read_precision(path: Path) -> str:
    """The precision that a run was begun in: that of its settings if its `config.json` has no other."""
    config = read_json(path / CONFIG)
    begun = config.get("precision") if isinstance(config, dict) else None
    return begun if begun in PRECISIONS else read_settings(path).precision


def finished_runs(folder: Path) -> list[Path]:
    """The finished runs right below a folder, or the folder itself if it is one, by name. Raises DataError if none."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: there is no such folder; train first: python train.py")
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # hidden: half made or removed
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from None
    candidates = [folder, *(folder / name for name in names)]
    found = [path for path in candidates if os.path.isfile(path / SUMMARY) and os.path.isfile(path / BEST)]
    if not found:
        raise DataError(f"{folder}: has no finished run; train one: python train.py")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises DataError, naming the file, if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid JSON ({error})") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, each a dict; a last line that is still being written is left out.

    Raises DataError, naming the file, if it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    records = []
    for number, line in enumerate(lines, start=1):
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
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def describe_machine(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """What a run's numbers and times may depend on beside its settings: versions, revision, hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads(), "processes": processes},
        "precision": precision,
        "command": ["train.py", *sys.argv[1:]],
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str | None:
    """The commit of the source, `+` behind it where the source was changed since; None without git."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
