"""Masks as black-and-white pictures, white = given: read from what people draw, and written into run folders."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvae.data.pictures import read_picture
from cvae.errors import DataError

MOST_MIDDLE_GREY = 0.1  # share of the pixels: the edges of a drawn shape stay below it, photographs do not


def read_mask(path: Path, height: int, width: int, exact: bool = False) -> tuple[Tensor, str]:
    """The mask that a picture shows, white = given: bool `[height, width]`, True = given; and how it was read.

    A picture of another size is scaled to this one, each pixel from the nearest one; with `exact` it is refused.
    Colours count as their grey (ITU-R 601), transparent pixels as black. If there are two levels, of which one is 0,
    the other one is given, whatever it is; else the grey levels from 128 on, unless more than a tenth of the pixels
    lie between 64 and 191: that is no picture in black and white. The second result says in one line which of this was
    done. Raises DataError, naming the file, also if all pixels are given or none.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file, which would be the picture of the mask")
    read: list[str] = []
    levels = read_picture(path, notes=read)
    if levels.shape != (height, width):
        sizes = [f"{each[0]}×{each[1]}" for each in (levels.shape, (height, width))]
        if exact:
            raise DataError(f"{path}: has {sizes[0]} pixels, and the images that it is the mask of have {sizes[1]}")
        read.append(f"scaled from {sizes[0]} to {sizes[1]} (nearest)")
    found = np.unique(levels).tolist()
    threshold = 128
    if len(found) == 2 and found[0] == 0:
        threshold = found[1]
        if threshold < 255:
            read.append(f"level {threshold} of 255 = white")
    elif not {*found} <= {0, 255}:
        middle = float(((levels >= 64) & (levels < 192)).mean())
        if middle > MOST_MIDDLE_GREY:
            raise DataError(
                f"{path}: is no mask in black and white: {middle:.0%} of its pixels are of a middle grey; "
                "draw what is given in white, and the rest in black"
            )
        read.append("grey levels from 128 on = white")
    white = Image.fromarray((levels >= threshold).astype(np.uint8))
    observed = torch.tensor(np.asarray(white.resize((width, height), Image.Resampling.NEAREST)), dtype=torch.bool)
    given, count = int(observed.sum()), observed.numel()
    if given in (0, count):
        what = "nothing is white, and so nothing is given" if given == 0 else "all is white, and so nothing is hidden"
        raise DataError(f"{path}: {what}" + (f" ({'; '.join(read)})" if read else ""))
    return observed, "; ".join([f"observed: {given} of {count} pixels, white in {path}", *read])


def mask_png(observed: Tensor) -> bytes:
    """The PNG file of a mask, bool `[height, width]`: a pixel each, white = given. The inverse of `read_mask`."""
    buffer = io.BytesIO()
    Image.fromarray(observed.to(torch.uint8).mul(255).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
