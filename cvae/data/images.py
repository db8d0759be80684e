"""Images on the device, as rows of a task, in batches; bent, and drawn black or white."""

from collections.abc import Callable

import torch
from torch import Tensor

from cvae import context
from cvae.data.bending import bent
from cvae.data.tasks import Batch, Task, described
from cvae.settings import Settings

DRAWN_ONCE = {"grey": (), "binary": ("validation", "test"), "binary-fixed": ("train", "validation", "test")}
"""The parts of the images that are black or white from the start, by the setting `targets`."""

AT_ONCE = 10_000  # images that are redrawn at once


class ImageSet:
    """Images on the device, kept as rows of a task, and batches of them.

    Args:
        images: uint8 `[N, height, width]`, 0 to 255.
        task: What turns them into x and y.
        device: Where they are kept.
        labels: Their classes, int64 `[N]`, where the task needs them.
        key: The key of the random numbers, where the task draws any.

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
        self._guess(self.guesses)

    @torch.no_grad()
    def _guess(self, guesses: Tensor, size: int = 1000) -> None:
        assert self._baseline is not None
        for i, part in enumerate(guesses.split(size)):
            part.copy_(self._baseline(self.batch(slice(i * size, (i + 1) * size)).x))

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
        if self.guesses is not None:
            self._guess(self.guesses)

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return the images at these rows, int64 `[B]` on the device or a slice, with their guesses if known."""
        guess = None if self.guesses is None else _select(self.guesses, rows)
        return self.task.batch(_select(self.rows, rows))._replace(guess=guess)


def _select(table: Tensor, rows: Tensor | slice) -> Tensor:
    return table[rows] if isinstance(rows, slice) else table.index_select(0, rows)


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


def as_targets(s: Settings, part: str, images: Tensor) -> Tensor:
    """Return one part (`train`, `validation` or `test`) of a source's images, uint8, as the setting `targets` wants it.

    What is drawn once is drawn from the part's name, whatever the run's seed: runs of several seeds are evaluated on
    the same pictures.
    """
    return binarized(images, "targets", part) if part in DRAWN_ONCE[s.targets] else images
