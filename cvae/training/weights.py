"""The trained weights of a model as one vector, and their average over the steps."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Weights:
    """The parameters that are trained, side by side in one vector: one pass over it does for all of them.

    They stay the parameters that they are, as views of `vector`; those of one shape are neighbours, so that `stacked`
    finds them. `working` is what products are computed with: the vector itself, or, given the type `half`, a copy of it
    in half precision.
    """

    _ALIGNMENT = 16  # a parameter begins at a multiple of so many elements: products are faster on aligned matrices

    def __init__(self, parameters: Iterable[nn.Parameter], half: torch.dtype | None = None):
        self._starts: dict[Tensor, int] = {}
        length = 0
        for parameter in sorted(parameters, key=lambda parameter: parameter.shape):
            if parameter.requires_grad:
                self._starts[parameter] = length
                length += -(-parameter.numel() // self._ALIGNMENT) * self._ALIGNMENT
        first = next(iter(self._starts))
        self.vector = torch.zeros(length, dtype=first.dtype, device=first.device)
        for trained in self:
            trained.data = self.view(trained, self.vector).copy_(trained.detach())
        self.half = half
        self.working = self.vector if half is None else self.vector.to(half)

    def refresh(self) -> None:
        """Bring `working` up to date: needed when anything but the optimizer has changed the weights."""
        if self.half is not None:
            self.working.copy_(self.vector)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._starts)

    def view(self, parameter: Tensor, vector: Tensor) -> Tensor:
        """The part of a parameter, in its shape, of a vector that is laid out as this one is."""
        start = self._starts[parameter]
        return vector[start : start + parameter.numel()].view_as(parameter)

    def stacked(self, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
        """`view` of several parameters at once, `[n, *shape]`: a view too.

        Raises ValueError unless they are of one shape, and equally far apart in the vector, in this order.
        """
        starts = [self._starts[parameter] for parameter in parameters]
        shapes = {parameter.shape for parameter in parameters}
        distances = {after - before for before, after in pairwise(starts)} or {parameters[0].numel()}
        if len(shapes) > 1 or len(distances) > 1 or min(distances) <= 0:
            raise ValueError("parameters can be stacked if they are of one shape, equally far apart and in order")
        first = self.view(parameters[0], vector)
        return first.as_strided((len(starts), *first.shape), (*distances, *first.stride()))


class WeightAverage(Generic[Model]):
    """An exponential moving average of a model's weights, in a copy of the model: less noisy than any last weights.

    The average spans about `window` steps, and less at the start. 0: there is none, `model` is the model itself.
    Source: Polyak and Juditsky 1992, with exponential weights.
    """

    def __init__(self, model: Model, weights: Weights, window: int):
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model: Model = copy.deepcopy(model, frozen) if window else model  # what is frozen is shared
        self._window = window
        self._vector = weights.vector
        self._average = Weights(self.model.parameters()).vector if window else self._vector
        self._since = 0  # steps since the weights were last taken in

    def update(self, step: int, last: bool = False) -> None:
        """Take the weights in, after the step of this number, counted from 0 over the whole training.

        A pass over all weights takes time, and later they change little: then they are taken in every so many steps
        only, each time with the weight of these steps, and after the `last` step of an epoch.
        """
        self._since += 1
        every = 1 if step < 100 else min(20, self._window)
        if self._window and (last or self._since >= every):
            self._average.lerp_(self._vector, min(1.0, self._since / min(self._window, 1 + step / 9)))
            self._since = 0
