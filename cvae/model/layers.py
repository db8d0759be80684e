"""Fully connected layers that put the gradients of their weights where the optimizer reads them.

`MLP` computes what `nn.Linear` and `nn.ReLU` do. While it is trained, its weights have slots (from
`training/weights.py`), and a backward pass writes their gradients there; without them it consists of plain operations.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cvae.model.densities import refuse_to_be_differentiated, widen


class Gradients:
    """Tells the layers whether the gradients of their weights are wanted just now."""

    wanted = False


class Slot:
    """The place of one weight's gradient, a tensor of its shape and type; `filled` once a backward pass wrote to it."""

    def __init__(self, gradients: Gradients, tensor: Tensor):
        self.gradients, self.tensor = gradients, tensor
        self.filled = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add a batched product to the gradient."""
        if self.filled:
            self.tensor.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=self.tensor)
        self.filled = True

    def add(self, gradient: Tensor) -> None:
        """Add to the gradient."""
        if self.filled:
            self.tensor.add_(gradient)
        else:
            self.tensor.copy_(gradient)
        self.filled = True

    def add_sum(self, gradient: Tensor) -> None:
        """Add the sum over the second dimension."""
        if self.filled:
            self.tensor.add_(gradient.sum(1))
        else:
            torch.sum(gradient, 1, out=self.tensor)
        self.filled = True


class Trained(NamedTuple):
    """A layer of an `MLP` in training: its weights as products take them, and where their gradients go."""

    weight: Tensor  # [copies, fan_in, fan_out]
    bias: Tensor  # [copies, 1, fan_out]
    relu: bool
    of_weight: Slot
    of_bias: Slot


class Linear(nn.Module):
    """`copies` linear layers of one shape side by side, each followed by a ReLU or not, in one batched product.

    `[copies, B, fan_in]` → `[copies, B, fan_out]`, of the type of its weights. Weights before a ReLU are initialised
    as in He et al. 2015, others as `nn.Linear` does.
    """

    converts_inputs = True  # an `MLP` does it for its layers

    def __init__(self, fan_in: int, fan_out: int, copies: int, relu: bool):
        super().__init__()
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(copies, fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(copies, fan_out))
        for weight, bias in zip(self.weight.data, self.bias.data, strict=True):
            if weight.is_meta:
                break  # PyTorch would load its compiler, a second's work, to draw nothing
            if relu:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            else:
                nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
                nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor, copy: int | None = None) -> Tensor:
        """copy: the number of the one layer to be computed, `[1, B, fan_in]` → `[1, B, fan_out]`; None: all of them."""
        weight, bias = (self.weight, self.bias) if copy is None else (self.weight[copy, None], self.bias[copy, None])
        outputs = torch.baddbmm(bias[:, None], x, weight.mT)
        return outputs.relu() if self.relu else outputs


class MLP(nn.Module):
    """`copies` networks of the same sizes side by side: linear layers with a ReLU between each two.

    sizes: of the inputs, the hidden layers and the outputs.
    """

    def __init__(self, sizes: Sequence[int], copies: int = 1):
        super().__init__()
        last = len(sizes) - 2
        self.copies = copies
        self.trained: list[Trained] | None = None  # its layers, while `Weights` trains them all
        self.layers = nn.ModuleList(
            Linear(fan_in, fan_out, copies, relu=i < last) for i, (fan_in, fan_out) in enumerate(pairwise(sizes))
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products, to which the inputs are converted."""
        first: Linear = self.layers[0]  # type: ignore[assignment]
        return first.weight.dtype

    def forward(self, x: Tensor, copy: int | None = None) -> Tensor:
        """All networks: `[copies, B, inputs]` → `[copies, B, outputs]`. The network of number `copy`, or the only one
        where copies = 1: `[..., B, inputs]` → `[..., B, outputs]`. In float32 or wider."""
        flat = (copy is not None or self.copies == 1) and x.shape[:-2] != (1,)
        hidden = x.reshape(1, -1, x.shape[-1]) if flat else x
        if copy is None and self.trained is not None and torch.is_grad_enabled():
            hidden = _IntoSlots.apply(hidden, self.trained, self.layers[0].weight)
        else:
            hidden = hidden.to(self.dtype)
            for layer in self.layers:
                hidden = layer(hidden, copy)
            hidden = widen(hidden)
        return hidden.view(*x.shape[:-1], hidden.shape[-1]) if flat else hidden

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trained": None}  # a copy of a model is not what is trained


class _IntoSlots(torch.autograd.Function):
    """The layers of an `MLP`, whose backward pass writes the gradients of the weights into their slots.

    One of the weights is an argument, for autograd to know that there is something to be trained.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Trained], weight: Tensor) -> Tensor:
        hidden = x.to(weight.dtype)
        inputs, weights = [], []  # of each layer
        for layer in layers:
            inputs.append(hidden)
            weights.append(layer.weight)
            hidden = torch.baddbmm(layer.bias, hidden, layer.weight)
            if layer.relu:
                hidden.relu_()
        ctx.save_for_backward(*inputs, *weights)
        ctx.layers, ctx.dtype = layers, x.dtype
        return widen(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        refuse_to_be_differentiated()
        layers, count = ctx.layers, len(ctx.layers)
        inputs, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grad = grads[0].to(weights[0].dtype)
        for i in reversed(range(count)):
            layer = layers[i]
            if layer.of_weight.gradients.wanted:
                layer.of_weight.add_product(grad.mT, inputs[i])
                layer.of_bias.add_sum(grad)
            if i > 0:
                grad = torch.bmm(grad, weights[i].mT)
                torch.ops.aten.threshold_backward.grad_input(grad, inputs[i], 0, grad_input=grad)  # a ReLU's
        by_x = torch.bmm(grad, weights[0].mT).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_x, None, None
