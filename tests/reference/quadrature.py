"""What the estimators estimate, by integration over a one-dimensional z on a fine grid, with torch.distributions."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from cvae.model.densities import Gaussian
from cvae.model.networks import CVAE

NUM_POINTS = 20_001


class Integrals(NamedTuple):
    """Exact values per image, `[B]` float64."""

    log_evidence: Tensor  # log p(y|x)
    elbo: Tensor  # E_q[log w], w = p(y|x,z) p(z|x) / q(z|x,y)
    log_likelihood: Tensor  # E_q[log p(y|x,z)]
    is_variance: Tensor  # of w / p(y|x) at z ~ q
    mc_variance: Tensor  # of p(y|x,z) / p(y|x) at z ~ p


@torch.no_grad()
def integrate(cvae: CVAE, x: Tensor, y: Tensor) -> Integrals:
    """The integrals over z of a CVAE with latent_dim 1."""
    p, q = cvae.prior(x), cvae.recognition(x, y)
    ends = [gaussian.loc + sign * 10 * gaussian.log_scale.exp() for gaussian in (p, q) for sign in (-1, 1)]
    low, high = torch.cat(ends, 1).double().aminmax(dim=1)
    z = low + (high - low) * torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64)[:, None]  # [points, B]
    log_y = log_likelihood(cvae, y, z[..., None])
    log_p, log_q = log_density(p, z), log_density(q, z)
    log_weight = log_y + log_p - log_q

    def integral(values: Tensor) -> Tensor:
        return torch.trapezoid(values, z, dim=0)

    evidence = integral((log_y + log_p).exp())
    return Integrals(
        log_evidence=evidence.log(),
        elbo=integral(log_q.exp() * log_weight),
        log_likelihood=integral(log_q.exp() * log_y),
        is_variance=integral((2 * log_weight + log_q).exp()) / evidence**2 - 1,
        mc_variance=integral((2 * log_y + log_p).exp()) / evidence**2 - 1,
    )


def log_likelihood(cvae: CVAE, y: Tensor, z: Tensor) -> Tensor:
    """log p(y|x,z), `[..., B]` float64, for z `[..., B, 1]`."""
    logits = cvae.generation(z.to(y.dtype)).double()
    return Bernoulli(logits=logits, validate_args=False).log_prob(y.double()).sum(-1)


def log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    """log N(z), `[..., B]` float64, for z `[..., B]`."""
    loc, log_scale = (part[:, 0].double() for part in gaussian)
    return Normal(loc, log_scale.exp()).log_prob(z)
