"""A phase of a run: what is trained, by which objective, on what, and how well it does on the validation images."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvae.context import Context, generator
from cvae.data.tasks import ImageSet
from cvae.model.objectives import Objective, Totals
from cvae.settings import Settings

VALIDATION_IMAGES, VALIDATION_ROWS = 1000, 20_000  # of a portion, at most: images, and images times samples of z
FREE_NATS = 0.4  # of each level and image, whose KL costs nothing at first, where `s.free_epochs` is not zero
UNBENT_RATE = 0.15  # share of the highest learning rate at which the last epochs begin, in which no image is bent


class Phase(NamedTuple):
    """One of the two trainings of a run: the baseline's, then the CVAE's."""

    name: str  # "baseline" or "cvae"
    model: nn.Module  # what is trained
    objective: Objective  # what is maximised
    epochs: int  # at most
    train: ImageSet
    validation: ImageSet
    samples: int  # of z per image; 0 where the objective takes no noise
    noise: Callable[[int, torch.Generator], tuple[Tensor, ...]]  # of so many images: the objective's further arguments
    picture: Callable[[Any], Tensor]  # draws what the log shows of a model

    @torch.no_grad()
    def validate(
        self, model: nn.Module, seed: int, context: Context, done: Callable[[int], object] = lambda count: None
    ) -> Totals:
        """Return the objective's terms on the validation images; the noise is the same in every epoch.

        Args:
            model: The phase's model, or the average of its weights.
            seed: The seed of the noise.
            context: Says the precision of the products, and which portions of the images this process takes.
            done: Called with the number of images that were just evaluated.
        """
        model.eval()
        images, totals = self.validation, Totals(context.device)
        size = max(1, min(VALIDATION_IMAGES, VALIDATION_ROWS // max(1, self.samples)))
        for start in context.processes.portions(len(images), size):
            batch = images.batch(slice(start, start + size))
            eps = self.noise(len(batch.x), generator(context.device, seed, "validation", start))
            with context.autocast():
                totals.add(self.objective(model, batch, *eps))
            done(len(batch.x))
        context.processes.sum_on_host_(totals.sums)
        return totals

    def bend(self, s: Settings, epoch: int) -> float:
        """Return the share of images bent in an epoch: none for the baseline, which hardly overfits, nor at the end."""
        return s.bend if epoch <= self.epochs - self.unbent(s) and self.name == "cvae" else 0.0

    def free_nats(self, s: Settings, epoch: float) -> float:
        """Return what costs nothing of each level's KL: `FREE_NATS`, falling linearly to zero in `s.free_epochs`."""
        return FREE_NATS * max(0.0, 1 - epoch / s.free_epochs) if s.free_epochs and self.name == "cvae" else 0.0

    def learning_rate(self, s: Settings, epoch: float) -> float:
        """Return the rate at a moment, in epochs: a linear warm-up, then constant, or half a cosine down to zero.

        In the CVAE's last `s.unbent_epochs` it is half a cosine again, from `UNBENT_RATE` of the highest rate.
        """
        first, epochs, rate = s.warmup_epochs, self.epochs - self.unbent(s), s.learning_rate
        if epochs <= epoch and epochs < self.epochs:
            first, epochs, rate = epochs, self.epochs, rate * UNBENT_RATE
        elif epoch < first:
            return rate * (epoch + 0.01) / (first + 0.01)
        elif s.schedule == "constant":
            return rate
        return rate * 0.5 * (1 + math.cos(math.pi * (epoch - first) / (epochs - first)))

    def unbent(self, s: Settings) -> int:
        """Return the number of last epochs without bent images, at a lower rate."""
        return min(s.unbent_epochs, self.epochs) if self.name == "cvae" else 0

    def where(self, epoch: int) -> str:
        """Return an epoch of the phase, in words."""
        return f"{self.name}, epoch {epoch}/{self.epochs}"
