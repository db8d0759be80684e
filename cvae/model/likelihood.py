"""Estimates of the conditional log-likelihood log p(y|x) over a set of images, with their standard errors.

Everything is computed per image, and averaged once, in float64. The noise comes from the seed and the place of a
portion of images in the set, whatever the number of processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvae import context
from cvae.data.images import Batch, ImageSet
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.model.objectives import elbo, kl_levels, log_mean_exp

ELBO_SAMPLES = 10  # as many as the tutorial takes for its "Monte Carlo" row
IMAGES_AT_ONCE, SAMPLES_AT_ONCE = 10, 100  # bound the memory, and keep a draw's logits in the processor's cache


class Estimate(NamedTuple):
    """A mean over images, in nats per image, and its standard error."""

    mean: float
    stderr: float


class Likelihoods(NamedTuple):
    """Negative log-likelihoods and what goes with them per image, `[N]`, or `[K, N]` for K numbers of samples; float64.

    In nats, lower is better:
    nn_nll: of the baseline's guess. cvae_neg_elbo: an upper bound on −log p(y|x), with ELBO_SAMPLES of z ~ q(z|x,y).
    cvae_mc_nll `[K, N]`: −log of the mean of p(y|x,z) over S samples z ~ p(z|x). cvae_is_nll `[K, N]`: −log of the mean
    of the importance weights over S samples z ~ q(z|x,y). In expectation both lie above −log p(y|x); they approach it
    as S grows.
    floor: the entropy of y's grey levels, which no Bernoulli negative log-likelihood of y can fall below.

    And: kl `[levels, N]`, KL(q ‖ p) of each level, from top to bottom, in the −ELBO: nats.
    ess `[K, N]`: the effective sample size of the S importance weights, from 1 to S.
    """

    nn_nll: Tensor
    cvae_neg_elbo: Tensor
    cvae_mc_nll: Tensor
    cvae_is_nll: Tensor
    floor: Tensor
    kl: Tensor
    ess: Tensor


def estimate(values: Tensor) -> Estimate:
    """The mean of values `[N]` and its standard error, s/√N with the unbiased s (NaN where N = 1)."""
    stderr = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), stderr)


def evaluate(
    model: CVAE, images: ImageSet, samples: Sequence[int], seed: int, share: Callable[[int], slice] = slice
) -> Iterator[Likelihoods]:
    """The likelihoods of the images, `IMAGES_AT_ONCE` at a time and in order; those of no image if it has none.

    samples: the numbers of samples S. All estimates of an image come from the same draws, of which each takes the first
    S: it is the same whatever other numbers there are. share: which of so many portions of images this process takes;
    all of them where it is not given. Raises ValueError for images with another split or on another device than the
    model's, and for fewer than one sample.
    Source: Sohn et al. 2015, the two estimates of the conditional log-likelihood; Burda et al. 2016 for the second.
    """
    if min(samples, default=0) < 1:
        raise ValueError(f"at least one sample is needed, not {list(samples)}")
    if images.split is not model.split and not torch.equal(images.split.observed, model.split.observed):
        own, other = (f"{split.num_observed} of {split.num_pixels} pixels" for split in (model.split, images.split))
        raise ValueError(f"the images have another split than the model: {other} observed, and not its {own}")
    if images.vectors.device != (device := next(model.parameters()).device):
        raise ValueError(f"the images are on {images.vectors.device}, and the model on {device}")
    return _evaluated(model, images, samples, seed, share)


def joined(portions: Iterable[Likelihoods]) -> Likelihoods:
    """The likelihoods of all the images of some portions, in order."""
    return Likelihoods(*(torch.cat(values, dim=-1) for values in zip(*portions, strict=True)))


@torch.inference_mode()
def _evaluated(
    model: CVAE, images: ImageSet, samples: Sequence[int], seed: int, share: Callable[[int], slice]
) -> Iterator[Likelihoods]:  # fmt: skip
    starts = range(0, len(images), IMAGES_AT_ONCE)
    own = starts[share(len(starts))]
    for start in own or starts[:1]:
        batch = images.batch(slice(start, start + IMAGES_AT_ONCE))
        random = context.generator(images.vectors.device, seed, "evaluation", start)
        found = _evaluate(model, batch, samples, random)
        yield found if own else Likelihoods(*(values[..., :0] for values in found))


def _evaluate(model: CVAE, batch: Batch, samples: Sequence[int], random: torch.Generator) -> Likelihoods:
    guess = model.baseline_net(batch.x)
    batch = batch._replace(guess=guess)
    terms = elbo(model, batch, noise(ELBO_SAMPLES, len(batch.x), model, random))
    of_prior, of_posterior = [], []
    for eps in portions(max(samples), batch, model, random):
        of_prior.append(model.from_prior(batch.x, batch.guess, eps).log_likelihood(batch.y))
        of_posterior.append(model.from_posterior(*batch, eps).log_weights(batch.y))
    log_p, log_weights = torch.cat(of_prior).double(), torch.cat(of_posterior).double()
    return Likelihoods(
        nn_nll=-bernoulli_log_prob(batch.y, guess).double(),
        cvae_neg_elbo=-terms["elbo"].double(),
        cvae_mc_nll=-torch.stack([log_mean_exp(log_p[:s]) for s in samples]),
        cvae_is_nll=-torch.stack([log_mean_exp(log_weights[:s]) for s in samples]),
        floor=bernoulli_entropy(batch.y).double(),
        kl=torch.stack(kl_levels(terms)).double(),
        ess=torch.stack([effective_sample_size(log_weights[:s]) for s in samples]),
    )


def importance_sampling(model: CVAE, x: Tensor, y: Tensor, samples: int, random: torch.Generator) -> Tensor:
    """The estimate of log p(y|x) by so many samples of z ~ q(z|x,y), minus `cvae_is_nll`: nats `[B]`, float64."""
    found = []
    for batch in map(Batch, x.split(IMAGES_AT_ONCE), y.split(IMAGES_AT_ONCE)):
        batch = batch._replace(guess=model.baseline_net(batch.x))
        draws = (model.from_posterior(*batch, eps) for eps in portions(samples, batch, model, random))
        found.append(log_mean_exp(torch.cat([draw.log_weights(batch.y) for draw in draws]).double()))
    return torch.cat(found)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σw)² / Σw² over the first dimension, from log w: `[S, B]` → `[B]`, from 1, one weight alone, to S, all alike.

    Source: Kong 1992.
    """
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def portions(samples: int, batch: Batch, model: CVAE, random: torch.Generator) -> Iterator[Tensor]:
    """The noise of so many samples, SAMPLES_AT_ONCE at a time; the first ones are the same however many there are."""
    for first in range(0, samples, SAMPLES_AT_ONCE):
        yield noise(SAMPLES_AT_ONCE, len(batch.x), model, random)[: samples - first]


def noise(samples: int, count: int, model: CVAE, random: torch.Generator) -> Tensor:
    """eps ~ N(0, 1), `[samples, count, latent_dim]`, from and on the generator's device."""
    return torch.randn(samples, count, model.latent_dim, generator=random, device=random.device)
