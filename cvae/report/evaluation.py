"""A run on the test images: found, opened, evaluated; and runs that differ in their seeds alone, put together."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.console import Bar, called
from cvae.context import Context
from cvae.data.sources import TestImages, difference
from cvae.data.tasks import ImageSet
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.likelihood import Likelihoods, active_units, evaluate
from cvae.model.objectives import trains_recognition
from cvae.run.folder import BEST, CONFIG, LAST, SUMMARY, RunFolder, find_run, quoted
from cvae.run.load import load_trained
from cvae.settings import Settings

Values = dict[tuple[str, int], Tensor]
"""Quantities of each image, float64 `[N]`, by name and number of samples S; `kl` by the level of z, others with 0.

`gap` is nn_nll minus cvae_is_nll at the largest S. What takes z from an untrained recognition network is left out."""

OF_THE_IMAGES = ("data", "data_root", "size", "transpose", "targets")  # settings that the test images depend on


class Subject(NamedTuple):
    """A run to be evaluated, with all of it read that can be missing or wrong."""

    folder: Path
    settings: Settings  # with the place of the images as it is now
    model: CVAE
    test: TestImages
    epochs: int | None  # that an unfinished run has had


def find_runs(words: Sequence[Path], runs: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of runs, each once and in the order of the words, and a line about each word that names none.

    words: Runs and folders of runs, as paths or as names below the folder `runs`; none: all runs there.
    """
    folders: dict[Path, Path] = {}
    problems = []
    for place in [find_run(word, runs) for word in words] or [runs]:
        below = [place] if _has_run(place) else [path for path in sorted(place.glob("[!.]*")) if _has_run(path)]
        for folder in below:
            folders.setdefault(folder.resolve(), folder)
        if not below:
            problem = "has no run in it" if os.path.isdir(place) else "there is no such folder"
            problems.append(f"{place}: {problem}; {called('train.py')} trains a run")
    return list(folders.values()), problems


def _has_run(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in (CONFIG, BEST, LAST, SUMMARY))


def open_run(
    folder: Path, unfinished: bool, moved: dict[str, Any], device: torch.device, load: Callable[[Settings], TestImages]
) -> Subject:
    """Read what the evaluation of a run, or of published weights, needs. Raises DataError if it cannot be evaluated.

    unfinished: Whether a run that is not finished is taken as it is. moved: Settings that say where the images are now.
    load: Reads the test images; called with settings that are equal for runs on the same ones.
    """
    run = RunFolder(folder)
    settings, is_finished = replace(run.settings, **moved), run.is_passed_on or run.summary is not None
    if not (is_finished or unfinished):
        way = f"{called('train.py')} --resume {quoted(folder)} goes on with it, --unfinished evaluates it as it is"
        raise DataError(f"{folder}: is not finished; {way}")
    model = load_trained(folder, device).model
    epochs = [line.get("epoch") for line in ([] if is_finished else run.metrics()) if line.get("phase") == "cvae"]
    test = load(Settings(**{name: getattr(settings, name) for name in OF_THE_IMAGES}))
    if (other := difference(run.record, test.record)) is not None:
        raise DataError(f"{folder}: was begun on {other}; --data says where its own are")
    return Subject(folder, settings, model, test, epochs[-1] if epochs else None)


def is_comparable(run: Subject, other: Subject) -> bool:
    """Return whether two runs have the same test images and the same mask."""
    one, two = (each.model.task.rows(each.test.images) for each in (run, other))
    return run.model.task.x_dim == other.model.task.x_dim and torch.equal(one, two)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as many folders above it as tell it from the others."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    lengths = [next(n for n in range(1, 1 + len(own)) if [p[-n:] for p in parts].count(own[-n:]) == 1) for own in parts]
    return ["/".join(own[-length:]) for own, length in zip(parts, lengths, strict=True)]


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
