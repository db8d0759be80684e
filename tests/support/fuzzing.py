"""Damaged files for every reader: refused in one line that names the file, or read rightly."""

import struct
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cvae.errors import CvaeError

Edit = tuple[str, int, int, bytes]
Edits = list[Edit]
NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
EDITS = st.tuples(
    st.sampled_from(["truncate", "flip", "insert", "duplicate", "delete", "number", "swap"]),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.binary(min_size=1, max_size=6),
)


def edited(content: bytes, edit: Edit) -> bytes:
    """Return the content after one mutation."""
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


def changed(content: bytes, edits: Edits) -> bytes:
    """Return the content after these mutations."""
    return reduce(edited, edits, content)


def outcome(read: Callable[[], Any], path: Path) -> Any:
    """Return what a reader makes of a file: the result, or None for a refusal in one line that names the file."""
    try:
        return read()
    except CvaeError as error:
        message = str(error)
        assert str(path) in message
        assert message.isprintable()
        assert len(message) < 1000
        return None


def fuzz(count: int, seeds: list[Any], check: Callable[[Path, Any, Edits], bool]) -> None:
    """Have `check` look at this many mutations; it says of each if the file was read. Both have to happen."""
    read = {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=count, derandomize=True, database=None)
        @given(st.sampled_from(seeds), st.lists(EDITS, min_size=1, max_size=4))
        def run(seed: Any, edits: Edits) -> None:
            read[check(Path(folder), seed, edits)] += 1

        run()
    assert min(read.values()) >= count / 50, f"{read[True]} read, {read[False]} refused"
