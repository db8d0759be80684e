"""Damaged and forged files for every reader: a DataError of one line that names the file, or the right answer."""

import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvae.errors import DataError
from support.scripts import PATIENCE

EXAMPLES = {
    "idx": 1500, "arrays": 1500, "pictures": 1500, "folder": 300,
    "checkpoint": 2500, "settings": 2000, "size": 500, "metrics": 1000, "json": 1000,
}  # fmt: skip
"""How many files each reader is tried on."""

NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
EDITS = st.tuples(
    st.sampled_from(["truncate", "flip", "insert", "duplicate", "delete", "number", "swap"]),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.binary(min_size=1, max_size=6),
)


def edited(content: bytes, edit: tuple[str, int, int, bytes]) -> bytes:
    """The content after one mutation."""
    kind, first, second, new = edit
    at = first % (len(content) + 1)
    length = 1 + second % 64
    before, after = content[:at], content[at:]
    match kind:
        case "truncate":
            return before
        case "flip":
            return before + bytes([after[0] ^ (1 << second % 8)]) + after[1:] if after else content
        case "insert":
            return before + new + after
        case "duplicate":
            return before + after[:length] * (1 + second % 3) + after
        case "delete":
            return before + after[length:]
        case "number":  # what a header's field may be forged to, at the start where headers are
            at %= 24
            order = "<" if second % 2 else ">"
            return content[:at] + struct.pack(order + "I", NUMBERS[second % len(NUMBERS)]) + content[at + 4 :]
        case _:
            return after + before


def mutations(seeds: list[Any]) -> st.SearchStrategy[tuple[Any, list[tuple[str, int, int, bytes]]]]:
    return st.tuples(st.sampled_from(seeds), st.lists(EDITS, min_size=1, max_size=4))


@contextmanager
def time_limit() -> Iterator[None]:
    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the reader hangs: {PATIENCE} s and more")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)  # for one example, of milliseconds in truth
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(read: Callable[[], Any], path: Path) -> Any:
    """What the reader makes of a file: the result, or None for a refusal in one line that names the file."""
    try:
        with time_limit():
            return read()
    except DataError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 1000
        return None


def fuzz(kind: str, seeds: list[Any], check: Callable[[Path, Any, list[tuple[str, int, int, bytes]]], bool]) -> None:
    """Have `check` look at so many mutations; it says of each whether the file was read. Both have to happen."""
    read = refused = 0
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=EXAMPLES[kind],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(mutations(seeds))
        def run(mutation: tuple[Any, list[tuple[str, int, int, bytes]]]) -> None:
            nonlocal read, refused
            if check(Path(folder), *mutation):
                read += 1
            else:
                refused += 1

        run()
    assert read + refused >= EXAMPLES[kind]
    assert min(read, refused) >= EXAMPLES[kind] / 50, f"{read} read, {refused} refused"
