"""How a run folder comes into being, or is begun anew; and the lock that one training holds on it."""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cvae.errors import DataError, UsageError
from cvae.run.checkpoint import sync_folder, telling_of_disk, write_atomically
from cvae.run.folder import CONFIG, EVENTS, FILES, INIT, METRICS, OBSERVED, RunFolder, quoted

LOCK = ".lock"
Held = AbstractContextManager[Any]


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise UsageError if there is something at `path` that a new run must not replace; hidden files count as none."""
    with suppress(OSError):
        if not os.path.lexists(path) or all(name.startswith(".") for name in os.listdir(path)):
            return
    config: Any = {}
    with suppress(DataError):
        config = RunFolder(path).config
    is_damaged_run = os.path.isfile(path / CONFIG) and os.path.isfile(path / METRICS)
    if not isinstance(config.get("settings"), dict) and not is_damaged_run:
        raise UsageError(f"{path} is no run folder and is left as it is; choose another --name")
    if not overwrite:
        raise UsageError(f"{path} exists already: --resume {quoted(path)} goes on with it, --overwrite starts it anew")


def hold(folder: Path, warn: Callable[[str], None]) -> Held:
    """Lock a folder until the end of the returned context or of the process, however it ends.

    Where the file system has no locks, `warn` is told in one line. The file of the lock stays where it is. Raises
    UsageError if another process holds the folder, DiskError if it is not writable.
    """
    with telling_of_disk(f"{folder}: cannot be written to"):
        open(folder / LOCK, "a").close()
    hard: dict[str, Any] = {} if sys.platform == "win32" else {"fallback_to_soft": False}
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, preserve_lock_file=True, **hard)
    try:
        return lock.acquire()
    except Timeout:
        raise UsageError(f"{folder} is held by another training; wait for it, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warn(f"{folder} cannot be locked on this file system ({reason}): see that no other training uses it")
        return nullcontext()


def create_run(path: Path, files: Mapping[str, bytes], overwrite: bool, warn: Callable[[str], None]) -> Held:
    """Make a run folder, or with `overwrite` begin the one that is there anew, and hold it.

    Whatever fails, and wherever the process is killed, there is the old run, whole, or the new one, or a free folder.
    What somebody else has put into the folder stays.

    files: what is in it from the beginning, by name; `config.json` is one of them. Returns and raises as `hold` does,
    and UsageError also if something is there that must not be replaced.
    """
    is_new = not os.path.isdir(path)
    with telling_of_disk(f"{path}: cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    lock, stage, names = hold(path, warn), path / f".new-{secrets.token_hex(6)}", sorted(files, key=FILES.index)
    try:
        with telling_of_disk(f"{path}: cannot be written to", "; what stood there is intact"):
            settle(path)
            refuse_existing(path, overwrite)
            (stage / "old").mkdir(parents=True)
            for name in names:
                write_atomically(stage / name, files[name])
            for file in [*path.glob(EVENTS + "*"), *(path / name for name in FILES)]:
                if os.path.lexists(file):
                    os.rename(file, stage / "old" / file.name)
            for name in names:
                os.rename(stage / name, path / name)
        sync_folder(path)
        shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        with suppress(OSError):
            settle(path)
            if is_new:
                (path / LOCK).unlink()
                path.rmdir()
        lock.__exit__(None, None, None)
        raise
    return lock


def settle(folder: Path) -> None:
    """Undo a replacement that did not come to its end: until the new `config.json` is in its place, the old run stays.

    Only who holds the folder may do so. Raises OSError.
    """
    for stage in folder.glob(".new-*"):
        if os.path.isfile(stage / CONFIG):
            for name in () if os.path.lexists(folder / CONFIG) else (INIT, OBSERVED):  # the new run's, in their place
                (folder / name).unlink(missing_ok=True)
            for name in [*(path.name for path in (stage / "old").glob(EVENTS + "*")), *FILES]:
                if os.path.lexists(stage / "old" / name):
                    os.rename(stage / "old" / name, folder / name)
        shutil.rmtree(stage)
