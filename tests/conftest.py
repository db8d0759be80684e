"""Fixtures that several test files use: a small CVAE with images and noise, and a folder for whole trainings."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from reference.networks import TEST_NETWORKS
from support.trainings import Forked, make_contrary_data, make_data
from torch import Tensor, nn

from cvae.data.masks import quadrants
from cvae.data.tasks import Batch, FixedMask, Task
from cvae.model.cvae import CVAE
from cvae.model.networks import NETWORKS
from cvae.settings import Settings

# No test depends on how fast the machine is.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # fmt: skip
hypothesis.settings.load_profile("any speed")

# Where the tests were started in the background, SIGINT is ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Toy(NamedTuple):
    """A CVAE of random weights, images `[B, height, width]` in [0, 1], and noise `[L, B, latent_dim]`."""

    task: FixedMask
    cvae: CVAE
    images: Tensor
    eps: Tensor

    @property
    def batch(self) -> Batch:
        """The images as the objectives take them; their guess is not known."""
        return self.task.batch(self.task.rows(self.images))

    @property
    def x(self) -> Tensor:
        return self.batch.x

    @property
    def y(self) -> Tensor:
        return self.batch.y

    def model(self, which: str) -> nn.Module:
        """Return what is trained: the "cvae", or its "baseline", no longer frozen."""
        return self.cvae if which == "cvae" else self.cvae.baseline_net.requires_grad_(True)


def spread(model: nn.Module, gain: float) -> None:
    """Draw all weights and biases anew, uniformly, `gain` times as far spread as nn.Linear's."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1:
            bound = gain * weight[0].numel() ** -0.5
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """Make toys of any size; in float64, so that a comparison shows mistakes and not rounding."""

    def make(
        num_quadrants: int = 1, height: int = 6, width: int = 6, hidden: Sequence[int] = (11, 9), latent_dim: int = 4,
        count: int = 5, particles: int = 1, seed: int = 0, gain: float = 2.0, dtype: torch.dtype = torch.float64,
        network: str | Callable[[Task, Settings], CVAE] = "tutorial", **settings: object,
    ) -> Toy:  # fmt: skip
        """network: a name of this program's or of the tests' networks, or a builder."""
        torch.manual_seed(seed)
        task = FixedMask(quadrants(num_quadrants, height, width))
        builder = {**NETWORKS, **TEST_NETWORKS}[network] if isinstance(network, str) else network
        given = {"hidden": tuple(hidden), "latent_dim": latent_dim, "channels": 4, **settings}
        cvae = builder(task, Settings(**given)).to(dtype)
        spread(cvae, gain)
        # Black, white and grey pixels; whole grey levels, so that uint8 holds them too.
        images = torch.rand(count, height, width).mul(1.6).sub(0.3).clamp(0, 1).mul(255).round().to(dtype) / 255
        return Toy(task, cvae, images, torch.randn(particles, count, latent_dim, dtype=dtype))

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
