"""Masks, which pixels are given: by quadrants, by name, or as a black-and-white picture, white = given."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvae.data.pictures import read_picture
from cvae.data.tasks import FixedMask
from cvae.errors import DataError, printable
from cvae.settings import Settings

MOST_MIDDLE_GREY = 0.1  # share of the pixels: the edges of a drawn shape stay below it, photographs do not


def quadrants(count: int, height: int = 28, width: int = 28) -> Tensor:
    """Return the mask in which `count` quadrants are observed.

    1 quadrant: the bottom left one; 2: the left half; 3: all but the bottom right one. Halves of an odd size are cut by
    floor division. Source: the MNIST experiment of Sohn et al. 2015, with the choice of quadrants of the Pyro tutorial.

    Returns:
        bool `[height, width]`, True = given.
    """
    if count not in (1, 2, 3):
        raise ValueError(f"1, 2 or 3 quadrants can be observed, not {count}")
    if height < 2 or width < 2:
        raise ValueError(f"an image of {height}×{width} pixels has no four quadrants")
    lower = torch.arange(height)[:, None] >= height // 2
    left = torch.arange(width)[None, :] < width // 2
    return (lower & left, left.expand(height, width).clone(), ~lower | left)[count - 1]


def _in_middle(index: Tensor, side: int) -> Tensor:
    """Return whether rows or columns are in the middle half: (side + 1) // 4 are left out at both ends."""
    return (index >= (side + 1) // 4) & (index < side - (side + 1) // 4)


RULES: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "left": lambda row, column, height, width: column < width // 2,
    "right": lambda row, column, height, width: column >= width // 2,
    "top": lambda row, column, height, width: row < height // 2,
    "bottom": lambda row, column, height, width: row >= height // 2,
    "center": lambda row, column, height, width: _in_middle(row, height) & _in_middle(column, width),
    "border": lambda row, column, height, width: ~(_in_middle(row, height) & _in_middle(column, width)),
    "checkerboard": lambda row, column, height, width: (row + column) % 2 == 0,
    "every-second-row": lambda row, column, height, width: row % 2 == 0,
}
"""What each mask by name gives: of row indices `[height, 1]`, column indices `[width]`, height and width → bool."""


def _mask(name: str, height: int, width: int) -> Tensor:
    mask = RULES[name](torch.arange(height)[:, None], torch.arange(width), height, width)
    return mask.expand(height, width).clone()


MASKS: dict[str, Callable[[int, int], Tensor]] = {name: partial(_mask, name) for name in RULES}
"""Makers of masks, by name: height, width → bool `[height, width]`, True = given."""


def is_picture(s: Settings) -> bool:
    """Return whether `s.observed` is the path of a picture, from the root, on this or another system, and no name."""
    paths = () if s.observed is None else (PurePosixPath(s.observed), PureWindowsPath(s.observed))
    return any(path.is_absolute() for path in paths)


def mask_name(s: Settings) -> str:
    """Return a name of the mask for people: "2 quadrants", "top", or a picture's file without its ending."""
    if s.observed is None:
        return f"{s.quadrants} quadrant{'s' * (s.quadrants > 1)}"
    return printable(PureWindowsPath(s.observed).stem if is_picture(s) else s.observed)


def make_task(s: Settings, height: int, width: int, picture: Path | None = None) -> FixedMask:
    """Make the task of the settings, for images of this size.

    Args:
        s: The settings; `s.observed` names a mask or a picture of one, else `s.quadrants` counts.
        height, width: The size of the images.
        picture: The file to read where the settings name a picture: the mask that a run has kept of it.

    Raises:
        ValueError: If there is no mask of this name.
        DataError: If the mask does not suit the images, or cannot be read.
    """
    if is_picture(s):
        observed, about = read_mask(picture or Path(str(s.observed)), height, width, exact=picture is not None)
        return FixedMask(observed, mask_name(s), about)
    try:
        make = partial(quadrants, s.quadrants) if s.observed is None else s.chosen("observed", MASKS)
        return FixedMask(make(height, width), mask_name(s))
    except ValueError as error:
        raise DataError(f"images of {height}×{width} pixels cannot be split: {error}") from None


def read_mask(path: Path, height: int, width: int, exact: bool = False) -> tuple[Tensor, str]:
    """Read a picture as a mask of this size, white = given.

    A picture of another size is scaled, each pixel from the nearest one, unless `exact`. If there are two levels, of
    which one is 0, the other one is given; else the grey levels from 128 on, unless more than a tenth of the pixels lie
    between 64 and 191.

    Returns:
        bool `[height, width]`, True = given; and how it was read, in one line.

    Raises:
        DataError: For a picture that cannot be read, is not black and white, or gives all pixels or none.
    """
    grey, size = read_picture(path), f"{height}×{width}"
    about, threshold = f"white in {path}", 128
    if (drawn := f"{grey.shape[0]}×{grey.shape[1]}") != size:
        if exact:
            raise DataError(f"{path}: has {drawn} pixels, and the images that it is the mask of have {size}")
        about += f"; scaled from {drawn} to {size} (nearest)"
    present = np.unique(grey).tolist()
    if len(present) == 2 and present[0] == 0:
        threshold = present[1]
    elif (middle := float(((grey >= 64) & (grey < 192)).mean())) > MOST_MIDDLE_GREY:
        problem = f"is no mask in black and white: {middle:.0%} of its pixels are of a middle grey"
        raise DataError(f"{path}: {problem}; draw what is given in white, and the rest in black")
    if not {*present} <= {0, 255}:
        about += f"; grey levels from {threshold} on = white"
    white = Image.fromarray((grey >= threshold).astype(np.uint8))
    observed = torch.tensor(np.asarray(white.resize((width, height), Image.Resampling.NEAREST)), dtype=torch.bool)
    given, count = int(observed.sum()), observed.numel()
    if given in (0, count):
        problem = "nothing is white, and so nothing is given" if given == 0 else "all is white, and nothing is hidden"
        raise DataError(f"{path}: {problem} ({about})")
    return observed, f"observed: {given} of {count} pixels, {about}"


def mask_png(observed: Tensor) -> bytes:
    """Return the PNG file of a mask, bool `[height, width]`: the inverse of `read_mask`."""
    buffer = io.BytesIO()
    Image.fromarray(observed.to(torch.uint8).mul(255).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
