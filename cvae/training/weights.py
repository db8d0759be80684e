"""The trained weights of a model as one vector, their gradient as another, and their average over the steps."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from cvae.model.layers import MLP, Gradients, Linear, Slot, Trained

Model = TypeVar("Model", bound=nn.Module)

ALIGNMENT = 256
"""A parameter begins at a multiple of so many elements: products are faster on aligned matrices, and norms by rows."""


class Weights(Generic[Model]):
    """The parameters of a model that are trained, side by side in one vector: one pass over it does for all of them.

    They stay the parameters that they are, as views of `vector`: first those without weight decay, which are the
    biases and all others of fewer than two dimensions per copy, then the rest, from `decayed` on.

    model: its weights are in float32 or wider. half: the type of the products, if it is not theirs. If all that is
    trained belongs to modules with the attribute `converts_inputs`, which compute in the type of their weights, the
    weights get a copy of this type, `working`, which is what `model` is made of from then on; for any other model
    autocast has to do it. slots: have the layers of `layers.py` write their gradients into the vector themselves, which
    is faster; not where autocast computes with copies of their weights.

    Attributes: `vector`; `gradient`, of the type of `working`; `working`: the copy, or the vector itself; `model`: what
    is to be trained; `decayed`.
    """

    def __init__(self, model: Model, half: torch.dtype | None = None, slots: bool = False):
        linears = [module for module in model.modules() if isinstance(module, Linear) and module.weight.requires_grad]
        biases = {id(linear.bias) for linear in linears}
        trained = {
            name: parameter
            for name, parameter in sorted(model.named_parameters(), key=lambda item: is_decayed(item[1], biases))
            if parameter.requires_grad
        }
        self.decayed = length = 0
        self._starts: dict[str, int] = {}
        for name, parameter in trained.items():
            self._starts[name] = length
            length += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if not is_decayed(parameter, biases):
                self.decayed = length
        self._shapes = {name: parameter.shape for name, parameter in trained.items()}
        first = next(iter(trained.values()))
        self.vector = torch.zeros(length, dtype=first.dtype, device=first.device)
        for name, parameter in trained.items():
            parameter.data = self.view(name, self.vector).copy_(parameter.detach())

        converting = (module for module in model.modules() if getattr(module, "converts_inputs", False))
        of_any_type = {id(parameter) for module in converting for parameter in module.parameters()}
        self.half = half if of_any_type.issuperset(id(parameter) for parameter in trained.values()) else None
        self.working = self.vector
        self.model = model
        if self.half is not None:
            self.working = self.vector.to(self.half)
            kept = (*model.buffers(), *(p for p in model.parameters() if not p.requires_grad))
            self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
        self.gradient = torch.zeros_like(self.working)
        parameters = {name: p for name, p in self.model.named_parameters() if name in trained}
        if self.half is not None:
            for name, parameter in parameters.items():
                parameter.data = self.view(name, self.working)
        self._wanted = Gradients()
        self._slots = [(p, Slot(self._wanted, self.view(name, self.gradient))) for name, p in parameters.items()]
        autocast = half is not None and self.half is None  # it computes with copies of the weights, of another type
        for module in self.model.modules():
            if slots and not autocast and isinstance(module, MLP):
                module.trained = self._layers(module)

    def _layers(self, mlp: MLP) -> list[Trained] | None:
        """The layers of one of the model's networks, if all of them are trained."""
        slots = {id(parameter): slot for parameter, slot in self._slots}
        layers = []
        for layer in mlp.layers:
            assert isinstance(layer, Linear)
            weight, bias = layer.weight, layer.bias
            if not slots.keys() >= {id(weight), id(bias)}:
                return None
            values = weight.detach().mT, bias.detach()[:, None]
            layers.append(Trained(*values, layer.relu, slots[id(weight)], slots[id(bias)]))
        return layers

    def release(self) -> None:
        """Have the model be one that is not trained any more."""
        for module in self.model.modules():
            if isinstance(module, MLP):
                module.trained = None

    @contextmanager
    def collecting_gradients(self) -> Iterator[None]:
        """Within it, a backward pass; after it, `gradient` holds what that found, and nothing of an earlier one."""
        for parameter, _ in self._slots:
            parameter.grad = None  # a backward pass outside of this may have left one
        self._wanted.wanted = True
        try:
            yield
        finally:
            self._wanted.wanted = False
            for parameter, slot in self._slots:
                if parameter.grad is not None:  # a plain operation's, of which the layers here know nothing
                    slot.add(parameter.grad)
                    parameter.grad = None
                elif not slot.filled:
                    slot.tensor.zero_()
                slot.filled = False

    def refresh(self) -> None:
        """Bring `working` up to date: needed when the weights have changed; the optimizer does it after its steps."""
        if self.half is not None:
            self.working.copy_(self.vector)

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def view(self, name: str, vector: Tensor) -> Tensor:
        """The part of the parameter of this name, in its shape, of a vector that is laid out as this one is."""
        shape = self._shapes[name]
        return vector[self._starts[name] : self._starts[name] + shape.numel()].view(shape)


def is_decayed(parameter: Tensor, biases: set[int]) -> bool:
    """Whether a parameter is a matrix or kernel, and no bias."""
    return parameter.dim() > 1 and id(parameter) not in biases


class WeightAverage(Generic[Model]):
    """An exponential moving average of a model's weights, in a copy of the model: less noisy than any last weights.

    The average spans about `window` steps, and less at the start. 0: there is none, `model` is the model itself.
    Buffers of floats, as of batch normalisation, are averaged with the weights, others are copied.
    Source: Polyak and Juditsky 1992, with exponential weights.
    """

    def __init__(self, model: Model, weights: Weights[Model], window: int):
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model: Model = copy.deepcopy(model, frozen) if window else model  # what is frozen is shared
        self._window = window
        self._vector = weights.vector
        self._average = Weights(self.model).vector if window else self._vector
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True)) if window else []
        self._since = 0  # steps since the weights were last taken in

    def update(self, step: int, last: bool = False) -> None:
        """Take the weights in, after the step of this number, counted from 0 over the whole training.

        A pass over all weights takes time, and later they change little: then they are taken in every so many steps
        only, each time with the weight of these steps, and after the `last` step of an epoch.
        """
        self._since += 1
        every = 1 if step < 100 else min(20, self._window)
        if self._window and (last or self._since >= every):
            share = min(1.0, self._since / min(self._window, 1 + step / 9))
            self._average.lerp_(self._vector, share)
            for averaged, buffer in self._buffers:
                if buffer.is_floating_point():
                    averaged.lerp_(buffer, share)
                else:
                    averaged.copy_(buffer)
            self._since = 0
