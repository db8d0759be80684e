"""A run folder is held by one training at a time."""

import sys
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, Timeout, UnixFileLock, WindowsFileLock

from cvae.errors import DiskError, UsageError

LOCK = ".lock"


def hold(folder: Path, warn: Callable[[str], None]) -> BaseFileLock | None:
    """The lock on a folder, until it is released or the process ends, however it ends.

    None where the file system has no locks: `warn` is told in one line. The file of the lock stays where it is; that
    it is there says nothing. Raises UsageError if another process holds the folder, DiskError if it is not writable.
    """
    path = folder / LOCK
    try:
        open(path, "a").close()
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written to ({error.strerror or error})") from None
    # A soft lock, the mere presence of a file, would outlive its process.
    lock: BaseFileLock
    if sys.platform == "win32":
        lock = WindowsFileLock(path, thread_local=False, preserve_lock_file=True)
    else:
        lock = UnixFileLock(path, thread_local=False, preserve_lock_file=True, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{folder} is held by another training; wait for it, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        warn(f"{folder} cannot be locked on this file system ({reason}): see that no other training uses it")
        return None
    return lock
