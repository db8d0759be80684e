"""The trained weights of a model as one vector, a copy of them for products in half precision, and their average."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Weights(Generic[Model]):
    """The parameters of a model that are trained, side by side in one vector: one pass over it does for all of them.

    They stay the parameters that they are, as views of `vector`: first those without weight decay, which are the biases
    and all others of fewer than two dimensions, then the rest. Autocast would convert all of them in each step; instead
    `model` holds matrices and kernels in half precision, as views of a copy that follows each step of the optimizer.

    Args:
        model: The model, its weights in float32 or wider.
        half: The type of the products, if it is not theirs.

    Attributes:
        vector: The weights, `[W]`.
        num_undecayed: How many of them, the first ones, have no weight decay.
        model: What is to be trained: the model itself, or a copy of it with `half` weights.
    """

    def __init__(self, model: Model, half: torch.dtype | None = None):
        trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.dim() > 1)
        sizes = [p.numel() for p in trained]
        self.num_undecayed = sum(p.numel() for p in trained if p.dim() < 2)
        self.vector = torch.cat([p.detach().flatten() for p in trained])
        self.model = model
        self._copy = self.vector if half is None else self.vector.to(half)
        for parameter, part in zip(trained, self.vector.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
        self._trained = trained
        if half is not None:
            shared = [
                *model.buffers(),
                *(p for p in model.parameters() if not p.requires_grad),
                *trained[: self._narrow],
            ]
            self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
            self._trained = sorted((p for p in self.model.parameters() if p.requires_grad), key=lambda p: p.dim() > 1)
            for parameter, part in zip(self._trained, self._copy.split(sizes), strict=True):
                if parameter.dim() > 1:
                    parameter.data = part.view_as(parameter)

    @property
    def _narrow(self) -> int:
        return sum(p.dim() < 2 for p in self._trained)

    def take_gradient(self) -> Tensor:
        """Return the gradient that a backward pass left in the parameters, as one vector like `vector`, and drop it."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        gradient = torch.cat([gradient.flatten() for gradient in gradients], out=torch.empty_like(self.vector))
        for parameter in self._trained:
            parameter.grad = None
        return gradient

    def refresh(self) -> None:
        """Bring the half-precision copy up to date, after the weights have changed."""
        if self._copy is not self.vector:
            self._copy.copy_(self.vector)


class WeightAverage(Generic[Model]):
    """An exponential moving average of a model's weights, in a copy of the model: less noisy than any last weights.

    Buffers of floats, as of batch normalisation, are averaged with the weights, others are copied.
    Source: Polyak and Juditsky 1992, with exponential weights.

    Args:
        model: The model that is trained.
        weights: Its weights.
        window: The steps that the average spans, fewer at the start; 0: none, `self.model` is the model itself.
    """

    def __init__(self, model: Model, weights: Weights[Model], window: int):
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model: Model = copy.deepcopy(model, frozen) if window else model  # what is frozen is shared
        self._window, self._vector = window, weights.vector
        self._average = Weights(self.model).vector if window else weights.vector
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True)) if window else []
        self._since = 0  # steps since the weights were last taken in

    def update(self, step: int, last: bool = False) -> None:
        """Take the weights in, after the step of this number, counted from 0 over the whole training.

        A pass over all weights takes time, and later they change little: then they are taken in every so many steps,
        with the weight of these steps, and after the `last` step of an epoch.
        """
        self._since += 1
        every = 1 if step < 100 else min(20, max(1, self._window // 25))
        if self._window and (last or self._since >= every):
            span = min(self._window, 1 + step / 9)
            share = 1 - (1 - 1 / span) ** self._since
            self._average.lerp_(self._vector, share)
            for averaged, buffer in self._buffers:
                if buffer.is_floating_point():
                    averaged.lerp_(buffer, share)
                else:
                    averaged.copy_(buffer)
            self._since = 0
