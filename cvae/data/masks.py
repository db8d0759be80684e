"""Masks, which pixels are given: by quadrants, by name, or as a black-and-white picture, white = given."""

import io
from collections.abc import Callable
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


def _center(height: int, width: int) -> Tensor:
    """Return the middle half of the rows and columns: (side + 1) // 4 of them are left out at both ends."""
    mask, top, left = torch.zeros(height, width, dtype=torch.bool), (height + 1) // 4, (width + 1) // 4
    mask[top : height - top, left : width - left] = True
    return mask


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "left": lambda height, width: (torch.arange(width) < width // 2).repeat(height, 1),
    "right": lambda height, width: (torch.arange(width) >= width // 2).repeat(height, 1),
    "top": lambda height, width: (torch.arange(height) < height // 2)[:, None].repeat(1, width),
    "bottom": lambda height, width: (torch.arange(height) >= height // 2)[:, None].repeat(1, width),
    "center": _center,
    "border": lambda height, width: ~_center(height, width),
    "checkerboard": lambda height, width: (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0,
    "every-second-row": lambda height, width: (torch.arange(height) % 2 == 0)[:, None].repeat(1, width),
}
"""Makers of masks, by name: height, width → bool `[height, width]`, True = given."""


def quadrants(count: int, height: int = 28, width: int = 28) -> Tensor:
    """Return the mask in which `count` quadrants are observed, bool `[height, width]`, True = given.

    1 quadrant: the bottom left one; 2: the left half; 3: all but the bottom right one. Halves of an odd size are cut by
    floor division. Source: the MNIST experiment of Sohn et al. 2015, with the choice of quadrants of the Pyro tutorial.
    """
    if count not in (1, 2, 3):
        raise ValueError(f"1, 2 or 3 quadrants can be observed, not {count}")
    if height < 2 or width < 2:
        raise ValueError(f"an image of {height}×{width} pixels has no four quadrants")
    bottom, left = MASKS["bottom"](height, width), MASKS["left"](height, width)
    return (bottom & left, left, ~bottom | left)[count - 1]


def is_picture(s: Settings) -> bool:
    """Return whether `s.observed` is the path of a picture, from the root, on this or another system, and no name."""
    return any(path(s.observed or "").is_absolute() for path in (PurePosixPath, PureWindowsPath))


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
        DataError: If there is no mask of this name, or it does not suit the images or cannot be read.
    """
    about = ""
    try:
        if s.observed is None:
            observed = quadrants(s.quadrants, height, width)
        elif is_picture(s):
            observed, about = read_mask(picture or Path(s.observed), height, width)
        else:
            observed = s.chosen("observed", MASKS)(height, width)
        return FixedMask(observed, mask_name(s), about)
    except ValueError as error:
        problem = f"{s.observed}:" if is_picture(s) else f"images of {height}×{width} pixels cannot be split:"
        raise DataError(f"{problem} {error}") from None


def read_mask(path: Path, height: int, width: int) -> tuple[Tensor, str]:
    """Return a picture as a mask of this size, bool `[height, width]`, white = given, and how it was read, in one line.

    A picture of another size is scaled, each pixel from the nearest one. If there are two levels, of which one is 0,
    the other one is given; else the grey levels from 128 on. DataError: for a picture that cannot be read, or where
    more than a tenth of the pixels lie between 64 and 191.
    """
    grey, about = read_picture(path), f"white in {path}"
    levels, threshold = np.unique(grey).tolist(), 128
    if len(levels) == 2 and levels[0] == 0:
        threshold = levels[1]
    elif (middle := float(((grey >= 64) & (grey < 192)).mean())) > MOST_MIDDLE_GREY:
        problem = f"is no mask in black and white: {middle:.0%} of its pixels are of a middle grey"
        raise DataError(f"{path}: {problem}; draw what is given in white, and the rest in black")
    if grey.shape != (height, width):
        about += f"; scaled from {grey.shape[0]}×{grey.shape[1]} to {height}×{width} (nearest)"
    if not {*levels} <= {0, 255}:
        about += f"; grey levels from {threshold} on = white"
    white = Image.fromarray((grey >= threshold).astype(np.uint8))
    observed = torch.tensor(np.asarray(white.resize((width, height), Image.Resampling.NEAREST)), dtype=torch.bool)
    return observed, f"observed: {int(observed.sum())} of {observed.numel()} pixels, {about}"


def mask_png(observed: Tensor) -> bytes:
    """Return the PNG file of a mask, bool `[height, width]`: the inverse of `read_mask`."""
    Image.fromarray(observed.to(torch.uint8).mul(255).numpy()).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
