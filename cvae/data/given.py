"""A picture, or several, as people have them: a tensor, an array, a Pillow image, or a file's path."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvae.data.pictures import grey_picture, read_picture
from cvae.data.readers import Array, naming
from cvae.data.tasks import Task, described

Picture = Tensor | Array | Image.Image | str | os.PathLike[str]


def as_images(picture: Picture, task: Task) -> Tensor:
    """Return pictures of the task's size, `[B, height, width]`, uint8 or floats as they are given.

    Args:
        picture: A tensor or an array, `[height, width]` (B = 1) or `[B, height, width]`, uint8, bool or floats; a
            Pillow image or the path of a file, which are read as `read_picture` does.
        task: The task of the model.

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
    if isinstance(picture, Tensor):
        return picture.detach()
    if isinstance(picture, str | os.PathLike):
        return torch.tensor(read_picture(os.fspath(picture)))
    if isinstance(picture, Image.Image):
        with naming("the picture", "cannot be read as a picture"):
            return torch.tensor(np.asarray(grey_picture(picture, "the picture", [])))
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "buif":
        return torch.tensor(picture.astype(picture.dtype.newbyteorder("="), copy=False))
    kind = f"{picture.dtype} array" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise ValueError(f"a picture is a tensor, a numpy array, a Pillow image or the path of a file, not: {kind}")


def in_range(pixels: Tensor) -> bool:
    """Return whether pixels are uint8, or all in [0, 1]."""
    return pixels.dtype == torch.uint8 or bool(((pixels >= 0) & (pixels <= 1)).all())


def as_pixels(name: str, pixels: Tensor, like: Tensor) -> Tensor:
    """Return pixels as floats in [0, 1], of another tensor's type and device; raise ValueError for floats outside."""
    if not in_range(pixels):
        raise ValueError(f"{name} has to be uint8, or floats in [0, 1], not {described(pixels)}")
    moved = pixels.to(like.device, like.dtype)
    return moved / 255 if pixels.dtype == torch.uint8 else moved
