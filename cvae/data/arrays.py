"""Images in NumPy's files, .npz and .npy: nothing in them is executed, no more is read than their headers announce."""

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from cvae.data.parts import (
    GREY,
    SIXTEEN_BIT,
    TWELVE_BIT,
    Array,
    Images,
    Part,
    Source,
    eight_bit,
    grey,
    levels,
    listed,
    naming,
    part_named,
    space,
)
from cvae.errors import DataError
from cvae.settings import Settings

CHUNK = 1 << 20
LARGEST_HEADER = 1 << 14
MAX_COMPRESSION = 1100  # more than deflate can do
LABELS = {"y", "label", "labels", "target", "targets"}  # words in the names of arrays that are no images


class Member(NamedTuple):
    """An array in a file, as its header describes it.

    member: its name in the archive, or None for the file itself. start: where its numbers begin. size, packed: bytes
    of header and numbers, and as the archive holds them.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    start: int
    size: int
    packed: int

    @property
    def name(self) -> str:
        """The array's name; "" for the file itself."""
        return (self.member or "").removesuffix(".npy")

    def __str__(self) -> str:
        return f"{self.path}: {self.name}" if self.name else str(self.path)


def find_arrays(path: Path, s: Settings) -> Source | None:
    """The images in an .npz or .npy file; None where the file is neither. Raises DataError where it has no images.

    Arrays are `[N, height, width]`, with one or three channels after them or before height; which of them are the
    parts of the set, their names say (`x_train`, `test`, `val_images`); of another name there can only be one.
    """
    if not os.path.isfile(path):
        return None
    with naming(path), open(path, "rb") as file:
        if not (start := file.read(6)).startswith((b"PK\3\4", npy.MAGIC_PREFIX)):
            return None
    members = list(_members(path) if start.startswith(b"PK") else [_header(path, None)])
    named: dict[str | None, list[Member]] = {}
    for each in members:
        if not LABELS.intersection(each.name.lower().split("_")):
            named.setdefault(part_named(each.name), []).append(each)
    others = [each for each in named.pop(None, []) if len(each.shape) > 2 or len(members) == 1]
    if named:
        if several := next((found for found in named.values() if len(found) > 1), None):
            raise DataError(f"{path}: holds several arrays for one part: {listed(each.name for each in several)}")
        parts = {name: _part(each) for name, (each,) in named.items() if name is not None}
    elif len(others) == 1:
        parts = {"all": _part(others[0])}
    else:
        shapes = listed(f"{each.name} {list(each.shape)}" for each in members) or "nothing"
        raise DataError(f"{path}: has to hold x_train and x_test, or one array of images; it holds {shapes}")
    return Source(".npz file" if start.startswith(b"PK") else ".npy file", path, parts, [])


def _part(member: Member) -> Part:
    """The images of an array."""
    shape = member.shape
    match shape:
        case (count, height, width) | (count, height, width, 1 | 3) | (count, 1 | 3, height, width):
            pass
        case _:
            advice = f"; reshape them: {_shaped(shape[1])}" if len(shape) == 2 else ""
            raise DataError(
                f"{member}: has the shape {list(shape)}; images are [N, height, width], or with 1 or 3 channels{advice}"
            )
    if member.dtype.kind not in "buif":
        raise DataError(f"{member}: is of type {str(member.dtype)[:40]}; images are bytes, whole numbers or floats")
    size = member.dtype.itemsize * math.prod(shape)
    if count < 1 or member.start + size != member.size or size > MAX_COMPRESSION * member.packed:
        raise DataError(f"{member}: its header announces {size} bytes, and it has {member.size - member.start}")
    return Part(
        count, height, width,
        read=lambda rows, reading: _read(member, rows, (count, height, width), reading.check),
        name=lambda row: f"{member}: image {row}",
        held=lambda number: number * height * width * (3 if _is_wide(member) else 1) + size * member.fortran,
    )  # fmt: skip


def _shaped(pixels: int) -> str:
    """How images that are rows of so many pixels get a height and a width, in NumPy's words."""
    side = math.isqrt(pixels)
    return f"images.reshape(-1, {side}, {side})" if side**2 == pixels else "images.reshape(-1, height, width)"


def _is_wide(member: Member) -> bool:
    """Whether its numbers may need more than eight bits."""
    return (member.dtype.kind in "ui" and member.dtype.itemsize > 1) or member.dtype == np.int8


def _read(member: Member, rows: Tensor, size: tuple[int, int, int], check: Callable[[], None]) -> Images:
    """The images at these rows."""
    count, height, width = size
    colour, channels_first = 3 in member.shape[1:2] + member.shape[3:], member.shape[2:] == (height, width)
    wide = _is_wide(member)
    result = space(member, len(rows), height, width, np.uint16 if wide else np.uint8)
    places = np.full(count, -1)  # of each image in the result
    places[rows.numpy()] = np.arange(len(rows))
    highest = 0
    for first, chunk in _chunks(member):
        check()
        images = levels(chunk, lambda i, first=first: f"{member}: image {first + i}")  # type: ignore[misc]
        if images.ndim == 4:
            images = np.moveaxis(images, 1, 3) if channels_first else images
            images = grey(images) if colour else images[..., 0]
        highest = max(highest, int(images.max()))
        into = places[first : first + len(chunk)]
        result[into[into >= 0]] = images[into >= 0]
    notes = [GREY] if colour else []
    words = "floats from 0 to 1" if member.dtype.kind == "f" else ""
    if wide and highest > 0xFF:
        words, result = SIXTEEN_BIT, eight_bit(result)
        notes += [TWELVE_BIT] if highest <= 0xFFF else []
    elif wide:
        notes.append(f"{member.dtype.name} up to {highest} taken as levels of 0 to 255")
    return Images(torch.from_numpy(result.astype(np.uint8, copy=False)), words, notes)


def _chunks(member: Member) -> Iterator[tuple[int, Array]]:
    """The array, some images at a time, each time with the index of the first of them."""
    shape, each = member.shape, member.dtype.itemsize * math.prod(member.shape[1:])
    step = max(1, CHUNK // each)
    read = shape[0] if member.fortran else step
    with naming(member.path), _opened(member.path, member.member) as file:
        file.read(member.start)
        for first in range(0, shape[0], read):
            count = min(read, shape[0] - first)
            content = file.read(count * each)
            if len(content) < count * each:
                raise DataError(f"{member}: is truncated, it ends within image {first + len(content) // each}")
            chunk = np.frombuffer(content, member.dtype)
            images = chunk.reshape(shape[::-1]).T if member.fortran else chunk.reshape(count, *shape[1:])
            for i in range(0, count, step):
                yield first + i, images[i : i + step]
        if file.read(1):  # an archive's checksum is looked at here
            raise DataError(f"{member}: holds more than its header announces")


# Headers


def _members(path: Path) -> Iterator[Member]:
    """The arrays in an archive."""
    with naming(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
    if not names:
        raise DataError(f"{path}: is an archive without arrays; unpack it, and give the folder of pictures")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: holds two arrays of the same name")
    for name in names:
        yield _header(path, name)


def _header(path: Path, name: str | None) -> Member:
    """The array of this name, or the one that the file is."""
    with naming(path), _opened(path, name) as file:
        header = io.BytesIO(file.read(LARGEST_HEADER))
    with naming(path), catch_warnings():
        simplefilter("ignore")  # of headers as Python 2 wrote them
        version = npy.read_magic(header)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise DataError(f"{path}: holds an array in version {version} of its format; 1.0 and 2.0 are read")
        shape, fortran, dtype = read(header)
        size = packed = os.path.getsize(path)
        if name is not None:
            with zipfile.ZipFile(path) as archive:
                size, packed = archive.getinfo(name).file_size, archive.getinfo(name).compress_size
    return Member(path, name, shape, dtype, fortran, header.tell(), size, packed)


@contextmanager
def _opened(path: Path, name: str | None) -> Iterator[IO[bytes]]:
    """The bytes of an array: of an archive's member, or of the file itself."""
    if name is None:
        with open(path, "rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            yield member
