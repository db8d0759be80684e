"""Folders of pictures, read by Pillow: files made to fill the memory, or to lead out of the folder, are refused."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cvae.console import Bar
from cvae.data.parts import (
    GREY,
    SIXTEEN_BIT,
    TWELVE_BIT,
    Array,
    Images,
    Part,
    Reading,
    Source,
    eight_bit,
    levels,
    listed,
    naming,
    part_named,
    scaled,
    space,
)
from cvae.errors import DataError
from cvae.settings import Settings

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
LEFT_OUT = ("__MACOSX",)  # folders that are never looked into, beside those whose names begin with a dot
ORIENTATION = 0x0112  # the EXIF tag


def find_pictures(path: Path, s: Settings) -> Source | None:
    """The pictures below a folder; None where it is no folder, or has none.

    Where the folder has folders `train` and `test`, these are the parts of the set, and `val` or `validation` too;
    else the set is not divided, and all other folders, of classes for instance, are alike. Raises DataError.
    """
    if not os.path.isdir(path):
        return None
    found = _Listing(path)
    tops: dict[str | None, set[str]] = {}
    for picture in found.pictures:
        top, *below = picture.split(os.sep)
        tops.setdefault(part_named(top) if below else None, set()).add(top)
    parts: dict[str, list[str]] = {}
    notes = [f"{found.others} files that are no pictures passed over"] if found.others else []
    if "train" in tops or "test" in tops:
        for part, names in tops.items():
            if part is not None and len(names) > 1:
                raise DataError(f"{path}: has several folders for one part: {listed(sorted(names))}")
        for picture in found.pictures:
            parts.setdefault(part_named(picture.split(os.sep)[0]) or "", []).append(picture)
        if beside := parts.pop("", []):
            notes.append(f"{len(beside)} pictures beside train and test passed over, {beside[0]} for one")
    elif found.pictures:
        parts["all"] = found.pictures
    else:
        return None
    return Source("pictures below", path, {name: _part(path, names, s.size) for name, names in parts.items()}, notes)


def _part(folder: Path, names: Sequence[str], side: int | None) -> Part:
    """These pictures; all of the size of the first one, unless they are scaled."""
    paths = [os.path.join(folder, name) for name in names]
    height, width = (side, side) if side else read_picture(paths[0]).shape
    expected = None if side else Expected(paths[0], height, width)

    def read(rows: Tensor, reading: Reading) -> Images:
        pixels = space(folder, len(rows), height, width)
        notes: list[str] = []
        with Bar("pictures", len(rows), "img", reading.show) as bar:
            for i, row in enumerate(rows.tolist()):
                reading.check()
                pixels[i] = read_picture(paths[row], side, expected, notes)
                bar.update()
        if SIXTEEN_BIT in notes and pixels.max() <= eight_bit(np.array([0xFFF])):
            notes.append(TWELVE_BIT)
        return Images(torch.from_numpy(pixels), notes=notes)

    return Part(len(paths), height, width, read, paths.__getitem__, lambda count: count * height * width)


def pictures_below(folder: str | Path) -> list[str]:
    """The paths in a folder of all pictures below it, sorted, as `find_pictures` takes them. Raises DataError."""
    return _Listing(Path(folder)).pictures


class _Listing:
    """What lies below a folder: `pictures`, their paths in it, sorted; and the number of `others`.

    Nothing is opened, and what is no plain file, or hidden, never will be. Raises DataError for symbolic links to
    pictures outside of the folder, and to folders.
    """

    def __init__(self, folder: Path):
        self.pictures: list[str] = []
        self.others = 0
        self._folder, self._root = str(folder), os.path.realpath(folder)
        extensions = Image.registered_extensions()
        self._suffixes = {suffix for suffix, form in extensions.items() if form in FORMATS}
        left = [self._folder]
        while left:
            place = left.pop()
            try:
                with os.scandir(place) as entries:
                    left += [entry.path for entry in entries if self._is_folder(entry)]
            except OSError as error:
                raise DataError(f"{place}: cannot be read ({error.strerror})") from None
        self.pictures.sort(key=lambda name: name.split(os.sep))

    def _is_folder(self, entry: "os.DirEntry[str]") -> bool:
        """Whether this is a folder to look into; what is not is taken, or counted."""
        hidden = entry.name.startswith(".") or entry.name in LEFT_OUT
        if entry.is_dir(follow_symlinks=False):
            return not hidden
        if hidden:
            return False
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink():
            self._check_link(entry.path, suffix in self._suffixes)
        if suffix in self._suffixes and entry.is_file():
            self.pictures.append(os.path.relpath(entry.path, self._folder))
        else:
            self.others += 1
        return False

    def _check_link(self, path: str, is_picture: bool) -> None:
        target = os.path.realpath(path)
        if os.path.isdir(target):
            raise DataError(
                f"{path}: is a symbolic link to a folder, which is not followed; put the folder itself there"
            )
        if is_picture and (not Path(target).is_relative_to(self._root) or not os.path.exists(target)):
            raise DataError(
                f"{path}: is a symbolic link to {target}, which is not in the folder; put the file itself there"
            )


# Pictures


class Expected(NamedTuple):
    """The size that all pictures have to have, since the one at this path has it."""

    path: str
    height: int
    width: int


def read_picture(
    path: str | Path, side: int | None = None, expected: Expected | None = None, notes: list[str] | None = None
) -> Array:
    """A picture's grey levels, uint8 `[height, width]`.

    Turned as its EXIF orientation says; transparent pixels are black; of several frames the first one. side: scaled to
    so many pixels square. notes: what was chosen is added to it, once. Raises DataError, naming the file.
    """
    notes = [] if notes is None else notes
    with naming(path, "cannot be read as a picture"), catch_warnings():
        simplefilter("ignore")
        simplefilter("error", Image.DecompressionBombWarning)
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            return _decoded(image, str(path), side, expected, notes)


def grey_levels(picture: Image.Image, name: str = "the picture") -> Array:
    """The grey levels of an open picture, as `read_picture` gives them. name: for messages."""
    with naming(name, "cannot be read as a picture"):
        return _decoded(picture, name, None, None, [])


def _decoded(image: Image.Image, path: str, side: int | None, expected: Expected | None, notes: list[str]) -> Array:
    """The work of `read_picture` on an open picture; one of another size is not decoded."""

    def note(words: str) -> None:
        if words not in notes:
            notes.append(words)

    if expected is not None and sorted(image.size) != sorted(expected[1:]):
        raise DataError(_unequal(path, image, expected))
    if getattr(image, "is_animated", False):
        note("the first one of several frames taken")
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        note("turned as their EXIF orientation says")
    if expected is not None and image.size != (expected.width, expected.height):
        raise DataError(_unequal(path, image, expected))
    if image.mode[0] in "IF":
        values = levels(np.asarray(image)[None], lambda _: path)[0]
        if image.mode == "F":
            note("floats from 0 to 1")
        if values.dtype == np.uint16:
            if values.max() <= 0xFF:
                raise DataError(f"{path}: is a 16-bit picture with no level above 255 of 65535; store it with 8 bits")
            note(SIXTEEN_BIT)
            values = eight_bit(values)
        image = Image.fromarray(values)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            note("transparent pixels made black")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode not in ("1", "L"):
        note(GREY)
    grey = image.convert("L")
    if side is None or grey.size == (side, side):
        return np.asarray(grey)
    note("scaled")
    return np.asarray(scaled(grey, side))


def _unequal(path: str, image: Image.Image, expected: Expected) -> str:
    return (
        f"{path}: has {image.height}×{image.width} pixels, and {expected.path} has {expected.height}×{expected.width}; "
        "--size N scales all of them to N×N"
    )
