"""A CVAE of several levels of latent variables, each of which depends on all that was drawn above it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cvae.data.tasks import Batch, Task
from cvae.model.convolutions import SMALL, Decoder, Encoder
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian
from cvae.model.layers import dense, mlp
from cvae.settings import Settings

LARGEST = 4.0
"""The bound of a level's log-scales, and of the recognition network's above the prior network's: e⁴ = 55."""
FIRST_LOG_RATIO = -1.0
"""log(q's scale / p's), before any training: each z tells something of y from the first step, and is made use of."""

Features = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The prior network's features of x and ŷ, two for each level, and the recognition network's of x and y, one each."""


class Deep(CVAE):
    """Levels z_1 … z_L: p(z|x) = Π p(z_l | x, z_<l), and q(z|x,y) = Π q(z_l | x, y, z_<l), all Gaussian.

    A state goes from level to level: the sum of what each z adds to it and of residual blocks. The prior network sees
    it and features of x and ŷ; the recognition network sees features of x and y too, and says how q differs from p.
    The logits follow from the last state, which has x by z alone. Images are encoded and decoded by residual
    convolutions.
    Source: Sønderby et al. 2016 (ladder VAE) and Vahdat and Kautz 2020 (q relative to p), here conditional on x.

    Args:
        task: What turns images into x and y.
        s: `hidden` are the baseline's layers, and the last of them is the width of the state and of the features;
            `latent_dim` are the dimensions of all `levels` together; `channels` those of the convolutions.
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
            z = q.sample(noise)
            if detach_z:
                z = z.detach().requires_grad_()
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
        seen: Tensor = self.of_z(z)
        if state is not None:
            seen = seen + state
        return seen + self.block_last(silu(self.block_first(silu(seen))))  # type: ignore[no-any-return]


def _added(layer: nn.Module | None, state: Tensor | None, features: Tensor) -> Tensor:
    """Return the features `[B, width]` with what a layer makes of the state above, if there is one."""
    return features if layer is None or state is None else features + layer(silu(state))


def bounded(log_scale: Tensor) -> Tensor:
    """Return log-scales that are nearly as they were where they are small, and never beyond ±LARGEST."""
    return LARGEST * torch.tanh(log_scale / LARGEST)
