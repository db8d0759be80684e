"""The runs that a command is about: their folders, what an evaluation needs of them, their names in a table."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvae.console import called
from cvae.data.sources import TestImages, difference
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.run.folder import BEST, CONFIG, LAST, SUMMARY, RunFolder, find_run, quoted
from cvae.run.load import load_trained
from cvae.settings import Settings

OF_THE_IMAGES = ("data", "data_root", "size", "transpose", "targets")  # settings that the test images depend on


class Subject(NamedTuple):
    """A run to be evaluated, with all of it read that can be missing or wrong.

    `settings` say where the images are now; `epochs` is the number that an unfinished run has had, else None.
    """

    folder: Path
    settings: Settings
    model: CVAE
    test: TestImages
    epochs: int | None


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
    names = [part[-1] for part in parts]
    for length in range(2, 1 + max(map(len, parts), default=0)):
        counts, pairs = Counter(names), zip(names, parts, strict=True)
        names = ["/".join(part[-length:]) if counts[name] > 1 else name for name, part in pairs]
    return names
