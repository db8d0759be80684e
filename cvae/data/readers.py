"""Readers of sets of images: the path of IDX files, of NumPy's files or of pictures in, grey levels out."""

import gzip
import lzma
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvae.console import Bar
from cvae.data.pictures import Array, pictures_below, read_picture, resized, to_bytes
from cvae.errors import DataError, taken_for_damage

PARTS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation"}
PARTS |= {"test": "test", "testing": "test", "t10k": "test"}
"""The words in the names of files, folders and arrays that say to which part of a set they belong."""

LABELS = {"y", "label", "labels", "target", "targets"}  # words in the names of arrays that are no images
# train-images-idx3-ubyte, emnist-letters-test-labels-idx1-ubyte.gz, t10k-images.idx3-ubyte, …
IDX_NAME = re.compile(r"(?i)(?:(.+)[-_.])?(train|test|t10k)[-_.](image|label)s?[-_.]idx\d[-_.]\w+(?:\.[gx]z)?")
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {b"\x1f\x8b": gzip.decompress, b"\xfd7": lzma.decompress}


class Source(NamedTuple):
    """A set of images as it was read; or of their classes, int64 `[N]`, where these were asked for."""

    form: str  # in words
    place: str  # "" for MNIST, which comes with the package
    parts: dict[str, Tensor]  # train, validation and test, or all where it is not divided: uint8 [N, height, width]
    notes: list[str]  # what was chosen in reading it, in words


def part_named(name: str) -> str | None:
    """Return the part that a name speaks of, as `x_train` and `Testing` do; None: of no part, or of several."""
    parts = {PARTS[word] for word in name.lower().replace("-", "_").split("_") if word in PARTS}
    return parts.pop() if len(parts) == 1 else None


def read_idx_set(path: Path, wanted: Collection[str], kind: str = "images") -> Source | None:
    """Read the wanted parts of a set of IDX files, `images` or `labels`; None where there is none.

    path: a folder that holds one set, itself or below (`MNIST/raw`); or a folder and a set's name, `emnist-letters`.
    """
    sets: dict[Path, dict[tuple[str, str], Path]] = defaultdict(dict)
    folder, levels = path, [("*",), ("*/*", "*/raw/*")]
    if not path.is_dir():
        folder, levels = path.parent, [(f"{path.name}[-_.]*",)]
    for patterns in levels:
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):  # plain before packed files
            if (match := IDX_NAME.fullmatch(file.name)) and file.is_file():
                name, part, what = match.groups()
                sets[file.parent / (name or "")].setdefault((PARTS[part.lower()], f"{what.lower()}s"), file)
        for place in [place for place, files in sets.items() if not any(what == "images" for _, what in files)]:
            del sets[place]
        if sets:
            break
    if len(sets) > 1:
        choices = ", ".join(shlex.quote(str(place)) for place in sets)
        raise DataError(f"{path}: holds several sets of images; say which: --data with {choices}")
    if not sets:
        return None
    ((place, files),) = sets.items()
    source = Source("IDX files in", str(place), {}, [])
    for part in (part for part in wanted if {(part, "images"), (part, kind)} <= files.keys()):
        array, name = read_idx(files[part, kind]), str(files[part, kind])
        if kind == "images":
            source.parts[part] = to_images(array, name, source.notes)
        elif len(array) != (count := len(read_idx(files[part, "images"]))):
            raise DataError(f"{name}: has {len(array)} labels for {count} images")
        else:  # QMNIST's first column is the class
            source.parts[part] = torch.tensor(array.reshape(count, -1)[:, 0].astype(np.int64))
    return source


def read_idx(path: Path) -> Array:
    """Return the array in an IDX file, plain, gzip or xz, whatever its name says.

    The format: two zero bytes, a type, the number of dimensions, each dimension as a big-endian uint32, the elements.
    """
    with taken_for_damage(f"{path}: is damaged, or no IDX file", Exception):  # damage may show anywhere
        content = path.read_bytes()
        content = UNPACKERS.get(content[:2], bytes)(content)
        start = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:start], ">u4").tolist()
        return np.frombuffer(content, IDX_TYPES[content[2]], offset=start).reshape(shape)


def read_arrays(path: Path, wanted: Collection[str]) -> Source | None:
    """Read the wanted parts of the images in an .npz or .npy file; None where it is neither. Nothing is executed.

    The parts are known by the names of arrays (`x_train`, `test`, `val_images`); of another name there can only be one.
    """
    form = path.suffix.lower()
    if form not in (".npz", ".npy") or not path.is_file():
        return None
    source = Source(f"{form} file", str(path), {}, [])
    with taken_for_damage(f"{path}: is damaged, or no {form} file of numbers", Exception), path.open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        arrays: Mapping[str, Array] = {"images": stored} if isinstance(stored, np.ndarray) else stored
        names = [name for name in arrays if not LABELS.intersection(name.lower().split("_"))]
        parts = {name: part for name in names if (part := part_named(name))} or dict.fromkeys(names, "all")
        if not parts or len(set(parts.values())) < len(parts):
            problem = f"has to hold x_train and x_test, or one array of images; it holds {', '.join(arrays)}"
            raise DataError(f"{path}: {problem}")
        for name, part in parts.items():
            if part in (*wanted, "all"):
                source.parts[part] = to_images(arrays[name], f"{path}: {name}", source.notes)
    return source


def to_images(array: Array, name: str, notes: list[str]) -> Tensor:
    """Return an array of images as uint8 `[N, height, width]`, 0 to 255; notes takes what was chosen, in words.

    array: `[N, height, width]`, with one or three channels after them or before height; truth values, bytes, whole
    numbers of 0 to 255 or to 65535, or floats from 0 to 1. Colours become luminance, by ITU-R 601.
    """
    pixels = array[..., None] if array.ndim == 3 else array
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        pixels = np.moveaxis(pixels, 1, 3)
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        wanted = "images are [N, height, width], or with 1 or 3 channels; images.reshape(-1, height, width) helps"
        raise DataError(f"{name}: has the shape {list(array.shape)}; {wanted}")
    if pixels.dtype.kind not in "buif":
        raise TypeError(f"{pixels.dtype.name} is no type of grey levels")
    most = 1 if pixels.dtype.kind in "bf" else 255 if pixels.dtype == np.uint8 or pixels.max() < 256 else 65535
    if pixels.dtype not in (np.uint8, np.bool_):
        notes.append(f"{pixels.dtype.name} taken as levels from 0 to {most}")
    images = to_bytes(pixels, most, name)
    if images.shape[3] == 3:
        images = np.array(Image.fromarray(images.reshape(-1, *images.shape[2:])).convert("L"))  # as one tall picture
    return torch.from_numpy(images.reshape(pixels.shape[:3]))


def read_pictures(path: Path, wanted: Collection[str], side: int | None) -> Source | None:
    """Read the wanted parts of the pictures below a folder; None where there is no folder, or no picture in it.

    Folders `train`, `test` and `val` are the parts of the set; without the first two of them the set is not divided.
    side: height and width that all are scaled to; None: they have to be of one size.
    """
    names, others = pictures_below(path) if path.is_dir() else ([], 0)
    parts: dict[str | None, list[str]] = defaultdict(list)
    for name in names:
        top, _, below = name.partition(os.sep)
        parts[part_named(top) if below else None].append(name)
    if not names:
        return None
    if not parts.keys() & {"train", "test"}:
        parts = {"all": names}
    others += len(parts.pop(None, []))
    source = Source("pictures below", str(path), {}, [f"{others} other files passed over"] if others else [])
    for part in (part for part in parts if part in (*wanted, "all")):
        images: list[Array] = []
        with Bar("pictures", len(parts[part]), "img") as bar:
            for name in parts[part]:
                picture = read_picture(path / name)
                images.append(picture if side is None else resized(picture, side))
                bar.update()
                if images[-1].shape != images[0].shape:
                    size, first = (f"{height}×{width}" for height, width in (images[-1].shape, images[0].shape))
                    problem = f"has {size} pixels, and {path / parts[part][0]} has {first}"
                    raise DataError(f"{path / name}: {problem}; --size N scales all")
        source.parts[str(part)] = torch.from_numpy(np.stack(images))
    return source
