"""Readers of arrays of images: IDX files as MNIST's, NumPy's files; grey levels as bytes, however they were stored."""

import gzip
import lzma
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvae.errors import CvaeError, DataError, UsageError, first_line, is_out_of_memory

Array = npt.NDArray[Any]

PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
PARTS |= {"test": "test", "testing": "test", "t10k": "test"}
"""The words in the names of files, folders and arrays that say to which part of a set they belong."""

LABELS = {"y", "label", "labels", "target", "targets"}  # words in the names of arrays that are no images
GREY, SIXTEEN_BIT = "colour made grey by ITU-R 601", "16-bit levels scaled to 8"
AT_ONCE = 1000  # images whose levels are converted at once

IDX_NAME = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<part>train|test|t10k)[-_.]"
    r"(?:(?P<images>images?[-_.]idx3[-_.]ubyte)|labels?[-_.]idx\d[-_.]\w+?)(?:\.gz|\.xz)?",
    re.IGNORECASE,
)
"""`train-images-idx3-ubyte`, `emnist-letters-test-labels-idx1-ubyte.gz`, `t10k-images.idx3-ubyte`, …"""

IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
UNPACKERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}  # by their first two bytes


class Source(NamedTuple):
    """A set of images as it was read; or of their classes, int64 `[N]`, where these were asked for."""

    form: str  # in words
    place: str  # "" for MNIST, which comes with the package
    parts: dict[str, Tensor]  # train, validation and test, or all where it is not divided: uint8 [N, height, width]
    notes: list[str]  # what was chosen in reading it, in words


@contextmanager
def naming(path: object, problem: str = "cannot be read") -> Iterator[None]:
    """Raise DataError, naming the file, for all that a reader stumbles over; UsageError for too little memory."""
    try:
        yield
    except CvaeError:
        raise
    except Exception as error:
        reason = (getattr(error, "strerror", None) or first_line(error))[:200]
        if is_out_of_memory(error) or "out of memory" in reason:  # as Pillow says it
            raise UsageError(f"{path}: does not fit into the memory ({reason}); smaller images do (--size)") from None
        raise DataError(f"{path}: {problem} ({reason})") from None


def part_named(name: str) -> str | None:
    """Return the part that a name speaks of, as `x_train` and `Testing` do; None: of no part, or of several."""
    parts = {PARTS[word] for word in name.lower().replace("-", "_").split("_") if word in PARTS}
    return parts.pop() if len(parts) == 1 else None


def read_idx_set(path: Path, wanted: Collection[str], kind: str = "images") -> Source | None:
    """Read the wanted parts of a set of IDX files, `images` or `labels`; None where there is none.

    path: a folder that holds one set, itself or below (`MNIST/raw`); or a folder and a set's name, `emnist-letters`.
    """
    if path.is_dir():
        tops = sorted(top for top in path.iterdir() if top.is_dir())
        folders = [path] if _idx_files(path) else [place for top in tops for place in (top, top / "raw")]
        sets = [(place / name, files) for place in folders for name, files in _idx_files(place).items()]
    else:
        sets = [(path, files) for name, files in _idx_files(path.parent).items() if name == path.name.lower()]
    if len(sets) > 1:
        choices = ", ".join(shlex.quote(str(place)) for place, _ in sets)
        raise DataError(f"{path}: holds several sets of images; say which: --data with {choices}")
    for place, files in sets:
        source = Source("IDX files in", str(place), {}, [])
        for part in (part for part in wanted if {(part, "images"), (part, kind)} <= files.keys()):
            array, name = read_idx(files[part, kind]), str(files[part, kind])
            if kind == "images":
                source.parts[part] = as_images(array, name, source.notes)
            elif len(array) != (count := len(read_idx(files[part, "images"]))):
                raise DataError(f"{name}: has {len(array)} labels for {count} images")
            else:  # QMNIST's first column is the class
                source.parts[part] = torch.tensor(array.reshape(count, -1)[:, 0].astype(np.int64))
        return source
    return None


def _idx_files(folder: Path) -> dict[str, dict[tuple[str, str], Path]]:
    """Return the files by part and `images` or `labels`, by the prefixes of their names."""
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # a plain file comes before its packed copy
        if (match := IDX_NAME.fullmatch(path.name)) and path.is_file():
            files = sets.setdefault((match["set"] or "").lower(), {})
            key = PARTS[match["part"].lower()], "images" if match["images"] else "labels"
            if not path.name.startswith(files.setdefault(key, path).name):
                raise DataError(f"{folder}: holds both {files[key].name} and {path.name}; leave one of them")
    return {name: files for name, files in sets.items() if any(kind == "images" for _, kind in files)}


def read_idx(path: Path) -> Array:
    """Return the array in an IDX file, plain, gzip or xz, whatever its name says.

    The format: two zero bytes, a type, the number of dimensions, each dimension as a big-endian uint32, the elements.
    """
    with naming(path), open(path, "rb") as file:
        unpack = UNPACKERS.get(file.read(2), nullcontext)
        file.seek(0)
        with unpack(file) as stream:
            content = stream.read()
        if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES or content[3] == 0:
            raise DataError(f"{path}: is no IDX file (it begins with {content[:4].hex(' ') or 'nothing'})")
        dtype, start = np.dtype(IDX_TYPES[content[2]]), 4 + 4 * content[3]
        shape = np.frombuffer(content[4:start], ">u4").tolist()
        if len(content) != start + (size := dtype.itemsize * math.prod(shape)):
            raise DataError(f"{path}: is truncated or too long (its header announces {size:,} bytes)")
        return np.frombuffer(content, dtype, offset=start).reshape(shape)


def mnist(part: str, kind: str = "images") -> Tensor:
    """Return the images of the MNIST in the package, part `train` or `t10k`, uint8 `[N, 28, 28]`; or its `labels`."""
    name = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.xz"
    array = read_idx(Path(__file__).with_name("mnist") / name)
    return torch.tensor(array, dtype=torch.uint8 if kind == "images" else torch.int64)


def read_arrays(path: Path, wanted: Collection[str]) -> Source | None:
    """Read the wanted parts of the images in an .npz or .npy file; None where it is neither. Nothing is executed.

    The parts are known by the names of arrays (`x_train`, `test`, `val_images`); of another name there can only be one.
    """
    if not path.is_file():
        return None
    with naming(path), open(path, "rb") as file:
        form = {b"PK\3\4": ".npz file", b"\x93NUM": ".npy file"}.get(file.read(4))
        if form is None:
            return None
        file.seek(0)
        stored = np.load(file if form == ".npz file" else path, mmap_mode="r", allow_pickle=False)
        with stored if form == ".npz file" else nullcontext({"": stored}) as arrays:
            source = Source(form, str(path), {}, [])
            for name, part in _parts(path, arrays).items():
                if part in (*wanted, "all"):
                    source.parts[part] = as_images(arrays[name], f"{path}: {name}".strip(": "), source.notes)
    return source


def _parts(path: Path, arrays: Mapping[str, Array]) -> dict[str, str]:
    """Return the parts of a set by the names of their arrays, or `all` for the only array of images."""
    names = [name for name in arrays if not LABELS.intersection(name.lower().split("_"))]
    parts = {name: part for name in names if (part := part_named(name))}
    parts = parts or {name: "all" for name in names if len(arrays) == 1 or np.ndim(arrays[name]) > 2}
    if not parts or len(set(parts.values())) < len(parts):
        held = ", ".join(f"{name} {list(np.shape(arrays[name]))}" for name in arrays) or "nothing"
        raise DataError(f"{path}: has to hold x_train and x_test, or one array of images; it holds {held}")
    return parts


def as_images(array: Array, name: str, notes: list[str]) -> Tensor:
    """Return an array of images as uint8 `[N, height, width]`, 0 to 255; notes takes what was chosen, in words.

    array: `[N, height, width]`, with one or three channels after them or before height; truth values, bytes, whole
    numbers of 0 to 255 or to 65535, or floats from 0 to 1.
    """
    match np.shape(array):
        case (_, height, width) | (_, height, width, 1 | 3) | (_, 1 | 3, height, width) if array.size:
            kind = array.dtype.kind
        case shape:
            wanted = "images are [N, height, width], or with 1 or 3 channels; images.reshape(-1, height, width) helps"
            raise DataError(f"{name}: has the shape {list(shape)}; {wanted}")
    if kind not in "buif":
        raise DataError(f"{name}: is of type {str(array.dtype)[:40]}; images are bytes, whole numbers or floats")
    most = 1 if kind in "bf" else 255 if array.dtype == np.uint8 or (brightest := array.max()) < 256 else 65535
    if kind == "f" or most > 255:
        notes.append(SIXTEEN_BIT if most > 255 else "floats from 0 to 1")
    elif most == 255 and array.dtype != np.uint8:
        notes.append(f"{array.dtype.name} up to {brightest} taken as levels of 0 to 255")
    array = np.moveaxis(array, 1, 3) if array.shape[2:] == (height, width) else array  # channels last
    images = np.empty((len(array), height, width), np.uint8)
    for first in range(0, len(array), AT_ONCE):
        images[first : first + AT_ONCE] = levels(array[first : first + AT_ONCE], most, name, first)
    notes += [GREY] * (array.size == 3 * images.size)
    return checked(images, lambda row: f"{name}: image {row}", notes)


def levels(images: Array, most: int, name: str, first: int = 0) -> Array:
    """Return grey levels or colours `[N, height, width(, 1 or 3)]`, 0 to `most`, as uint8 `[N, height, width]`.

    first: the index of the first of these images in the array of this name, for messages.
    """
    flat = images.reshape(len(images), -1)
    low, high = flat.min(1), flat.max(1)
    for i in np.flatnonzero(~((low >= 0) & (high <= most))):  # NaN too: it compares as false
        problem = f"holds numbers from {low[i]:.6g} to {high[i]:.6g}, which have to be from 0 to {most}"
        raise DataError(f"{name}: image {first + i}: {problem}")
    if images.dtype.kind in "bf":
        images = np.rint(images.astype(np.float32) * 255)
    images = images.astype(np.uint16 if most > 255 else np.uint8)
    if images.ndim == 4 and images.shape[3] == 3:  # luminance by ITU-R 601, rounded as Pillow does it
        images = (((images.astype(np.int64) @ np.array([19595, 38470, 7471])) + 0x8000) >> 16).astype(images.dtype)
    images = images.reshape(images.shape[:3])
    return ((images.astype(np.uint32) + 128) // 257).astype(np.uint8) if most > 255 else images


def checked(images: Array, name: Callable[[int], str], notes: list[str]) -> Tensor:
    """Return images uint8 `[N, height, width]`, those of levels 0 and 1 as black and white; refuse constant ones."""
    low, high = images.min((1, 2)), images.max((1, 2))
    for row in np.flatnonzero(low == high):
        raise DataError(f"{name(int(row))}: is of one grey level throughout; leave it out")
    if high.max() == 1:
        notes.append("the brightest level is 1 of 255: taken as black and white, and scaled")
        images *= 255
    return torch.from_numpy(images)
