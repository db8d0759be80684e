"""Residual convolutions over the patches of an image, for networks that see an image or draw one.

An image is cut into patches of `PATCH`×`PATCH` pixels, whose pixels are channels: `[B, rows, columns, channels]`, so
that MNIST's 28×28 are 7×7 places. What leaves is in float32 or wider; within, autocast chooses the type.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, silu

from cvae.data.tasks import Task
from cvae.model.densities import widen
from cvae.model.layers import dense

PATCH = 4
BLOCKS_IN, BLOCKS_OUT = 2, 3
SMALL = 0.1
"""The scale of last layers at first: residual blocks are nearly the identity then."""


class Convolution(nn.Module):
    """A 3×3 convolution that keeps rows and columns; its outputs vary as its inputs do."""

    def __init__(self, channels_in: int, channels_out: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        nn.init.normal_(self.weight, std=gain / math.sqrt(9 * channels_in))

    def forward(self, x: Tensor) -> Tensor:
        channels_first = x.permute(0, 3, 1, 2)  # a view, in the order in which convolutions are fastest
        return conv2d(channels_first, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A state, and what two convolutions add to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.last = Convolution(channels, channels), Convolution(channels, channels, SMALL)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.last(silu(self.first(silu(state))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A network from x `[B, x_dim]`, and y or a guess of it, `[B, y_dim]`, to `places` features, `[B, width]` each."""

    def __init__(self, task: Task, channels: int, width: int, places: int):
        super().__init__()
        self.task, self.places = task, places
        self.first = Convolution(task.planes * PATCH**2, channels)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_IN)))
        self.second, self.last = dense(channels * math.prod(grid(task)), width), dense(width, places * width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        picture = self.task.picture(x, y)
        rows, columns = grid(self.task)
        whole = pad(picture, (0, columns * PATCH - self.task.width, 0, rows * PATCH - self.task.height))
        patches = whole.unflatten(-1, (columns, PATCH)).unflatten(-3, (rows, PATCH)).permute(0, 2, 4, 1, 3, 5)
        state = self.blocks(self.first(patches.flatten(3)))
        features: Tensor = self.last(silu(self.second(silu(state).flatten(1))))
        return features.chunk(self.places, dim=-1)


class Decoder(nn.Module):
    """A network from a state `[L, B, width]` to the logits of y, `[L, B, y_dim]`."""

    def __init__(self, task: Task, channels: int, width: int):
        super().__init__()
        self.task, self.channels = task, channels
        self.first = dense(width, channels * math.prod(grid(task)))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_OUT)))
        self.last = Convolution(channels, PATCH**2)

    def forward(self, state: Tensor) -> Tensor:
        places = self.first(silu(state)).flatten(0, -2).unflatten(-1, (*grid(self.task), self.channels))
        logits = widen(self.last(silu(self.blocks(places))))
        whole = logits.unflatten(3, (PATCH, PATCH)).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
        asked = self.task.asked(whole[:, : self.task.height, : self.task.width])
        logits_of_y: Tensor = asked.unflatten(0, state.shape[:-1])
        return logits_of_y


def grid(task: Task) -> tuple[int, int]:
    """Return the rows and columns of patches in an image, the last ones not filled where its size is no multiple."""
    return math.ceil(task.height / PATCH), math.ceil(task.width / PATCH)
