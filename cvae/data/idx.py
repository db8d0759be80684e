"""Files in the IDX format of MNIST: plain, gzip or xz, whatever they are called; what they say of themselves is not
trusted.

The format: two zero bytes, a type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
uint32, then the elements. Described on the MNIST page of its authors.
"""

import gzip
import hashlib
import lzma
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from cvae.data.parts import PARTS, Images, Part, Source, listed, naming, taken
from cvae.errors import DataError
from cvae.settings import Settings

CHUNK = 1 << 20
MAX_ELEMENTS = 1 << 31
MAX_COMPRESSION = 1000  # pictures shrink to a sixth or so; what grows more than this is made to fill the memory
XZ_MEMORY = 256 << 20  # the decoder's own dictionary, whose size a file may choose
MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz"}

NAME = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<part>train|test|t10k)[-_.]"
    r"(?:(?P<images>images?[-_.]idx3[-_.]ubyte)|labels?[-_.]idx\d[-_.]\w+?)(?:\.gz|\.xz)?",
    re.IGNORECASE,
)
"""`train-images-idx3-ubyte`, `emnist-letters-test-labels-idx1-ubyte.gz`, `t10k-images.idx3-ubyte`, …"""


# Sets of files


class Files(NamedTuple):
    """The files of one set: for each part of it its images, and its labels where there are any."""

    images: dict[str, Path]
    labels: dict[str, Path]


def find_idx(path: Path, s: Settings) -> Source | None:
    """The set of IDX files at a path; None where there is none.

    The path is a folder that holds one set, itself or in a folder below it (torchvision's layout is `MNIST/raw`); or
    such a folder and the name of one of its sets, as in `raw/emnist-letters`. Raises DataError for several sets.
    """
    if not os.path.isdir(path):
        name = path.name.lower()
        return idx_set(path.parent, name) if os.path.isdir(path.parent) and not os.path.exists(path) else None
    own = _sets(path)
    below: Iterable[Path] = () if own else _folders(path)
    found = [(place, name) for place in below for name in _sets(place)] or [(path, name) for name in own]
    if len(found) > 1:
        choices = [shlex.quote(str(place / name)) for place, name in found]
        raise DataError(f"{path}: holds several sets of images; say which: --data with {listed(choices)}")
    return idx_set(*found[0]) if found else None


def idx_set(folder: Path, name: str) -> Source | None:
    """The set of a name in a folder, "" for files without a prefix; None where it is not."""
    files = _sets(folder).get(name)
    if files is None:
        return None
    parts = {part: _part(path, files.labels.get(part)) for part, path in files.images.items()}
    return Source("IDX files in", folder / name, parts, [])


def _folders(path: Path) -> Iterator[Path]:
    """The folders in a folder, and `raw` in each of them."""
    with suppress(OSError), os.scandir(path) as entries:
        for name in sorted(entry.name for entry in entries if entry.is_dir()):
            yield from (path / name, path / name / "raw")


def _sets(folder: Path) -> dict[str, Files]:
    """The sets in a folder, by their names, with images in them; none in what is no folder, or cannot be read."""
    sets: dict[str, Files] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    for name in names:  # a plain file comes before its compressed copy, and is taken
        if (match := NAME.fullmatch(name)) and os.path.isfile(folder / name):
            files = sets.setdefault((match["set"] or "").lower(), Files({}, {}))
            kind = files.images if match["images"] else files.labels
            other = kind.setdefault(PARTS[match["part"].lower()], folder / name)
            if _stem(other.name) != _stem(name):
                raise DataError(f"{folder}: holds both {other.name} and {name}; leave one of them")
    return {name: files for name, files in sets.items() if files.images}


def _stem(name: str) -> str:
    return re.sub(r"\.(gz|xz)$", "", name.lower()).replace(".", "-").replace("_", "-")


def _part(path: Path, labels: Path | None) -> Part:
    """The images in a file; the labels are only counted, until somebody asks for them."""
    count, height, width = _announced(path, 3)
    if labels is not None and (number := _announced(labels, None)[0]) != count:
        raise DataError(f"{labels}: has {number} labels for the {count} images of {path.name}")
    return Part(
        count, height, width,
        read=lambda rows, reading: Images(taken(read_idx(path, 3, check=reading.check), rows)),
        name=lambda row: f"{path}: image {row}",
        held=lambda number: (count + number) * height * width,
        labels=None if labels is None else lambda: read_idx(labels, 1),
    )  # fmt: skip


# Files


def _announced(path: Path, num_dims: int | None) -> tuple[int, ...]:
    """The dimensions that a file's header announces. num_dims: as in `_count`."""
    with naming(path):
        content = bytearray(next(_chunks(path, 4 + 4 * 255), b""))
    if len(content) < 4 or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path}: is truncated, its header is incomplete")
    _count(path, content, num_dims)
    return _dims(content, content[3])


def read_idx(path: Path, num_dims: int, sha256: str | None = None, check: Callable[[], None] = lambda: None) -> Tensor:
    """The array in an IDX file of unsigned bytes, uint8 `[d_1, …, d_num_dims]`.

    The memory taken grows with what the file really holds, whatever its header claims. `sha256`: what the digest of
    the uncompressed file has to be. check: called every MiB. Raises DataError, naming the file, if it cannot be read or
    is damaged.
    """
    with naming(path):
        content = _read_bounded(path, num_dims, check)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged (its SHA-256 is not the expected one); install the package anew")
    start = 4 + 4 * num_dims
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(_dims(content, num_dims))


def _read_bounded(path: Path, num_dims: int, check: Callable[[], None]) -> bytearray:
    """The uncompressed file, read no further than its header says."""
    content = bytearray()
    start, end = 4 + 4 * num_dims, None
    for chunk in _chunks(path):
        check()
        content += chunk
        if end is None and len(content) >= start:
            end = start + _count(path, content, num_dims)
        if end is not None and len(content) > end:
            raise DataError(f"{path}: holds more than the {end} bytes that its header announces")
    if end is None:
        raise DataError(f"{path}: is truncated, its header is incomplete")
    if len(content) < end:
        raise DataError(f"{path}: is truncated, it holds {len(content)} of the {end} bytes that its header announces")
    return content


def _count(path: Path, content: bytearray, num_dims: int | None) -> int:
    """The number of elements announced, after a look at whether the header can be true.

    num_dims: that the array has to have, of unsigned bytes; None: any array will do.
    """
    magic = bytes([0, 0, 8, num_dims or content[3]])
    if content[:4] != magic and (num_dims is not None or content[:2] != magic[:2] or content[3] == 0):
        expected, found = int.from_bytes(magic), int.from_bytes(content[:4])
        raise DataError(f"{path}: is no IDX file of {num_dims or 1}-dimensional bytes (magic {found}, not {expected})")
    dims = _dims(content, content[3])
    count = math.prod(dims)
    if not 0 < count <= MAX_ELEMENTS:
        raise DataError(f"{path}: its header announces {'×'.join(map(str, dims))} elements; 1 to 2^31 are read")
    if count > MAX_COMPRESSION * path.stat().st_size:
        raise DataError(f"{path}: is truncated, its header announces {count} bytes")
    return count


def _dims(content: bytearray, num_dims: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i]) for i in range(num_dims))


def _chunks(path: Path, size: int = CHUNK) -> Iterator[bytes]:
    """The uncompressed bytes, so many at a time."""
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        packing = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
        if packing == "xz":
            yield from _unxz(file, size)
        else:
            with gzip.GzipFile(fileobj=file) if packing == "gzip" else file as stream:
                while chunk := stream.read(size):
                    yield chunk


def _unxz(file: BinaryIO, size: int) -> Iterator[bytes]:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    while not decoder.eof:
        compressed = file.read(CHUNK) if decoder.needs_input else b""
        if decoder.needs_input and not compressed:
            raise EOFError("the compressed stream ends early")
        yield decoder.decompress(compressed, max_length=size)
    if decoder.unused_data or file.read(1):
        raise lzma.LZMAError("bytes after the end of the compressed stream")
