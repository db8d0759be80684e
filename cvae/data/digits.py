"""The digit in a photograph, a scan or a drawing as a picture of MNIST: light on black, cropped and centred.

MNIST's own way (LeCun et al. 1998): the digit's box scaled to 20×20 pixels, its proportions kept, antialiased; then
placed so that its centre of mass is that of the 28×28 pixels. Before that comes what a photograph needs.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn.functional import max_pool2d

from cvae.data.pictures import Array, Picture, as_tensor
from cvae.data.tasks import described
from cvae.errors import DataError

BOX = 20 / 28  # the digit's longer side, as a share of the picture's
WORKING_SIDE = 256  # pixels that a large picture is reduced to, which takes its noise away too
FRAME = 1 / 8  # width of the border that shows what is behind the digit, as a share of a side
FITS = 10  # fits of the light on the border, each to the half of it that the one before fits best
LEAST_CONTRAST = 16  # grey levels
WIDEST = 1 / 3  # width that no line has, as a share of the longer side
INK = 0.25  # share of the strongest ink that counts as ink
LEAST_PART = 0.05  # share of the largest part's pixels that a speck stays below
THIN, THICK = 0.07, 0.1  # shares of the box's longer side: thinner lines than the first become as thick as the second


def as_digit(picture: Picture, height: int = 28, width: int = 28) -> Tensor:
    """Find the digit in a picture of any size; `docs/using.md` lists the steps.

    Args:
        picture: A Pillow image, the path of a file, or grey levels, uint8 `[h, w]`.
        height, width: The size of the result.

    Returns:
        uint8 `[height, width]`, light on black.

    Raises:
        DataError: Where there is no ink, or a file cannot be read.
        ValueError: For no such picture.
    """
    grey = as_tensor(picture)
    if grey.dtype != torch.uint8 or grey.dim() != 2 or not grey.numel():
        raise ValueError(f"the grey levels of a picture are uint8 [height, width], not {described(grey)}")
    image = Image.fromarray(grey.cpu().numpy())
    if max(image.size) > WORKING_SIDE:
        image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
        image = image.filter(ImageFilter.MedianFilter(3))
    ink = _ink(np.asarray(image).astype(np.float64))
    strongest = np.quantile(ink, 0.999)
    if strongest < LEAST_CONTRAST:
        name = picture if isinstance(picture, str | os.PathLike) else "the picture"
        raise DataError(f"{name}: no digit is seen in it; transparent pixels count as black")
    kept = _largest_parts(ink > INK * strongest)
    near = np.asarray(Image.fromarray(kept).convert("L").filter(ImageFilter.MaxFilter(3))) > 0  # its soft edges too
    digit = Image.fromarray((np.where(near, ink / np.quantile(ink[kept], 0.75), 0).clip(0, 1) * 255).astype(np.uint8))
    return torch.tensor(np.asarray(_centred(_thickened(digit.crop(digit.getbbox())), height, width)))


def _ink(levels: Array) -> Array:
    """Return how much darker each pixel is than what is behind it, or how much lighter where that most differs."""
    height, width = levels.shape
    down, across = (part.ravel() for part in np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j])
    terms = np.stack([np.ones_like(down), down, across, down * across, down**2, across**2], axis=1)
    border = np.maximum(abs(down), abs(across)) > 1 - 2 * FRAME
    values = levels.ravel()
    light = np.full(values.shape, np.median(values[border]))
    for _ in range(FITS):
        rest = abs(values - light)
        kept = border & (rest <= np.median(rest[border]))
        light = terms @ np.linalg.lstsq(terms[kept], values[kept], rcond=None)[0]
    noise = np.median(rest[kept]) / 0.319  # a quartile of the deviations, in units of a Gaussian's
    darker = (light - values).reshape(levels.shape)
    strength = [_lines(np.maximum(sign * darker - 3 * noise, 0)) for sign in (1, -1)]
    return max(strength, key=lambda ink: float(np.square(ink).sum()))


def _lines(ink: Array) -> Array:
    """Return the ink without what is wider than any line: shadows, the table beside the paper."""
    size = int(WIDEST * max(ink.shape)) // 2 * 2 + 1
    wide = torch.from_numpy(ink)[None]
    for sign in (-1, 1):  # the least around each pixel, and then the largest of that
        for kernel in ((size, 1), (1, size)):
            wide = sign * max_pool2d(sign * wide, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return np.asarray(ink - wide[0].numpy())


def _largest_parts(ink: Array) -> Array:
    """Return the connected parts of ink, bool `[h, w]`, without specks, and those at an edge if there are others."""
    mask = torch.from_numpy(ink).float()
    parts, spread = torch.zeros_like(mask), mask * torch.arange(1, mask.numel() + 1).view(mask.shape)
    while not torch.equal(spread, parts):  # each pixel takes the largest number around it, as far as there is ink
        parts = spread
        spread = max_pool2d(parts[None, None], 3, stride=1, padding=1)[0, 0] * mask
    labels = parts.long()
    sizes = torch.bincount(labels.flatten())
    sizes[0] = 0
    inner = sizes.clone()
    inner[torch.cat([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = 0
    sizes = inner if inner.max() >= LEAST_PART * sizes.max() else sizes
    return (sizes >= (LEAST_PART * sizes.max()).clamp(min=1))[labels].numpy()


def _thickened(digit: Image.Image) -> Image.Image:
    """Return the digit, cropped to its box, with lines that are not much thinner than those of MNIST."""
    side = max(digit.size)
    full = np.pad(np.asarray(digit) > 127, 1)
    inner = full[1:-1, 1:-1] & full[:-2, 1:-1] & full[2:, 1:-1] & full[1:-1, :-2] & full[1:-1, 2:]
    thickness = 2 * full.sum() / max(full.sum() - inner.sum(), 1)  # the area over the outline
    if thickness >= THIN * side:
        return digit
    more = round((THICK * side - thickness) / 2)
    return ImageOps.expand(digit, more).filter(ImageFilter.MaxFilter(2 * more + 1))


def _centred(digit: Image.Image, height: int, width: int) -> Image.Image:
    """Return a digit cropped to its box, scaled and placed as MNIST's are."""
    scale = min(BOX * height / digit.height, BOX * width / digit.width)
    size = max(1, round(digit.width * scale)), max(1, round(digit.height * scale))
    digit = digit.resize(size, Image.Resampling.BICUBIC)
    result, corner = Image.new("L", (width, height)), []
    for axis, (side, room) in enumerate(zip(digit.size, result.size, strict=True)):
        centre = np.average(np.arange(side), weights=np.asarray(digit).sum(axis, dtype=float))  # MNIST: 14 of 28
        corner.append(min(max(round(room / 2 - centre), 0), room - side))
    result.paste(digit, (corner[0], corner[1]))
    return result
