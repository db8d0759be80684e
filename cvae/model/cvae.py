"""A conditional VAE: a baseline, and draws of z with what follows from them."""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from cvae import context
from cvae.data.pictures import Picture, as_images, as_pixels
from cvae.data.tasks import Batch, Task, described
from cvae.model.densities import Gaussian, bernoulli_log_prob, gaussian_kl, log_mean_exp, widen

Seed = int | Generator | None

NOISE_IMAGES, SAMPLES_AT_ONCE = 10, 100  # of one portion of noise in an estimate; they bound the memory too


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
        levels = (p.log_prob(z) - q.log_prob(z) for z, _, q, p in self.latents if q is not p)
        return reduce(torch.add, levels, widen(self.logits).new_zeros(self.logits.shape[:-1]))

    @property
    def kl_of_levels(self) -> list[Tensor]:
        """KL(q ‖ p) of each level, in closed form, a mean over the samples drawn above it: nats `[B]`."""
        kls = (gaussian_kl(q, p) for _, _, q, p in self.latents)
        return [kl.mean(0) if kl.dim() > 1 else kl for kl in kls]


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
        """Draw z from the recognition network, q(z|x,y), as `draw` does; raise ValueError for other shapes."""
        return self.draw(self._encode(batch, eps, True), eps, True, detach_z)

    def from_prior(self, batch: Batch, eps: Tensor) -> Draw:
        """Draw z from the prior network, p(z|x), as `draw` does; raise ValueError for other shapes."""
        return self.draw(self._encode(batch, eps, False), eps, False)

    def _encode(self, batch: Batch, eps: Tensor, recognise: bool) -> Any:
        """Encode what has the right shapes. Others would broadcast, and be wrong without a word."""
        count, x_dim, y_dim = batch.x.shape[0], self.task.x_dim, self.task.y_dim
        is_one_for_all = eps.dim() == 3 and count != eps.shape[1] == 1  # compared so, `torch.export` leaves both open
        of_eps = (*eps.shape[:1], 1 if is_one_for_all else count, self.latent_dim)
        shapes = (count, x_dim), (count, y_dim), (count, y_dim), (count, y_dim), of_eps
        for name, tensor, shape in zip((*Batch._fields, "eps"), (*batch, eps), shapes, strict=True):
            if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
                raise ValueError(f"{name} has to be floats {list(shape)}, not {described(tensor)}")
        return self.encode(batch, self.guess(batch), recognise)

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
        """Return the pixel means of p(y|x,z) at z ~ p(z|x), `[S, B, y_dim]` in [0, 1].

        Args:
            x: What is given, `[B, x_dim]` in [0, 1].
            eps: Noise, N(0, 1), `[S, B, latent_dim]`, or `[S, 1, latent_dim]` to use one noise for all images.
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
            seed: A number, or a generator; None: other samples each time.
            temperature: A factor of z's noise: 1 for samples of p(z|x), 0 for its mean.
            labels: The classes of the pictures, int64 `[B]`, where the task needs them.

        Returns:
            `[samples, B, height, width]` in [0, 1].

        Raises:
            ValueError: For what is of another size, type or range.
            DataError: For a file that cannot be read.
        """
        batch = self.task.batch(self.task.rows(as_images(picture, self.task), labels))
        x = as_pixels("the observed part of a picture", batch.x, like=next(self.parameters()))
        eps = noise(samples, len(x), self, _generator(seed, x.device)).to(x)
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
            seed, labels: As in `complete`, and so are the errors.

        Returns:
            Nats per image, `[B]`, float64; higher is more likely.
        """
        like, estimates = next(self.parameters()), []
        random = _generator(seed, like.device)
        for rows in self.task.rows(as_images(picture, self.task), labels).split(NOISE_IMAGES):
            batch = self.task.batch(rows)
            known = {name: part for name, part in batch._asdict().items() if part is not None}
            moved = {name: as_pixels("a picture", part, like) for name, part in known.items()}
            (log_w,) = log_weights(self, batch._replace(**moved), samples, [random])
            estimates.append(log_mean_exp(log_w))
        return torch.cat(estimates)


def log_weights(
    model: CVAE, batch: Batch, samples: int, random: Sequence[Generator], recognise: Sequence[bool] = (True,)
) -> list[Tensor]:
    """Draw so many z for each image, and return the log of their importance weights, nats `[samples, B]`, float64.

    The noise of SAMPLES_AT_ONCE samples is drawn at a time: the first ones do not depend on their number.
    random: As in `noise`. recognise: Where z comes from, as in `draw`; one result for each, all from the same noise.
    """
    if samples < 1:
        raise ValueError(f"samples has to be a number from 1 on, not {samples}")
    encoded, portions = model.encode(batch, model.guess(batch), True), []
    for first in range(0, samples, SAMPLES_AT_ONCE):
        eps = noise(SAMPLES_AT_ONCE, len(batch.x), model, *random)[: samples - first].to(batch.x)
        portions.append([model.draw(encoded, eps, by_q).log_weights(batch) for by_q in recognise])
    return [torch.cat(log_w).double() for log_w in zip(*portions, strict=True)]


def noise(samples: int, count: int, model: CVAE, *random: Generator) -> Tensor:
    """Draw eps ~ N(0, 1), `[samples, count, latent_dim]`, from and on a generator's device.

    Of several generators, each draws the noise of NOISE_IMAGES images, and the last one that of the others.
    """
    counts = [NOISE_IMAGES] * (len(random) - 1)
    counts.append(count - sum(counts))
    dtype = torch.float32  # whatever the default type is
    return torch.cat([
        torch.randn(samples, images, model.latent_dim, generator=generator, device=generator.device, dtype=dtype)
        for images, generator in zip(counts, random, strict=True)
    ], dim=1)  # fmt: skip


def _generator(seed: Seed, device: torch.device) -> Generator:
    if isinstance(seed, Generator):
        return seed
    number = int(torch.randint(1 << 62, ())) if seed is None else operator.index(seed)
    return context.generator(device, number, "pictures")
