"""Images on the device, split into what is observed and what is hidden, and batches of them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.data.masks import Quadrants


class Batch(NamedTuple):
    """Some images, split: x `[B, num_observed]` and y `[B, num_hidden]` in [0, 1], and the baseline's guess for y."""

    x: Tensor
    y: Tensor
    y_hat: Tensor | None


class ImageSet:
    """Images on the device: uint8 vectors `[N, num_pixels]` with the observed pixels first, and batches of them.

    `y_hat` `[N, num_hidden]`: the guesses of a frozen baseline, once `set_guesses` has computed them.
    """

    def __init__(self, images: Tensor, quadrants: Quadrants, device: torch.device | str = "cpu"):
        self.vectors = quadrants.vectors(images.to(device))
        self.num_observed = quadrants.num_observed
        self.y_hat: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    @torch.no_grad()
    def set_guesses(
        self, guess: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, size: int = 1000
    ) -> None:
        """Compute ŷ once for all images, `size` at a time; `guess`: x `[B, num_observed]` → ŷ `[B, num_hidden]`.

        dtype: to keep them in; a network whose products are in half precision sees no more of them than that.
        """
        shape = (len(self), self.vectors.shape[1] - self.num_observed)
        self.y_hat = torch.empty(shape, dtype=dtype, device=self.vectors.device)
        for rows, batch in zip(self.y_hat.split(size), self.batches(size), strict=True):
            rows.copy_(guess(batch.x))

    def batch(self, rows: Tensor | slice) -> Batch:
        """The images at these rows: int64 `[B]` on the device, or a slice."""
        pixels = _rows(self.vectors, rows) / 255
        y_hat = None if self.y_hat is None else _rows(self.y_hat, rows)
        return Batch(pixels[:, : self.num_observed], pixels[:, self.num_observed :], y_hat)

    def batches(self, size: int) -> Iterator[Batch]:
        """The images in order, `size` at a time and the rest at last."""
        for first in range(0, len(self), size):
            yield self.batch(slice(first, first + size))


def _rows(table: Tensor, rows: Tensor | slice) -> Tensor:
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)
