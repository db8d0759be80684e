"""What the tests share: a small CVAE with noise and images to put through it; a place for whole trainings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from support.trainings import Forked, make_contrary_data, make_data
from torch import Tensor, nn

from cvae.data.images import Batch
from cvae.data.masks import Split, quadrants
from cvae.model import layers
from cvae.model.cvae import CVAE
from cvae.model.networks import NETWORKS
from cvae.settings import Settings

# No test depends on how fast the machine is.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # fmt: skip
hypothesis.settings.load_profile("any speed")


class Toy(NamedTuple):
    """A CVAE of random weights, images `[B, height, width]` in [0, 1] with their x and y, and noise `[L, B, Z]`."""

    split: Split
    cvae: CVAE
    images: Tensor
    x: Tensor
    y: Tensor
    eps: Tensor

    def model(self, which: str) -> nn.Module:
        """The "cvae" to train, or its "baseline", no longer frozen."""
        return self.cvae if which == "cvae" else self.cvae.baseline_net.requires_grad_(True)

    @property
    def batch(self) -> Batch:
        """The images as the objectives take them, their guess not known."""
        return Batch(self.x, self.y)


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
        network: str | Callable[[Split, Settings], CVAE] = "tutorial",
    ) -> Toy:
        """network: a name in NETWORKS, or a builder. gain: the spread of the weights, in units of nn.Linear's."""
        torch.manual_seed(seed)
        split = Split(quadrants(num_quadrants, height, width))
        builder = NETWORKS[network] if isinstance(network, str) else network
        cvae = builder(split, Settings(hidden=tuple(hidden), latent_dim=latent_dim)).to(dtype)
        for module in cvae.modules():  # the same spread in all layers, and biases that are not zero
            if isinstance(module, layers.Linear):
                bound = gain * module.weight.shape[2] ** -0.5
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
                for parameter in module.parameters():
                    parameter.data.mul_(gain)
        # Black, white and grey pixels; whole grey levels, so that uint8 holds them too.
        images = torch.rand(count, height, width).mul(1.6).sub(0.3).clamp(0, 1).mul(255).round().to(dtype) / 255
        eps = torch.randn(particles, count, cvae.latent_dim, dtype=dtype)
        return Toy(split, cvae, images, *split.split(images), eps)

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
def forked(work: Path) -> Forked:
    """Trainings in `work`, of one process that has imported all that they need."""
    return Forked(work)
