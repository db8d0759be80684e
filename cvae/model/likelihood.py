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
from cvae.model.densities import Gaussian, bernoulli_entropy, bernoulli_log_prob
from cvae.model.networks import CVAE
from cvae.model.objectives import elbo_terms, log_importance_weights

ELBO_SAMPLES = 10  # as many as the tutorial takes for its "Monte Carlo" row
IMAGES_AT_ONCE, SAMPLES_AT_ONCE = 50, 20  # bound the memory, and keep a chunk's logits in the processor's cache


class Estimate(NamedTuple):
    """A mean over images, in nats per image, and its standard error."""

    mean: float
    stderr: float


class Likelihoods(NamedTuple):
    """Negative log-likelihoods and their bounds per image, nats `[N]` float64, lower is better.

    nn_nll: of the baseline's guess. cvae_neg_elbo: an upper bound on −log p(y|x), with ELBO_SAMPLES of z ~ q(z|x,y).
    cvae_mc_nll: −log of the mean of p(y|x,z) over S samples z ~ p(z|x). cvae_is_nll: −log of the mean of the
    importance weights over S samples z ~ q(z|x,y). Both lie above −log p(y|x) in expectation, by less the larger S is.
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


@torch.inference_mode()
def evaluate(
    cvae: CVAE, images: ImageSet, samples: int, seed: int, share: Callable[[int], slice] = slice
) -> Iterator[Likelihoods]:
    """The likelihoods of the images, `IMAGES_AT_ONCE` at a time and in order.

    share: which of so many portions of images this process takes; all of them where it is not given.
    Source: Sohn et al. 2015, the two estimates of the conditional log-likelihood; Burda et al. 2016 for the second.
    """
    starts = range(0, len(images), IMAGES_AT_ONCE)
    for start in starts[share(len(starts))]:
        batch = images.batch(slice(start, start + IMAGES_AT_ONCE))
        random = runtime.generator(images.vectors.device, seed, "evaluation", start)
        yield _evaluate(cvae, batch, samples, random)


def _evaluate(cvae: CVAE, batch: Batch, samples: int, random: torch.Generator) -> Likelihoods:
    x, y, _ = batch
    guess = cvae.baseline_net.logits(x)
    p, q = cvae.prior(x, guess.sigmoid()), cvae.recognition(x, y)
    _, logits = next(draw(cvae, q, ELBO_SAMPLES, random))  # they fit into one draw
    return Likelihoods(
        nn_nll=-bernoulli_log_prob(y, guess).double(),
        cvae_neg_elbo=-elbo_terms(y, logits, q, p).elbo.double(),
        cvae_mc_nll=monte_carlo_nll(cvae, y, p, samples, random),
        cvae_is_nll=importance_sampling_nll(cvae, y, q, p, samples, random),
        floor=bernoulli_entropy(y).double(),
    )


def monte_carlo_nll(cvae: CVAE, y: Tensor, p: Gaussian, samples: int, random: torch.Generator) -> Tensor:
    """−log of the mean of p(y|x,z) over z ~ p(z|x): y `[B, D]`, p `[B, Z]` → nats `[B]`, float64."""
    return -log_mean_exp(torch.cat([bernoulli_log_prob(y, logits) for _, logits in draw(cvae, p, samples, random)]))


def importance_sampling_nll(
    cvae: CVAE, y: Tensor, q: Gaussian, p: Gaussian, samples: int, random: torch.Generator
) -> Tensor:
    """−log of the mean importance weight over z ~ q(z|x,y): y `[B, D]`, q and p `[B, Z]` → nats `[B]`, float64."""
    draws = draw(cvae, q, samples, random)
    return -log_mean_exp(torch.cat([log_importance_weights(y, logits, z, q, p) for z, logits in draws]))


def draw(cvae: CVAE, gaussian: Gaussian, count: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """So many samples of z `[S, B, Z]` and the logits of y given them `[S, B, D]`, SAMPLES_AT_ONCE at a time."""
    for first in range(0, count, SAMPLES_AT_ONCE):
        size = (min(SAMPLES_AT_ONCE, count - first), *gaussian.loc.shape)
        z = gaussian.sample(torch.randn(size, generator=random, device=gaussian.loc.device))
        yield z, cvae.generation(z)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log of the mean over the first dimension of exp(log_weights): `[S, B]` → `[B]`, float64."""
    return log_weights.double().logsumexp(0) - math.log(len(log_weights))
