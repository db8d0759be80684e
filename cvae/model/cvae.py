"""What a conditional VAE is here: a baseline, and draws of z with what follows from them.

Images are vectors with their observed pixels first (`Split.vectors`): x `[B, num_observed]` and y `[B, num_hidden]`,
both in [0, 1]. guess: the logits of the baseline's guess ŷ for y, `[B, num_hidden]`; computed where it is None.
"""

import math
import operator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cvae import context
from cvae.data.given import Picture, as_images, as_pixels
from cvae.data.masks import Split, described
from cvae.model.densities import Gaussian, bernoulli_log_prob, gaussian_kl, gaussian_log_prob

Seed = int | torch.Generator | None


class Latent(NamedTuple):
    """One level of latent variables: z `[L, B, Z]`, the noise that it was made of, and its two distributions.

    q is what z was drawn from: the recognition network's, or the prior network's, p itself. q and p `[B, Z]`, or
    `[L, B, Z]` where they depend on what was drawn above.
    """

    z: Tensor
    eps: Tensor
    q: Gaussian
    p: Gaussian


class Draw(NamedTuple):
    """L samples of z for each of B images, and the generation network's prediction from each.

    logits: of p(y|x,z), `[L, B, num_hidden]`. latents: the levels of z, from top to bottom.
    """

    logits: Tensor
    latents: tuple[Latent, ...]

    def log_likelihood(self, y: Tensor) -> Tensor:
        """log p(y|x,z), nats `[L, B]`, for y `[B, num_hidden]` in [0, 1]. Raises ValueError for another shape."""
        check("y", y, self.logits.shape[1:], self.logits.device)
        return bernoulli_log_prob(y, self.logits)

    def log_weights(self, y: Tensor) -> Tensor:
        """log of the importance weights, p(y|x,z) p(z|x) / q(z|x,y), nats `[L, B]`, for y as in `log_likelihood`."""
        return self.log_likelihood(y) + self.log_ratio

    @property
    def log_ratio(self) -> Tensor:
        """log p(z|x) − log q(z|x,y) at these z, nats `[L, B]`; zero where they come from the prior network."""
        return reduce(torch.add, (gaussian_log_prob(z, p) - gaussian_log_prob(z, q) for z, _, q, p in self.latents))

    @property
    def kl_of_levels(self) -> list[Tensor]:
        """KL(q(z|x,y) ‖ p(z|x)) of each level, in closed form given what was drawn above it: nats, `[B]` or `[L, B]`.

        Zero where z comes from the prior network.
        """
        return [gaussian_kl(q, p) for _, _, q, p in self.latents]

    @property
    def kl(self) -> Tensor:
        """KL(q(z|x,y) ‖ p(z|x)) of all levels together, nats, `[B]` or `[L, B]`."""
        return reduce(torch.add, self.kl_of_levels)


class CVAE(nn.Module):
    """A conditional VAE, p(y|x) = ∫ p(y|x,z) p(z|x) dz, on top of a baseline, which stays as it is.

    A network (`networks.py`) defines `from_posterior` and `from_prior`; everything else, training and the estimates
    included, is made of these two.

    split: of the images. baseline_net: x → logits of ŷ, `[B, num_hidden]`. latent_dim: the dimensions of z, of all
    levels together.
    """

    def __init__(self, split: Split, baseline_net: nn.Module, latent_dim: int):
        super().__init__()
        self.split = split
        self.baseline_net = baseline_net.requires_grad_(False)
        self.latent_dim = latent_dim

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        """A draw of z from the recognition network, q(z|x,y). eps: the noise, N(0, 1), `[L, B, latent_dim]`.

        Raises ValueError for tensors of other shapes, and for values that `known_guess` finds outside [0, 1].
        detach_z: what follows from each level's z takes it as a constant that a gradient can be taken for, as
        `objectives.iwae` needs it.
        """
        raise NotImplementedError

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        """A draw of z from the prior network, p(z|x), which does not see y. eps: as in `from_posterior`."""
        raise NotImplementedError

    def known_guess(
        self, x: Tensor, guess: Tensor | None, eps: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The guess as it is given, or the baseline's for x.

        Raises ValueError where one of the four is not of this model's images. Shapes are always looked at; values, and
        the weights' device, where the guess is computed in evaluation mode: a training must not wait for its device,
        and an exported program has no exceptions.
        """
        count = x.shape[0]  # unlike len(x), a size that an exported program leaves open
        check("x", x, (count, self.split.num_observed), x.device)
        if y is not None:
            check("y", y, (count, self.split.num_hidden), x.device)
        if eps is not None:  # of one image it serves for all
            each = 1 if eps.dim() == 3 and count != eps.shape[1] == 1 else count
            check("eps", eps, (eps.shape[0], each, self.latent_dim), x.device, "N(0, 1)")
        if guess is not None:
            check("guess", guess, (count, self.split.num_hidden), x.device, "logits")
            return guess
        if not (self.training or torch.compiler.is_exporting()):
            check("x", x, x.shape, next(self.parameters()).device)
            for name, tensor in (("x", x), ("y", y)):
                if tensor is not None and not ((tensor >= 0) & (tensor <= 1)).all():
                    raise ValueError(f"{name} has to be in [0, 1], not {described(tensor)}")
        with torch.no_grad():
            return self.baseline_net(x)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "CVAE":
        """As any module's, but the baseline stays as in evaluation: it is trained by itself, before."""
        super().train(mode)
        self.baseline_net.eval()
        return self

    def completions(self, x: Tensor, eps: Tensor) -> Tensor:
        """Completions of x: the pixel means of p(y|x,z) at z ~ p(z|x), in [0, 1], `[S, B, num_hidden]`.

        eps: the noise, `[S, B, latent_dim]`, or `[S, 1, latent_dim]` to use the same for all images. Raises ValueError
        for tensors of other shapes, and for values of x outside [0, 1].
        """
        return self.from_prior(x, None, eps).logits.sigmoid()

    @torch.no_grad()
    def complete(
        self, picture: Picture, samples: int = 10, seed: Seed = None, temperature: float = 1.0
    ) -> Tensor:  # fmt: skip
        """Pictures `[samples, B, height, width]` in [0, 1]: the observed pixels as given, the hidden ones completed.

        picture: B pictures, as `as_images` takes them; their hidden pixels may hold anything. seed: a number, or a
        generator on the model's device; None: other samples each time, drawn by the default generator. temperature: a
        factor of z's noise, 1 for samples of p(z|x), 0 for its mean. Raises ValueError for what is of another size,
        type or range, and DataError for a file that cannot be read.
        """
        from cvae.model.likelihood import noise  # it imports this module

        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature has to be a number from 0 on, not {temperature}")
        observed = self.split.split(as_images(picture, self.split))[0]
        x = self._pixels("the observed part of a picture", observed)
        eps = noise(_positive(samples), len(x), self, self._random(seed)).to(x.dtype)
        return self.split.compose(x, self.completions(x, temperature * eps))

    @torch.no_grad()
    def log_likelihood(self, picture: Picture, samples: int = 1000, seed: Seed = None) -> Tensor:
        """log p(y|x) of whole pictures, nats per image `[B]`, float64, higher is better.

        An estimate by importance sampling, with so many samples of z ~ q(z|x,y); in expectation it lies below the true
        value. Arguments and errors as those of `complete`, but that no pixel may hold anything else than its level.
        """
        from cvae.model.likelihood import importance_sampling  # it imports this module

        x, y = self.split.split(self._pixels("a picture", as_images(picture, self.split)))
        return importance_sampling(self, x, y, _positive(samples), self._random(seed))

    def _pixels(self, name: str, pixels: Tensor) -> Tensor:
        return as_pixels(name, pixels, like=next(self.parameters()))

    def _random(self, seed: Seed) -> torch.Generator:
        device = next(self.parameters()).device
        if isinstance(seed, torch.Generator):
            if seed.device.type != device.type:
                raise ValueError(f"the generator has to be on {device}, as the model is, not on {seed.device}")
            return seed
        number = int(torch.randint(1 << 62, ())) if seed is None else operator.index(seed)
        return context.generator(device, number, "pictures")


def _positive(samples: int) -> int:
    if operator.index(samples) < 1:
        raise ValueError(f"samples has to be a number from 1 on, not {samples}")
    return samples


def check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, values: str = "in [0, 1]") -> None:
    """Raises ValueError unless a tensor has floats, this shape and this device. It does not wait for the device."""
    if tensor.shape != shape or tensor.device != device or not tensor.is_floating_point():
        wanted, found = f"{values}, {list(shape)} on {device}", f"{described(tensor)} on {tensor.device}"
        raise ValueError(f"{name} has to be floats {wanted}, not {found}")
