"""The two densities of the model, written out: the diagonal Gaussian, and the Bernoulli from its logits.

All of it is computed in float32 or wider: what autocast leaves in half precision goes through `widen` first.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_2PI = 1.8378770664093453


class Gaussian(NamedTuple):
    """A diagonal Gaussian over z: `loc` and `log_scale`, the log of the standard deviation, each `[..., Z]`."""

    loc: Tensor
    log_scale: Tensor

    def sample(self, eps: Tensor, detach: bool = False) -> Tensor:
        """Return z = loc + scale · eps, reparameterized; detach: as a constant that has a gradient of its own."""
        loc, log_scale = map(widen, self)
        z = torch.addcmul(loc, log_scale.exp(), eps)
        return z.detach().requires_grad_() if detach else z

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log N(z; loc, scale²) summed over the last dimension: z `[..., Z]` → nats `[...]`."""
        loc, log_scale = map(widen, self)
        standard = (z - loc) * (-log_scale).exp()
        return (-0.5 * standard.square() - log_scale - 0.5 * LOG_2PI).sum(-1)

    def score(self, z: Tensor) -> Tensor:
        """Return the derivative of `log_prob` with respect to z, −(z − loc) / scale²: `[..., Z]`."""
        loc, log_scale = map(widen, self)
        return (loc - z) * (-2.0 * log_scale).exp()


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """Return KL(q‖p) = Σ log(σ_p/σ_q) + (σ_q² + (μ_q − μ_p)²) / 2σ_p² − ½ over the last dimension: nats `[...]`, ≥ 0.

    Source: Kingma and Welling 2014, appendix B, for two general diagonal Gaussians.
    """
    q_loc, q_log_scale, p_loc, p_log_scale = map(widen, (*q, *p))
    log_ratio = q_log_scale - p_log_scale
    shift = (q_loc - p_loc) * (-p_log_scale).exp()
    return 0.5 * ((2.0 * log_ratio).exp() + shift.square() - 1.0 - 2.0 * log_ratio).sum(-1)


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it is of half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def bernoulli_log_prob(y: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return Σ w · (y·l − log(1 + eˡ)) over the last dimension: nats `[...]`, ≤ 0.

    For grey levels, 0 < y < 1, this is minus the cross-entropy, the tutorial's convention: not the logarithm of a
    normalised density, and never above minus the entropy of the grey levels. Differentiable in the logits alone, once.

    Args:
        y: Targets in [0, 1], `[..., D]`; broadcasts against the logits.
        logits: l, `[..., D]`.
        weight: w, which broadcasts against the logits too: 1 where a pixel counts, 0 where not; None where all count.
    """
    return _BernoulliLogProb.apply(y, widen(logits), weight)  # type: ignore[no-any-return]


class _BernoulliLogProb(torch.autograd.Function):
    """log(1 + eˡ) as max(l, 0) − log σ(|l|): three times as fast on a CPU as the library's softplus, whose log1p is not
    vectorized. In float32 the logarithm is off by less than 1e-7 nats; the derivative, w · (y − σ(l)), is exact."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor, weight: Tensor | None) -> Tensor:
        if ctx.needs_input_grad[1]:
            white = logits.sigmoid()
            ctx.save_for_backward(y - white if weight is None else (y - white) * weight)
            larger = torch.maximum(white, 1.0 - white)  # σ(|l|)
        else:
            larger = logits.abs().sigmoid_()
        log_prob = larger.log_().sub_(logits.clamp(min=0)).addcmul_(y, logits)
        return (log_prob if weight is None else log_prob * weight).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        if torch.is_grad_enabled():  # with create_graph; `once_differentiable` would let a constant `grad` pass
            raise RuntimeError("the Bernoulli's derivative is written out and cannot be differentiated again")
        (derivative,) = ctx.saved_tensors
        return None, derivative * grad.unsqueeze(-1), None


def bernoulli_entropy(y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return −Σ w · (y·log y + (1 − y)·log(1 − y)) over the last dimension: y `[..., D]` → nats `[...]`, ≥ 0.

    It is the floor under every Bernoulli negative log-likelihood of y, reached by a prediction equal to y itself.
    """
    entropy = -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y))
    return (entropy if weight is None else entropy * weight).sum(-1)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return the log of the mean over the first dimension of exp(log_weights): `[S, B]` → `[B]`."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
