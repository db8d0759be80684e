"""Standard output and standard error, whatever they lead to: a terminal that is not UTF-8, a pipe, nothing at all;
and how far something has come that takes its time."""

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import ParamSpec, TextIO

from tqdm import tqdm

from cvae.errors import CvaeError, DiskError, telling_of_memory

Arguments = ParamSpec("Arguments")
BAR_AFTER_S, LINE_EVERY_S = 2, 60
ASCII = {
    "±": "+-", "−": "-", "–": "-", "─": "-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "…": "...", "ŷ": "y",
    "▀": '"', "▄": "_", "█": "#",
}  # fmt: skip
"""How characters are written where they cannot be shown; any other one by its number, as \\u00e9."""


def _written_in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


codecs.register_error("cvae.ascii", _written_in_ascii)


def called(script: str) -> str:
    """How the user calls a script: `python train.py`, or `cvae-train` where this one was called in that way."""
    return f"cvae-{Path(script).stem}" if Path(sys.argv[0]).stem.startswith("cvae-") else f"python {script}"


def program(script: str) -> str:
    """The name by which a script speaks of itself: `train.py` or `cvae-train`."""
    return called(script).removeprefix("python ")


def command(script: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Makes `main` of a script one that any terminal can show, and that ends in one line where it fails as expected."""

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @wraps(main)
        def safe_main(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            with safe_output():
                try:
                    with telling_of_memory():
                        return main(*args, **kwargs)
                except CvaeError as error:
                    if not error.is_told_elsewhere:
                        complain(f"{program(script)}: {error}")
                    return error.exit_code

        return safe_main

    return decorate


@contextmanager
def safe_output() -> Iterator[None]:
    """Within it, all that is printed can be encoded, and there is somewhere to print it; all is put back after it."""
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (nowhere if stream is None else stream for stream in streams)  # None: it was closed
        errors = [(each, each.errors) for each in streams if isinstance(each, TextIOWrapper)]
        for stream, _ in errors:
            stream.reconfigure(errors="cvae.ascii")
        try:
            yield
        finally:
            for stream, before in errors:
                try:
                    stream.reconfigure(errors=before)  # flushes it
                except OSError:
                    _lead_nowhere(stream)
            sys.stdout, sys.stderr = streams


def say(text: str, end: str = "\n") -> None:
    """Print on standard output, at once; where nobody reads it any more, nothing. Raises DiskError if it is full."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _lead_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise DiskError(f"standard output: cannot be written ({error.strerror or error})") from None


def complain(line: str) -> None:
    """Print a line on standard error, at once, if that can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _lead_nowhere(sys.stderr)


def _lead_nowhere(stream: TextIO) -> None:
    """Drop what is still to be written to a stream, and what will be: else it fails once more when Python ends."""
    with suppress(OSError, ValueError):  # that of a notebook has no descriptor, and fails nowhere else
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Bar(tqdm):  # type: ignore[misc]
    """How far something has come, with its rate and the time left: a bar on a terminal, else a line a minute.

    The bar appears after two seconds, and leaves with the end of the `with` block; `update` counts.
    total: how many of a unit there are. show: whether the user is to see it at all.
    """

    monitor_interval = 0  # no thread of its own

    def __init__(self, what: str, total: int, unit: str, show: bool = True):
        plain = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
        form = None if sys.stderr.isatty() else plain
        super().__init__(
            desc=what, total=total, unit=unit, unit_scale=True, miniters=1, leave=False, disable=not show,
            delay=BAR_AFTER_S if form is None else LINE_EVERY_S, mininterval=0.1 if form is None else LINE_EVERY_S,
            bar_format=form, file=sys.stderr if form is None else StringIO(),
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Called by tqdm when it is time; returns whether there is something to be wiped away."""
        if self.bar_format is None:
            return bool(super().display(msg, pos))
        if msg is None:
            complain(str(self))
        return False
