"""What objectives and estimates estimate, by integration over z or over its noise, with torch.distributions."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from cvae.data.tasks import Batch
from cvae.model.cvae import CVAE

NUM_POINTS = 4_001


class Integrals(NamedTuple):
    """Exact values per image, `[B]` float64."""

    log_evidence: Tensor  # log p(y|x)
    elbo: Tensor  # E_q[log w], w = p(y|x,z) p(z|x) / q(z|x,y)
    log_likelihood: Tensor  # E_q[log p(y|x,z)]
    gsnn: Tensor  # E_p[log p(y|x,z)]
    is_variance: Tensor  # of w / p(y|x) at z ~ q
    mc_variance: Tensor  # of p(y|x,z) / p(y|x) at z ~ p


@torch.no_grad()
def integrate(cvae: CVAE, batch: Batch) -> Integrals:
    """Return the integrals over z of a CVAE of one level with latent_dim 1, on a fine grid."""
    ((_, _, q, p),) = cvae.from_posterior(batch, batch.x.new_zeros(1, len(batch.x), 1)).latents
    ends = [gaussian.loc + sign * 10 * gaussian.log_scale.exp() for gaussian in (p, q) for sign in (-1, 1)]
    low, high = torch.cat(ends, 1).double().aminmax(dim=1)
    z = low + (high - low) * torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64)[:, None]  # [points, B]
    eps = (z[..., None].to(batch.y.dtype) - p.loc) / p.log_scale.exp()  # z as noise of the prior network's draw
    log_y = bernoulli(batch, cvae.from_prior(batch, eps).logits)
    log_p, log_q = (Normal(g.loc[:, 0].double(), g.log_scale[:, 0].double().exp()).log_prob(z) for g in (p, q))
    log_weight = log_y + log_p - log_q

    def integral(values: Tensor) -> Tensor:
        return torch.trapezoid(values, z, dim=0)

    evidence = integral((log_y + log_p).exp())
    return Integrals(
        log_evidence=evidence.log(),
        elbo=integral(log_q.exp() * log_weight),
        log_likelihood=integral(log_q.exp() * log_y),
        gsnn=integral(log_p.exp() * log_y),
        is_variance=integral((2 * log_weight + log_q).exp()) / evidence**2 - 1,
        mc_variance=integral((2 * log_y + log_p).exp()) / evidence**2 - 1,
    )


def bernoulli(batch: Batch, logits: Tensor) -> Tensor:
    """Return log p(y|x,z) of the pixels that count, `[S, B]` float64, for logits `[S, B, y_dim]`."""
    pixels = Bernoulli(logits=logits.double(), validate_args=False).log_prob(batch.y.double())
    return (pixels if batch.weight is None else pixels * batch.weight.double()).sum(-1)


def noise_grid(dims: int, points: int) -> tuple[Tensor, Tensor]:
    """Return noise on a grid, `[points^dims, dims]` float64, and weights, which make sums expectations.

    Up to 100 points a dimension they are those of Gauss and Hermite, for smooth functions; else they are regular.
    """
    if points <= 100:
        line, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(points))
        weights = weights / math.sqrt(2 * math.pi)
    else:
        line = torch.linspace(-7, 7, points, dtype=torch.float64)
        weights = Normal(0.0, 1.0).log_prob(line).exp() * (line[1] - line[0])
    noise, products = (torch.cartesian_prod(*[each] * dims).view(-1, dims) for each in (line, weights))
    return noise, products.prod(-1)


@torch.no_grad()
def log_evidence(cvae: CVAE, batch: Batch, points: int) -> Tensor:
    """Return log p(y|x) = log E[p(y|x,z)], z ~ p(z|x), `[B]` float64: of any levels and few dimensions of z."""
    noise, weights = noise_grid(cvae.latent_dim, points)
    eps = noise[:, None].expand(-1, len(batch.x), -1).to(batch.x.dtype)
    assert math.isclose(weights.sum().item(), 1, rel_tol=1e-9)
    return torch.logsumexp(bernoulli(batch, cvae.from_prior(batch, eps).logits) + weights.log()[:, None], 0)


def formula(name: str, model: CVAE, batch: Batch, eps: Tensor) -> Tensor:
    """Return an objective, `[B]`, as its formula stands, by the densities of PyTorch, with alpha = 0.3."""
    draw = (model.from_prior if name in ("gsnn", "multisample") else model.from_posterior)(batch, eps)
    log_y = bernoulli(batch, draw.logits)
    if name == "multisample":
        return log_y.exp().mean(0).log()
    normals = [[Normal(g.loc, g.log_scale.exp()) for g in (q, p)] for _, _, q, p in draw.latents]
    if name == "iwae":
        log_q, log_p = (
            sum(pair[i].log_prob(latent.z).sum(-1) for pair, latent in zip(normals, draw.latents, strict=True))
            for i in range(2)
        )
        return (log_y + log_p - log_q).exp().mean(0).log()
    if name == "gsnn":
        return log_y.mean(0)
    value = (log_y - sum(kl_divergence(*pair).sum(-1) for pair in normals)).mean(0)
    return 0.3 * value + 0.7 * formula("gsnn", model, batch, eps) if name == "hybrid" else value
