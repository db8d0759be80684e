"""Damaged files for every reader: refused in one line that names the file, or read rightly."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvae.errors import CvaeError

Damage = Callable[[bytes], bytes]


def damage_by(seed: int) -> Damage:
    """Return a function that cuts, flips, inserts, or forges a number in the header, one to three times."""

    def damaged(content: bytes) -> bytes:
        draw = random.Random(seed)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(content) + 1)
            head = min(at, draw.randrange(24))
            changes = [
                content[:at],
                content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
                content[:at] + draw.randbytes(3) + content[at:],
                content[:at] + content[at + draw.randint(1, 64) :],
                content[:head] + draw.choice([0, 1, 0x7FFF_FFFF, 0xFFFF_FFFF]).to_bytes(4) + content[head + 4 :],
            ]
            content = draw.choice(changes)
        return content

    return damaged


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


def fuzz(count: int, kinds: list[Any], check: Callable[[Path, Any, Damage], bool]) -> None:
    """Have `check` look at this many damages; it says of each if the file was read. Both have to happen."""
    with tempfile.TemporaryDirectory() as folder:
        read = [check(Path(folder), kinds[seed % len(kinds)], damage_by(seed)) for seed in range(count)]
    assert count / 50 <= sum(read) <= count * 49 / 50
