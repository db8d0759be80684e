"""Fully connected networks."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

from cvae.model.densities import widen


class Hidden(nn.Linear):
    """A linear layer and a ReLU, initialised as in He et al. 2015."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class MLP(nn.Module):
    """Linear layers with a ReLU between each two: `[..., inputs]` → `[..., outputs]` in float32 or wider."""

    __call__: Callable[..., Tensor]

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return widen(self.layers(x))


def mlps(*sizes: int, count: int = 1) -> list[MLP]:
    """Make networks of the same sizes, of inputs, hidden layers and outputs; their weights are drawn layer by layer."""
    kinds = [*[Hidden] * (len(sizes) - 2), nn.Linear]
    layers = [[kind(*pair) for _ in range(count)] for kind, pair in zip(kinds, pairwise(sizes), strict=True)]
    return [MLP(*stack) for stack in zip(*layers, strict=True)]


def mlp(*sizes: int) -> MLP:
    """Make a network of these sizes, of inputs, hidden layers and outputs."""
    return mlps(*sizes)[0]


def dense(fan_in: int, fan_out: int, gain: float = 1.0) -> MLP:
    """Make one linear layer without a bias at first, whose outputs vary `gain` times as much as its inputs."""
    network = mlp(fan_in, fan_out)
    weight, bias = network.parameters()
    nn.init.normal_(weight, std=gain * fan_in**-0.5)
    nn.init.zeros_(bias)
    return network
