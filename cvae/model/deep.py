"""A CVAE of several levels of latent variables, between residual convolutions that see an image and draw one."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from cvae.data.tasks import Batch, Task
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian, widen
from cvae.model.layers import MLP, dense, mlp
from cvae.settings import Settings

LARGEST = 4.0  # bounds the log of p's scale, and of q's scale above p's: e⁴ = 55
FIRST_LOG_RATIO = -1.0  # log(q's scale / p's) at first: each z tells something of y from the first step, and is used
SMALL = 0.1  # the scale of last layers at first: residual blocks are nearly the identity then
PATCH = 4  # patches of 4×4 pixels are the channels of a place: MNIST's 28×28 pixels are 7×7 places
BLOCKS_IN, BLOCKS_OUT = 2, 3

Features = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The prior network's features of x and ŷ, two for each level, and the recognition network's of x and y, one each."""


class Deep(CVAE):
    """Levels z_1 … z_L: p(z|x) = Π p(z_l | x, z_<l), and q(z|x,y) = Π q(z_l | x, y, z_<l), all Gaussian.

    A state goes from level to level: the sum of what each z adds to it and of residual blocks. The prior network sees
    it and features of x and ŷ; the recognition network sees features of x and y too, and says how q differs from p.
    The logits follow from the last state, which has x by z alone. Of the settings, `hidden` are the baseline's layers,
    the last of them is the width of the state and of the features; `latent_dim` is that of all `levels` together.
    Source: Sønderby et al. 2016 (ladder VAE) and Vahdat and Kautz 2020 (q relative to p), here conditional on x.
    """

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, mlp(task.x_dim, *s.hidden, task.y_dim), s.latent_dim)
        self.dim = s.latent_dim // s.levels
        width = s.hidden[-1]
        self.prior_features = Encoder(task, s.channels, width, 2 * s.levels)
        self.recognition_features = Encoder(task, s.channels, width, s.levels)
        self.levels = nn.ModuleList(Level(width, self.dim, is_top=i == 0) for i in range(s.levels))
        self.logits = Decoder(task, s.channels, width)

    def encode(self, batch: Batch, guess: Tensor, recognise: bool) -> Features:
        prior = self.prior_features(batch.x, guess.sigmoid().to(batch.x.dtype))
        return prior, self.recognition_features(batch.x, batch.y) if recognise else ()

    def draw(self, encoded: Features, eps: Tensor, recognise: bool, detach_z: bool = False) -> Draw:
        features, truth = encoded
        state: Tensor | None = None
        latents = []
        for i, (level, noise) in enumerate(zip(self.levels, eps.split(self.dim, dim=-1), strict=True)):
            assert isinstance(level, Level)
            p = q = level.prior(state, features[2 * i])
            if recognise:
                q = level.posterior(p, state, features[2 * i + 1] + truth[i])
            z = q.sample(noise, detach_z)
            latents.append(Latent(z, noise, q, p))
            state = level.next_state(state, z)
        return Draw(self.logits(state), tuple(latents))


class Level(nn.Module):
    """One level of z: its distributions given the state above, `[L, B, width]`, None at the top, and the next state."""

    def __init__(self, width: int, dim: int, is_top: bool):
        super().__init__()
        self.prior_state, self.recognition_state = (None if is_top else dense(width, width) for _ in range(2))
        self.prior_last, self.recognition_last = dense(width, 2 * dim, SMALL), dense(width, 2 * dim)
        _, bias = self.recognition_last.parameters()
        nn.init.constant_(bias[dim:], FIRST_LOG_RATIO)
        self.of_z = dense(dim, width)
        self.block_first, self.block_last = dense(width, width), dense(width, width, SMALL)

    def prior(self, state: Tensor | None, features: Tensor) -> Gaussian:
        loc, log_scale = self.prior_last(silu(_added(self.prior_state, state, features))).chunk(2, dim=-1)
        return Gaussian(loc, bounded(log_scale))

    def posterior(self, p: Gaussian, state: Tensor | None, features: Tensor) -> Gaussian:
        """Return q, whose loc is given in units of p's scale, and whose scale as a multiple of it."""
        shift, log_ratio = self.recognition_last(silu(_added(self.recognition_state, state, features))).chunk(2, dim=-1)
        return Gaussian(torch.addcmul(p.loc, p.log_scale.exp(), shift), p.log_scale + bounded(log_ratio))

    def next_state(self, state: Tensor | None, z: Tensor) -> Tensor:
        seen = self.of_z(z) if state is None else self.of_z(z) + state
        return seen + self.block_last(silu(self.block_first(silu(seen))))


def _added(layer: MLP | None, state: Tensor | None, features: Tensor) -> Tensor:
    """Return the features `[B, width]` with what a layer makes of the state above, if there is one."""
    return features if layer is None or state is None else features + layer(silu(state))


def bounded(log_scale: Tensor) -> Tensor:
    """Return log-scales that are nearly as they were where they are small, and never beyond ±LARGEST."""
    return LARGEST * torch.tanh(log_scale / LARGEST)


class Encoder(nn.Module):
    """A network from x `[B, x_dim]`, and y or a guess of it, `[B, y_dim]`, to `count` features, `[B, width]` each."""

    def __init__(self, task: Task, channels: int, width: int, count: int):
        super().__init__()
        self.task, self.count = task, count
        self.first = convolution(task.planes * PATCH**2, channels)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_IN)))
        self.second, self.last = dense(channels * math.prod(grid(task)), width), dense(width, count * width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        picture, (rows, columns) = self.task.picture(x, y), grid(self.task)
        whole = pad(picture, (0, columns * PATCH - self.task.width, 0, rows * PATCH - self.task.height))
        patches = whole.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))  # [B, planes, rows, 4, columns, 4]
        places = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)  # channels last in memory: fastest
        features = silu(self.blocks(self.first(places))).permute(0, 2, 3, 1).flatten(1)
        return self.last(silu(self.second(features))).chunk(self.count, dim=-1)


class Decoder(nn.Module):
    """A network from a state `[L, B, width]` to the logits of y, `[L, B, y_dim]`."""

    def __init__(self, task: Task, channels: int, width: int):
        super().__init__()
        self.task, self.channels = task, channels
        self.first = dense(width, channels * math.prod(grid(task)))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(BLOCKS_OUT)))
        self.last = convolution(channels, PATCH**2)

    def forward(self, state: Tensor) -> Tensor:
        places = self.first(silu(state)).flatten(0, -2).unflatten(-1, (*grid(self.task), self.channels))
        patches = widen(self.last(silu(self.blocks(places.permute(0, 3, 1, 2)))))
        whole = patches.unflatten(1, (PATCH, PATCH)).permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)
        logits: Tensor = self.task.asked(whole[:, : self.task.height, : self.task.width]).unflatten(0, state.shape[:-1])
        return logits


class Block(nn.Module):
    """A state, and what two convolutions add to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.last = convolution(channels, channels), convolution(channels, channels, SMALL)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.last(silu(self.first(silu(state))))  # type: ignore[no-any-return]


def convolution(channels_in: int, channels_out: int, gain: float = 1.0) -> nn.Conv2d:
    """Make a 3×3 convolution that keeps rows and columns, whose outputs vary `gain` times as much as its inputs."""
    layer: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels_in, channels_out, 3, padding=1)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(9 * channels_in))
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def grid(task: Task) -> tuple[int, int]:
    """Return the rows and columns of patches in an image, the last ones not filled where its size is no multiple."""
    return math.ceil(task.height / PATCH), math.ceil(task.width / PATCH)
