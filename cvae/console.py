"""Everything between a script and its user: output, failures in one line, Ctrl-C, commands. Does not import PyTorch."""

import codecs
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from importlib import import_module
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from cvae.errors import CvaeError, DiskError, Interrupted, UsageError, is_text, telling_of_memory

BAR_AFTER_S, LINE_EVERY_S = 2, 60
ASCII = dict(zip("±−–─×→≤≥…ŷ▀▄█", ["+-", "-", "-", "-", "x", "->", "<=", ">=", "...", "y", '"', "_", "#"], strict=True))
# Replacements for characters that a terminal cannot show; any other one is written by its number.


def before_torch() -> None:
    """Prepare the process of a script for PyTorch: what Ctrl-C does while it is imported, and how its threads wait.

    Ctrl-C simply ends the process until a handler is installed. Waiting threads spin before they sleep; beside other
    programs, where that takes the time of those that they wait for, they sleep at once (measured in docs/speed.md).
    Variables that the user has set stay. A process that goes on after the script, as a notebook's, is left alone.
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
    try:
        usable, running = len(os.sched_getaffinity(0)), []
        for _ in range(5):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(0.01)
    except (OSError, AttributeError, ValueError, IndexError):
        return False
    return (os.cpu_count() or usable) - sorted(running)[2] < usable


def _main_of(module: str) -> int:
    before_torch()
    return int(import_module(module).main())


# The installed commands cvae-train, cvae-eval, cvae-complete and cvae-page; each returns the exit code.
train, evaluate = partial(_main_of, "cvae_commands.train"), partial(_main_of, "cvae_commands.eval")
complete, page = partial(_main_of, "cvae.report.complete"), partial(_main_of, "cvae.report.page")


def called(script: str) -> str:
    """Return how the user calls a script: `python train.py`, or `cvae-train` if it was called in that way."""
    return f"cvae-{Path(script).stem}" if Path(sys.argv[0]).stem.startswith("cvae-") else f"python {script}"


def program(script: str) -> str:
    """Return the name by which a script speaks of itself: `train.py` or `cvae-train`."""
    return called(script).removeprefix("python ")


def command(script: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the `main` of a script: an expected failure is one line and the exit code that `main` returns."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def safe_main(argv: Sequence[str] | None = None) -> int:
            with safe_output():
                try:
                    with telling_of_memory():
                        for word in sys.argv[1:] if argv is None else argv:
                            if not is_text(word):  # no JSON file and no log could hold it
                                shown = os.fsencode(word).decode("utf-8", "backslashreplace")
                                raise UsageError(f"{shown}: is no text in UTF-8; give the file or folder another name")
                        return main(argv)
                except CvaeError as error:
                    if not error.is_told_elsewhere:
                        complain(f"{program(script)}: {error}")
                    return error.exit_code

        return safe_main

    return decorate


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted at Ctrl-C within the block, if `before_torch` lets it end the process without a word."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        yield
        return

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted", signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _written_in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


codecs.register_error("cvae.ascii", _written_in_ascii)


@contextmanager
def safe_output() -> Iterator[None]:
    """Make everything printed within the block encodable, and give closed streams (None) a place to go."""
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(sys.stdout or nowhere))
        stack.enter_context(redirect_stderr(sys.stderr or nowhere))
        streams = {each: each.errors for each in (sys.stdout, sys.stderr) if isinstance(each, TextIOWrapper)}
        for stream in streams:
            stream.reconfigure(errors="cvae.ascii")
        try:
            yield
        finally:
            for stream, errors in streams.items():
                try:
                    stream.reconfigure(errors=errors)  # flushes it
                except OSError:
                    _lead_nowhere(stream)


def say(text: str, end: str = "\n") -> None:
    """Print on standard output at once, or nothing if its reader has gone. Raises DiskError if it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _lead_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise DiskError(f"standard output: cannot be written ({error.strerror or error})") from None


def complain(line: str) -> None:
    """Print a line on standard error at once, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _lead_nowhere(sys.stderr)


def _lead_nowhere(stream: TextIO) -> None:
    """Drop what is still to be written to a stream, or it fails once more when Python ends."""
    with suppress(OSError, ValueError):  # a notebook's stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def silence(is_silent: bool = True) -> Iterator[None]:
    """Have `say` and `Bar` show nothing within the block, if it is to be silent."""
    before, Bar.is_silent = Bar.is_silent, is_silent
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if is_silent else sys.stdout):
            yield
    finally:
        Bar.is_silent = before


class Bar(tqdm):  # type: ignore[misc]
    """A progress bar with rate and time left on a terminal, a line a minute elsewhere; `update` counts.

    It appears after two seconds, and is wiped away at the end of its `with` block; `show=False` shows nothing.
    """

    monitor_interval = 0  # no thread of its own
    is_silent = False

    def __init__(self, title: str, total: int, unit: str, show: bool = True):
        on_terminal = sys.stderr.isatty()
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
        super().__init__(
            desc=title, total=total, unit=unit, unit_scale=True, miniters=1, leave=False,
            disable=self.is_silent or not show,
            delay=BAR_AFTER_S if on_terminal else LINE_EVERY_S, mininterval=0.1 if on_terminal else LINE_EVERY_S,
            bar_format=None if on_terminal else line, file=sys.stderr if on_terminal else StringIO(),
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state, called by tqdm when it is time; returns True if there is something to be wiped away."""
        if self.bar_format is None:
            return bool(super().display(msg, pos))
        if msg is None:
            complain(str(self))
        return False
