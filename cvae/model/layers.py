"""Fully connected networks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cvae.model.densities import widen


class Linear(nn.Linear):
    """A linear layer, initialised as in He et al. 2015 if a ReLU follows it."""

    def __init__(self, fan_in: int, fan_out: int, relu: bool):
        self.relu = relu
        super().__init__(fan_in, fan_out)

    def reset_parameters(self) -> None:
        if self.relu:
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
            nn.init.zeros_(self.bias)
        else:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs.relu_() if self.relu else outputs


class MLP(nn.Module):
    """Linear layers with a ReLU between each two: `[..., inputs]` → `[..., outputs]` in float32 or wider."""

    def __init__(self, layers: Sequence[Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return widen(x)


def mlps(*sizes: int, count: int = 1) -> list[MLP]:
    """Make networks of the same sizes, of inputs, hidden layers and outputs; their weights are drawn layer by layer."""
    last = len(sizes) - 2
    layers = [
        [Linear(fan_in, fan_out, relu=i < last) for _ in range(count)]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes))
    ]
    return [MLP(own) for own in zip(*layers, strict=True)]


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
