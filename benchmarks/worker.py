"""Trainings and evaluations in a process of their own: started by other benchmarks, which ask it for steps.

    echo "cvae bf16 100" | python benchmarks/worker.py          # the seconds of 100 steps

Each line of the input is a phase (baseline, cvae, evaluation), a precision and a number of steps; of `evaluation`, of
images. A training is made when it is first asked for. What the process says of itself first is how its threads wait.
Sides: `ours`, the loop of `train.py` and the estimates of `eval.py`; `plain` (`plain.py`); `tutorial` (`tutorial.py`).
"""

if __name__ == "__main__":
    import sys

    from start import before_torch

    if not {"plain", "tutorial"} & set(sys.argv):
        before_torch()

import argparse
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from common import count, serve, waiting
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import train
from cvae.context import Context, Interruption, prepare
from cvae.data.masks import quadrants
from cvae.data.sources import load_train
from cvae.data.tasks import FixedMask, ImageSet
from cvae.model import cvae, objectives
from cvae.model.cvae import noise
from cvae.model.likelihood import evaluate
from cvae.model.networks import build
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.phase import Phase

DEVICE = torch.device("cpu")
EPOCH, EPOCHS = 100, 1000
"""A training begins in its hundredth epoch of a thousand: in most of a training its average is taken in every 20
steps, and its learning rate is high."""
SAMPLES = 100  # of z per image, in an evaluation


class Training:
    """The training of `train.py` in one phase, with its own loop, and without what is between two epochs.

    Args:
        phase: "baseline", or "cvae" on top of an untrained baseline, whose guesses are computed here.
        s: The settings.
        precision: The precision of the products.
        images: uint8 `[N, height, width]`.
    """

    def __init__(self, phase: str, s: Settings, precision: str, images: Tensor):
        task = FixedMask(quadrants(s.quadrants, *images.shape[1:]))
        image_set, model = ImageSet(images, task), build(task, s)
        self.context = Context(DEVICE, precision)
        parts: dict[str, Any] = {"epochs": EPOCHS, "train": image_set, "validation": image_set, "picture": None}
        if phase == "baseline":
            net = model.baseline_net.requires_grad_(True)
            self.phase = Phase(phase, net, objectives.log_likelihood, samples=0, noise=lambda *_: (), **parts)
        else:
            image_set.set_guesses(model.baseline_net, self.context.half)
            draw = partial(one_noise, s.particles, model)
            self.phase = Phase(phase, model, objectives.objective(s), samples=s.particles, noise=draw, **parts)
        self.session = Run(Path(), s, self.context, Interruption())  # writes nothing
        self.step, self.epoch = train.Step(self.phase, s, self.context), EPOCH
        self.steps_of_epoch = self.step.count

    def run(self, steps: int) -> float:
        """Return the seconds that so many steps take."""
        started = time.perf_counter()
        while steps > 0:
            self.epoch += 1
            self.step.count = min(steps, self.steps_of_epoch)
            train.train_epoch(self.phase, self.session, self.step, self.step, self.epoch)
            steps -= self.step.count
        return time.perf_counter() - started


def one_noise(particles: int, model: cvae.CVAE, number: int, random: torch.Generator) -> tuple[Tensor]:
    """Return the noise of a batch, as `train.py` draws it."""
    return (noise(particles, number, model, random),)


class Evaluation:
    """The estimates of `eval.py`, at SAMPLES samples of z, by an untrained model."""

    def __init__(self, s: Settings, precision: str, images: Tensor):
        self.images = ImageSet(images, FixedMask(quadrants(s.quadrants)))
        self.model, self.context = build(self.images.task, s).requires_grad_(False).eval(), Context(DEVICE, precision)

    def run(self, number: int) -> float:
        """Return the seconds that so many images take."""
        images = ImageSet(self.images.images[:number], self.images.task)
        started = time.perf_counter()
        list(evaluate(self.model, images, [SAMPLES], 0, self.context))
        return time.perf_counter() - started


def plain_bernoulli(y: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return what `bernoulli_log_prob` does, by the library."""
    log_prob = -binary_cross_entropy_with_logits(logits.float(), y.expand_as(logits), reduction="none")
    return (log_prob if weight is None else log_prob * weight).sum(-1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", choices=("ours", "plain", "tutorial"), default="ours")
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--network", default=Settings.network, help="(default: %(default)s)")
    parser.add_argument("--objective", default=Settings.objective, help="(default: %(default)s)")
    parser.add_argument("--plain-bernoulli", action="store_true", help="differentiate the likelihood by autograd")
    options = parser.parse_args()
    s = Settings(network=options.network, objective=options.objective, batch_size=options.batch_size)
    images = load_train(s).train
    if options.plain_bernoulli:
        cvae.bernoulli_log_prob = objectives.bernoulli_log_prob = plain_bernoulli
    make: Callable[[str, str], Any]
    if options.side == "plain":
        from plain import PlainTraining

        make = lambda phase, precision: PlainTraining(phase, s, precision, images)  # noqa: E731
    elif options.side == "tutorial":
        from tutorial import TutorialWay

        make = lambda phase, precision: TutorialWay(phase, images, s, SAMPLES)  # noqa: E731
    else:
        prepare(DEVICE)
        make = lambda phase, precision: (  # noqa: E731
            Evaluation(s, precision, images) if phase == "evaluation" else Training(phase, s, precision, images)
        )
    side = lru_cache(make)
    serve(lambda phase, precision, steps: side(phase, precision).run(steps), waiting())


if __name__ == "__main__":
    main()
