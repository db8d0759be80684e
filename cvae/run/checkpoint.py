"""Files that cannot be half-written, checkpoints, whose content cannot do harm, and JSON. Knows nothing of CVAEs."""

import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cvae.errors import DataError, DiskError, taken_for_damage

FORMAT = 3


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values (numbers, strings, lists, dicts), wholly or not at all. Raises DiskError."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, its tensors into the CPU's memory; nothing in the file is run. Raises DataError."""
    packed = read(path)
    with taken_for_damage(f"{path}: is damaged, or no checkpoint of this program", Exception):  # anywhere in the reader
        content = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] != FORMAT:
        raise DataError(f"{path}: is not a checkpoint of format {FORMAT}, which this version reads; train anew")
    return content


def read(path: Path) -> bytes:
    """Return the content of a file. Raises DataError, naming it."""
    with taken_for_damage(f"{path}: cannot be read", OSError):
        return path.read_bytes()


@contextmanager
def telling_of_disk(problem: str) -> Iterator[None]:
    """Raise DiskError, with the problem and the reason, for what the system says within the block."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{problem} ({error.strerror or error})") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, wholly or not at all. Raises DiskError; then what stood there is intact."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place at `path` at the end of the block, on the disk and not only in a cache.

    Until then it has a name of its own, with the same ending, so that two writers do not meet. Raises DiskError.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.tmp{path.suffix}")
    with telling_of_disk(f"{path}: cannot be written"):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return what a JSON file says. Raises DataError, naming the file, if it cannot be read."""
    content = read(path)
    with taken_for_damage(f"{path}: is no valid JSON", ValueError, RecursionError):
        return json.loads(content)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. Raises DiskError."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
