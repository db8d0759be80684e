"""An independent CVAE to compare with: the plain masked form, and a Pyro model and guide on top of it.

Whole images `[B, num_pixels]` in raster order go into whole networks; a pixel that is not observed holds −1 where the
baseline looks, and takes no part in the likelihood.
"""

from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from cvae.data.masks import Quadrants
from cvae.model.networks import CVAE


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
    """Networks of whole images, as the tutorial's, that compute the same as ours."""

    def __init__(self, cvae: CVAE, quadrants: Quadrants):
        super().__init__()
        first, last = cvae.prior_net.layers[0], cvae.prior_net.layers[-1]
        pixels, hidden = first.in_features, (first.out_features, last.in_features)
        self.observed = quadrants.observed.flatten()
        self.latent_dim = cvae.latent_dim
        self.baseline_net = network(pixels, *hidden, pixels)
        self.prior_net = network(pixels, *hidden, 2 * cvae.latent_dim)
        self.recognition_net = network(pixels, *hidden, 2 * cvae.latent_dim)
        self.generation_net = network(cvae.latent_dim, *hidden, pixels)
        ours = {name.replace(".layers.", "."): weights.detach() for name, weights in cvae.named_parameters()}
        positions = positions_of_pixels(quadrants)
        with torch.no_grad():
            for name, weights in self.named_parameters():  # those that ours leaves out stay as they are: random
                if name in positions:
                    weights.index_copy_(*positions[name], ours[name])
                else:
                    weights.copy_(ours[name])
            self.baseline_net[0].bias += self.baseline_net[0].weight[:, ~self.observed].sum(1)  # times −(−1)

    def baseline_logits(self, images: Tensor) -> Tensor:
        return self.baseline_net(torch.where(self.observed, images, -1.0))

    def prior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of p(z|x), `[B, Z]`."""
        y_hat = torch.sigmoid(self.baseline_logits(images)).detach()
        loc, log_scale = self.prior_net(torch.where(self.observed, images, y_hat)).split(self.latent_dim, dim=-1)
        return loc, torch.exp(log_scale)

    def recognition(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of q(z|x,y), `[B, Z]`."""
        loc, log_scale = self.recognition_net(images).split(self.latent_dim, dim=-1)
        return loc, torch.exp(log_scale)

    def observe(self, logits: Tensor, images: Tensor) -> None:
        """The hidden pixels as Pyro's observations; grey levels are not in a Bernoulli's support, so no validation."""
        pixels = dist.Bernoulli(logits=logits, validate_args=False).mask(~self.observed).to_event(1)
        pyro.sample("y", pixels, obs=images)

    def model(self, images: Tensor, eps: Tensor) -> None:
        with pyro.plate("images", len(images)):
            z = pyro.sample("z", dist.Normal(*self.prior(images)).to_event(1))
            self.observe(self.generation_net(z), images)

    def guide(self, images: Tensor, eps: Tensor) -> None:
        with pyro.plate("images", len(images)):
            pyro.sample("z", FixedNoise(*self.recognition(images), eps).to_event(1))

    def baseline_model(self, images: Tensor) -> None:
        with pyro.plate("images", len(images)):
            self.observe(self.baseline_logits(images), images)

    def baseline_guide(self, images: Tensor) -> None:
        pass


def positions_of_pixels(quadrants: Quadrants) -> dict[str, tuple[int, Tensor]]:
    """Where the parameters of ours that stand for pixels are in the reference's: the dimension, and the places in it.

    For networks with two hidden layers.
    """
    observed, hidden = quadrants.order.split([quadrants.num_observed, quadrants.num_hidden])
    positions = {f"{net}.0.weight": (1, quadrants.order) for net in ("prior_net", "recognition_net")}
    positions["baseline_net.0.weight"] = (1, observed)
    ends = [f"{net}.4.{kind}" for net in ("baseline_net", "generation_net") for kind in ("weight", "bias")]
    return positions | dict.fromkeys(ends, (0, hidden))


def assert_gradients_agree(cvae: CVAE, reference: Reference, quadrants: Quadrants, tolerance: float) -> None:
    """Every gradient of ours within `tolerance` of the reference's, relative to the largest entry of the tensor."""
    ours = {name.replace(".layers.", "."): weights.grad for name, weights in cvae.named_parameters()}
    theirs = {name: weights.grad for name, weights in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    assert any(gradient is not None for gradient in theirs.values())
    positions = positions_of_pixels(quadrants)
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            largest = gradient.abs().max().item()
            assert largest > 0, name
            same = gradient.index_select(*positions[name]) if name in positions else gradient
            torch.testing.assert_close(ours[name], same, rtol=0, atol=tolerance * largest, msg=name)
