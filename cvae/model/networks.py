"""The networks, by name: each a builder, from the split of the images and the settings to a CVAE with its baseline.

A new network is a class with the two draws of `CVAE`, a builder, and a name in `NETWORKS`. It may be made of any
modules; those of `layers.py` train fastest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cvae import context
from cvae.data.masks import Split
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.deep import Deep
from cvae.model.densities import Gaussian
from cvae.model.layers import MLP
from cvae.settings import Settings


class OneLevel(CVAE):
    """A CVAE of one level of z, whose generation network is left to a subclass: Sohn et al. 2015, figure 1(d).

    The prior network sees x completed by the baseline's guess ŷ, the recognition network x completed by the true y.
    Both are of the same sizes, and are computed side by side: pixels → hidden layers → (loc, log-scale).
    """

    PRIOR, RECOGNITION = 0, 1  # the encoders' numbers

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, MLP((split.num_observed, *s.hidden, split.num_hidden)), s.latent_dim)
        self.encoders = MLP((split.num_pixels, *s.hidden, 2 * s.latent_dim), copies=2)

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        guess = self.known_guess(x, guess, eps, y)
        completed = torch.empty(2, len(x), self.split.num_pixels, dtype=self.encoders.dtype, device=x.device)
        completed[:, :, : self.split.num_observed] = x
        completed[self.PRIOR, :, self.split.num_observed :] = guess.sigmoid()
        completed[self.RECOGNITION, :, self.split.num_observed :] = y
        encoded = self.encoders(completed)
        p, q = (Gaussian(*parameters.chunk(2, dim=-1)) for parameters in encoded)
        z = q.sample(eps)
        if detach_z:
            z = z.detach().requires_grad_()
        return Draw(self.generation(z, x, guess), (Latent(z, eps, q, p),))

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        guess = self.known_guess(x, guess, eps)
        encoded = self.encoders(torch.cat([x, guess.sigmoid().to(x.dtype)], dim=-1), copy=self.PRIOR)
        p = Gaussian(*encoded.chunk(2, dim=-1))
        z = p.sample(eps)
        return Draw(self.generation(z, x, guess), (Latent(z, eps, p, p),))

    def generation(self, z: Tensor, x: Tensor, guess: Tensor) -> Tensor:
        """The logits of p(y|x,z), `[L, B, num_hidden]`, for z `[L, B, Z]`."""
        raise NotImplementedError


class Tutorial(OneLevel):
    """The tutorial's networks, whose generation network sees z alone.

    The tutorial shows its baseline −1 in the place of each hidden pixel. Those inputs add a constant to each unit of
    the first layer, which its bias can hold as well: they are left out, and so are all outputs for observed pixels,
    which nothing uses.
    """

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, s)
        self.generation_net = MLP((s.latent_dim, *s.hidden, split.num_hidden))

    def generation(self, z: Tensor, x: Tensor, guess: Tensor) -> Tensor:
        logits: Tensor = self.generation_net(z)
        return logits


class Paper(OneLevel):
    """The paper's p(y|x,z): the generation network sees z, x and ŷ, and its logits are added to the baseline's.

    Source: Sohn et al. 2015, and its authors' code for the sum.
    """

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, s)
        self.generation_of_x = MLP((split.num_pixels, s.hidden[0]))  # once an image, whatever the number of samples
        self.generation_of_z = MLP((s.latent_dim, s.hidden[0]))
        self.generation_net = MLP((*s.hidden, split.num_hidden))
        *_, weight, bias = self.encoders.parameters()
        with torch.no_grad():  # z tells much of y from the first step: on top of the guess it is not missed otherwise
            weight[self.RECOGNITION, : s.latent_dim] *= 3
            bias[self.RECOGNITION, s.latent_dim :] -= 2

    def generation(self, z: Tensor, x: Tensor, guess: Tensor) -> Tensor:
        seen = self.generation_of_x(torch.cat([x, guess.sigmoid().to(x.dtype)], dim=-1))
        features = (self.generation_of_z(z) + seen).relu()
        logits: Tensor = self.generation_net(features)
        return logits + guess


NETWORKS: dict[str, Callable[[Split, Settings], CVAE]] = {"tutorial": Tutorial, "paper": Paper, "deep": Deep}


def build(split: Split, s: Settings) -> CVAE:
    """The model of these settings for images with this split, its weights drawn from the seed.

    The same wherever one is needed: training, evaluation, tests, benchmarks. Raises ValueError for a network that
    there is not.
    """
    builder = s.chosen("network", NETWORKS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.derive_seed(s.seed, "weights"))
        return builder(split, s)
