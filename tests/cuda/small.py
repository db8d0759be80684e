"""Small trainings that the tests of CUDA take steps of, with the package's networks and a convolutional one."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cvae import context
from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.sources import TrainImages, record
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian, widen
from cvae.model.likelihood import noise
from cvae.model.networks import NETWORKS, build
from cvae.model.objectives import OBJECTIVES, log_likelihood, objective
from cvae.run import checkpoint
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.optimizer import GuardedAdam
from cvae.training.phase import Phase
from train import Step

PRECISIONS = ["fp32", "bf16", "fp16"]
BATCH, COUNT, SIDE = 8, 40, 8
SPLITS = {side: Split(quadrants(1, side, side)) for side in (SIDE, 28)}


def source(train: Tensor, validation: Tensor) -> TrainImages:
    """These images as a source gives them."""
    return TrainImages(train, validation, "", record(train=train, validation=validation))


class Convolutional(CVAE):
    """Made of plain modules, with batch normalisation and dropout: what autocast and plain autograd have to do with."""

    def __init__(self, split: Split, s: Settings):
        super().__init__(split, nn.Linear(split.num_observed, split.num_hidden), s.latent_dim)
        self.register_buffer("raster", torch.tensor(split.raster.tolist()), persistent=False)  # not moved in each step
        self.encode = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(4 * split.num_pixels, 4 * s.latent_dim),
        )  # fmt: skip
        self.generate = nn.Linear(s.latent_dim, split.num_hidden)

    def gaussians(self, x: Tensor, y: Tensor) -> tuple[Gaussian, Gaussian]:
        pixels = torch.cat([x, y.to(x.dtype)], -1).index_select(-1, self.raster)
        parameters = widen(self.encode(pixels.view(-1, 1, self.split.height, self.split.width)))
        loc, log_scale, other_loc, other_log_scale = parameters.chunk(4, -1)
        return Gaussian(loc, log_scale), Gaussian(other_loc, other_log_scale)

    def from_posterior(
        self, x: Tensor, y: Tensor, guess: Tensor | None, eps: Tensor, detach_z: bool = False
    ) -> Draw:  # fmt: skip
        p = self.gaussians(x, self.known_guess(x, guess).sigmoid())[0]
        q = self.gaussians(x, y)[1]
        z = q.sample(eps)
        if detach_z:
            z = z.detach().requires_grad_()
        return Draw(self.generate(z), (Latent(z, eps, q, p),))

    def from_prior(self, x: Tensor, guess: Tensor | None, eps: Tensor) -> Draw:
        p = self.gaussians(x, self.known_guess(x, guess).sigmoid())[0]
        z = p.sample(eps)
        return Draw(self.generate(z), (Latent(z, eps, p, p),))


NAMES = [*NETWORKS, "convolutional"]
KINDS = [("tutorial", "log_likelihood"), *((network, name) for network in NAMES for name in OBJECTIVES)]
"""Networks and objectives; `log_likelihood` is the baseline's."""


class Training(NamedTuple):
    """A model on a device with all that its steps need."""

    model: CVAE
    step: Step
    phase: Phase
    optimizer: GuardedAdam

    @property
    def device(self) -> torch.device:
        return self.optimizer.device

    def inputs(self, number: int) -> tuple[Tensor, ...]:
        """Those of the step of this number, the same on every device."""
        random = torch.Generator("cpu").manual_seed(number)
        rows = torch.randperm(len(self.step.images), generator=random)[: self.step.batch_size]
        eps = self.phase.noise(len(rows), random)
        return tuple(tensor.to(self.step.run.device) for tensor in (rows, *eps))

    def take(self, steps: range, take_step: Callable[..., None] | None = None) -> None:
        for number in steps:
            self.phase.schedule(self.step.run.settings, number / 50, self.optimizer.learning_rate, self.step.free_nats)
            (take_step or self.step)(*self.inputs(number))

    def state(self) -> dict[str, Any]:
        """All that a step may change, on the CPU."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "totals": self.step.totals.means(),
            "skipped": self.optimizer.skipped(),
        }
        moved: dict[str, Any] = tree_map(lambda v: v.cpu().clone() if isinstance(v, Tensor) else v, state)
        return moved


def make_training(
    device: torch.device, network: str, objective_name: str, precision: str = "fp32", size: int = SIDE,
    count: int = COUNT, move: bool = True, **settings: Any,
) -> Training:  # fmt: skip
    """A training as `train.py` makes one, ready for its first step, on so many images of size × size pixels.

    objective_name: see `KINDS`. move: the model is made on the CPU and moved, as `train.py` does it; fake parameters
    have to be made where they are to be. settings: other than those of the smallest training.
    """
    is_baseline = objective_name == "log_likelihood"
    smallest = {
        "hidden": (16, 16),
        "latent_dim": 4,
        "particles": 3,
        "batch_size": BATCH,
        "learning_rate": 1e-2,
        "average": 0,
        "warmup_epochs": 0.1,
        "free_epochs": 0.3,
    }
    s = Settings(network=network, objective="elbo" if is_baseline else objective_name, **{**smallest, **settings})
    split = SPLITS[size]
    with nullcontext() if move else device:
        model = build(split, s)
    if move:
        model = model.to(device)
    for module in () if move else model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))  # what is computed from the split's tensors, which are real ones
    pixels = (torch.arange(count * size * size).view(count, size, size).mul(7919) % 256).to(torch.uint8)
    images = ImageSet(pixels, split, device)
    half = context.HALF.get(precision)
    if is_baseline:
        trained: nn.Module = model.baseline_net.requires_grad_(True)
    else:
        images.set_guesses(model.baseline_net, half)
        trained = model
    phase = Phase(
        "baseline" if is_baseline else "cvae", trained, log_likelihood if is_baseline else objective(s), 1,
        images, images,
        noise=lambda count, random: () if is_baseline else (noise(s.particles, count, model, random),),
        picture=lambda _: torch.empty(0),
    )  # fmt: skip
    run = Run(Path("no folder"), s, device, precision, Processes(), context.Interruption())
    step = Step(phase, run)
    step.weights.model.train()
    return Training(model, step, phase, step.optimizer)


# Whole runs

SMALL = [
    "--hidden", "16", "16", "--latent-dim", "4", "--batch-size", str(BATCH), "--precision", "fp32", "--quiet",
    "--schedule", "constant", "--patience", "100", "--baseline-epochs", "2", "--epochs", "4",
]  # fmt: skip
"""Ten steps an epoch."""


def left_behind(run: Path) -> Any:
    """What a run has come to, apart from times."""
    last, best = (checkpoint.load(run / name) for name in ("last.pt", "best.pt"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    records = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    return last["model"], last["average"], last["optimizer"], best["model"], records


def numbers(value: Any) -> list[Any]:
    """The tensors and numbers in it, to be compared."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor | int | float)]


def assert_equal(left: Any, right: Any) -> None:
    """That all tensors and numbers in them are the same, bit for bit."""
    assert len(numbers(left)) == len(numbers(right)) > 0
    for a, b in zip(numbers(left), numbers(right), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
