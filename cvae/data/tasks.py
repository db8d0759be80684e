"""Tasks: what is given of an image (x), what is asked (y), and which of it counts; and the masks of fixed ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.data.mask_pictures import read_mask
from cvae.errors import DataError, printable
from cvae.settings import Settings


class Batch(NamedTuple):
    """Some images as the networks see them, with values in [0, 1].

    Attributes:
        x: What is given, `[B, x_dim]`.
        y: What is asked, `[B, y_dim]`.
        weight: 1 where a pixel of y counts and 0 where it does not, `[B, y_dim]`; None where all count.
        guess: The logits of the baseline's guess ŷ for y, `[B, y_dim]`; None where they are not computed yet.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    guess: Tensor | None = None


class Task(ABC):
    """A way to turn images into x and y, and completions of y into images: all that networks know of the data.

    Attributes:
        x_dim, y_dim: The sizes of x and y.
        height, width: The size of the images.
        planes: The number of planes of `picture`.
        is_random: Whether `rows` depends on its key, so that it is called anew for each epoch.
        name: A name for people.
        about: How the task was read from a picture, in one line, or "".
    """

    x_dim: int
    y_dim: int
    height: int
    width: int
    planes: int
    is_random = False
    name = ""
    about = ""

    @abstractmethod
    def rows(self, images: Tensor, labels: Tensor | None = None, key: tuple[object, ...] = ()) -> Tensor:
        """Return what is kept of each image, in the order in which batches need it.

        Args:
            images: uint8 from 0 to 255 or floats in [0, 1], `[N, height, width]`.
            labels: The classes of the images, int64 `[N]`, where the task needs them.
            key: The key of the random numbers, where the task draws any.

        Returns:
            `[N, R]` of the images' type.
        """

    @abstractmethod
    def batch(self, rows: Tensor) -> Batch:
        """Return rows `[B, R]`, as `rows` makes them, as x, y and weight."""

    @abstractmethod
    def picture(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x `[B, x_dim]`, and y or a guess of it, `[B, y_dim]`, in space: `[B, planes, height, width]`."""

    @abstractmethod
    def asked(self, images: Tensor) -> Tensor:
        """Return the part of images `[..., height, width]` that y is: `[..., y_dim]`."""

    @abstractmethod
    def compose(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the completed images `[..., height, width]`; x `[..., x_dim]` and y `[..., y_dim]` broadcast."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Task":
        return self  # a task never changes


class FixedMask(Task):
    """The task of one mask for all images: x are the observed pixels, and y the hidden ones.

    A row is an image as a vector with its observed pixels first and its hidden pixels after them, each part in raster
    order, so that x and y are slices of it. `order[i]` is the raster position of the i-th pixel of that vector.

    Args:
        observed: The mask, bool `[height, width]`, True = given.
        name: A name of the mask for people.
        about: How a picture was read as the mask, in one line, if it was.

    Raises:
        ValueError: If the mask gives all pixels or none.
    """

    planes = 2  # the image, and the mask

    def __init__(self, observed: Tensor, name: str = "", about: str = ""):
        if observed.dtype != torch.bool or observed.dim() != 2:
            raise ValueError(f"a mask is bool [height, width], True = given, not {described(observed)}")
        self.observed, self.name, self.about = observed, name, about
        self.height, self.width = observed.shape
        self.x_dim, self.y_dim = int(observed.sum()), int((~observed).sum())
        if self.x_dim == 0 or self.y_dim == 0:
            raise ValueError(f"{self.x_dim} of {observed.numel()} pixels are observed; some have to be, not all")
        self.order = torch.argsort(~observed.flatten(), stable=True)
        self._places: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return `order`, its inverse and the mask on a device, moved there once: no step waits for a copy."""
        if device not in self._places:
            tensors = self.order, torch.argsort(self.order), self.observed.float()
            self._places[device] = tensors[0].to(device), tensors[1].to(device), tensors[2].to(device)
        return self._places[device]

    def rows(self, images: Tensor, labels: Tensor | None = None, key: tuple[object, ...] = ()) -> Tensor:
        if images.shape[-2:] != self.observed.shape:
            raise ValueError(f"the mask is of images [..., {self.height}, {self.width}], not of {described(images)}")
        return images.flatten(-2).index_select(-1, self._on(images.device)[0])

    def batch(self, rows: Tensor) -> Batch:
        pixels = rows / 255 if rows.dtype == torch.uint8 else rows
        return Batch(pixels[..., : self.x_dim], pixels[..., self.x_dim :])

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return images `[..., height, width]` of any type as x `[..., x_dim]` and y `[..., y_dim]` of this type."""
        rows = self.rows(images)
        return rows[..., : self.x_dim], rows[..., self.x_dim :]

    def picture(self, x: Tensor, y: Tensor) -> Tensor:
        image, mask = self.compose(x, y), self._on(x.device)[2]
        return torch.stack([image, mask.to(image.dtype).expand_as(image)], dim=1)

    def asked(self, images: Tensor) -> Tensor:
        hidden = self._on(images.device)[0][self.x_dim :]
        return images.flatten(-2).index_select(-1, hidden)

    def compose(self, x: Tensor, y: Tensor) -> Tensor:
        if (x.shape[-1], y.shape[-1]) != (self.x_dim, self.y_dim):
            wanted = f"x [..., {self.x_dim}] and y [..., {self.y_dim}]"
            raise ValueError(f"this mask needs {wanted}, not {list(x.shape)} and {list(y.shape)}")
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        rows = torch.cat([x.expand(*leading, -1), y.expand(*leading, -1)], dim=-1)
        return rows.index_select(-1, self._on(x.device)[1]).view(*leading, self.height, self.width)


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


def described(tensor: Tensor) -> str:
    """Return the type, shape and range of a tensor, for an error message."""
    values = ""
    if tensor.numel() and not tensor.is_complex() and not tensor.is_meta:
        low, high = tensor.double().aminmax()
        values = f" from {low:g} to {high:g}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{values}"
