"""Active units: the variance over images of the posterior means, against closed forms."""

from typing import Any

import pytest
import torch
from reference.networks import TEST_NETWORKS
from torch import Tensor

from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.model import activity
from cvae.model.activity import IMAGES_AT_ONCE, active_units, variance_of_means
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian

SPLIT = Split(quadrants(1, 4, 4))
COUNT = IMAGES_AT_ONCE + 7


class Linear(CVAE):
    """Two levels of known posterior means: of z_1 weights · m, m the mean of y; of z_2 weights · m + slope · z_1.

    All scales are `scale`, and the second mean, given the image, is (weights + slope · weights) · m.
    """

    def __init__(self, weights: Tensor, slope: Tensor, scale: float):
        super().__init__(SPLIT, torch.nn.Linear(SPLIT.num_observed, SPLIT.num_hidden), 2 * len(weights))
        self.weights, self.slope, self.scale = weights, slope, scale

    def from_posterior(self, x: Tensor, y: Tensor, guess: Any, eps: Tensor, detach_z: bool = False) -> Draw:
        first, second = eps.chunk(2, dim=-1)
        loc = y.mean(-1, keepdim=True) * self.weights
        q_1 = Gaussian(loc, torch.full_like(loc, self.scale).log())
        z_1 = q_1.sample(first)
        below = loc + self.slope * z_1
        q_2 = Gaussian(below, torch.full_like(below, self.scale).log())
        z_2 = q_2.sample(second)
        logits = z_2.new_zeros(*z_2.shape[:2], SPLIT.num_hidden)
        return Draw(logits, (Latent(z_1, first, q_1, q_1), Latent(z_2, second, q_2, q_2)))


@pytest.fixture
def images() -> ImageSet:
    return ImageSet(torch.randint(0, 256, (COUNT, 4, 4), dtype=torch.uint8), SPLIT)


def test_of_two_levels_against_the_closed_form(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights just below and above the threshold; what varies with z_1 alone is not active, however much it does."""
    monkeypatch.setattr(activity, "SAMPLES", 400)
    means = images.batch(slice(None)).y.mean(1)
    edge = (activity.LEAST_VARIANCE / means.var()).sqrt().item()  # the least weight of an active unit
    weights = edge * torch.tensor([0.0, 0.98, 1.02, -1.5, 3.0, 0.0])
    slope = torch.tensor([9.0, 0.3, -0.3, -1.0, 0.0, 0.0])
    model = Linear(weights, slope, scale=0.1)
    assert active_units(model, images, seed=0) == [(3, 6), (2, 6)]
    expected = (weights * (1 + slope)).square() * means.var()
    assert (expected > activity.LEAST_VARIANCE).tolist() == [False, True, False, False, True, False]


def test_variance_of_means_is_not_biased_by_few_draws() -> None:
    """Two draws or many: on the average, the variance over the images of E[loc | image] alone."""
    random = torch.Generator().manual_seed(0)
    image_means = torch.tensor([0.0, 0.1, 1.0]) * torch.randn(50, 1, generator=random)
    exact = image_means.double().var(0)
    for draws, trials in ((2, 4000), (20, 1600)):
        found = torch.stack(
            [variance_of_means(image_means + torch.randn(draws, 50, 3, generator=random)) for _ in range(trials)]
        )
        error = found.std(0) / trials**0.5
        assert ((found.mean(0) - exact).abs() < 4 * error).all()
        assert (4 * error < 0.25 / draws).all(), "what would be left of the draws' own variance is far beyond that"


def test_of_one_level_it_is_the_plain_variance() -> None:
    loc = torch.randn(30, 4)
    torch.testing.assert_close(variance_of_means(loc), loc.double().var(0))
    constant = variance_of_means(loc.expand(5, 30, 4))
    torch.testing.assert_close(constant, loc.double().var(0))
    assert variance_of_means(loc[:1]).eq(0).all()


@pytest.mark.parametrize("network", ["tutorial", "paper", "deep", "two levels", "convolutional"])
def test_any_network(make_toy: Any, network: str) -> None:
    """The units of all levels are those of z; the numbers depend on the seed and the first images alone."""
    toy = make_toy(latent_dim=4, count=COUNT, dtype=torch.float32, network=TEST_NETWORKS.get(network, network))
    image_set = ImageSet(toy.images.mul(255).round().to(torch.uint8), toy.split)
    found = active_units(toy.cvae.eval(), image_set, 0)
    assert sum(count for _, count in found) == 4
    assert all(0 <= active <= count for active, count in found)
    assert active_units(toy.cvae, image_set, 0) == found
