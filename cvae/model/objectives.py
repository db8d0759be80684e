"""The objectives, by name: what is maximised per image, in nats, and what is reported of it.

An objective is a function of a model, a batch of B images and noise eps ~ N(0, 1), `[L, B, latent_dim]`, to its terms,
`[B]` each, by name: the first is what is maximised. Its keyword-only parameters are settings of the same name. A new
objective is a function here and a name in `OBJECTIVES`, and in `OF_PRIOR` if it does without the recognition network;
autograd finds its gradient.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import TypeVar

import torch
from torch import Tensor, nn

from cvae.data.tasks import Batch
from cvae.model.cvae import CVAE, Draw
from cvae.model.densities import bernoulli_log_prob, log_mean_exp
from cvae.settings import Settings

Value = TypeVar("Value", Tensor, float)

Terms = dict[str, Tensor]  # nats per image, [B]; higher is better but for `kl` and `kl_1`, …
Objective = Callable[..., Terms]  # of a model, a batch, and noise if it takes any


def log_likelihood(baseline: nn.Module, batch: Batch) -> Terms:
    """Return the baseline's objective: log p(y|ŷ), a Bernoulli's."""
    return {"log_likelihood": bernoulli_log_prob(batch.y, baseline(batch.x), batch.weight)}


def elbo(model: CVAE, batch: Batch, eps: Tensor) -> Terms:
    """Return E_q[log p(y|x,z)] − KL(q(z|x,y) ‖ p(z|x)), by L samples of z and with the KL in closed form.

    The tutorial samples its KL too, at the same z; the closed form has the same expectation and less variance.
    Source: Sohn et al. 2015, equation 4 (the empirical lower bound).
    """
    draw = model.from_posterior(batch, eps)
    log_likelihood, kl = draw.log_likelihood(batch).mean(0), by_level("kl", draw.kl_of_levels)
    return {"elbo": log_likelihood - kl["kl"], "log_likelihood": log_likelihood, **kl}


def gsnn(model: CVAE, batch: Batch, eps: Tensor) -> Terms:
    """Return E_p[log p(y|x,z)] by L samples of z from the prior network: the Gaussian stochastic neural network.

    It is the lower bound with the recognition network set equal to the prior network, so that there is no KL, and does
    not train the recognition network. Source: Sohn et al. 2015, section 4.2.
    """
    return {"gsnn": model.from_prior(batch, eps).log_likelihood(batch).mean(0)}


def multisample(model: CVAE, batch: Batch, eps: Tensor) -> Terms:
    """Return the log of the mean of p(y|x,z) over K samples of z from the prior network: a bound above that of `gsnn`.

    It is the Monte Carlo estimate of log p(y|x) with S = K, and `gsnn` where K = 1; it does not train the recognition
    network. Source: Raiko et al. 2015; Mnih and Rezende 2016, with the prior as the proposal.
    """
    log_likelihood = model.from_prior(batch, eps).log_likelihood(batch)
    return {"multisample": log_mean_exp(log_likelihood), "gsnn": log_likelihood.detach().mean(0)}


def hybrid(model: CVAE, batch: Batch, eps: Tensor, *, alpha: float) -> Terms:
    """Return α · elbo + (1 − α) · gsnn, both from the same noise, α from 0 to 1: Sohn et al. 2015, equation 7."""
    elbo_terms, gsnn_terms = elbo(model, batch, eps), gsnn(model, batch, eps)
    mixed = alpha * elbo_terms["elbo"] + (1 - alpha) * gsnn_terms["gsnn"]
    return {"hybrid": mixed, **elbo_terms, **gsnn_terms}


def iwae(model: CVAE, batch: Batch, eps: Tensor) -> Terms:
    """Return the log of the mean of K importance weights, p(y|x,z) p(z|x) / q(z|x,y), z ~ q: a bound above the elbo.

    With K = 1 it is the elbo with a sampled KL. Its gradient is the doubly reparameterized one, for the prior network
    too. Source: Burda et al. 2016, with the conditional prior in the place of theirs.
    """
    draw = model.from_posterior(batch, eps, detach_z=True)
    log_likelihood = draw.log_likelihood(batch)
    log_weights = log_likelihood + draw.log_ratio
    bound = log_mean_exp(log_weights)
    if log_weights.requires_grad:
        differentiable = doubly_reparameterized(draw, log_likelihood, log_weights)
        bound = bound.detach() + (differentiable - differentiable.detach())
    reported, kl = log_likelihood.detach().mean(0), by_level("kl", [kl.detach() for kl in draw.kl_of_levels])
    return {"iwae": bound, "elbo": reported - kl["kl"], "log_likelihood": reported, **kl}


def doubly_reparameterized(draw: Draw, log_likelihood: Tensor, log_weights: Tensor) -> Tensor:
    """Return a quantity `[B]` whose gradient estimates the iwae bound's without bias, with less variance than its own.

    The draw is one with `detach_z`; its log-likelihood and log-weights are nats `[K, B]`.
    The gradient of log w by the parameters of q and p, at fixed z, is replaced by one by z. With w̃ the normalised
    weights and G = d log w / dz, with all that follows from z on the levels below, q's parameters get
    w̃² G · dz/dq, z = loc + scale · eps, and p's get w̃ (∂ log q/∂z − ∂ log p/∂z + (1 − w̃) G) · dz/dp, in which
    this z is expressed by p's own noise. The generation network gets w̃ ∂ log p(y|x,z), as always.
    Source: Tucker et al. 2019 for q; Bauer and Mnih 2021 for p, here with levels one below another.
    """
    normalised = log_weights.detach().softmax(0)
    weights = normalised.unsqueeze(-1)
    surrogate = (normalised * log_likelihood).sum(0)
    total = log_weights.sum()
    for z, eps, q, p in reversed(draw.latents):
        (by_z,) = torch.autograd.grad(total, z, retain_graph=True)
        total = total + (by_z * q.sample(eps)).sum()  # how z itself depends on what was drawn above it
        with torch.no_grad():
            for_q = weights.square() * by_z
            for_p = weights * (q.score(z) - p.score(z) + (1 - weights) * by_z)
            eps_of_p = (z - p.loc) * (-p.log_scale).exp()
        surrogate = surrogate + (for_q * q.sample(eps) + for_p * p.sample(eps_of_p)).sum(-1).sum(0)
    return surrogate


def kl_levels(terms: Terms) -> list[Tensor]:
    """Return the KL of each level among the terms, from top to bottom."""
    return [term for name, term in terms.items() if name.startswith("kl_")] or [terms["kl"]]


def by_level(name: str, values: Sequence[Value]) -> dict[str, Value]:
    """Return a quantity's sum over the levels by its name, and each level's if there are several (1: the top)."""
    total = {name: reduce(add, values)}
    return total if len(values) == 1 else total | {f"{name}_{i}": value for i, value in enumerate(values, start=1)}


def maximised(terms: dict[str, Value]) -> Value:
    """Return the first of the terms, or of their means."""
    return next(iter(terms.values()))


def with_free_nats(terms: Terms, free_nats: Tensor | None) -> Tensor:
    """Return the first term, with the KL of each level floored at `free_nats` where that term is the elbo: nats `[B]`.

    A smaller KL has no gradient, which helps levels to come to be used; all terms stay as they are.
    Source: the free bits of Kingma et al. 2016, here for each image.

    free_nats: The nats of each level and image, a scalar; None: none are free.
    """
    name, gain = next(iter(terms.items()))
    if free_nats is None or name != "elbo":
        return gain
    return gain - reduce(add, ((free_nats - kl).relu() for kl in kl_levels(terms)))


OBJECTIVES: dict[str, Objective] = {f.__name__: f for f in (elbo, iwae, gsnn, hybrid, multisample)}

OF_PRIOR = ("gsnn", "multisample")  # take z from the prior network alone; the recognition network is decayed only


def trains_recognition(s: Settings) -> bool:
    """Return whether training with these settings gives the recognition network a gradient."""
    return s.objective not in OF_PRIOR and (s.objective, s.alpha) != ("hybrid", 0.0)


def objective(s: Settings) -> Objective:
    """Return the objective of these settings, with its own settings filled in; ValueError for an unknown one."""
    function = s.chosen("objective", OBJECTIVES)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return partial(function, **{name: getattr(s, name) for name in names})


class Totals:
    """Sums of an objective's terms over images, in float64 on the device, to be divided once (`means`)."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)  # of each term, and of the images

    def add(self, terms: Terms, skipped: Tensor | None = None) -> None:
        """Add the terms of a batch; skipped: a bool scalar, on the device, with which nothing is added."""
        if not self.names:
            self.names = list(terms)
            self.sums = self.sums.new_zeros(len(terms) + 1)
        values = [term.detach() for term in terms.values()]
        added = torch.stack([*values, torch.ones_like(values[0])]).sum(1, dtype=torch.float64)
        self.sums += added if skipped is None else added.masked_fill_(skipped, 0.0)

    def means(self) -> dict[str, float]:
        """Return the terms' means, nats per image, by name, the maximised one first; NaN where there were no images."""
        *sums, count = self.sums.tolist() or [0.0]
        return {name: total / count if count else math.nan for name, total in zip(self.names, sums, strict=True)}
