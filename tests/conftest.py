"""What the tests share: a small CVAE with noise and images to put through it; a place for whole trainings."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from support.trainings import Forked, make_contrary_data, make_data

from cvae.data.masks import Quadrants
from cvae.model.networks import CVAE, Baseline


class Toy(NamedTuple):
    """A CVAE of random weights, images `[B, height, width]` in [0, 1] with their x and y, and noise `[L, B, Z]`."""

    quadrants: Quadrants
    cvae: CVAE
    images: Tensor
    x: Tensor
    y: Tensor
    eps: Tensor

    def model(self, which: str) -> Baseline | CVAE:
        """The "cvae" to train, or its "baseline", no longer frozen."""
        return self.cvae if which == "cvae" else self.cvae.baseline_net.requires_grad_(True)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """Makes toys of any size; in float64, so that a comparison shows mistakes and not rounding."""

    def make(
        num_quadrants: int = 1,
        height: int = 6,
        width: int = 6,
        hidden: Sequence[int] = (11, 9),
        latent_dim: int = 4,
        count: int = 5,
        particles: int = 1,
        seed: int = 0,
        gain: float = 2.0,
        dtype: torch.dtype = torch.float64,
    ) -> Toy:
        torch.manual_seed(seed)
        quadrants = Quadrants(num_quadrants, height, width)
        baseline = Baseline(quadrants.num_observed, quadrants.num_pixels, hidden)
        cvae = CVAE(baseline, quadrants.num_observed, quadrants.num_pixels, hidden, latent_dim).to(dtype)
        for layer in cvae.modules():
            if isinstance(layer, nn.Linear):  # the same spread in all layers, and biases that are not zero
                layer.reset_parameters()
                for parameter in layer.parameters():
                    parameter.data.mul_(gain)
        # Black, white and grey pixels; whole grey levels, so that uint8 holds them too.
        images = torch.rand(count, height, width).mul(1.6).sub(0.3).clamp(0, 1).mul(255).round().to(dtype) / 255
        eps = torch.randn(particles, count, latent_dim, dtype=dtype)
        return Toy(quadrants, cvae, images, *quadrants.split(images), eps)

    return make


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for whole trainings, one per test file, with images in `data` and `contrary`."""
    folder = tmp_path_factory.mktemp("work")
    make_data(folder / "data")
    make_contrary_data(folder / "contrary")
    (folder / "runs").mkdir()
    return folder


@pytest.fixture(scope="module")
def forked(work: Path) -> Iterator[Forked]:
    """Trainings on one process, in `work`."""
    trainings = Forked(work)
    yield trainings
    trainings.close()
