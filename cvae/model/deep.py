"""A CVAE of several levels of latent variables, each of which depends on all that was drawn above it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cvae.data.masks import Split
from cvae.model.convolutions import SMALL, Decoder, Encoder, dense
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian
from cvae.model.layers import MLP
from cvae.settings import Settings

LARGEST = 4.0
"""The bound of a level's log-scales, and of the recognition network's above the prior network's: e⁴ = 55."""
FIRST_LOG_RATIO = -1.0
"""log(q's scale / p's), before any training: each z tells something of y from the first step, and is made use of."""


class Deep(CVAE):
    """Levels z_1 … z_L: p(z|x) = Π p(z_l | x, z_<l), and q(z|x,y) = Π q(z_l | x, y, z_<l), all Gaussian.

    A state goes from level to level: the sum of what each z adds to it and of residual blocks. The
    prior network sees it and features of x and ŷ; the recognition network sees features of x and y too, and says how q
    differs from p. The logits follow from the last state, which has x by z alone. Images are encoded and decoded by
    residual convolutions of `s.channels` channels.

    `s.hidden` are the baseline's layers, and the last of them is the width of the state and of the features;
    `s.latent_dim` are the dimensions of all `s.levels` levels together.
    Source: Sønderby et al. 2016 (ladder VAE) and Vahdat and Kautz 2020 (q relative to p), here conditional on x.
    """

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, MLP((split.num_observed, *s.hidden, split.num_hidden)), s.latent_dim)
        self.dim = s.latent_dim // s.levels
        width = s.hidden[-1]
        self.prior_features = Encoder(split, s.channels, width, 2 * s.levels)
        self.recognition_features = Encoder(split, s.channels, width, s.levels)
        self.levels = nn.ModuleList(Level(width, self.dim, is_top=i == 0) for i in range(s.levels))
        self.logits = Decoder(split, s.channels, width)

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        guess = self.known_guess(x, guess, eps, y)
        return self.draw(x, guess, eps, self.recognition_features(torch.cat([x, y], dim=-1)), detach_z)

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        return self.draw(x, self.known_guess(x, guess, eps), eps)

    def draw(
        self, x: Tensor, guess: Tensor, eps: Tensor, truth: tuple[Tensor, ...] = (), detach_z: bool = False
    ) -> Draw:  # fmt: skip
        """z from the recognition network, given its features of the truth, or else from the prior network."""
        features = self.prior_features(torch.cat([x, guess.sigmoid().to(x.dtype)], dim=-1))
        levels: list[Level] = list(self.levels)  # type: ignore[arg-type]
        state: Tensor | None = None
        latents = []
        for i, (level, noise) in enumerate(zip(levels, eps.split(self.dim, dim=-1), strict=True)):
            p = q = level.prior(state, features[2 * i])
            if truth:
                q = level.posterior(p, state, features[2 * i + 1] + truth[i])
            z = q.sample(noise)
            if detach_z:
                z = z.detach().requires_grad_()
            latents.append(Latent(z, noise, q, p))
            state = level.next_state(state, z)
        assert state is not None
        return Draw(self.logits(state), tuple(latents))


class Level(nn.Module):
    """One level of z: its distributions given the state above it, `[L, B, width]`, None at the top, and the state
    below it."""

    def __init__(self, width: int, dim: int, is_top: bool):
        super().__init__()
        self.prior_state, self.recognition_state = (None if is_top else dense(width, width) for _ in range(2))
        self.prior_last, self.recognition_last = dense(width, 2 * dim, SMALL), dense(width, 2 * dim)
        _, bias = self.recognition_last.parameters()
        nn.init.constant_(bias[:, dim:], FIRST_LOG_RATIO)
        self.of_z = dense(dim, width)
        self.block_first, self.block_last = dense(width, width), dense(width, width, SMALL)

    def prior(self, state: Tensor | None, features: Tensor) -> Gaussian:
        loc, log_scale = self.prior_last(silu(added(self.prior_state, state, features))).chunk(2, dim=-1)
        return Gaussian(loc, bounded(log_scale))

    def posterior(self, p: Gaussian, state: Tensor | None, features: Tensor) -> Gaussian:
        """q, whose loc is given in units of p's scale, and whose scale as a multiple of it."""
        shift, log_ratio = self.recognition_last(silu(added(self.recognition_state, state, features))).chunk(2, dim=-1)
        return Gaussian(torch.addcmul(p.loc, p.log_scale.exp(), shift), p.log_scale + bounded(log_ratio))

    def next_state(self, state: Tensor | None, z: Tensor) -> Tensor:
        seen: Tensor = self.of_z(z)
        if state is not None:
            seen = seen + state
        return seen + self.block_last(silu(self.block_first(silu(seen))))  # type: ignore[no-any-return]


def added(layer: nn.Module | None, state: Tensor | None, features: Tensor) -> Tensor:
    """The features, and what a layer makes of the state above, if there is one."""
    return features if layer is None or state is None else features + layer(silu(state))


def bounded(log_scale: Tensor) -> Tensor:
    """The same where it is small, and never beyond ±LARGEST."""
    return LARGEST * torch.tanh(log_scale / LARGEST)
