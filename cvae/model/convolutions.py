"""Residual convolutions over the patches of an image, for networks that see an image or draw one.

An image is cut into patches of `PATCH`×`PATCH` pixels, whose pixels are channels: `[B, rows, columns, channels]`, so
that MNIST's 28×28 are 7×7 places. What leaves is in float32 or wider; within, autocast chooses the type.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, silu

from cvae.data.masks import Split
from cvae.model.densities import widen
from cvae.model.layers import MLP

PATCH = 4
BLOCKS_IN, BLOCKS_OUT = 2, 3
SMALL = 0.1
"""What last layers are scaled by at first: residual blocks are nearly the identity then."""


def dense(fan_in: int, fan_out: int, gain: float = 1.0) -> MLP:
    """A linear layer for inputs of any leading dimensions, in float32 or wider; its outputs vary as its inputs do."""
    layer = MLP((fan_in, fan_out))
    weight, bias = layer.parameters()
    nn.init.normal_(weight, std=gain * fan_in**-0.5)
    nn.init.zeros_(bias)
    return layer


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
    """What is added to a state by two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.last = Convolution(channels, channels), Convolution(channels, channels, SMALL)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.last(silu(self.first(silu(state))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pixels `[B, num_pixels]`, observed first → what so many places use of the image, `[B, width]` each."""

    converts_inputs = True  # to the type of its weights
    raster: Tensor
    observed: Tensor

    def __init__(self, split: Split, channels: int, width: int, places: int):
        super().__init__()
        self.split, self.places = split, places
        self.register_buffer("raster", split.raster.clone(), persistent=False)  # no step may move it to the device
        self.register_buffer("observed", split.observed.float(), persistent=False)
        self.first = Convolution(2 * PATCH**2, channels)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_IN)))
        self.second, self.last = dense(channels * math.prod(grid(split)), width), dense(width, places * width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        image = pixels.index_select(-1, self.raster).unflatten(-1, self.observed.shape)
        seen = torch.stack([image, self.observed.to(image.dtype).expand_as(image)], dim=1)
        rows, columns = grid(self.split)
        whole = pad(seen, (0, columns * PATCH - self.split.width, 0, rows * PATCH - self.split.height))
        patches = (
            whole.unflatten(-1, (columns, PATCH)).unflatten(-3, (rows, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        )
        state = self.blocks(self.first(patches.to(self.first.weight.dtype)))
        features: Tensor = self.last(silu(self.second(silu(state).flatten(1))))
        return features.chunk(self.places, dim=-1)


class Decoder(nn.Module):
    """A state `[L, B, width]` → the logits of the hidden pixels, `[L, B, num_hidden]`."""

    converts_inputs = True
    hidden: Tensor

    def __init__(self, split: Split, channels: int, width: int):
        super().__init__()
        self.split, self.channels = split, channels
        self.register_buffer("hidden", split.order[split.num_observed :].clone(), persistent=False)
        self.first = dense(width, channels * math.prod(grid(split)))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_OUT)))
        self.last = Convolution(channels, PATCH**2)

    def forward(self, state: Tensor) -> Tensor:
        split = self.split
        places = self.first(silu(state)).flatten(0, -2).unflatten(-1, (*grid(split), self.channels))
        logits = widen(self.last(silu(self.blocks(places.to(self.last.weight.dtype)))))
        whole = logits.unflatten(3, (PATCH, PATCH)).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
        whole = whole[:, : split.height, : split.width]
        of_hidden: Tensor = whole.flatten(1).index_select(1, self.hidden).unflatten(0, state.shape[:-1])
        return of_hidden


def grid(split: Split) -> tuple[int, int]:
    """The rows and columns of patches that an image takes, the last ones not filled where the size is no multiple."""
    return math.ceil(split.height / PATCH), math.ceil(split.width / PATCH)
