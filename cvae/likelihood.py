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
from cvae.data import Batch, ImageSet
from cvae.densities import Gaussian, bernoulli_entropy, bernoulli_log_prob
from cvae.model import CVAE
from cvae.objectives import elbo_terms, log_importance_weights

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
    Source: Sohn et al. 2015, section 4.2 (equations 6 and 7).
    """
    starts = range(0, len(images), IMAGES_AT_ONCE)
    for start in starts[share(len(starts))]:
        batch = images.batch(slice(start, start + IMAGES_AT_ONCE))
        random = runtime.generator(images.vectors.device, seed, "evaluation", start)
        yield _evaluate(cvae, batch, samples, random)


def _evaluate(cvae: CVAE, batch: Batch, samples: int, random: torch.Generator) -> Likelihoods:
    x, y, _ = batch
    guess = cvae.baseline_net.logits(x)
    p = cvae.prior(x, guess.sigmoid())
    q = cvae.recognition(x, y)

    def draw(gaussian: Gaussian, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples of z and the logits of y given them, some at a time."""
        for first in range(0, count, SAMPLES_AT_ONCE):
            size = (min(SAMPLES_AT_ONCE, count - first), len(x), cvae.latent_dim)
            z = gaussian.sample(torch.randn(size, generator=random, device=x.device))
            yield z, cvae.generation(z)

    _, logits = next(draw(q, ELBO_SAMPLES))  # they fit into one draw
    bound = elbo_terms(y, logits, q, p).elbo
    prior_weights = torch.cat([bernoulli_log_prob(y, logits) for _, logits in draw(p, samples)])
    weights = torch.cat([log_importance_weights(y, logits, z, q, p) for z, logits in draw(q, samples)])
    return Likelihoods(
        nn_nll=-bernoulli_log_prob(y, guess).double(),
        cvae_neg_elbo=-bound.double(),
        cvae_mc_nll=-log_mean_exp(prior_weights),
        cvae_is_nll=-log_mean_exp(weights),
        floor=bernoulli_entropy(y).double(),
    )


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log of the mean over the first dimension of exp(log_weights): `[S, B]` → `[B]`, float64."""
    return log_weights.double().logsumexp(0) - math.log(len(log_weights))
