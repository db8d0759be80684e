"""What the tests of training share: a small training of any network and objective, as `train.py` makes it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cvae import context
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask, ImageSet, Task
from cvae.model.cvae import CVAE, noise
from cvae.model.networks import NETWORKS, Tutorial
from cvae.model.objectives import OBJECTIVES, log_likelihood, objective
from cvae.processes import Processes
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.phase import Phase
from train import Step

CPU = torch.device("cpu")
SIDE, COUNT, BATCH = 6, 20, 6  # three steps an epoch, and two images left over
SMALL = {
    "hidden": (12, 10), "latent_dim": 4, "particles": 2, "batch_size": BATCH, "learning_rate": 1e-2, "epochs": 9,
    "baseline_epochs": 9, "warmup_epochs": 0.5, "free_epochs": 4.0, "levels": 2, "channels": 3, "alpha": 0.3,
}  # fmt: skip


class Regularised(Tutorial):
    """Modules that training has to mind: batch normalisation, with buffers, and dropout, with its random numbers."""

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, s)
        pixels, size = task.x_dim + task.y_dim, 2 * s.latent_dim
        for name in ("prior_net", "recognition_net"):
            layers = nn.Linear(pixels, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, size)
            setattr(self, name, nn.Sequential(*layers))


ALL_NETWORKS: dict[str, Callable[[Task, Settings], CVAE]] = {**NETWORKS, "regularised": Regularised}
CASES = [("tutorial", "baseline"), *((network, name) for network in ALL_NETWORKS for name in OBJECTIVES)]
"""Each network with each objective; "baseline" trains the network's baseline."""
cases = pytest.mark.parametrize(("network", "objective"), CASES, ids=map(" ".join, CASES))


class Training(NamedTuple):
    """A model with all that its epochs need."""

    model: CVAE
    phase: Phase
    run: Run
    step: Step


def pictures(count: int = COUNT, side: int = SIDE, seed: int = 0) -> Tensor:
    """Random pictures with black, white and grey pixels, uint8 `[count, side, side]`."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, side, side, generator=random).mul(1.6).sub(0.3).clamp(0, 1).mul(255).to(torch.uint8)


def make_run(
    settings: Settings, precision: str = "fp32", device: torch.device = CPU, processes: Processes | None = None,
    folder: Path = Path("nowhere"),
) -> Run:  # fmt: skip
    """A run that has not made its folder: all that steps and epochs need of it."""
    place = context.Context(device, precision, processes or Processes())
    return Run(folder, settings, place, context.Interruption())


def make_training(
    network: str | Callable[[Task, Settings], CVAE] = "tutorial", name: str = "elbo", precision: str = "fp32",
    device: torch.device = CPU, processes: Processes | None = None, count: int = COUNT, side: int = SIDE,
    **settings: Any,
) -> Training:  # fmt: skip
    """A training before its first step, of the default type; `settings`: other than `SMALL`."""
    is_baseline = name == "baseline"
    s = Settings(objective="elbo" if is_baseline else name, **{**SMALL, **settings})
    task = FixedMask(quadrants(1, side, side))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.derive_seed(s.seed, "weights"))
        model = (ALL_NETWORKS[network] if isinstance(network, str) else network)(task, s).to(device)
    images = ImageSet(pictures(count, side), task, device)
    if is_baseline:
        model.baseline_net.requires_grad_(True)
    else:
        images.set_guesses(model.baseline_net, context.HALF.get(precision))
    phase = Phase(
        *(("baseline", model.baseline_net, log_likelihood) if is_baseline else ("cvae", model, objective(s))),
        s.epochs, images, images, samples=0 if is_baseline else s.particles,
        noise=lambda count, random: () if is_baseline else (noise(s.particles, count, model, random),),
        picture=lambda model: torch.zeros(3, 4, 4, dtype=torch.uint8),
    )  # fmt: skip
    run = make_run(s, precision, device, processes)
    return Training(model, phase, run, Step(phase, s, run.context))


def state(training: Training) -> dict[str, Tensor]:
    """All that steps change, as copies: weights, buffers, their average, the optimizer's state, the sums."""
    optimizer = training.step.optimizer.state_dict()
    parts = {
        "model": training.model.state_dict(), "average": training.step.average.model.state_dict(),
        "optimizer": {f"{name}.{i}": t for name, ts in optimizer.items() for i, t in enumerate(ts)},
        "totals": {"sums": training.step.totals.sums},
    }  # fmt: skip
    return {f"{part}.{name}": tensor.cpu().clone() for part, states in parts.items() for name, tensor in states.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], but: str = "no name") -> None:
    """That all tensors are the same, bit for bit, but those in whose names a pattern is found."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not re.search(but, name) and not torch.equal(ours[name], theirs[name])] == []
