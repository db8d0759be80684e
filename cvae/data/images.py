"""Images on the device, split into what is observed and what is hidden, batches of them, and black or white draws."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cvae import context
from cvae.data.bending import bent
from cvae.data.masks import Split, described
from cvae.settings import Settings

DRAWN_ONCE = {"grey": (), "binary": ("validation", "test"), "binary-fixed": ("train", "validation", "test")}
"""The parts of the images that are black or white from the start, by the setting `targets`."""


AT_ONCE = 10_000  # images that are redrawn at once, which takes two more bytes a pixel


class Batch(NamedTuple):
    """Some images, split: x `[B, num_observed]` and y `[B, num_hidden]`, in [0, 1].

    guess: the logits of the baseline's guess ŷ for y, `[B, num_hidden]`, where they are known already.
    """

    x: Tensor
    y: Tensor
    guess: Tensor | None = None


class ImageSet:
    """Images on the device: uint8 vectors `[N, num_pixels]` with the observed pixels first, and batches of them.

    images: uint8 `[N, height, width]` of the split's size, 0 to 255; ValueError for others.
    `guesses` `[N, num_hidden]`: the logits of a frozen baseline, once `set_guesses` has computed them.
    """

    def __init__(self, images: Tensor, split: Split, device: torch.device | str = "cpu"):
        if images.dtype != torch.uint8 or images.dim() != 3:
            raise ValueError(f"images are uint8 [N, height, width], 0 to 255, not {described(images)}")
        self.vectors = split.vectors(images).to(device)  # so that the device never holds them twice
        self.split, self.num_observed = split, split.num_observed
        self.guesses: Tensor | None = None
        self._guess: Callable[[], None] = lambda: None  # computes the guesses
        self._stored: Tensor | None = None  # the vectors before they were redrawn

    def __len__(self) -> int:
        return len(self.vectors)

    def set_guesses(
        self, baseline: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, size: int = 1000
    ) -> None:
        """Compute a baseline's logits once for all images, `size` at a time, and again whenever they are redrawn.

        baseline: x `[B, num_observed]` → logits `[B, num_hidden]`. dtype: to keep them in; those of a
        product in half precision are no more exact than its type.
        """
        shape = (len(self), self.vectors.shape[1] - self.num_observed)
        self.guesses = guesses = torch.empty(shape, dtype=dtype, device=self.vectors.device)

        @torch.no_grad()
        def guess() -> None:
            for rows, batch in zip(guesses.split(size), self.batches(size), strict=True):
                rows.copy_(baseline(batch.x))

        self._guess = guess
        guess()

    def redraw(
        self, *key: object, binary: bool, bend: float = 0.0, done: Callable[[int], object] = lambda count: None
    ) -> None:
        """Draw the images anew from the stored ones: a share of them bent (`bent`), all black or white (`binarized`).

        key: of the random seed. done: told how many more images it has drawn. The vectors and the guesses change in
        place, where a CUDA graph reads them.
        """
        if self._stored is None:
            self._stored = self.vectors.clone()
        for i, (rows, drawn) in enumerate(zip(self.vectors.split(AT_ONCE), self._stored.split(AT_ONCE), strict=True)):
            if bend:
                drawn = self.split.vectors(bent(self.split.images(drawn), bend, *key, i))
            rows.copy_(binarized(drawn, *key, i) if binary else drawn)
            done(len(rows))
        self._guess()

    def batch(self, rows: Tensor | slice) -> Batch:
        """The images at these rows: int64 `[B]` on the device, or a slice."""
        pixels = _rows(self.vectors, rows) / 255
        guess = None if self.guesses is None else _rows(self.guesses, rows)
        return Batch(pixels[:, : self.num_observed], pixels[:, self.num_observed :], guess)

    def batches(self, size: int) -> Iterator[Batch]:
        """The images in order, `size` at a time and the rest at last."""
        for first in range(0, len(self), size):
            yield self.batch(slice(first, first + size))


def _rows(table: Tensor, rows: Tensor | slice) -> Tensor:
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)


def binarized(images: Tensor, *key: object) -> Tensor:
    """Images of black or white pixels, 0 or 255, each white with the probability grey / 255: black and white ones stay.

    images: uint8, of any shape. key: of the random seed, as in `context.derive_seed`. A draw on the CPU is the same on
    every machine. Raises ValueError for another type.
    Source: Salakhutdinov and Murray 2008, who draw the pixels of MNIST so.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"grey levels are uint8, 0 to 255, not {described(images)}")
    random = context.generator(images.device, *key)
    thresholds = torch.randint(255, images.shape, generator=random, dtype=torch.uint8, device=images.device)
    return (thresholds < images).view(torch.uint8).mul_(255)


def is_redrawn(s: Settings) -> bool:
    """Whether training images are drawn anew in each epoch, black or white or bent: the stored ones are kept beside."""
    return s.targets == "binary" or s.bend > 0


def as_targets(s: Settings, part: str, images: Tensor) -> Tensor:
    """One part of a source's images (`train`, `validation` or `test`; uint8), as the setting `targets` wants it.

    What is drawn once is drawn by a seed of its own, the part's name, whatever the run's `seed`: runs of several seeds
    are evaluated on the same pictures.
    """
    return binarized(images, "targets", part) if part in DRAWN_ONCE[s.targets] else images
