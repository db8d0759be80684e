"""Pictures as people have them, files, arrays and Pillow images, as grey levels; and the digits in photographs.

A digit becomes one of MNIST: light on black, cropped and centred as there (LeCun et al. 1998), after what a photograph
needs first.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn.functional import max_pool2d

from cvae.data.tasks import Task, described
from cvae.errors import DataError, taken_for_damage

Array = npt.NDArray[Any]
Picture = Tensor | Array | Image.Image | str | os.PathLike[str]
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")

BOX = 20 / 28  # the digit's longer side, as a share of the picture's
WORKING_SIDE = 256  # pixels that a large picture is reduced to, which takes its noise away too
FRAME = 1 / 8  # width of the border that shows what is behind the digit, as a share of a side
FITS = 10  # fits of the light on the border, each to the half of it that the one before fits best
LEAST_CONTRAST = 16  # grey levels
WIDEST = 1 / 3  # width that no line has, as a share of the longer side
INK = 0.25  # share of the strongest ink that counts as ink
LEAST_PART = 0.05  # share of the largest part's pixels that a speck stays below
THIN, THICK = 0.07, 0.1  # shares of the box's longer side: thinner lines than the first become as thick as the second


def pictures_below(folder: str | Path) -> tuple[list[str], int]:
    """Return the paths in a folder of all pictures below it, sorted, and the number of other files; no hidden ones."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    files, seen = list[str](), {os.path.realpath(folder)}  # a link may lead back
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        places = {name: os.path.realpath(os.path.join(place, name)) for name in folders if name[0] != "."}
        folders[:] = [name for name, there in places.items() if there not in seen]
        seen.update(places.values())
        paths = [os.path.join(place, name) for name in names if name[0] != "."]
        files += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]
    pictures = [file for file in files if os.path.splitext(file)[1].lower() in suffixes]
    return sorted(pictures, key=lambda file: file.split(os.sep)), len(files) - len(pictures)


def read_picture(path: str | os.PathLike[str]) -> Array:
    """Return the grey levels of a picture's file, uint8 `[height, width]`; raise DataError if it cannot be read."""
    problem = f"{os.fspath(path)}: cannot be read as a picture"
    with taken_for_damage(problem, Exception), Image.open(path, formats=FORMATS) as image:
        return grey_levels(image, os.fspath(path))


def grey_levels(image: Image.Image, name: str = "the picture") -> Array:
    """Return an open picture in grey levels, uint8 `[height, width]`.

    It is turned as its EXIF orientation says; transparent pixels are black; of several frames the first is taken.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] == "I" and 0 < np.asarray(image).max() < 256:
        raise DataError(f"{name}: is a 16-bit picture with no level above 255 of 65535; store it with 8 bits")
    if image.mode[0] in "IF":
        image = Image.fromarray(to_bytes(np.asarray(image), 65535 if image.mode[0] == "I" else 1, name))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return np.asarray(image.convert("L"))


def to_bytes(levels: Array, most: int, name: str) -> Array:
    """Return levels from 0 to `most` (255, 65535, or 1 for floats and truth values) as uint8; refuse others."""
    low, high = levels.min(), levels.max()
    if not (low >= 0 and high <= most):  # NaN too: it compares as false
        raise DataError(f"{name}: holds numbers from {low:.6g} to {high:.6g}, which have to be from 0 to {most}")
    if most == 1:
        levels = np.rint(levels.astype(np.float32) * 255)
    elif most > 255:
        levels = (levels.astype(np.uint32) + 128) // 257
    return levels.astype(np.uint8)


def resized(grey: Array, side: int) -> Array:
    """Return grey levels uint8 `[height, width]` scaled to `[side, side]`."""
    return np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.LANCZOS))


def as_images(picture: Picture, task: Task) -> Tensor:
    """Return pictures of the task's size, `[B, height, width]`, uint8 or floats as they are given.

    picture: A tensor or an array, `[height, width]` (B = 1) or `[B, height, width]`, uint8, bool or floats; a Pillow
    image or the path of a file, which are read as `read_picture` does.

    Raises:
        ValueError: For another size or type; DataError: for a file that cannot be read.
    """
    images = as_tensor(picture)
    images = images.float() if images.dtype == torch.bool else images
    size = [task.height, task.width]
    is_known = images.dtype == torch.uint8 or images.is_floating_point()
    if not is_known or images.dim() not in (2, 3) or list(images.shape[-2:]) != size:
        wanted = f"{size} or [B, {task.height}, {task.width}], uint8 or floats in [0, 1]"
        advice = "" if isinstance(picture, Tensor | np.ndarray) else "; cvae.as_digit finds the digit in a photograph"
        raise ValueError(f"pictures for this model are {wanted}, not {described(images)}{advice}")
    return images if images.dim() == 3 else images[None]


def as_tensor(picture: Picture) -> Tensor:
    """Return a tensor or an array as it is, another picture as grey levels, uint8 `[height, width]`."""
    if isinstance(picture, str | os.PathLike):
        return torch.tensor(read_picture(picture))
    if isinstance(picture, Image.Image):
        with taken_for_damage("the picture: cannot be read", Exception):
            return torch.tensor(grey_levels(picture))
    if isinstance(picture, Tensor):
        return picture.detach()
    if isinstance(picture, np.ndarray):
        return torch.from_numpy(np.array(picture, picture.dtype.newbyteorder("=")))
    raise ValueError(f"a picture is a tensor, an array, a Pillow image or a file's path, not: {type(picture).__name__}")


def in_range(pixels: Tensor) -> bool:
    """Return whether pixels are uint8, or all in [0, 1]."""
    return pixels.dtype == torch.uint8 or bool(((pixels >= 0) & (pixels <= 1)).all())


def as_pixels(name: str, pixels: Tensor, like: Tensor) -> Tensor:
    """Return pixels as floats in [0, 1], of another tensor's type and device; raise ValueError for floats outside."""
    if not in_range(pixels):
        raise ValueError(f"{name} has to be uint8, or floats in [0, 1], not {described(pixels)}")
    moved = pixels.to(like.device, like.dtype)
    return moved / 255 if pixels.dtype == torch.uint8 else moved


def as_digit(picture: Picture, height: int = 28, width: int = 28) -> Tensor:
    """Find the digit in a photograph, a scan or a drawing, of any size; `docs/using.md` lists the steps.

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
    """Return a digit, cropped to its box, scaled and placed so that its centre of mass is in the middle, as MNIST's."""
    scale = min(BOX * height / digit.height, BOX * width / digit.width)
    size = max(1, round(digit.width * scale)), max(1, round(digit.height * scale))
    digit = digit.resize(size, Image.Resampling.BICUBIC)
    result, corner = Image.new("L", (width, height)), []
    for axis, (side, room) in enumerate(zip(digit.size, result.size, strict=True)):
        centre = np.average(np.arange(side), weights=np.asarray(digit).sum(axis, dtype=float))  # MNIST: 14 of 28
        corner.append(min(max(round(room / 2 - centre), 0), room - side))
    result.paste(digit, (corner[0], corner[1]))
    return result
