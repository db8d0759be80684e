"""Estimates of the conditional log-likelihood log p(y|x), and active units of z, over a set of images.

Everything is computed per image, and averaged once, in float64. The noise comes from the seed and the place of a
portion of images in the set, whatever the number of processes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.context import Context, generator
from cvae.data.tasks import ImageSet
from cvae.model.cvae import CVAE, NOISE_IMAGES, log_weights, noise
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob, log_mean_exp, widen
from cvae.model.objectives import elbo, kl_levels

ELBO_SAMPLES = 10  # as many as the tutorial takes for its "Monte Carlo" row
LEAST_VARIANCE = 0.01
ACTIVITY_IMAGES, ACTIVITY_SAMPLES, ACTIVITY_AT_ONCE = 1000, 10, 50


class Estimate(NamedTuple):
    """A mean over images, in nats per image, and its standard error."""

    mean: float
    stderr: float


class Likelihoods(NamedTuple):
    """Negative log-likelihoods in nats per image, lower is better, and what goes with them; all in float64.

    `[N]` for N images, or `[K, N]` for K numbers of samples S. In expectation the two estimates of −log p(y|x) lie
    above it; they approach it as S grows.
    """

    nn_nll: Tensor  # −log p(y|ŷ) of the baseline's guess, [N]
    cvae_neg_elbo: Tensor  # an upper bound on −log p(y|x), by ELBO_SAMPLES samples of z ~ q(z|x,y), [N]
    cvae_mc_nll: Tensor  # −log of the mean of p(y|x,z) over S samples z ~ p(z|x), [K, N]
    cvae_is_nll: Tensor  # −log of the mean of the importance weights over S samples z ~ q(z|x,y), [K, N]
    floor: Tensor  # the entropy of y's grey levels, below which no Bernoulli negative log-likelihood of y falls, [N]
    kl: Tensor  # KL(q ‖ p) of each level, from top to bottom, in the −ELBO, [levels, N]
    ess: Tensor  # the effective sample size of the S importance weights, from 1 to S, [K, N]


def estimate(values: Tensor) -> Estimate:
    """Return the mean of values `[N]` and its standard error, s/√N with the unbiased s (NaN where N = 1)."""
    stderr = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), stderr)


@torch.inference_mode()
def evaluate(
    model: CVAE, images: ImageSet, samples: Sequence[int], seed: int, context: Context
) -> Iterator[Likelihoods]:
    """Yield the likelihoods of this process's images, a portion at a time; an empty portion if it has no images.

    All estimates of an image come from the same draws, of which each takes the first S: it is the same whatever other
    numbers there are. Source: Sohn et al. 2015, the two estimates of the conditional log-likelihood; Burda et al. 2016
    for the second.

    Args:
        model, images: The CVAE, and images of its task and on its device.
        samples: The numbers of samples S.
        seed: The seed of the noise.
        context: Says where the images are, the precision of the products, and which portions this process takes.
    """
    size = NOISE_IMAGES * (2 if context.half else 1)  # more rows fill half-precision products better
    for start in context.processes.portions(len(images), size):
        batch = images.batch(slice(start, start + size))
        places = range(start, start + max(1, len(batch.x)), NOISE_IMAGES)
        random = [generator(context.device, seed, "evaluation", place) for place in places]
        with context.autocast():
            batch = batch._replace(guess=model.guess(batch))
            terms = elbo(model, batch, noise(ELBO_SAMPLES, len(batch.x), model, *random))
            log_p, log_w = log_weights(model, batch, max(samples), random, recognise=(False, True))
        yield Likelihoods(
            nn_nll=-bernoulli_log_prob(batch.y, model.guess(batch), batch.weight).double(),
            cvae_neg_elbo=-terms["elbo"].double(),
            cvae_mc_nll=-torch.stack([log_mean_exp(log_p[:s]) for s in samples]),
            cvae_is_nll=-torch.stack([log_mean_exp(log_w[:s]) for s in samples]),
            floor=bernoulli_entropy(batch.y, batch.weight).double(),
            kl=torch.stack(kl_levels(terms)).double(),
            ess=torch.stack([effective_sample_size(log_w[:s]) for s in samples]),
        )


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (Σw)² / Σw² over the first dimension, from log w `[S, B]`: `[B]`, from 1 to S. Source: Kong 1992."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


@torch.no_grad()
def active_units(model: CVAE, images: ImageSet, seed: int, context: Context) -> list[tuple[int, int]]:
    """Return for each level of z, from top to bottom, how many dimensions are active, and how many there are.

    A dimension is active where the mean of its q(z|x,y), given the image, has a variance over the first
    `ACTIVITY_IMAGES` images above `LEAST_VARIANCE`. Source: Burda et al. 2016, section 5.1, with their threshold.

    The arguments are those of `evaluate`; levels below the first depend on the noise.
    """
    count, portions = min(len(images), ACTIVITY_IMAGES), []
    for start in range(0, count, ACTIVITY_AT_ONCE):
        batch = images.batch(slice(start, min(start + ACTIVITY_AT_ONCE, count)))
        eps = noise(ACTIVITY_SAMPLES, len(batch.x), model, generator(context.device, seed, "activity", start))
        with context.autocast():
            latents = model.from_posterior(batch, eps[:1]).latents
            if len(latents) > 1:  # the levels below the first depend on what was drawn above
                latents = model.from_posterior(batch, eps).latents
        portions.append([latent.q.loc for latent in latents])
    levels = (torch.cat(locs, dim=-2) for locs in zip(*portions, strict=True))
    return [(int((variance_of_means(loc) > LEAST_VARIANCE).sum()), loc.shape[-1]) for loc in levels]


def variance_of_means(loc: Tensor) -> Tensor:
    """Return the variance over images of E[loc | image], without bias: `[Z]` float64, zero for a single image.

    loc: `[B, Z]`, or `[L, B, Z]` for L draws of what lies above, of which the expectation is taken. The mean of L draws
    varies by itself too, by 1/L of the variance among them, which is taken off.
    """
    loc = widen(loc).double().view(-1, *loc.shape[-2:])
    of_draws, of_images = (min(1, count - 1) for count in loc.shape[:2])
    return loc.mean(0).var(0, correction=of_images) - loc.var(0, correction=of_draws).mean(0) / len(loc)
