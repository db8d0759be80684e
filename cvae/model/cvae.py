"""A conditional VAE: a baseline, and draws of z with what follows from them."""

import math
import operator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvae import context
from cvae.data.pictures import Picture, as_images, as_pixels
from cvae.data.tasks import Batch, Task, described
from cvae.model.densities import (
    Gaussian,
    bernoulli_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    log_mean_exp,
)

Seed = int | torch.Generator | None

NOISE_IMAGES, SAMPLES_AT_ONCE = 10, 100
"""The images and samples of one portion of noise in an estimate; they bound the memory too."""


class Latent(NamedTuple):
    """One level of z. The distributions are `[B, Z]`, or `[L, B, Z]` where they depend on a level above."""

    z: Tensor  # the samples, [L, B, Z]
    eps: Tensor  # the noise that they were made of, [L, B, Z]
    q: Gaussian  # what they were drawn from: the recognition network's distribution, or p itself
    p: Gaussian  # the prior network's distribution


class Draw(NamedTuple):
    """L samples of z for each of B images, and the generation network's prediction from each."""

    logits: Tensor  # of p(y|x,z), [L, B, y_dim]
    latents: tuple[Latent, ...]  # the levels of z, from top to bottom

    def log_likelihood(self, batch: Batch) -> Tensor:
        """Return log p(y|x,z) of the batch's y, nats `[L, B]`."""
        return bernoulli_log_prob(batch.y, self.logits, batch.weight)

    def log_weights(self, batch: Batch) -> Tensor:
        """Return the log of the importance weights, p(y|x,z) p(z|x) / q(z|x,y), nats `[L, B]`."""
        return self.log_likelihood(batch) + self.log_ratio

    @property
    def log_ratio(self) -> Tensor:
        """log p(z|x) − log q(z|x,y) at these z, nats `[L, B]`; zero where they come from the prior network."""
        return reduce(torch.add, (gaussian_log_prob(z, p) - gaussian_log_prob(z, q) for z, _, q, p in self.latents))

    @property
    def kl_of_levels(self) -> list[Tensor]:
        """KL(q ‖ p) of each level, in closed form given what was drawn above it: nats, `[B]` or `[L, B]`."""
        return [gaussian_kl(q, p) for _, _, q, p in self.latents]


class CVAE(nn.Module):
    """A conditional VAE, p(y|x) = ∫ p(y|x,z) p(z|x) dz, on top of a baseline, which stays as it is.

    A network (`networks.py`) defines `encode` and `draw`; training and all estimates are made of these two.

    Args:
        task: What turns images into x and y.
        baseline_net: x `[B, x_dim]` → logits of ŷ, `[B, y_dim]`.
        latent_dim: The dimensions of z, of all levels together.
    """

    def __init__(self, task: Task, baseline_net: nn.Module, latent_dim: int):
        super().__init__()
        self.task = task
        self.baseline_net = baseline_net.requires_grad_(False)
        self.latent_dim = latent_dim

    def encode(self, batch: Batch, guess: Tensor, recognise: bool) -> Any:
        """Return what all draws of z for a batch have in common, in the network's own form.

        guess: The logits of ŷ, `[B, y_dim]`. recognise: As in `draw`; where it is False, y is not looked at.
        """
        raise NotImplementedError

    def draw(self, encoded: Any, eps: Tensor, recognise: bool, detach_z: bool = False) -> Draw:
        """Draw z, level by level, and predict y from it.

        Args:
            encoded: As `encode` returned it.
            eps: Noise, N(0, 1), `[L, B, latent_dim]`.
            recognise: Whether z comes from the recognition network, q(z|x,y), or from the prior network, p(z|x).
            detach_z: Whether what follows from each level's z takes it as a constant that has a gradient of its own,
                as `objectives.iwae` needs it.
        """
        raise NotImplementedError

    def from_posterior(self, batch: Batch, eps: Tensor, detach_z: bool = False) -> Draw:
        """Draw z from the recognition network, q(z|x,y), as `draw` does. Raises ValueError for other shapes."""
        return self.draw(self.encode(batch, self._checked_guess(batch, eps), True), eps, True, detach_z)

    def from_prior(self, batch: Batch, eps: Tensor) -> Draw:
        """Draw z from the prior network, p(z|x), as `draw` does. Raises ValueError for other shapes."""
        return self.draw(self.encode(batch, self._checked_guess(batch, eps), False), eps, False)

    def _checked_guess(self, batch: Batch, eps: Tensor) -> Tensor:
        """Return the baseline's guess. Shapes that do not fit would broadcast, and be wrong without a word."""
        count = batch.x.shape[0]
        one_for_all = eps.dim() == 3 and count != eps.shape[1] == 1
        _check("x", batch.x, (count, self.task.x_dim))
        _check("eps", eps, (eps.shape[0], 1 if one_for_all else count, self.latent_dim))
        for name, tensor in (("y", batch.y), ("weight", batch.weight), ("guess", batch.guess)):
            if tensor is not None:
                _check(name, tensor, (count, self.task.y_dim))
        return self.guess(batch)

    @torch.no_grad()
    def guess(self, batch: Batch) -> Tensor:
        """Return the logits of the baseline's guess ŷ, `[B, y_dim]`: the batch's, or computed for its x."""
        return self.baseline_net(batch.x) if batch.guess is None else batch.guess

    def train(self, mode: bool = True) -> "CVAE":
        """Change the mode as any module does; the baseline, which is trained before, stays in evaluation mode."""
        super().train(mode)
        self.baseline_net.eval()
        return self

    def completions(self, x: Tensor, eps: Tensor) -> Tensor:
        """Return the pixel means of p(y|x,z) at z ~ p(z|x).

        Args:
            x: What is given, `[B, x_dim]` in [0, 1].
            eps: Noise, N(0, 1), `[S, B, latent_dim]`, or `[S, 1, latent_dim]` to use one noise for all images.

        Returns:
            `[S, B, y_dim]` in [0, 1].

        Raises:
            ValueError: For tensors of other shapes.
        """
        return self.from_prior(Batch(x, x.new_empty(x.shape[0], self.task.y_dim)), eps).logits.sigmoid()

    @torch.no_grad()
    def complete(
        self, picture: Picture, samples: int = 10, seed: Seed = None, temperature: float = 1.0,
        labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Complete pictures: given pixels stay, the others are pixel means of p(y|x,z) at z ~ p(z|x).

        Args:
            picture: B pictures of the model's size, as `as_images` takes them; what is asked may hold anything.
            samples: S, the number of completions of each.
            seed: A number, or a generator on the model's device; None: other samples each time.
            temperature: A factor of z's noise: 1 for samples of p(z|x), 0 for its mean.
            labels: The classes of the pictures, int64 `[B]`, where the task needs them.

        Returns:
            `[samples, B, height, width]` in [0, 1].

        Raises:
            ValueError: For what is of another size, type or range.
            DataError: For a file that cannot be read.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature has to be a number from 0 on, not {temperature}")
        batch = self.task.batch(self.task.rows(as_images(picture, self.task), labels))
        x = self._pixels("the observed part of a picture", batch.x)
        eps = noise(_positive(samples), len(x), self, self._random(seed)).to(x.dtype)
        return self.task.compose(x, self.completions(x, temperature * eps))

    @torch.no_grad()
    def log_likelihood(
        self, picture: Picture, samples: int = 1000, seed: Seed = None, labels: Tensor | None = None
    ) -> Tensor:
        """Estimate log p(y|x) of whole pictures by importance sampling.

        In expectation the estimate lies below the true value. Source: Burda et al. 2016.

        Args:
            picture: B pictures, as in `complete`; all their pixels count.
            samples: The number of samples of z ~ q(z|x,y).
            seed, labels: As in `complete`.

        Returns:
            Nats per image, `[B]`, float64; higher is more likely.

        Raises:
            ValueError, DataError: As in `complete`.
        """
        _positive(samples)
        random = self._random(seed)
        whole = self.task.batch(self.task.rows(as_images(picture, self.task), labels))
        whole = whole._replace(x=self._pixels("a picture", whole.x), y=self._pixels("a picture", whole.y))
        estimates = []
        for first in range(0, len(whole.x), NOISE_IMAGES):
            batch = some(whole, slice(first, first + NOISE_IMAGES))
            encoded = self.encode(batch, self.guess(batch), True)
            log_weights = [
                self.draw(encoded, eps.to(batch.x.dtype), True).log_weights(batch)
                for eps in noise_portions(samples, len(batch.x), self, random)
            ]
            estimates.append(log_mean_exp(torch.cat(log_weights).double()))
        return torch.cat(estimates)

    def _pixels(self, name: str, pixels: Tensor) -> Tensor:
        return as_pixels(name, pixels, like=next(self.parameters()))

    def _random(self, seed: Seed) -> torch.Generator:
        device = next(self.parameters()).device
        if isinstance(seed, torch.Generator):
            if seed.device.type != device.type:
                raise ValueError(f"the generator has to be on {device}, as the model is, not on {seed.device}")
            return seed
        number = int(torch.randint(1 << 62, ())) if seed is None else operator.index(seed)
        return context.generator(device, number, "pictures")


def noise(samples: int, count: int, model: CVAE, random: torch.Generator) -> Tensor:
    """Draw eps ~ N(0, 1), `[samples, count, latent_dim]`, from and on the generator's device."""
    return torch.randn(
        samples, count, model.latent_dim, generator=random, device=random.device, dtype=torch.float32
    )  # whatever the default type is


def noise_portions(samples: int, count: int, model: CVAE, random: torch.Generator) -> list[Tensor]:
    """Draw the noise of so many samples, SAMPLES_AT_ONCE at a time: the first ones do not depend on their number."""
    starts = range(0, samples, SAMPLES_AT_ONCE)
    return [noise(SAMPLES_AT_ONCE, count, model, random)[: samples - first] for first in starts]


def some(batch: Batch, rows: slice) -> Batch:
    """Return some of the images of a batch."""
    return Batch(*(None if tensor is None else tensor[rows] for tensor in batch))  # type: ignore[arg-type]


def _positive(samples: int) -> int:
    if operator.index(samples) < 1:
        raise ValueError(f"samples has to be a number from 1 on, not {samples}")
    return samples


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(f"{name} has to be floats {list(shape)}, not {described(tensor)}")
