"""Images on the device, split into what is observed and what is hidden, and batches of them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.data.masks import Split


class Batch(NamedTuple):
    """Some images, split: x `[B, num_observed]` and y `[B, num_hidden]`, in [0, 1].

    guess: the logits of the baseline's guess ŷ for y, `[B, num_hidden]`, where they are known already.
    """

    x: Tensor
    y: Tensor
    guess: Tensor | None = None


class ImageSet:
    """Images on the device: uint8 vectors `[N, num_pixels]` with the observed pixels first, and batches of them.

    `guesses` `[N, num_hidden]`: the logits of a frozen baseline, once `set_guesses` has computed them.
    """

    def __init__(self, images: Tensor, split: Split, device: torch.device | str = "cpu"):
        self.vectors = split.vectors(images.to(device))
        self.num_observed = split.num_observed
        self.guesses: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @torch.no_grad()
    def set_guesses(
        self, baseline: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, size: int = 1000
    ) -> None:
        """Compute a baseline's logits once for all images, `size` at a time.

        baseline: x `[B, num_observed]` → logits `[B, num_hidden]`. dtype: to keep them in; those of a
        product in half precision are no more exact than its type.
        """
        shape = (len(self), self.vectors.shape[1] - self.num_observed)
        self.guesses = torch.empty(shape, dtype=dtype, device=self.vectors.device)
        for rows, batch in zip(self.guesses.split(size), self.batches(size), strict=True):
            rows.copy_(baseline(batch.x))

    def redraw(self, *key: object) -> None:
        """Draw black or white pixels anew, each white with its grey level as probability; key: of the random seed."""
        raise NotImplementedError

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
