"""A phase of a run: what is trained, by which objective, on what, and how well it does on the validation images."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvae import context
from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.model.activity import active_units
from cvae.model.objectives import Objective, Totals, by_level
from cvae.settings import Settings

VALIDATION_BATCH = 1000
FREE_NATS = 0.4
"""Nats of each level and image whose KL costs nothing at first, where `s.free_epochs` is not zero."""
UNBENT_RATE = 0.15
"""The share of the highest learning rate at which the last epochs begin, in which no image is bent."""


class Phase(NamedTuple):
    """One of the two trainings of a run: the baseline's, then the CVAE's."""

    name: str  # "baseline" or "cvae"
    model: nn.Module
    objective: Objective
    epochs: int
    train: ImageSet
    validation: ImageSet
    noise: Callable[[int, torch.Generator], tuple[Tensor, ...]]  # of so many images: what the objective takes of it
    picture: Callable[[Any], Tensor]  # of a model, for the log

    @torch.no_grad()
    def validate(
        self,
        model: nn.Module,
        seed: int,
        precision: str,
        processes: Processes,
        done: Callable[[int], object] = lambda count: None,
    ) -> Totals:
        """The objective's terms on the validation images, in this precision; the noise is the same in every epoch.

        model: the phase's, or the average of its weights. Each process takes its share of portions of the images.
        done: told how many more images it has been through.
        """
        model.eval()
        images = self.validation
        device, totals = images.vectors.device, Totals(images.vectors.device)
        starts = range(0, len(images), VALIDATION_BATCH)
        for start in starts[processes.share(len(starts))] or [len(images)]:  # where there is none: an empty one
            batch = images.batch(slice(start, start + VALIDATION_BATCH))
            eps = self.noise(len(batch.x), context.generator(device, seed, "validation", start))
            with context.autocast(precision, device):
                totals.add(self.objective(model, batch, *eps))
            done(len(batch.x))
        processes.sum_on_host_(totals.sums)
        return totals

    def active_units(self, model: Any, seed: int, precision: str) -> dict[str, float]:
        """How many dimensions of z are active on the validation images, in all and by level, for the log."""
        units = active_units(model, self.validation, seed, precision)
        return by_level("active_units", [float(active) for active, _ in units])

    def bend(self, s: Settings, epoch: int) -> float:
        """The share of images bent in an epoch: none for the baseline, which hardly overfits, nor in the last ones."""
        return s.bend if epoch <= self._epochs_before_last(s) and self.name == "cvae" else 0.0

    def schedule(self, s: Settings, epoch: float, rate: Tensor, free_nats: Tensor | None) -> None:
        """Set what changes from step to step, at a moment in epochs. free_nats: None where it is always zero."""
        rate.fill_(self.learning_rate(s, epoch))
        if free_nats is not None:
            free_nats.fill_(self.free_nats(s, epoch))

    def free_nats(self, s: Settings, epoch: float) -> float:
        """What costs nothing of each level's KL: `FREE_NATS`, falling linearly to zero in `s.free_epochs`."""
        return FREE_NATS * max(0.0, 1 - epoch / s.free_epochs) if s.free_epochs and self.name == "cvae" else 0.0

    def learning_rate(self, s: Settings, epoch: float) -> float:
        """At a moment, in epochs: a linear warm-up, then constant, or half a cosine down to zero.

        In the CVAE's last `s.unbent_epochs`, half a cosine again, from `UNBENT_RATE` of the highest rate.
        """
        first, epochs, rate = s.warmup_epochs, self._epochs_before_last(s), s.learning_rate
        if epochs <= epoch and epochs < self.epochs:
            first, epochs, rate = epochs, self.epochs, rate * UNBENT_RATE
        elif epoch < first:
            return rate * (epoch + 0.01) / (first + 0.01)
        elif s.schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * (epoch - first) / (epochs - first)))

    def _epochs_before_last(self, s: Settings) -> int:
        return max(0, self.epochs - s.unbent_epochs) if self.name == "cvae" else self.epochs

    def where(self, epoch: int) -> str:
        """An epoch of the phase, in words."""
        return f"{self.name}, epoch {epoch}/{self.epochs}"
