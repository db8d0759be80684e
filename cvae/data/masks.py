"""Masks, which say what is observed of an image, and the split of images into x and y that follows from one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from cvae.data.mask_pictures import read_mask
from cvae.errors import DataError, printable
from cvae.settings import Settings


def quadrants(count: int, height: int = 28, width: int = 28) -> Tensor:
    """The mask in which `count` quadrants are observed, bool `[height, width]`, True = given.

    1 quadrant: the bottom left one; 2: the left half; 3: all but the bottom right one. The halves of an odd
    size are cut by floor division, so that the left and the upper half are the smaller ones.

    Raises ValueError unless `count` is 1, 2 or 3 and both sides have at least 2 pixels.
    Source: the MNIST experiment of Sohn et al. 2015, with the choice of quadrants of the Pyro tutorial.
    """
    if count not in (1, 2, 3):
        raise ValueError(f"1, 2 or 3 quadrants can be observed, not {count}")
    if height < 2 or width < 2:
        raise ValueError(f"an image of {height}×{width} pixels has no four quadrants")
    lower = torch.arange(height)[:, None] >= height // 2
    left = torch.arange(width)[None, :] < width // 2
    return (lower & left, left.expand(height, width).clone(), ~lower | left)[count - 1]


def rows(first: float, last: float, height: int, width: int) -> Tensor:
    """The mask of the rows between two shares of the height, cut by floor division, bool `[height, width]`."""
    index = torch.arange(height)[:, None]
    return ((index >= int(first * height)) & (index < int(last * height))).expand(height, width).clone()


def columns(first: float, last: float, height: int, width: int) -> Tensor:
    """The mask of the columns between two shares of the width, cut by floor division, bool `[height, width]`."""
    return rows(first, last, width, height).T.contiguous()


def center(height: int, width: int) -> Tensor:
    """The mask of the middle half of the rows and columns, bool `[height, width]`.

    A quarter of each side, (side + 1) // 4 pixels, is left out at both ends: the mask has the symmetries of the image,
    and of 28 pixels it gives the middle 14, of 7 the middle 3.
    """
    above, left = (height + 1) // 4, (width + 1) // 4
    given = torch.zeros(height, width, dtype=torch.bool)
    given[above : height - above, left : width - left] = True
    return given


def border(height: int, width: int) -> Tensor:
    """The mask of all that `center` leaves out, bool `[height, width]`."""
    return ~center(height, width)


def checkerboard(height: int, width: int) -> Tensor:
    """The mask of every other pixel, bool `[height, width]`: those whose row and column, counted from 0, add up evenly.

    The upper left pixel is given. Where the number of pixels is odd, one more is given than hidden.
    """
    return (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0


def every_second_row(height: int, width: int) -> Tensor:
    """The mask of rows 0, 2, 4, …, bool `[height, width]`. Where their number is odd, one more is given."""
    return (torch.arange(height)[:, None] % 2 == 0).expand(height, width).clone()


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "left": partial(columns, 0, 0.5),
    "right": partial(columns, 0.5, 1),
    "top": partial(rows, 0, 0.5),
    "bottom": partial(rows, 0.5, 1),
    "center": center,
    "border": border,
    "checkerboard": checkerboard,
    "every-second-row": every_second_row,
}
"""Makers of masks, by name: height, width → bool `[height, width]`, True = given. Halves are cut as `quadrants` are."""


def mask(s: Settings, height: int, width: int) -> Tensor:
    """What is observed of images of this size: `s.observed` by name, or else `s.quadrants`.

    Raises ValueError for a mask that there is not.
    """
    if s.observed is None:
        return quadrants(s.quadrants, height, width)
    return s.chosen("observed", MASKS)(height, width)


def is_picture(s: Settings) -> bool:
    """Whether `s.observed` is the path of a picture, from the root, on this or another system, and no name."""
    paths = () if s.observed is None else (PurePosixPath(s.observed), PureWindowsPath(s.observed))
    return any(path.is_absolute() for path in paths)


def mask_name(s: Settings) -> str:
    """What is observed, in words: "2 quadrants", a mask's name, or that of a picture's file without its ending."""
    if s.observed is None:
        return f"{s.quadrants} quadrant{'s' * (s.quadrants > 1)}"
    return printable(PureWindowsPath(s.observed).stem if is_picture(s) else s.observed)


class Split:
    """The split of an image into the observed pixels x and the hidden pixels y.

    The networks see an image as a vector with its observed pixels first and its hidden pixels after them, each part
    in raster order: x and y are then slices, and no mask is needed where the computing is done. `order[i]` is the
    raster position of the i-th pixel of that vector, and `raster` the inverse: the place in that vector of the pixel
    at each raster position. The rows and columns of the networks' weights that stand for pixels follow `order` too.

    observed: the mask, bool `[height, width]`, True = given. Raises ValueError unless it gives some pixels and not all.
    name: of the mask, for people. about: how a picture was read as the mask, in one line, if it was.
    Attributes: these, `order` and `raster` int64 `[height * width]`; `height`, `width`; `num_observed`, `num_hidden`,
    `num_pixels`: counts of pixels.
    """

    def __init__(self, observed: Tensor, name: str = "", about: str = ""):
        if observed.dtype != torch.bool or observed.dim() != 2:
            raise ValueError(
                f"a mask is bool [height, width], True = given, not {observed.dtype} {list(observed.shape)}"
            )
        self.observed, self.name, self.about = observed, name, about
        self.height, self.width = observed.shape
        self.num_pixels = observed.numel()
        self.num_observed = int(observed.sum())
        self.num_hidden = self.num_pixels - self.num_observed
        if self.num_observed == 0 or self.num_hidden == 0:
            raise ValueError(f"{self.num_observed} of {self.num_pixels} pixels are observed; some have to be, not all")
        self.order = torch.argsort(~observed.flatten(), stable=True)
        self.raster = torch.argsort(self.order)
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`order` and `raster` on a device, moved there once: a training step must not wait for a copy."""
        if device not in self._moved:
            self._moved[device] = self.order.to(device), self.raster.to(device)
        return self._moved[device]

    def vectors(self, images: Tensor) -> Tensor:
        """Images `[..., height, width]` as vectors `[..., num_pixels]`, observed pixels first; any dtype.

        Raises ValueError for images of another size.
        """
        if images.shape[-2:] != self.observed.shape:
            raise ValueError(f"the split is of images [..., {self.height}, {self.width}], not of {described(images)}")
        return images.flatten(-2).index_select(-1, self._on(images.device)[0])

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[..., height, width]` as (x `[..., num_observed]`, y `[..., num_hidden]`); any dtype."""
        vectors = self.vectors(images)
        return vectors[..., : self.num_observed], vectors[..., self.num_observed :]

    def images(self, vectors: Tensor) -> Tensor:
        """The inverse of `vectors`: `[..., num_pixels]` as images `[..., height, width]`; any dtype."""
        images = vectors.index_select(-1, self._on(vectors.device)[1])
        return images.view(*vectors.shape[:-1], self.height, self.width)

    def compose(self, x: Tensor, y: Tensor) -> Tensor:
        """The images `[..., height, width]` whose observed pixels are x and whose hidden pixels are y.

        The inverse of `split`; x `[..., num_observed]` and y `[..., num_hidden]` broadcast against each other.
        Raises ValueError for another number of pixels.
        """
        if (x.shape[-1:], y.shape[-1:]) != ((self.num_observed,), (self.num_hidden,)):
            wanted = f"x [..., {self.num_observed}] and y [..., {self.num_hidden}]"
            raise ValueError(f"the split is into {wanted}, not {list(x.shape)} and {list(y.shape)}")
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        return self.images(torch.cat([x.expand(*leading, -1), y.expand(*leading, -1)], dim=-1))


def described(tensor: Tensor) -> str:
    """The type, shape and range of a tensor, for an error message."""
    ordered = tensor.numel() and not tensor.is_complex() and not tensor.is_meta
    values = ""
    if ordered:
        low, high = tensor.double().aminmax()  # not all integers have an order of their own in PyTorch
        values = f" from {low:g} to {high:g}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{values}"


def make_split(s: Settings, height: int, width: int, picture: Path | None = None) -> Split:
    """The split of images of this size by the mask of the settings. Raises DataError where the two do not suit.

    picture: where the settings name a picture, the file to read in its place: the mask that a run has kept of it.
    """
    if is_picture(s):
        found = read_mask(picture or Path(str(s.observed)), height, width, exact=picture is not None)
        return Split(found[0], mask_name(s), found[1])
    try:
        return Split(mask(s, height, width), mask_name(s))
    except ValueError as error:
        raise DataError(f"images of {height}×{width} pixels cannot be split: {error}") from None
