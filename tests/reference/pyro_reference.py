"""An independent CVAE to compare with: whole images, masked as the tutorial masks them, and a Pyro model and guide.

Images `[B, height · width]` in raster order go into whole networks; a pixel that is not observed holds −1 where the
baseline looks, and takes no part in the likelihood.
"""

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from cvae.model.networks import OneLevel, Paper, Tutorial
from reference.networks import layers

Index = tuple[Tensor, ...]


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


class Reference(nn.Module):
    """Networks of whole images that compute the same as ours: the tutorial's, or the paper's, in float64.

    The paper's generation network is one that sees z, x and ŷ side by side.
    """

    def __init__(self, cvae: OneLevel):
        super().__init__()
        assert type(cvae) in (Tutorial, Paper)
        self.observed = cvae.task.observed.flatten()
        self.latent_dim, self.sees_x = cvae.latent_dim, isinstance(cvae, Paper)
        hidden, pixels = [layer.out_features for layer in cvae.prior_net.layers[:-1]], len(self.observed)
        self.baseline_net = layers(pixels, *hidden, pixels).double()
        self.prior_net, self.recognition_net = (layers(pixels, *hidden, 2 * cvae.latent_dim).double() for _ in range(2))
        self.generation_net = layers(cvae.latent_dim + pixels * self.sees_x, *hidden, pixels).double()
        self.places = list(places(cvae))
        theirs, ours = dict(self.named_parameters()), dict(cvae.named_parameters())
        with torch.no_grad():  # what ours leaves out stays as it is: random
            for _, name, index in self.places:
                theirs[name][index] = 0
            for own, name, index in self.places:  # two biases of ours that are added are one of theirs
                theirs[name][index] += ours[own]
            self.baseline_net[0].bias += self.baseline_net[0].weight[:, ~self.observed].sum(1)  # times −(−1)

    def baseline_logits(self, images: Tensor) -> Tensor:
        return self.baseline_net(torch.where(self.observed, images, -1.0))

    def completed(self, images: Tensor) -> Tensor:
        """Return the images with the baseline's guess ŷ in the place of the hidden pixels."""
        return torch.where(self.observed, images, torch.sigmoid(self.baseline_logits(images)).detach())

    def prior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc and scale of p(z|x), `[B, Z]`."""
        loc, log_scale = self.prior_net(self.completed(images)).chunk(2, dim=-1)
        return loc, log_scale.exp()

    def recognition(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc and scale of q(z|x,y), `[B, Z]`."""
        loc, log_scale = self.recognition_net(images).chunk(2, dim=-1)
        return loc, log_scale.exp()

    def generation(self, z: Tensor, images: Tensor) -> Tensor:
        """Return the logits of all pixels, `[..., B, height · width]`, for z `[..., B, Z]`."""
        if not self.sees_x:
            return self.generation_net(z)
        seen = self.completed(images).expand(*z.shape[:-1], -1)
        return self.generation_net(torch.cat([z, seen], dim=-1)) + self.baseline_logits(images).detach()

    def observe(self, logits: Tensor, images: Tensor) -> None:
        """Tell Pyro the hidden pixels; grey levels are not in a Bernoulli's support, so they are not validated."""
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


def places(cvae: OneLevel) -> Iterator[tuple[str, str, Index]]:
    """Yield the name of each parameter of ours, and where it is: the reference's parameter, and the index in it."""
    order = cvae.task.order
    given, hidden = order[: cvae.task.x_dim], order[cvae.task.x_dim :]

    def net(
        name: str, theirs: str, inputs: Tensor | None, outputs: Tensor | None = None, first: int = 0
    ) -> Iterator[tuple[str, str, Index]]:
        linears = getattr(cvae, name).layers
        for i, layer in enumerate(linears):
            is_last = i == len(linears) - 1 and outputs is not None
            rows = outputs if is_last else torch.arange(layer.out_features)
            columns = inputs if i == 0 and inputs is not None else torch.arange(layer.in_features)
            yield f"{name}.layers.{i}.weight", f"{theirs}.{2 * (first + i)}.weight", (rows[:, None], columns)
            yield f"{name}.layers.{i}.bias", f"{theirs}.{2 * (first + i)}.bias", (rows,)

    yield from net("baseline_net", "baseline_net", given, hidden)
    yield from net("prior_net", "prior_net", order)
    yield from net("recognition_net", "recognition_net", order)
    if isinstance(cvae, Paper):
        yield from net("generation_of_z", "generation_net", torch.arange(cvae.latent_dim))
        yield from net("generation_of_x", "generation_net", cvae.latent_dim + order)
        yield from net("generation_net", "generation_net", None, hidden, first=1)
    else:
        yield from net("generation_net", "generation_net", None, hidden)


def assert_gradients_agree(cvae: OneLevel, reference: Reference, tolerance: float) -> None:
    """Assert that no gradient is off by more than `tolerance`, relative to the largest entry of the reference's."""
    ours, theirs = dict(cvae.named_parameters()), dict(reference.named_parameters())
    assert {name for name, _, _ in reference.places} == ours.keys()
    assert {name for _, name, _ in reference.places} == theirs.keys()
    assert any(parameter.grad is not None for parameter in theirs.values())
    for own, name, index in reference.places:
        found, expected = ours[own].grad, theirs[name].grad
        assert (found is None) == (expected is None), own
        if expected is not None:
            largest = expected.abs().max().item()
            assert largest > 0, name
            torch.testing.assert_close(found, expected[index], rtol=0, atol=tolerance * largest, msg=own)
