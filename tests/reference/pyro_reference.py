"""An independent CVAE to compare with: the plain masked form, and a Pyro model and guide on top of it.

Whole images `[B, num_pixels]` in raster order go into whole networks; a pixel that is not observed holds −1 where the
baseline looks, and takes no part in the likelihood.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from cvae.data.masks import Split
from cvae.model.layers import MLP
from cvae.model.networks import OneLevel, Paper, Tutorial


class FixedNoise(dist.Normal):
    """A normal distribution whose sample is made of given noise."""

    def __init__(self, loc: Tensor, scale: Tensor, eps: Tensor):
        super().__init__(loc, scale)
        self.eps = eps

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        assert sample_shape == torch.Size()
        return self.loc + self.scale * self.eps

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "FixedNoise":
        assert batch_shape == self.batch_shape  # a plate expands what it holds, if only to the size it has
        return self


def network(*sizes: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two, in float64."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


class Reference(nn.Module):
    """Networks of whole images that compute the same as ours: the tutorial's, and the paper's.

    The paper's generation network is one that sees z, x and ŷ side by side.
    """

    def __init__(self, cvae: OneLevel):
        super().__init__()
        assert type(cvae) in (Tutorial, Paper)
        split, hidden = cvae.split, [layer.weight.shape[1] for layer in list(cvae.encoders.layers)[:-1]]
        pixels = split.num_pixels
        self.observed = split.observed.flatten()
        self.latent_dim = cvae.latent_dim
        self.sees_x = isinstance(cvae, Paper)
        self.baseline_net = network(pixels, *hidden, pixels)
        self.prior_net = network(pixels, *hidden, 2 * cvae.latent_dim)
        self.recognition_net = network(pixels, *hidden, 2 * cvae.latent_dim)
        self.generation_net = network(cvae.latent_dim + (pixels if self.sees_x else 0), *hidden, pixels)
        self.places = list(places(cvae, split))
        theirs, ours = dict(self.named_parameters()), dict(cvae.named_parameters())
        with torch.no_grad():  # those that ours leaves out stay as they are: random
            for place in self.places:
                theirs[place.theirs][place.index] = 0
            for place in self.places:  # two biases of ours that are added are one of theirs
                theirs[place.theirs][place.index] += ours[place.ours][place.copy]
            self.baseline_net[0].bias += self.baseline_net[0].weight[:, ~self.observed].sum(1)  # times −(−1)

    def baseline_logits(self, images: Tensor) -> Tensor:
        return self.baseline_net(torch.where(self.observed, images, -1.0))

    def completed(self, images: Tensor) -> Tensor:
        """The images with the baseline's guess ŷ in the place of the hidden pixels."""
        return torch.where(self.observed, images, torch.sigmoid(self.baseline_logits(images)).detach())

    def prior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of p(z|x), `[B, Z]`."""
        loc, log_scale = self.prior_net(self.completed(images)).split(self.latent_dim, dim=-1)
        return loc, torch.exp(log_scale)

    def recognition(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of q(z|x,y), `[B, Z]`."""
        loc, log_scale = self.recognition_net(images).split(self.latent_dim, dim=-1)
        return loc, torch.exp(log_scale)

    def generation(self, z: Tensor, images: Tensor) -> Tensor:
        """The logits of all pixels, `[..., B, num_pixels]`, for z `[..., B, Z]`."""
        if not self.sees_x:
            return self.generation_net(z)
        seen = self.completed(images).expand(*z.shape[:-1], -1)
        return self.generation_net(torch.cat([z, seen], dim=-1)) + self.baseline_logits(images).detach()

    def observe(self, logits: Tensor, images: Tensor) -> None:
        """The hidden pixels as Pyro's observations; grey levels are not in a Bernoulli's support, so no validation."""
        pixels = dist.Bernoulli(logits=logits, validate_args=False).mask(~self.observed).to_event(1)
        pyro.sample("y", pixels, obs=images)

    def model(self, images: Tensor, eps: Tensor) -> None:
        with pyro.plate("images", len(images)):
            z = pyro.sample("z", dist.Normal(*self.prior(images)).to_event(1))
            self.observe(self.generation(z, images), images)

    def guide(self, images: Tensor, eps: Tensor) -> None:
        with pyro.plate("images", len(images)):
            pyro.sample("z", FixedNoise(*self.recognition(images), eps).to_event(1))

    def baseline_model(self, images: Tensor) -> None:
        with pyro.plate("images", len(images)):
            self.observe(self.baseline_logits(images), images)

    def baseline_guide(self, images: Tensor) -> None:
        pass


class Place(NamedTuple):
    """Where one copy of a parameter of ours is in a parameter of the reference's: at these rows, and columns."""

    ours: str
    copy: int
    theirs: str
    index: tuple[Tensor, ...]


def places(cvae: OneLevel, split: Split) -> Iterator[Place]:
    """Those of all parameters of ours."""
    every = split.order
    observed, hidden = every.split([split.num_observed, split.num_hidden])
    z = torch.arange(cvae.latent_dim)
    yield from places_of("baseline_net", cvae.baseline_net, 0, "baseline_net", observed, hidden)
    yield from places_of("encoders", cvae.encoders, 0, "prior_net", every)
    yield from places_of("encoders", cvae.encoders, 1, "recognition_net", every)
    if isinstance(cvae, Paper):
        yield from places_of("generation_of_z", cvae.generation_of_z, 0, "generation_net", z)
        yield from places_of("generation_of_x", cvae.generation_of_x, 0, "generation_net", cvae.latent_dim + every)
        yield from places_of("generation_net", cvae.generation_net, 0, "generation_net", None, hidden, first=1)
    else:
        yield from places_of("generation_net", cvae.generation_net, 0, "generation_net", None, hidden)


def places_of(
    ours: str, mlp: MLP, copy: int, theirs: str, inputs: Tensor | None, outputs: Tensor | None = None, first: int = 0
) -> Iterator[Place]:
    """Those of one of the networks: inputs and outputs are the places of its own in the reference's, all where None.

    first: the number of the reference's layer that its first one is.
    """
    last = len(mlp.layers) - 1
    for i, layer in enumerate(mlp.layers):
        _, fan_out, fan_in = layer.weight.shape
        rows = outputs if i == last and outputs is not None else torch.arange(fan_out)
        columns = inputs if i == 0 and inputs is not None else torch.arange(fan_in)
        name = f"{theirs}.{2 * (first + i)}"
        yield Place(f"{ours}.layers.{i}.weight", copy, f"{name}.weight", (rows[:, None], columns))
        yield Place(f"{ours}.layers.{i}.bias", copy, f"{name}.bias", (rows,))


def assert_gradients_agree(cvae: OneLevel, reference: Reference, tolerance: float) -> None:
    """Every gradient of ours within `tolerance` of the reference's, relative to the largest entry of the tensor.

    Where the reference has none, ours has none either, or zeros.
    """
    ours, theirs = dict(cvae.named_parameters()), dict(reference.named_parameters())
    assert {(place.ours, place.copy) for place in reference.places} == {
        (name, copy) for name, parameter in ours.items() for copy in range(len(parameter))
    }
    assert {place.theirs for place in reference.places} == theirs.keys()
    assert any(parameter.grad is not None for parameter in theirs.values())
    for place in reference.places:
        found, expected = ours[place.ours].grad, theirs[place.theirs].grad
        if expected is None:
            assert found is None or found[place.copy].eq(0).all(), place.ours
        else:
            assert found is not None, place.ours
            largest = expected.abs().max().item()
            assert largest > 0, place.theirs
            torch.testing.assert_close(
                found[place.copy], expected[place.index], rtol=0, atol=tolerance * largest, msg=str(place[:3])
            )
