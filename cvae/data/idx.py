"""Read files in the IDX format of MNIST: plain, .gz or .xz, and trust nothing that they say of themselves.

The format: two zero bytes, a type (8: unsigned byte), the number of dimensions, each dimension as a big-endian
uint32, then the elements. Described on the MNIST page of its authors.
"""

import gzip
import hashlib
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cvae.errors import DataError

SUFFIXES = ("", ".gz", ".xz")

CHUNK = 1 << 20
MAX_ELEMENTS = 1 << 31
MAX_COMPRESSION = 1000  # pictures shrink to a sixth or so; what grows more than this is made to fill the memory
XZ_MEMORY = 256 << 20  # the decoder's own dictionary, whose size a file may choose


def read_idx(path: Path, num_dims: int, sha256: str | None = None) -> Tensor:
    """The array in an IDX file of unsigned bytes, uint8 `[d_1, …, d_num_dims]`.

    The memory taken grows with what the file really holds, whatever its header claims. `sha256`: what the digest of
    the uncompressed file has to be. Raises DataError, naming the file, if it cannot be read or is damaged.
    """
    try:
        content = _read_bounded(path, num_dims)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error or type(error).__name__})") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged (its SHA-256 is not the expected one); install the package anew")
    start = 4 + 4 * num_dims
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(_dims(content, num_dims))


def _read_bounded(path: Path, num_dims: int) -> bytearray:
    """The uncompressed file, read no further than its header says."""
    content = bytearray()
    start, end = 4 + 4 * num_dims, None
    for chunk in _chunks(path):
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


def _count(path: Path, content: bytearray, num_dims: int) -> int:
    """The number of elements announced, after a look at whether the header can be true."""
    magic = bytes([0, 0, 8, num_dims])
    if content[:4] != magic:
        expected, found = int.from_bytes(magic), int.from_bytes(content[:4])
        raise DataError(f"{path}: is no IDX file of {num_dims}-dimensional bytes (magic {found}, not {expected})")
    dims = _dims(content, num_dims)
    count = math.prod(dims)
    if not 0 < count <= MAX_ELEMENTS:
        raise DataError(f"{path}: its header announces {'×'.join(map(str, dims))} elements; 1 to 2^31 are read")
    if count > MAX_COMPRESSION * path.stat().st_size:
        raise DataError(f"{path}: is truncated, its header announces {count} bytes")
    return count


def _dims(content: bytearray, num_dims: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i]) for i in range(num_dims))


def _chunks(path: Path) -> Iterator[bytes]:
    """The uncompressed bytes, a megabyte at a time."""
    with open(path, "rb") as file:
        if path.suffix == ".xz":
            yield from _unxz(file)
        elif path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as stream:
                while chunk := stream.read(CHUNK):
                    yield chunk
        else:
            while chunk := file.read(CHUNK):
                yield chunk


def _unxz(file: BinaryIO) -> Iterator[bytes]:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    while not decoder.eof:
        compressed = file.read(CHUNK) if decoder.needs_input else b""
        if decoder.needs_input and not compressed:
            raise EOFError("the compressed stream ends early")
        yield decoder.decompress(compressed, max_length=CHUNK)
    if decoder.unused_data or file.read(1):
        raise lzma.LZMAError("bytes after the end of the compressed stream")
