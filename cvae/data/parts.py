"""What every reader gives: the parts of a set of images, counted and measured before any of them is read; and grey
levels as bytes, however they were stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from cvae.console import Bar
from cvae.errors import CvaeError, DataError, first_line

Array = npt.NDArray[Any]

PARTS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test", "t10k": "test",
}  # fmt: skip
"""The words in the names of files, folders and arrays that say to which part of a set they belong."""

NAMED = 5  # at most, in a message
GREY = "colour made grey by ITU-R 601"
SIXTEEN_BIT = "16-bit levels scaled to 8"
TWELVE_BIT = "none above 4095 of 65535: if they are of 12 bits, multiply them by 16 first"


class Images(NamedTuple):
    """Images that were read: uint8 `[N, height, width]`, 0 to 255.

    levels: how the numbers were read as grey levels, in words; "": as they are. notes: other choices of the reader.
    """

    pixels: Tensor
    levels: str = ""
    notes: Sequence[str] = ()


class Reading(NamedTuple):
    """How images are read: how much memory there is, and what goes on meanwhile.

    memory: bytes of it that this process may take; gpu: of the GPU that the images are brought to, None: to none.
    keep: whether the images are kept while they are trained on. show: whether the user sees a bar and remarks.
    check: called every picture or MiB; what it raises ends the reading.
    """

    memory: int | None = None
    gpu: int | None = None
    keep: bool = False
    show: bool = False
    check: Callable[[], None] = lambda: None

    @classmethod
    def on(cls, device: torch.device, sharing: int = 1, **more: Any) -> "Reading":
        """For a device, and one of so many processes that share this machine."""
        return cls(**more)


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one part of a set, not read yet: how many there are, of what size.

    read: rows, int64 `[n]` → these images in this order, all of this size. name: the words for the image of a row.
    held: the bytes that reading so many of them holds at its peak. labels: reads the classes of all of them, uint8
    `[count]`; None where there are none.
    """

    count: int
    height: int
    width: int
    read: Callable[[Tensor, Reading], Images]
    name: Callable[[int], str]
    held: Callable[[int], int]
    labels: Callable[[], Tensor] | None = None


class Source(NamedTuple):
    """A set of images: where it lies, in which form, and its parts.

    parts: `train`, `validation` and `test`, as far as there are such; or `all`, where the set is not divided.
    notes: what the user has to know of how it was found.
    """

    form: str
    place: Path | str
    parts: dict[str, Part]
    notes: list[str]


def part_named(name: str) -> str | None:
    """The part that a name speaks of, as `x_train` and `Testing` do; None: of no part, or of several."""
    found = {PARTS[word] for word in name.lower().replace("-", "_").split("_") if word in PARTS}
    return found.pop() if len(found) == 1 else None


def listed(names: Iterable[object]) -> str:
    """Names in one line, the first few of many."""
    words = [str(name) for name in names]
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more


@contextmanager
def naming(path: object, what: str = "cannot be read") -> Iterator[None]:
    """Raises DataError, naming the file, for all that a reader raises: of damaged files, whatever it stumbles over."""
    try:
        yield
    except CvaeError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:
        raise DataError(f"{path}: {what} ({first_line(error)[:200]})") from None


def space(name: object, count: int, height: int, width: int, dtype: type = np.uint8) -> Array:
    """Room for so many images. Raises DataError if there is not so much memory."""
    try:
        return np.empty((count, height, width), dtype)
    except (MemoryError, ValueError):
        raise DataError(
            f"{name}: {count} images of {height}×{width} pixels do not fit into memory; --size N scales them"
        ) from None


def levels(images: Array, name: Callable[[int], str]) -> Array:
    """Grey levels or colours `[N, …]` of any type as uint8, or as uint16 where they are integers of more than 8 bits.

    Truth values become 0 and 255, floats from 0 to 1 are scaled to 255. name: of the image at an index, to name one
    whose numbers are out of range in DataError.
    """
    if images.dtype.kind == "b":
        return np.where(images.view(np.uint8), np.uint8(255), np.uint8(0))
    if images.dtype == np.uint8:
        return images
    most = 1 if images.dtype.kind == "f" else 0xFFFF
    flat = images.reshape(len(images), -1)
    with np.errstate(invalid="ignore"):
        low, high = flat.min(1), flat.max(1)
    bad = np.flatnonzero(~((low >= 0) & (high <= most)))  # NaN too: it compares as false
    if len(bad):
        first = int(bad[0])
        raise DataError(f"{name(first)}: {_out_of_range(float(low[first]), float(high[first]), most)}")
    if most == 1:
        return np.rint(images.astype(np.float32) * 255).astype(np.uint8)
    return images.astype(np.uint16)


def _out_of_range(low: float, high: float, most: int) -> str:
    if low != low or high != high:
        return "holds NaN; replace it or leave the image out"
    kind = "floats" if most == 1 else "whole numbers"
    advice = "divide them by 255, or by the largest" if low >= 0 else "shift and scale them"
    return f"holds numbers from {low:.6g} to {high:.6g}; {kind} have to be from 0 to {most}: {advice}"


def eight_bit(wide: Array) -> Array:
    """uint16 as uint8, `[N, …]`: 65535 becomes 255."""
    result = np.empty(wide.shape, np.uint8)
    for first in range(0, len(wide), 100):  # not all at once: it takes ten more bytes a pixel
        result[first : first + 100] = (wide[first : first + 100].astype(np.uint32) + 128) // 257
    return result


def grey(colours: Array) -> Array:
    """Colours `[…, 3]`, uint8 or uint16, as luminance by ITU-R 601, rounded as Pillow does it."""
    red, green, blue = (colours[..., i].astype(np.int64) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(colours.dtype)


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """A grey picture scaled to a square."""
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def taken(images: Tensor, rows: Tensor) -> Tensor:
    """The images at these rows; where these are all of them, in order, no copy."""
    return images if torch.equal(rows, torch.arange(len(images))) else images[rows]


def resized(pixels: Tensor, side: int, reading: Reading) -> Tensor:
    """Images uint8 `[N, height, width]` scaled to `[N, side, side]`."""
    result = np.empty((len(pixels), side, side), np.uint8)
    with Bar("scaling", len(pixels), "img", reading.show) as bar:
        for i, image in enumerate(pixels.numpy()):
            reading.check()
            result[i] = np.asarray(scaled(Image.fromarray(image), side))
            bar.update()
    return torch.from_numpy(result)
