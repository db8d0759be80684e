"""Estimates of the conditional log-likelihood log p(y|x) over a set of images, with their standard errors.

Everything is computed per image, and averaged once, in float64. The noise comes from the seed and the place of a
portion of images in the set, whatever the number of processes.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cvae import runtime
from cvae.data.images import Batch, ImageSet
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.model.objectives import elbo, log_mean_exp

ELBO_SAMPLES = 10  # as many as the tutorial takes for its "Monte Carlo" row
IMAGES_AT_ONCE, SAMPLES_AT_ONCE = 20, 50  # bound the memory, and keep a draw's logits in the processor's cache


class Estimate(NamedTuple):
    """A mean over images, in nats per image, and its standard error."""

    mean: float
    stderr: float


class Likelihoods(NamedTuple):
    """Negative log-likelihoods and their bounds per image, nats `[N]` float64, lower is better.

    nn_nll: of the baseline's guess. cvae_neg_elbo: an upper bound on −log p(y|x), with ELBO_SAMPLES of z ~ q(z|x,y).
    cvae_mc_nll: −log of the mean of p(y|x,z) over S samples z ~ p(z|x). cvae_is_nll: −log of the mean of the
    importance weights over S samples z ~ q(z|x,y). In expectation both lie above −log p(y|x); they approach it as S
    grows.
    floor: the entropy of y's grey levels, which no Bernoulli negative log-likelihood of y can fall below.
    """

    nn_nll: Tensor
    cvae_neg_elbo: Tensor
    cvae_mc_nll: Tensor
    cvae_is_nll: Tensor
    floor: Tensor

    def estimates(self) -> dict[str, Estimate]:
        """Mean and standard error over the images of each of them."""
        return {name: estimate(values) for name, values in self._asdict().items()}


def estimate(values: Tensor) -> Estimate:
    """The mean of values `[N]` and its standard error, s/√N with the unbiased s (NaN where N = 1)."""
    stderr = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), stderr)


def evaluate(
    model: CVAE, images: ImageSet, samples: int, seed: int, share: Callable[[int], slice] = slice
) -> Iterator[Likelihoods]:
    """The likelihoods of the images, `IMAGES_AT_ONCE` at a time and in order.

    share: which of so many portions of images this process takes; all of them where it is not given. Raises ValueError
    for images with another split or on another device than the model's, and for fewer than one sample.
    Source: Sohn et al. 2015, the two estimates of the conditional log-likelihood; Burda et al. 2016 for the second.
    """
    if samples < 1:
        raise ValueError(f"at least one sample is needed, not {samples}")
    if images.split is not model.split and not torch.equal(images.split.observed, model.split.observed):
        own, other = (f"{split.num_observed} of {split.num_pixels} pixels" for split in (model.split, images.split))
        raise ValueError(f"the images have another split than the model: {other} observed, and not its {own}")
    if images.vectors.device != (device := next(model.parameters()).device):
        raise ValueError(f"the images are on {images.vectors.device}, and the model on {device}")
    return _evaluated(model, images, samples, seed, share)


@torch.inference_mode()
def _evaluated(
    model: CVAE, images: ImageSet, samples: int, seed: int, share: Callable[[int], slice]
) -> Iterator[Likelihoods]:  # fmt: skip
    starts = range(0, len(images), IMAGES_AT_ONCE)
    for start in starts[share(len(starts))]:
        batch = images.batch(slice(start, start + IMAGES_AT_ONCE))
        random = runtime.generator(images.vectors.device, seed, "evaluation", start)
        yield _evaluate(model, batch, samples, random)


def _evaluate(model: CVAE, batch: Batch, samples: int, random: torch.Generator) -> Likelihoods:
    guess = model.baseline_net(batch.x)
    batch = batch._replace(guess=guess)
    return Likelihoods(
        nn_nll=-bernoulli_log_prob(batch.y, guess).double(),
        cvae_neg_elbo=-elbo(model, batch, noise(ELBO_SAMPLES, len(batch.x), model, random))["elbo"].double(),
        cvae_mc_nll=monte_carlo_nll(model, batch, samples, random),
        cvae_is_nll=importance_sampling_nll(model, batch, samples, random),
        floor=bernoulli_entropy(batch.y).double(),
    )


def monte_carlo_nll(model: CVAE, batch: Batch, samples: int, random: torch.Generator) -> Tensor:
    """−log of the mean of p(y|x,z) over so many z ~ p(z|x): nats `[B]`, float64."""
    draws = (model.from_prior(batch.x, batch.guess, eps) for eps in portions(samples, batch, model, random))
    return -log_mean_exp(torch.cat([draw.log_likelihood(batch.y) for draw in draws]).double())


def importance_sampling_nll(model: CVAE, batch: Batch, samples: int, random: torch.Generator) -> Tensor:
    """−log of the mean of p(y|x,z) p(z|x) / q(z|x,y) over so many z ~ q(z|x,y): nats `[B]`, float64."""
    draws = (model.from_posterior(*batch, eps) for eps in portions(samples, batch, model, random))
    return -log_mean_exp(torch.cat([draw.log_weights(batch.y) for draw in draws]).double())


def portions(samples: int, batch: Batch, model: CVAE, random: torch.Generator) -> Iterator[Tensor]:
    """The noise of so many samples, SAMPLES_AT_ONCE at a time."""
    for first in range(0, samples, SAMPLES_AT_ONCE):
        yield noise(min(SAMPLES_AT_ONCE, samples - first), len(batch.x), model, random)


def noise(samples: int, count: int, model: CVAE, random: torch.Generator) -> Tensor:
    """eps ~ N(0, 1), `[samples, count, latent_dim]`, from and on the generator's device."""
    return torch.randn(samples, count, model.latent_dim, generator=random, device=random.device)
