"""The estimates of a run on the test images; and runs that differ in their seeds alone, put together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.console import Bar
from cvae.context import Context
from cvae.data.images import ImageSet
from cvae.model.likelihood import Likelihoods, active_units, evaluate
from cvae.model.objectives import trains_recognition
from cvae.report.selection import Subject
from cvae.settings import Settings

Values = dict[tuple[str, int], Tensor]
"""Quantities of each image, float64 `[N]`, by name and number of samples S; by the level of z for `kl`, 0 for others.

`gap` is nn_nll minus cvae_is_nll at the largest S. What takes z from a recognition network that was not trained is left
out."""


class Evaluation(NamedTuple):
    """The estimates of a run, or the means over several that differ in their seeds alone."""

    name: str  # of the run in the table
    settings: Settings
    samples: tuple[int, ...]  # the numbers of samples S, ascending
    values: Values
    units: list[tuple[int, int]]  # of each level of z, from top to bottom: active dimensions, all dimensions
    precision: str
    images: str  # SHA-256 of the test images
    epochs: int | None = None  # that an unfinished run has had
    against: "Evaluation | None" = None  # what it is compared with: of the same images, with the same mask
    seeds: "tuple[Evaluation, ...]" = ()  # the runs that were put together; all but `values` is the first one's


def evaluate_run(name: str, run: Subject, samples: tuple[int, ...], seed: int, context: Context) -> Evaluation:
    """Evaluate a run, under this name; each process computes the estimates of its share of the images."""
    images, processes = ImageSet(run.test.images, run.model.task, context.device), context.processes
    portions = []
    with Bar(name, len(images) // processes.count, "img", processes.is_main) as bar:
        for portion in processes.in_step(evaluate(run.model, images, samples, seed, context)):
            portions.append(portion)
            bar.update(len(portion.nn_nll))
    found = Likelihoods(*(processes.gather(torch.cat(parts, dim=-1)) for parts in zip(*portions, strict=True)))
    values, units = by_name(found, samples, run.settings), active_units(run.model, images, seed, context)
    sha256 = run.test.record["test"]["sha256"]
    return Evaluation(name, run.settings, samples, values, units, context.precision, sha256, run.epochs)


def by_name(found: Likelihoods, samples: Sequence[int], settings: Settings) -> Values:
    """Return what the likelihoods say about a run of these settings."""
    values: Values = {("nn_nll", 0): found.nn_nll, ("floor", 0): found.floor}
    values |= {("cvae_mc_nll", s): nll for s, nll in zip(samples, found.cvae_mc_nll, strict=True)}
    if trains_recognition(settings):
        values |= {("cvae_neg_elbo", 0): found.cvae_neg_elbo, ("gap", 0): found.nn_nll - found.cvae_is_nll[-1]}
        values |= {("cvae_is_nll", s): nll for s, nll in zip(samples, found.cvae_is_nll, strict=True)}
        values |= {("ess", s): ess for s, ess in zip(samples, found.ess, strict=True)}
        values |= {("kl", level): kl for level, kl in enumerate(found.kl, start=1)}
    return values


def by_setting(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """Put runs on the same images that differ in their seeds alone together, in the order of the first ones.

    Folders and devices do not count. Runs of one seed, as copies are, stay apart.
    """
    groups: dict[tuple[object, ...], list[Evaluation]] = {}
    copies: Counter[tuple[object, ...]] = Counter()
    for run in runs:
        alike = (replace(run.settings, seed=0, data_root=None, device="auto"), run.images, run.epochs)
        groups.setdefault((*alike, copies[*alike, run.settings.seed]), []).append(run)
        copies[*alike, run.settings.seed] += 1
    means = {run.name: mean for group in groups.values() for mean in [_mean(group)] for run in group}
    together = [(means[group[0].name], group[0].against) for group in groups.values()]
    references = [None if other is None or means[other.name] is run else means[other.name] for run, other in together]
    return [run._replace(against=other) for (run, _), other in zip(together, references, strict=True)]


def _mean(runs: Sequence[Evaluation]) -> Evaluation:
    names = [run.name for run in runs]
    name = ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
    values = {row: torch.stack([run.values[row] for run in runs]).mean(0) for row in runs[0].values}
    return runs[0]._replace(name=name, values=values, seeds=tuple(runs))
