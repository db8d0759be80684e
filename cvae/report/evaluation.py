"""The evaluation of a run on the test images, and runs that differ in their seeds alone as one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cvae.console import Bar
from cvae.context import Context, Processes
from cvae.data.images import ImageSet
from cvae.model.likelihood import Likelihoods, active_units, evaluate
from cvae.model.objectives import trains_recognition
from cvae.report.selection import Subject
from cvae.settings import Settings

T = TypeVar("T")
Values = dict[tuple[str, int], Tensor]
"""Quantities of each image, float64 `[N]`, by name and number of samples S (0 for what does not depend on it).

`kl` is counted by levels of z. What takes z from the recognition network is left out if the objective trains none.
"""


class Evaluation(NamedTuple):
    """The estimates of a run on the test images, or of several runs that differ in their seeds alone.

    Attributes:
        name: The run's name in the table.
        samples: The numbers of samples S, ascending.
        units: For each level of z, from top to bottom: how many dimensions are active, and how many there are.
        precision: The precision of the matrix products.
        images: The SHA-256 of the test images.
        epochs: The number of epochs that an unfinished run has had; None for a finished one.
        against: What it is compared with, on the same test images with the same mask.
        seeds: The runs that it stands for, by `by_setting`; `values` are their means, all else is the first one's.
    """

    name: str
    settings: Settings
    samples: tuple[int, ...]
    values: Values
    units: list[tuple[int, int]]
    precision: str
    images: str
    epochs: int | None = None
    against: "Evaluation | None" = None
    seeds: "tuple[Evaluation, ...]" = ()


def evaluate_run(name: str, subject: Subject, samples: tuple[int, ...], seed: int, context: Context) -> Evaluation:
    """Evaluate a run; each process computes the estimates of its share of the images, and all get all."""
    model, settings, test, processes = subject.model, subject.settings, subject.test, context.processes
    images, portions = ImageSet(test.images, model.task, context.device), []
    with Bar(name, len(images) // processes.count, "img", processes.is_main) as bar:
        for portion in in_step(evaluate(model, images, samples, seed, context), processes):
            portions.append(portion)
            bar.update(len(portion.nn_nll))
    likelihoods = Likelihoods(*(processes.gather(torch.cat(parts, dim=-1)) for parts in zip(*portions, strict=True)))
    values, units = by_name(likelihoods, samples, settings), active_units(model, images, seed, context)
    sha256 = test.record["test"]["sha256"]
    return Evaluation(name, settings, samples, values, units, context.precision, sha256, subject.epochs)


def in_step(portions: Iterator[T], processes: Processes) -> Iterator[T]:
    """Yield the portions of this process, each once all processes have computed one of theirs or have no more.

    What processes wait for each other, at most `context.TIMEOUT`, is then the time for one portion, not for all.
    """
    portion = next(portions, None)
    while processes.maximum(portion is not None):
        if portion is not None:
            yield portion
        portion = next(portions, None)


def by_name(likelihoods: Likelihoods, samples: Sequence[int], settings: Settings) -> Values:
    """Return the quantities that say something about a run of these settings."""
    values: Values = {("nn_nll", 0): likelihoods.nn_nll, ("floor", 0): likelihoods.floor}
    values |= {("cvae_mc_nll", s): nll for s, nll in zip(samples, likelihoods.cvae_mc_nll, strict=True)}
    if not trains_recognition(settings):
        return values
    values["cvae_neg_elbo", 0] = likelihoods.cvae_neg_elbo
    values["gap", 0] = likelihoods.nn_nll - likelihoods.cvae_is_nll[-1]
    values |= {("kl", level): kl for level, kl in enumerate(likelihoods.kl, start=1)}
    for s, nll, ess in zip(samples, likelihoods.cvae_is_nll, likelihoods.ess, strict=True):
        values |= {("cvae_is_nll", s): nll, ("ess", s): ess}
    return values


def by_setting(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """Put runs on the same images that differ in their seeds alone together, in the order of the first of each.

    Folders and devices do not count. Runs of one seed, as copies are, stay apart.
    """
    groups: dict[tuple[object, ...], list[Evaluation]] = {}
    copies: Counter[tuple[object, ...]] = Counter()
    for run in runs:
        alike = (replace(run.settings, seed=0, data_root=None, device="auto"), run.images, run.epochs)
        groups.setdefault((*alike, copies[*alike, run.settings.seed]), []).append(run)
        copies[*alike, run.settings.seed] += 1
    together = [_together(group) for group in groups.values()]
    place = {run.name: i for i, group in enumerate(groups.values()) for run in group}
    references = [run.against and together[place[run.against.name]] for run in together]
    return [
        run._replace(against=None if reference is run else reference)
        for run, reference in zip(together, references, strict=True)
    ]


def _together(runs: Sequence[Evaluation]) -> Evaluation:
    names = [run.name for run in runs]
    name = ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
    values = {row: torch.stack([run.values[row] for run in runs]).mean(0) for row in runs[0].values}
    return runs[0]._replace(name=name, values=values, seeds=tuple(runs))
