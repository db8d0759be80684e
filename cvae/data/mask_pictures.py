"""Masks as black-and-white pictures, white = given: read from what people draw, and written into run folders."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvae.data.pictures import read_picture
from cvae.errors import DataError

MOST_MIDDLE_GREY = 0.1  # share of the pixels: the edges of a drawn shape stay below it, photographs do not


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
