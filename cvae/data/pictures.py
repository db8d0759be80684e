"""Pictures as people have them, files, arrays and Pillow images, as grey levels; and the files below a folder."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cvae.data.tasks import Task, described
from cvae.errors import DataError, taken_for_damage

Array = npt.NDArray[Any]
Picture = Tensor | Array | Image.Image | str | os.PathLike[str]
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")


def pictures_below(folder: str | Path) -> tuple[list[str], int]:
    """Return the paths in a folder of all pictures below it, sorted, and the number of other files; no hidden ones."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    files: list[str] = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        files += [os.path.relpath(os.path.join(place, name), folder) for name in names if name[0] != "."]
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
