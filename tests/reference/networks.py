"""Networks that the package does not have: convolutional, of several levels of z, with dropout and batch normalisation.

Each is a builder, as those of `cvae.model.networks.NETWORKS` are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cvae.data.masks import Split
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian, widen
from cvae.model.layers import MLP
from cvae.model.networks import Tutorial
from cvae.settings import Settings


class Levels(CVAE):
    """Levels of z, one below another: q and p of each see what was drawn above it, and the image.

    latent_dim is divided among the levels evenly. net: makes a network of these sizes, for inputs of any leading
    dimensions.
    """

    def __init__(
        self, split: Split, s: Settings, levels: int = 2, net: Callable[[Sequence[int]], nn.Module] = MLP
    ):  # fmt: skip
        super().__init__(split, net((split.num_observed, *s.hidden, split.num_hidden)), s.latent_dim)
        self.size, rest = divmod(s.latent_dim, levels)
        assert rest == 0
        sizes = [(split.num_pixels + i * self.size, *s.hidden, 2 * self.size) for i in range(levels)]
        self.prior_nets, self.recognition_nets = (nn.ModuleList(map(net, sizes)) for _ in range(2))
        self.generation_net = net((s.latent_dim, *s.hidden, split.num_hidden))

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        guessed = torch.cat([x, self.known_guess(x, guess).sigmoid().to(x.dtype)], dim=-1)
        true = torch.cat([x, y], dim=-1)
        latents: list[Latent] = []
        for noise, prior_net, recognition_net in zip(
            eps.split(self.size, dim=-1), self.prior_nets, self.recognition_nets, strict=True
        ):
            p, q = self.seen(prior_net, guessed, latents), self.seen(recognition_net, true, latents)
            z = q.sample(noise)
            latents.append(Latent(z.detach().requires_grad_() if detach_z else z, noise, q, p))
        return Draw(self.generation(latents), tuple(latents))

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        guessed = torch.cat([x, self.known_guess(x, guess).sigmoid().to(x.dtype)], dim=-1)
        latents: list[Latent] = []
        for noise, prior_net in zip(eps.split(self.size, dim=-1), self.prior_nets, strict=True):
            p = self.seen(prior_net, guessed, latents)
            latents.append(Latent(p.sample(noise), noise, p, p))
        return Draw(self.generation(latents), tuple(latents))

    def seen(self, net: nn.Module, image: Tensor, above: list[Latent]) -> Gaussian:
        drawn = [latent.z for latent in above]
        if drawn:
            image = image.expand(*drawn[0].shape[:-1], -1)
        return Gaussian(*net(torch.cat([*drawn, image], dim=-1)).chunk(2, dim=-1))

    def generation(self, latents: list[Latent]) -> Tensor:
        logits: Tensor = self.generation_net(torch.cat([latent.z for latent in latents], dim=-1))
        return logits


def smooth(sizes: Sequence[int]) -> nn.Module:
    """Linear layers with a tanh between each two: integrals over what follows from them converge fast."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


class Encoded(CVAE):
    """One level of z, whose four networks are modules of PyTorch; they are a subclass's to make.

    baseline_net: x → logits of ŷ. prior_net, recognition_net: a vector of all pixels `[B, num_pixels]` → loc and
    log-scale `[B, 2Z]`. generation_net: z `[B, Z]` → logits `[B, num_hidden]`.
    """

    prior_net: nn.Module
    recognition_net: nn.Module
    generation_net: nn.Module

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        guess = self.known_guess(x, guess)
        p = self.encoded(self.prior_net, x, guess.sigmoid())
        q = self.encoded(self.recognition_net, x, y)
        z = q.sample(eps)
        if detach_z:
            z = z.detach().requires_grad_()
        return Draw(self.generation(z, guess), (Latent(z, eps, q, p),))

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        guess = self.known_guess(x, guess)
        p = self.encoded(self.prior_net, x, guess.sigmoid())
        z = p.sample(eps)
        return Draw(self.generation(z, guess), (Latent(z, eps, p, p),))

    def encoded(self, net: nn.Module, x: Tensor, y: Tensor) -> Gaussian:
        return Gaussian(*widen(net(torch.cat([x, y.to(x.dtype)], dim=-1))).chunk(2, dim=-1))

    def generation(self, z: Tensor, guess: Tensor) -> Tensor:
        return widen(self.generation_net(z.flatten(0, 1))).unflatten(0, z.shape[:2]) + guess


class Picture(nn.Module):
    """Vectors of pixels, the observed ones first, as pictures `[B, 1, height, width]`; hidden ones left out are 0."""

    def __init__(self, split: Split):
        super().__init__()
        self.split = split

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = nn.functional.pad(pixels, (0, self.split.num_pixels - pixels.shape[-1]))
        x, y = pixels.split([self.split.num_observed, self.split.num_hidden], dim=-1)
        return self.split.compose(x, y).unsqueeze(-3)


class Hidden(nn.Module):
    """The hidden pixels of pictures `[B, 1, height, width]`."""

    def __init__(self, split: Split):
        super().__init__()
        self.split = split

    def forward(self, pictures: Tensor) -> Tensor:
        return self.split.split(pictures.squeeze(-3))[1]


class Convolutional(Encoded):
    """Convolutions over the composed picture; `hidden` is not used."""

    CHANNELS = 4

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, self.encoder(split, split.num_hidden), s.latent_dim)
        self.prior_net, self.recognition_net = (self.encoder(split, 2 * s.latent_dim) for _ in range(2))
        shape = (self.CHANNELS, split.height, split.width)
        self.generation_net = nn.Sequential(
            nn.Linear(s.latent_dim, self.CHANNELS * split.num_pixels),
            nn.ReLU(),
            nn.Unflatten(-1, shape),
            nn.Conv2d(self.CHANNELS, 1, 3, padding=1),
            Hidden(split),
        )

    def encoder(self, split: Split, outputs: int) -> nn.Module:
        side = -(-split.height // 2) * -(-split.width // 2)
        return nn.Sequential(
            Picture(split),
            nn.Conv2d(1, self.CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.CHANNELS, self.CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(self.CHANNELS * side, outputs),
        )


class Regularised(Encoded):
    """Dropout and batch normalisation in all four networks; of `hidden`, the first size."""

    def __init__(self, split: Split, s: Settings):
        size = s.hidden[0]
        super().__init__(split, self.net(split.num_observed, size, split.num_hidden), s.latent_dim)
        self.prior_net = self.net(split.num_pixels, size, 2 * s.latent_dim)
        self.recognition_net = self.net(split.num_pixels, size, 2 * s.latent_dim)
        self.generation_net = self.net(s.latent_dim, size, split.num_hidden)

    def net(self, inputs: int, size: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(0.2), nn.Linear(size, outputs)
        )


class Mixed(Tutorial):
    """The tutorial's, of the layers whose gradients go straight to the optimizer, and a plain layer behind them."""

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, s)
        self.last = nn.Linear(split.num_hidden, split.num_hidden)

    def generation(self, z: Tensor, x: Tensor, guess: Tensor) -> Tensor:
        logits: Tensor = self.last(self.generation_net(z))
        return logits


TEST_NETWORKS: dict[str, Callable[[Split, Settings], CVAE]] = {
    "convolutional": Convolutional,
    "two levels": Levels,
    "regularised": Regularised,
    "mixed": Mixed,
    "smooth": partial(Levels, levels=1, net=smooth),
    "two smooth levels": partial(Levels, net=smooth),
}
