"""The gradient of −ELBO with respect to the weights, in two ways: written out by hand, and by PyTorch's autograd.

Both put it where the optimizer looks for it, and give back the terms of the ELBO. Written out, it takes fewer
operations, conversions and passes over memory, and is what trains. Autograd's needs no more than the formula: it serves
what `torch.compile` makes of a model, and is what the other is tested against.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cvae import runtime
from cvae.data.images import Batch
from cvae.model.densities import Gaussian, bernoulli_log_prob_and_grad, gaussian_kl_and_grads, widen
from cvae.model.networks import CVAE, Baseline, Decoder, Encoder
from cvae.model.objectives import Terms
from cvae.training.optimizer import GuardedAdam

Gradients = Callable[[Batch, Tensor, float | Tensor], Terms]
"""From a batch, its noise `[L, B, Z]` and a factor to the terms of the ELBO, `[B]` each. The gradient of
−factor · Σ elbo goes to `optimizer.gradient`, in the place of the last one."""


def by_autograd(objective: Callable[..., Terms], optimizer: GuardedAdam, precision: str) -> Gradients:
    """`objective`: x, y, ŷ, eps → Terms, of any model whose trained parameters are the optimizer's.

    It takes the weights as they are; autocast rounds them for `precision`. Raises ValueError if they have a copy in
    half precision: the gradient would be of its type.
    """
    if optimizer.weights.half is not None:
        raise ValueError("autograd's gradient is of the type of the weights: they can have no copy in half precision")

    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        with runtime.autocast(precision, eps.device):
            terms = objective(*batch, eps)
        optimizer.gradient.zero_()
        (-factor * terms.elbo.sum()).backward()
        return Terms(*(term.detach() for term in terms))

    return gradients


def by_hand(model: Baseline | CVAE, optimizer: GuardedAdam) -> Gradients:
    """For the models of this package: products of the optimizer's working weights, all else in float32 or wider.

    Raises TypeError if a layer is neither linear nor a ReLU.
    """
    if isinstance(model, Baseline):
        return _of_baseline(_Passes(optimizer, model))
    encoders = _Passes(optimizer, model.prior_net, model.recognition_net)
    return _of_cvae(model.baseline_net, encoders, _Passes(optimizer, model.generation_net))


class _Passes:
    """The passes through n networks of the same linear layers and ReLUs at once: one batched product takes less time
    than n single ones. Weights and gradients are views of the optimizer's vectors."""

    def __init__(self, optimizer: GuardedAdam, *networks: Baseline | Encoder | Decoder):
        for layer in (layer for network in networks for layer in network.layers):
            if not isinstance(layer, nn.Linear | nn.ReLU):
                raise TypeError("only linear layers and ReLUs are written out; train other networks by autograd")
        linears = [[layer for layer in network.layers if isinstance(layer, nn.Linear)] for network in networks]
        stacked, working = optimizer.weights.stacked, optimizer.weights.working
        self._layers = []  # of each layer the weights `[n, inputs, outputs]`, the biases `[n, 1, outputs]`, …
        self._grads = []  # … and where their gradients go
        for same in zip(*linears, strict=True):
            weights, biases = [layer.weight for layer in same], [layer.bias for layer in same]
            self._layers.append((stacked(weights, working).mT, stacked(biases, working)[:, None]))
            self._grads.append((stacked(weights, optimizer.gradient), stacked(biases, optimizer.gradient)))
        self.dtype = working.dtype
        self._inputs: list[Tensor] = []  # of each layer, in the last forward pass

    def forward(self, x: Tensor) -> Tensor:
        """`[n, B, inputs]` → `[n, B, outputs]`, in float32 or wider."""
        self._inputs = [x.to(self.dtype)]
        for weight, bias in self._layers[:-1]:
            self._inputs.append(torch.baddbmm(bias, self._inputs[-1], weight).relu_())
        weight, bias = self._layers[-1]
        return widen(torch.baddbmm(bias, self._inputs[-1], weight))

    def backward(self, grad: Tensor) -> Tensor:
        """Find the gradient, from that of the loss with respect to the outputs of the last forward pass.

        Returns that with respect to the first layer's outputs before the ReLU, for `to_input`.
        """
        grad = grad.to(self.dtype)
        for i in reversed(range(len(self._layers))):
            (weight, _), (weight_grad, bias_grad), x = self._layers[i], self._grads[i], self._inputs[i]
            torch.sum(grad, 1, out=bias_grad)
            torch.bmm(grad.mT, x, out=weight_grad)
            if i > 0:
                grad = torch.ops.aten.threshold_backward(torch.bmm(grad, weight.mT), x, 0)  # a ReLU's
        return grad

    def to_input(self, grad: Tensor) -> Tensor:
        """What `backward` returned → the gradient of the loss with respect to the inputs."""
        return widen(torch.bmm(grad, self._layers[0][0].mT))


def _of_baseline(net: _Passes) -> Gradients:
    @torch.inference_mode()
    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        logits = net.forward(batch.x[None])[0]
        log_likelihood, grad = bernoulli_log_prob_and_grad(batch.y, logits)
        net.backward(grad.mul_(-factor)[None])
        return Terms(log_likelihood, kl=torch.zeros_like(log_likelihood))

    return gradients


def _of_cvae(baseline: Baseline, encoders: _Passes, generation: _Passes) -> Gradients:
    @torch.inference_mode()
    def gradients(batch: Batch, eps: Tensor, factor: float | Tensor) -> Terms:
        x, y, y_hat = batch
        y_hat = baseline.guess(x) if y_hat is None else y_hat
        completed = torch.empty(2, len(x), x.shape[1] + y.shape[1], dtype=encoders.dtype, device=x.device)
        completed[:, :, : x.shape[1]] = x
        completed[0, :, x.shape[1] :] = y_hat
        completed[1, :, x.shape[1] :] = y
        p, q = (Gaussian(*outputs.chunk(2, dim=-1)) for outputs in encoders.forward(completed))
        scale = q.log_scale.exp()
        z = q.loc + scale * eps
        logits = generation.forward(z.flatten(0, 1)[None])[0].unflatten(0, z.shape[:2])

        # −log p(y|x,z), a mean over the L samples, reaches q through z = loc + scale · eps.
        log_likelihood, logits_grad = bernoulli_log_prob_and_grad(y, logits)
        logits_grad.mul_(-factor / len(eps))
        z_grad = generation.to_input(generation.backward(logits_grad.flatten(0, 1)[None])).view_as(z)
        loc_grad, log_scale_grad = z_grad.sum(0), (z_grad * eps).sum(0).mul_(scale)

        # The KL reaches q and p themselves.
        kl, *kl_grads = gaussian_kl_and_grads(q, p)
        kl_loc, kl_q, kl_p = (grad.mul_(factor) for grad in kl_grads)
        p_grad = torch.cat([-kl_loc, kl_p], dim=-1)
        q_grad = torch.cat([loc_grad + kl_loc, log_scale_grad + kl_q], dim=-1)
        encoders.backward(torch.stack([p_grad, q_grad]))
        return Terms(log_likelihood.mean(0), kl)

    return gradients
