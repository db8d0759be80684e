"""The digit in a photograph, a scan or a drawing as a picture of MNIST: light on black, cropped and centred.

MNIST's own way (LeCun et al. 1998): the digit's box scaled to 20×20 pixels, its proportions kept, antialiased; then
placed so that its centre of mass is that of the 28×28 pixels. Before that comes what a photograph needs.
"""

import os

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional

from cvae.data.given import Picture, as_levels
from cvae.data.readers import Array
from cvae.errors import DataError

BOX = 20 / 28  # of the picture's side, the digit's longer one
WORKING_SIDE = 256  # pixels that a large picture is reduced to, which takes its noise away too
FRAME = 1 / 8  # of a side: how wide the border is that shows what is behind the digit
FITS = 10  # of the light on the border, each to the half of it that the one before fits best
LEAST_CONTRAST = 16  # grey levels
WIDEST = 1 / 3  # of the longer side: wider than any line
INK = 0.25  # of the strongest ink: what counts as ink
LEAST_PART = 0.05  # of the largest part's pixels: what is smaller is a speck
THIN, THICK = 0.07, 0.1  # of the box's longer side: lines thinner than this are drawn as thick as that


def as_digit(picture: Picture, height: int = 28, width: int = 28) -> Tensor:
    """The digit in a picture of any size, uint8 `[height, width]`, light on black.

    picture: a Pillow image, the path of a file, or grey levels, uint8 `[h, w]`. In turn: a large picture is reduced;
    the light on its border, a quadratic function of the place, is taken as what is behind the digit everywhere; what
    differs from it in the direction that most does is ink, so that dark on light is turned round; shadows, specks, and
    what reaches an edge are left out; lines much thinner than MNIST's are thickened; the rest is MNIST's way, in
    proportion. Raises DataError where there is no ink or a file cannot be read, and ValueError for no such picture.
    """
    ink = _ink(_reduced(as_levels(picture)))
    strongest = np.quantile(ink, 0.999)
    if strongest < LEAST_CONTRAST:
        name = picture if isinstance(picture, str | os.PathLike) else "the picture"
        raise DataError(f"{name}: no digit is seen in it; transparent pixels count as black")
    found = _largest_parts(ink > INK * strongest)
    near = np.asarray(Image.fromarray(found).convert("L").filter(ImageFilter.MaxFilter(3))) > 0  # its soft edges too
    full = np.quantile(ink[found], 0.75)
    digit = Image.fromarray((np.where(near, ink / full, 0).clip(0, 1) * 255).astype(np.uint8))
    return torch.from_numpy(_centred(_thickened(digit.crop(digit.getbbox())), height, width))


def _reduced(levels: Array) -> Array:
    picture = Image.fromarray(levels)
    if max(picture.size) > WORKING_SIDE:
        picture.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
        picture = picture.filter(ImageFilter.MedianFilter(3))
    return np.asarray(picture).astype(np.float64)


def _ink(levels: Array) -> Array:
    """How much darker each pixel is than what is behind it, or how much lighter where that is what most differs."""
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
    """The ink without what is wider than any line: shadows, the table beside the paper."""
    size = int(WIDEST * max(ink.shape)) // 2 * 2 + 1
    wide = torch.from_numpy(ink)[None]
    for sign in (-1, 1):  # the least around each pixel, and then the largest of that
        for kernel in ((size, 1), (1, size)):
            padding = kernel[0] // 2, kernel[1] // 2
            wide = sign * functional.max_pool2d(sign * wide, kernel, stride=1, padding=padding)
    lines: Array = ink - wide[0].numpy()
    return lines


def _largest_parts(ink: Array) -> Array:
    """The connected parts of ink, bool `[h, w]`, without specks, and without what reaches an edge if there is more."""
    mask = torch.from_numpy(ink).float()
    parts = mask * torch.arange(1, mask.numel() + 1).view(mask.shape)
    while True:  # each pixel takes the largest number around it, as far as there is ink
        spread = functional.max_pool2d(parts[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, parts):
            break
        parts = spread
    labels = parts.long()
    sizes = torch.bincount(labels.flatten())
    sizes[0] = 0
    inner = sizes.clone()
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        inner[edge] = 0
    if inner.max() >= LEAST_PART * sizes.max():
        sizes = inner
    kept = sizes >= (LEAST_PART * sizes.max()).clamp(min=1)
    return kept[labels].numpy()


def _thickened(digit: Image.Image) -> Image.Image:
    """The digit, cropped to its box, with lines that are not much thinner than those of MNIST."""
    side = max(digit.size)
    full = np.pad(np.asarray(digit) > 127, 1)
    inner = full[1:-1, 1:-1] & full[:-2, 1:-1] & full[2:, 1:-1] & full[1:-1, :-2] & full[1:-1, 2:]
    outline = full.sum() - inner.sum()
    thickness = 2 * full.sum() / max(outline, 1)
    if thickness >= THIN * side:
        return digit
    more = round((THICK * side - thickness) / 2)
    larger = Image.new("L", (digit.width + 2 * more, digit.height + 2 * more))
    larger.paste(digit, (more, more))
    return larger.filter(ImageFilter.MaxFilter(2 * more + 1))


def _centred(digit: Image.Image, height: int, width: int) -> Array:
    """A digit cropped to its box, scaled and placed as MNIST's are."""
    scale = min(BOX * height / digit.height, BOX * width / digit.width)
    size = max(1, round(digit.width * scale)), max(1, round(digit.height * scale))
    pixels = np.asarray(digit.resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    total = pixels.sum()
    corner = []
    for axis, (side, room) in enumerate(zip(pixels.shape, (height, width), strict=True)):
        centre = (pixels.sum(1 - axis) * np.arange(side)).sum() / total  # MNIST: at index 14 of 28
        corner.append(min(max(round(room / 2 - centre), 0), room - side))
    result = np.zeros((height, width), np.uint8)
    top, left = corner
    result[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels.astype(np.uint8)
    return result
