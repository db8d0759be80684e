"""The gradient of −ELBO with respect to the weights, in two ways: written out by hand, and by PyTorch's autograd.

Both put it where the optimizer looks for it, and give back the terms of the ELBO. Written out, it takes fewer
operations, conversions and passes over memory, and is what trains. Autograd's needs no more than the formula: it serves
what `torch.compile` makes of a model, and is what the other is tested against.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae import runtime
from cvae.data import Batch
from cvae.densities import Gaussian, bernoulli_log_prob, bernoulli_log_prob_grad, gaussian_kl_and_grads, widen
from cvae.model import CVAE, Baseline
from cvae.objectives import Terms
from cvae.optimizer import GuardedAdam

Gradients = Callable[[Batch, Tensor, float | Tensor], Terms]
"""From a batch, its noise `[L, B, Z]` and a factor to the terms of the ELBO, `[B]` each. The gradient of
−factor · Σ elbo goes to `optimizer.gradient`, in the place of the last one."""


def by_autograd(objective: Callable[..., Terms], optimizer: GuardedAdam, precision: str) -> Gradients:
    """`objective`: x, y, ŷ, eps → Terms, of any model whose trained parameters are the optimizer's."""

    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        with runtime.autocast(precision, eps.device):
            terms = objective(*batch, eps)
        optimizer.gradient.zero_()
        (-factor * terms.elbo.sum()).backward()
        return Terms(*(term.detach() for term in terms))

    return gradients


def by_hand(model: Baseline | CVAE, optimizer: GuardedAdam, precision: str) -> Gradients:
    """For the models of this package: matrix products in `precision`, all else in float32 or wider."""
    half = runtime.HALF.get(precision)
    if isinstance(model, Baseline):
        return _of_baseline(_Passes(model.layers, optimizer, half))
    nets = (model.prior_net, model.recognition_net, model.generation_net)
    return _of_cvae(model.baseline_net, *(_Passes(net.layers, optimizer, half) for net in nets))


class _Passes:
    """The passes through one network of linear layers and ReLUs: its weights in, its part of the gradient out.

    With `half`, the products are of that type: each forward pass begins with a copy of the weights, and each backward
    pass ends with copying the gradient back.
    """

    def __init__(self, layers: nn.Sequential, optimizer: GuardedAdam, half: torch.dtype | None):
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if not all(isinstance(layer, nn.Linear | nn.ReLU) for layer in layers):
            raise TypeError("only linear layers and ReLUs are written out; train other networks by autograd")
        weights, span = optimizer.weights, optimizer.weights.span(layers.parameters())
        self._half = half
        self.dtype = half or weights.vector.dtype
        self._weights, self._gradient = weights.vector[span], optimizer.gradient[span]
        self._used, self._found = (
            vector if half is None else torch.zeros_like(vector, dtype=half)
            for vector in (self._weights, self._gradient)
        )

        def views(vector: Tensor) -> list[tuple[Tensor, Tensor]]:
            """The weight and the bias of each layer."""
            return [
                (weights.view(layer.weight, vector, span.start), weights.view(layer.bias, vector, span.start))
                for layer in linears
            ]

        self._layers, self._grads = views(self._used), views(self._found)
        self._inputs: list[Tensor] = []  # of each layer, in the last forward pass

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs]` → `[B, outputs]`."""
        if self._half is not None:
            self._used.copy_(self._weights)
        self._inputs = [x.to(self.dtype)]
        for weight, bias in self._layers[:-1]:
            self._inputs.append(torch.addmm(bias, self._inputs[-1], weight.t()).relu_())
        weight, bias = self._layers[-1]
        return widen(torch.addmm(bias, self._inputs[-1], weight.t()))

    def backward(self, grad: Tensor) -> Tensor:
        """Find the gradient, from that of the loss with respect to the outputs of the last forward pass.

        Returns that with respect to the first layer's outputs before the ReLU, for `to_input`.
        """
        grad = grad.to(self.dtype)
        for i in reversed(range(len(self._layers))):
            (weight, _), (weight_grad, bias_grad), x = self._layers[i], self._grads[i], self._inputs[i]
            torch.sum(grad, 0, out=bias_grad)
            torch.mm(grad.t(), x, out=weight_grad)
            if i > 0:
                grad = torch.ops.aten.threshold_backward(grad @ weight, x, 0)  # a ReLU's
        if self._half is not None:
            self._gradient.copy_(self._found)
        return grad

    def to_input(self, grad: Tensor) -> Tensor:
        """What `backward` returned → the gradient of the loss with respect to the inputs."""
        return widen(grad @ self._layers[0][0])


def _of_baseline(net: _Passes) -> Gradients:
    @torch.inference_mode()
    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        logits = net.forward(batch.x)
        net.backward(bernoulli_log_prob_grad(batch.y, logits).mul_(-factor))
        log_likelihood = bernoulli_log_prob(batch.y, logits)
        return Terms(log_likelihood, kl=torch.zeros_like(log_likelihood))

    return gradients


def _of_cvae(baseline: Baseline, prior: _Passes, recognition: _Passes, generation: _Passes) -> Gradients:
    @torch.inference_mode()
    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        x, y, y_hat = batch
        y_hat = baseline.guess(x) if y_hat is None else y_hat
        seen_x, seen_y, seen_y_hat = (part.to(prior.dtype) for part in (x, y, y_hat))
        p = Gaussian(*prior.forward(torch.cat([seen_x, seen_y_hat], dim=-1)).chunk(2, dim=-1))
        q = Gaussian(*recognition.forward(torch.cat([seen_x, seen_y], dim=-1)).chunk(2, dim=-1))
        scale = q.log_scale.exp()
        z = q.loc + scale * eps
        logits = generation.forward(z.flatten(0, 1)).unflatten(0, z.shape[:2])

        # −log p(y|x,z), a mean over the L samples, reaches q through z = loc + scale · eps.
        logits_grad = bernoulli_log_prob_grad(y, logits).mul_(-factor / len(eps))
        z_grad = generation.to_input(generation.backward(logits_grad.flatten(0, 1))).view_as(z)
        loc_grad, log_scale_grad = z_grad.sum(0), (z_grad * eps).sum(0).mul_(scale)

        # The KL reaches q and p themselves.
        kl, *kl_grads = gaussian_kl_and_grads(q, p)
        kl_loc, kl_q, kl_p = (grad.mul_(factor) for grad in kl_grads)
        recognition.backward(torch.cat([loc_grad + kl_loc, log_scale_grad + kl_q], dim=-1))
        prior.backward(torch.cat([-kl_loc, kl_p], dim=-1))
        return Terms(bernoulli_log_prob(y, logits).mean(0), kl)

    return gradients
