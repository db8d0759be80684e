"""The two densities of the model, written out: the diagonal Gaussian and the Bernoulli from its logits.

All of it is computed in float32 or wider: what autocast leaves in half precision goes through `widen` first. The
derivatives of the Bernoulli and of the KL divergence are written out beside them, since they share most of the work;
they can be taken once, not twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_2PI = 1.8378770664093453


class Gaussian(NamedTuple):
    """A diagonal Gaussian over z: `loc` and `log_scale` (the log of the standard deviation), each `[..., Z]`."""

    loc: Tensor
    log_scale: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """z = loc + scale · eps, reparameterized; eps ~ N(0, 1) broadcasts against `[..., Z]`."""
        loc, scale = widen(self.loc), widen(self.log_scale).exp()
        if loc.dim() < eps.dim():  # a dimension of its own, or the gradient would be summed over even one sample
            loc, scale = loc.unsqueeze(0), scale.unsqueeze(0)
        return torch.addcmul(loc, scale, eps)

    def detach(self) -> "Gaussian":
        """The same Gaussian as a constant."""
        return Gaussian(self.loc.detach(), self.log_scale.detach())


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is of half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def refuse_to_be_differentiated() -> None:
    """In a backward pass that is written out: raises RuntimeError if the pass itself is recorded (`create_graph`)."""
    if torch.is_grad_enabled():
        raise RuntimeError("these derivatives are written out and cannot be differentiated again: no create_graph here")


def gaussian_log_prob(z: Tensor, gaussian: Gaussian) -> Tensor:
    """log N(z; loc, scale²) summed over the last dimension: z `[..., Z]` → nats `[...]`."""
    loc, log_scale = widen(gaussian.loc), widen(gaussian.log_scale)
    standard = (z - loc) * (-log_scale).exp()
    return (-0.5 * standard.square() - log_scale - 0.5 * LOG_2PI).sum(-1)


def gaussian_score(z: Tensor, gaussian: Gaussian) -> Tensor:
    """The derivative of `gaussian_log_prob` with respect to z, −(z − loc) / scale²: `[..., Z]`."""
    return (widen(gaussian.loc) - z) * (-2.0 * widen(gaussian.log_scale)).exp()


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q‖p) = Σ log(σ_p/σ_q) + (σ_q² + (μ_q − μ_p)²) / 2σ_p² − ½, in closed form: `[..., Z]` → nats `[...]`, ≥ 0.

    q and p are of one shape. Source: Kingma and Welling 2014, appendix B, for two general diagonal Gaussians.
    """
    kl: Tensor = _GaussianKL.apply(*map(widen, (*q, *p)))
    return kl


class _GaussianKL(torch.autograd.Function):
    """The derivatives are (μ_q − μ_p) / σ_p² by μ_q and minus that by μ_p, σ_q²/σ_p² − 1 by log σ_q, and
    1 − (σ_q² + (μ_q − μ_p)²) / σ_p² by log σ_p."""

    @staticmethod
    def forward(ctx: Any, q_loc: Tensor, q_log_scale: Tensor, p_loc: Tensor, p_log_scale: Tensor) -> Tensor:
        log_ratio = q_log_scale - p_log_scale
        shift = q_loc - p_loc
        by_loc = shift * (-2.0 * p_log_scale).exp_()
        by_q = (2.0 * log_ratio).exp_().sub_(1.0)
        by_p = shift.mul_(by_loc).add_(by_q).neg_()
        ctx.save_for_backward(by_loc, by_q, by_p)
        return by_p.mul(-0.5).sub_(log_ratio).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        refuse_to_be_differentiated()
        grad = grad.unsqueeze(-1)
        by_loc, by_q, by_p = (grad * derivative for derivative in ctx.saved_tensors)
        return by_loc, by_q, -by_loc, by_p


def bernoulli_log_prob(y: Tensor, logits: Tensor) -> Tensor:
    """Σ y·l − log(1 + eˡ) over the last dimension: y in [0, 1] and logits l `[..., D]` → nats `[...]`, ≤ 0.

    y broadcasts against the logits. For grey levels, 0 < y < 1, this is minus the cross-entropy, the tutorial's
    convention: not the logarithm of a normalised density, and never above minus the entropy of the grey levels.
    Differentiable in the logits alone: targets are data.
    """
    log_prob: Tensor = _BernoulliLogProb.apply(y, widen(logits))
    return log_prob


class _BernoulliLogProb(torch.autograd.Function):
    """log(1 + eˡ) as max(l, 0) − log σ(|l|): three times as fast on a CPU as the library's softplus, whose log1p is
    not vectorized. In float32 the logarithm is off by less than 1e-7 nats; the derivative, y − σ(l), is exact."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor) -> Tensor:
        if ctx.needs_input_grad[1]:
            white = logits.sigmoid()
            ctx.save_for_backward(y - white)
            larger = torch.maximum(white, 1.0 - white)  # σ(|l|)
        else:
            larger = logits.abs().sigmoid_()
        return larger.log_().sub_(logits.clamp(min=0)).addcmul_(y, logits).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        refuse_to_be_differentiated()
        (derivative,) = ctx.saved_tensors
        return None, derivative * grad.unsqueeze(-1)


def bernoulli_entropy(y: Tensor) -> Tensor:
    """−Σ y·log y + (1 − y)·log(1 − y) over the last dimension: grey levels y `[..., D]` → nats `[...]`, ≥ 0.

    The floor under every Bernoulli negative log-likelihood of y, reached by a prediction equal to y itself.
    """
    return -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).sum(-1)
