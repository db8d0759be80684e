"""Everything between a script and its user: output, failures in one line, Ctrl-C, commands. Does not import PyTorch."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from importlib import import_module
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from cvae.errors import CvaeError, DiskError, PeerLost, UsageError, is_text, telling_of_memory

BAR_AFTER_S, LINE_EVERY_S = 2, 60


def before_torch() -> None:
    """Prepare the process of a script for PyTorch: what Ctrl-C does while it is imported, and how its threads wait.

    Ctrl-C simply ends the process until a handler is installed. Beside other programs, threads that wait sleep at once
    in place of spinning (docs/speed.md), unless the user has chosen. A notebook's process goes on, and stays as it is.
    """
    goes_on = hasattr(sys, "ps1") or sys.flags.interactive or threading.current_thread() is not threading.main_thread()
    if goes_on or "torch" in sys.modules:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and others_want_the_processors():
        os.environ["GOMP_SPINCOUNT"] = "0"


def others_want_the_processors() -> bool:
    """Return True if other programs leave fewer processors idle than this one may use (Linux only, else False)."""
    running = []
    with suppress(OSError, AttributeError, ValueError, IndexError):
        for _ in range(5):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(0.01)
        return (os.cpu_count() or 1) - sorted(running)[2] < len(os.sched_getaffinity(0))
    return False


def _main_of(module: str) -> int:
    before_torch()
    return int(import_module(module).main())


# The installed commands cvae-train, cvae-eval, cvae-complete and cvae-page; each returns the exit code.
train, evaluate = partial(_main_of, "cvae_commands.train"), partial(_main_of, "cvae_commands.eval")
complete, page = partial(_main_of, "cvae.report.complete"), partial(_main_of, "cvae.report.page")


def called(script: str) -> str:
    """Return how the user calls a script: `python train.py`, or `cvae-train` if it was called in that way."""
    return f"cvae-{Path(script).stem}" if Path(sys.argv[0]).stem.startswith("cvae-") else f"python {script}"


def command(script: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the `main` of a script: an expected failure is one line and the exit code that `main` returns."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def safe_main(argv: Sequence[str] | None = None) -> int:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, TextIOWrapper):  # neither closed nor a notebook's
                    stream.reconfigure(encoding="utf-8", errors="backslashreplace")
            try:
                for word in sys.argv[1:] if argv is None else argv:
                    if not is_text(word):  # no JSON file and no log could hold it
                        raise UsageError(f"{word}: is no text in UTF-8; give the file or folder another name")
                with telling_of_memory():
                    return main(argv)
            except CvaeError as error:
                if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, PeerLost):  # once on each machine
                    complain(str(error), script)
                return error.exit_code

        return safe_main

    return decorate


@contextmanager
def silence(is_silent: bool = True) -> Iterator[None]:
    """Have `say` and `Bar` show nothing within the block, if it is to be silent."""
    before, Bar.is_silent = Bar.is_silent, is_silent
    try:
        yield
    finally:
        Bar.is_silent = before


def say(text: str, end: str = "\n") -> None:
    """Print on standard output at once, or nothing if its reader has gone. Raises DiskError if it cannot be written."""
    error = None if Bar.is_silent else _print(text, end, sys.stdout)
    if error and not isinstance(error, BrokenPipeError):
        raise DiskError(f"standard output: cannot be written ({error.strerror or error})")


def complain(line: str, script: str = "") -> None:
    """Print a line on standard error at once, if it can be written, behind the name of the script that speaks."""
    _print(f"{called(script).removeprefix('python ')}: {line}" if script else line, "\n", sys.stderr)


def _print(text: str, end: str, stream: TextIO) -> OSError | None:
    """Print at once, or return the error of a stream that cannot be written; what it still holds is dropped."""
    try:
        print(text, end=end, file=stream or StringIO(), flush=True)  # None where it was closed before the start
    except OSError as error:
        with suppress(OSError, ValueError):  # a notebook's stream has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or it fails once more when Python ends
        return error
    return None


class Bar(tqdm):  # type: ignore[misc]
    """A progress bar with rate and time left on a terminal, a line a minute elsewhere; `update` counts.

    It appears after two seconds, and is wiped away at the end of its `with` block.
    """

    monitor_interval = 0  # no thread of its own
    is_silent = False

    def __init__(self, title: str, total: int, unit: str):
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
        kind: dict[str, Any] = {"delay": BAR_AFTER_S}
        if not (sys.stderr and sys.stderr.isatty()):
            kind = {"delay": LINE_EVERY_S, "mininterval": LINE_EVERY_S, "bar_format": line, "file": StringIO()}
        kind |= {"unit": unit, "unit_scale": True, "miniters": 1, "leave": False, "disable": self.is_silent}
        super().__init__(desc=title, total=total, **kind)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state, called by tqdm when it is time; returns True if there is something to be wiped away."""
        if self.bar_format is None:
            return bool(super().display(msg, pos))
        if msg is None:
            complain(str(self))
        return False
