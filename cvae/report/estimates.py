"""What a run's likelihoods of the test images are found with, and how."""

from typing import NamedTuple

import torch

from cvae.console import Bar
from cvae.context import Context, Processes, resolve_precision
from cvae.data.images import ImageSet
from cvae.model.likelihood import Likelihoods, active_units, evaluate
from cvae.report.results import Result
from cvae.report.selection import Subject


class Sampling(NamedTuple):
    """The numbers of samples S, ascending, the random seed of the noise, and the precision of the products."""

    samples: tuple[int, ...]
    seed: int
    precision: str


def evaluation_precision(name: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` is bf16 on a CPU that computes it natively, and fp32 elsewhere.

    Measured on validation images, bf16 moves the mean of an estimate by about 0.001 nats: docs/recipe.md.
    """
    if name != "auto":
        return name
    return resolve_precision("auto", device) if device.type == "cpu" else "fp32"


def result_of(name: str, subject: Subject, how: Sampling, processes: Processes) -> Result:
    """All that is found of a run, called by this name; each process computes its share of the likelihoods."""
    model, device = subject.model, next(subject.model.parameters()).device
    images = ImageSet(subject.test.images, model.split, device)
    portions, context = [], Context(device, how.precision, processes)
    with Bar(name, len(images) // processes.count, "img", processes.is_main) as bar:
        for portion in evaluate(model, images, how.samples, how.seed, context):
            portions.append(portion)
            bar.update(len(portion.nn_nll))
    return Result(
        name,
        subject.settings,
        how.samples,
        Likelihoods(*(processes.gather(torch.cat(parts, dim=-1)) for parts in zip(*portions, strict=True))),
        active_units(model, images, how.seed, context),
        how.precision,
        subject.test.record["test"]["sha256"],
        subject.epochs,
    )
