"""Runs on the test images: found, opened, evaluated; and those that differ in their seeds alone, put together."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cvae.console import Bar, called
from cvae.context import Context
from cvae.data.sources import TestImages
from cvae.data.tasks import ImageSet
from cvae.model.cvae import CVAE
from cvae.model.likelihood import Likelihoods, active_units, evaluate
from cvae.model.objectives import trains_recognition
from cvae.run.folder import CONFIG, find_run
from cvae.settings import Settings

OF_THE_IMAGES = ("data", "data_root", "size", "transpose", "targets")  # settings that the test images depend on


class Subject(NamedTuple):
    """A run to be evaluated, with all of it read that can be missing or wrong."""

    folder: Path
    settings: Settings  # with the place of the images as it is now
    model: CVAE
    test: TestImages
    epochs: int | None  # that an unfinished run has had
    against: str = ""  # the name of the run that it is compared with: of the same images, with the same mask


class Evaluation(NamedTuple):
    """The estimates of a run, or the means over several that differ in their seeds alone."""

    name: str  # of the run in the table
    run: Subject  # the first one
    samples: tuple[int, ...]  # the numbers of samples S, ascending
    values: dict[str, Tensor]  # the Likelihoods by name, and `gap`: nn_nll less the last cvae_is_nll; NaN if unknown
    units: list[tuple[int, int]]  # of each level of z, from top to bottom: active dimensions, all dimensions
    precision: str


def find_runs(words: Sequence[Path], runs: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of runs, each once and in the order of the words, and a line about each word that names none.

    words: Runs and folders of runs, as paths or as names below the folder `runs`; none: all runs there.
    """
    folders, problems = dict[Path, Path](), []
    for place in [find_run(word, runs) for word in words] or [runs]:
        is_run = os.path.isfile(place / CONFIG)
        below = [place] if is_run else sorted(file.parent for file in place.glob(f"[!.]*/{CONFIG}"))
        for folder in below:
            folders.setdefault(folder.resolve(), folder)
        if not below:
            problem = "has no run in it" if os.path.isdir(place) else "there is no such folder"
            problems.append(f"{place}: {problem}; {called('train.py')} trains a run")
    return list(folders.values()), problems


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as many folders above it as tell it from the others."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    ends = [[path[-n:] for n in range(1, 1 + len(path))] for path in paths]
    return ["/".join(next(end for end in each if sum(end in other for other in ends) == 1)) for each in ends]


def evaluate_run(name: str, run: Subject, samples: tuple[int, ...], seed: int, context: Context) -> Evaluation:
    """Evaluate a run, under this name; each process computes the estimates of its share of the images."""
    images, processes, portions = ImageSet(run.test.images, run.model.task, context.device), context.processes, []
    with Bar(name, len(images) // processes.count, "img", processes.is_main) as bar:
        for portion in processes.in_step(evaluate(run.model, images, samples, seed, context)):
            portions.append(portion)
            bar.update(len(portion.nn_nll))
    found = Likelihoods(*(processes.gather(torch.cat(parts, dim=-1)) for parts in zip(*portions, strict=True)))
    values = found._asdict() | {"gap": found.nn_nll - found.cvae_is_nll[-1]}
    if not trains_recognition(run.settings):  # from which all the others take z
        for key in values.keys() - {"nn_nll", "cvae_mc_nll", "floor"}:
            values[key] = torch.full_like(values[key], math.nan)
    return Evaluation(name, run, samples, values, active_units(run.model, images, seed, context), context.precision)


def by_setting(runs: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Group runs on the same images that differ in their seeds alone; folders and devices do not count."""
    groups = defaultdict[object, list[Evaluation]](list)
    for evaluation in runs:
        run = evaluation.run
        setting = replace(run.settings, seed=0, data_root=None, device="auto")
        groups[setting, run.test.record["test"]["sha256"], run.epochs].append(evaluation)
    return list(groups.values())


def mean_of(runs: Sequence[Evaluation]) -> Evaluation:
    """Return the mean of runs, image by image, under their names; all but the values is the first one's."""
    names = [run.name for run in runs]
    name = ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
    values = {key: torch.stack([run.values[key] for run in runs]).mean(0) for key in runs[0].values}
    return runs[0]._replace(name=name, values=values)
