"""What the objectives and estimators estimate, by integration over z or over its noise, with torch.distributions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from cvae.model.cvae import CVAE
from cvae.model.densities import Gaussian

NUM_POINTS = 10_001


class Integrals(NamedTuple):
    """Exact values per image, `[B]` float64."""

    log_evidence: Tensor  # log p(y|x)
    elbo: Tensor  # E_q[log w], w = p(y|x,z) p(z|x) / q(z|x,y)
    log_likelihood: Tensor  # E_q[log p(y|x,z)]
    gsnn: Tensor  # E_p[log p(y|x,z)]
    is_variance: Tensor  # of w / p(y|x) at z ~ q
    mc_variance: Tensor  # of p(y|x,z) / p(y|x) at z ~ p


@torch.no_grad()
def integrate(cvae: CVAE, x: Tensor, y: Tensor) -> Integrals:
    """The integrals over z of a CVAE of one level with latent_dim 1, on a fine grid."""
    p, q = encoded(cvae, x, y)
    ends = [gaussian.loc + sign * 10 * gaussian.log_scale.exp() for gaussian in (p, q) for sign in (-1, 1)]
    low, high = torch.cat(ends, 1).double().aminmax(dim=1)
    z = low + (high - low) * torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64)[:, None]  # [points, B]
    log_y = log_likelihood(cvae, x, y, z[..., None])
    log_p, log_q = log_density(p, z), log_density(q, z)
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


def encoded(cvae: CVAE, x: Tensor, y: Tensor) -> tuple[Gaussian, Gaussian]:
    """p(z|x) and q(z|x,y) of a CVAE of one level."""
    ((_, _, q, p),) = cvae.from_posterior(x, y, None, x.new_zeros(1, len(x), cvae.latent_dim)).latents
    return p, q


def log_likelihood(cvae: CVAE, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """log p(y|x,z), `[S, B]` float64, for z `[S, B, Z]` of one level; z as noise of the prior network's draw."""
    p, _ = encoded(cvae, x, y)
    logits = cvae.from_prior(x, None, (z.to(y.dtype) - p.loc) / p.log_scale.exp()).logits.double()
    return Bernoulli(logits=logits, validate_args=False).log_prob(y.double()).sum(-1)


def log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    """log N(z), `[..., B]` float64, for z `[..., B]`."""
    loc, log_scale = (part[:, 0].double() for part in gaussian)
    return Normal(loc, log_scale.exp()).log_prob(z)


def noise_grid(dims: int, points: int, reach: float = 7.0) -> tuple[Tensor, Tensor]:
    """All noise on a regular grid, `[points^dims, dims]` float64, and its weights, which make sums expectations.

    Of a smooth function, such a sum converges faster than any power of the distance of the points.
    """
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    noise = torch.cartesian_prod(*[line] * dims).view(-1, dims)
    return noise, Normal(0.0, 1.0).log_prob(noise).sum(-1).exp() * (line[1] - line[0]) ** dims


@torch.no_grad()
def log_evidence(cvae: CVAE, x: Tensor, y: Tensor, points: int) -> Tensor:
    """log p(y|x) = log E[p(y|x,z)], z ~ p(z|x), `[B]` float64, of a CVAE of any levels and few dimensions of z."""
    noise, weights = noise_grid(cvae.latent_dim, points)
    logits = cvae.from_prior(x, None, noise[:, None].expand(-1, len(x), -1).to(x.dtype)).logits.double()
    log_y = Bernoulli(logits=logits, validate_args=False).log_prob(y.double()).sum(-1)
    assert math.isclose(weights.sum().item(), 1, rel_tol=1e-9)
    return torch.logsumexp(log_y + weights.log()[:, None], 0)
