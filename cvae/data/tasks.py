"""Tasks: what is given of an image (x), what is asked (y), and which of it counts; and images in batches of these."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae import context
from cvae.data.bending import bent

AT_ONCE = 10_000  # images that are redrawn at once


class Batch(NamedTuple):
    """Some images as the networks see them, with values in [0, 1]."""

    x: Tensor  # what is given, [B, x_dim]
    y: Tensor  # what is asked, [B, y_dim]
    weight: Tensor | None = None  # 1 where a pixel of y counts and 0 where it does not, [B, y_dim]; None: all count
    guess: Tensor | None = None  # the logits of the baseline's guess ŷ for y, [B, y_dim]; None: not computed yet


class Task(ABC):
    """A way to turn images into x and y, and completions of y into images: all that networks know of the data."""

    x_dim: int  # the sizes of x and y
    y_dim: int
    height: int  # the size of the images
    width: int
    planes: int  # the number of planes of `picture`
    is_random = False  # whether `rows` depends on its key, so that it is called anew for each epoch
    name = ""  # for people
    about = ""  # how the task was read from a picture, in one line

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
        name, about: As in `Task`.

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


class ImageSet:
    """Images on the device, kept as rows of a task, and batches of them.

    Args:
        images: uint8 `[N, height, width]`, 0 to 255.
        task: What turns them into x and y.
        device: Where they are kept.
        labels, key: As in `Task.rows`.

    Raises:
        ValueError: For images of another size or type.
    """

    def __init__(
        self, images: Tensor, task: Task, device: torch.device | str = "cpu", labels: Tensor | None = None,
        key: tuple[object, ...] = (),
    ):  # fmt: skip
        if images.dtype != torch.uint8 or images.dim() != 3:
            raise ValueError(f"images are uint8 [N, height, width], 0 to 255, not {described(images)}")
        self.task, self.images = task, images.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.rows = task.rows(self.images, self.labels, key)
        self.guesses: Tensor | None = None
        self._baseline: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def set_guesses(self, baseline: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        """Compute a frozen baseline's logits of ŷ for all images, now and whenever they are redrawn.

        dtype: The type to keep them in; logits of half-precision products are no more exact than it.
        """
        self._baseline = baseline
        self.guesses = torch.empty(len(self), self.task.y_dim, dtype=dtype, device=self.rows.device)
        self._guess()

    @torch.no_grad()
    def _guess(self, size: int = 1000) -> None:
        if self.guesses is not None and self._baseline is not None:
            for guesses, rows in zip(self.guesses.split(size), self.rows.split(size), strict=True):
                guesses.copy_(self._baseline(self.task.batch(rows).x))

    def redraw(
        self, *key: object, binary: bool, bend: float = 0.0, done: Callable[[int], object] = lambda count: None
    ) -> None:
        """Draw the rows anew from the images; they and the guesses change in place, where a CUDA graph reads them.

        key: The key of the random numbers. binary: Whether pixels are drawn black or white (`binarized`). bend: The
        share of the images that are bent (`bent`). done: Called with the number of images that were just drawn.
        """
        for i, first in enumerate(range(0, len(self), AT_ONCE)):
            part = slice(first, first + AT_ONCE)
            images = bent(self.images[part], bend, *key, i) if bend else self.images[part]
            rows = self.task.rows(images, None if self.labels is None else self.labels[part], (*key, i))
            self.rows[part] = binarized(rows, *key, i) if binary else rows
            done(len(rows))
        self._guess()

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return the images at these rows, int64 `[B]` on the device or a slice, with their guesses if known."""

        def select(table: Tensor) -> Tensor:
            return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)

        return self.task.batch(select(self.rows))._replace(guess=None if self.guesses is None else select(self.guesses))


def binarized(images: Tensor, *key: object) -> Tensor:
    """Draw each pixel white with the probability grey / 255; black and white ones stay.

    A draw on the CPU is the same on every machine; key: see `derive_seed`. Returns uint8, 0 or 255.
    Source: Salakhutdinov and Murray 2008, who draw MNIST's pixels so.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"grey levels are uint8, 0 to 255, not {described(images)}")
    random = context.generator(images.device, *key)
    thresholds = torch.randint(255, images.shape, generator=random, dtype=torch.uint8, device=images.device)
    return (thresholds < images).view(torch.uint8).mul_(255)


def described(tensor: Tensor) -> str:
    """Return the type, shape and range of a tensor, for an error message."""
    values = ""
    if tensor.numel() and not tensor.is_complex() and not tensor.is_meta:
        low, high = tensor.double().aminmax()
        values = f" from {low:g} to {high:g}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{values}"
