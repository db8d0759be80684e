"""What the tests of training share: the parts of a step, put together for a toy as `train.fit` does it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from reference.networks import TEST_NETWORKS
from torch import Tensor, nn

from cvae import context
from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.model.likelihood import noise
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES, log_likelihood, objective
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.phase import Phase

CPU = torch.device("cpu")
ALL_NETWORKS = {**NETWORKS, **TEST_NETWORKS}


class Case(NamedTuple):
    """What is trained: a network and an objective of its CVAE, or of its baseline, "baseline"."""

    network: str
    objective: str

    @property
    def which(self) -> str:
        """What `Toy.model` takes."""
        return "baseline" if self.objective == "baseline" else "cvae"

    def make(self, make_toy: Callable[..., Any], **more: Any) -> Any:
        """A toy of this network."""
        return make_toy(network=ALL_NETWORKS[self.network], **more)

    def function(self) -> Callable[..., dict[str, Tensor]]:
        """The objective; its own settings are not the default ones."""
        return log_likelihood if self.which == "baseline" else objective(Settings(objective=self.objective, alpha=0.3))

    def noise(self, toy: Any) -> tuple[Tensor, ...]:
        """The toy's, if the objective takes any."""
        return () if self.which == "baseline" else (toy.eps,)


def cases(networks: Any = ALL_NETWORKS, objectives: Any = ("baseline", *OBJECTIVES)) -> pytest.MarkDecorator:
    """A test for each of the networks and each of the objectives."""
    found = [Case(network, objective) for network in networks for objective in objectives]
    return pytest.mark.parametrize("case", found, ids=" ".join)


def make_run(settings: Settings, precision: str = "fp32", rank: int = 0, count: int = 1) -> Run:
    """A run that has no folder: what a step and an epoch need of it."""
    processes = Processes()
    processes.rank, processes.count = rank, count
    return Run(Path("nowhere"), settings, CPU, precision, processes, context.Interruption(), quiet=True)


def make_phase(case: Case, toy: Any, particles: int = 2, cached: bool = True, precision: str = "fp32") -> Phase:
    """A phase whose images for training and validation are the toy's. cached: the baseline's guesses are computed."""
    model: nn.Module = toy.model(case.which)
    images = ImageSet(toy.images.mul(255).round().to(torch.uint8), toy.split)
    if cached and case.which == "cvae":
        toy.cvae.baseline_net.eval()
        images.set_guesses(toy.cvae.baseline_net, context.HALF.get(precision))

    def draw_noise(count: int, random: torch.Generator) -> tuple[Tensor, ...]:
        return (noise(particles, count, toy.cvae, random),) if case.which == "cvae" else ()

    return Phase(case.which, model, case.function(), 9, images, images, draw_noise, lambda model: torch.zeros(1))
