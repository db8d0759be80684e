"""Which runs are evaluated, what is read of them before, and what they are called."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvae.console import called
from cvae.data.sources import TestImages, difference
from cvae.errors import DataError, UsageError
from cvae.model.cvae import CVAE
from cvae.run.folder import (
    BEST,
    CONFIG,
    LAST,
    METRICS,
    SUMMARY,
    find_run,
    quoted,
    read_metrics,
    read_record,
    read_settings,
)
from cvae.run.load import load
from cvae.settings import Settings

OF_THE_IMAGES = ("data", "data_root", "size", "transpose", "targets")  # settings that say which the test images are


class Subject(NamedTuple):
    """A run to be evaluated, with all that can be missing or wrong read: before the first number is computed.

    settings: with the place of the images as it is now. epochs: how many an unfinished run has had.
    """

    folder: Path
    settings: Settings
    model: CVAE
    test: TestImages
    epochs: int | None


def find_runs(words: Sequence[Path], runs: Path) -> tuple[list[Path], list[str]]:
    """The folders of the runs that are named, each once, and a line about each name that there is no run of.

    words: each a run or a folder of runs, as a path or as a name below the folder `runs`; none: all runs below it.
    """
    found: dict[str, Path] = {}
    problems = []
    for folder in [find_run(word, runs) for word in words] or [runs]:
        try:
            own = [folder] if _is_run(folder) else _runs_below(folder)
        except OSError as error:
            problems.append(f"{folder}: cannot be read ({error.strerror or error})")
            continue
        if not own:
            missing = "has no run in it" if os.path.isdir(folder) else "there is no such folder"
            problems.append(f"{folder}: {missing}; {called('train.py')} trains a run")
        for run in own:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values()), problems


def with_reference(folders: list[Path], run: Path, runs: Path) -> list[Path]:
    """The folders, that of the run which they are compared with among them, and first if it was not.

    run: its path, or its name below the folder `runs`. Raises UsageError if there is no such run.
    """
    folder = find_run(run, runs)
    if not _is_run(folder):
        raise UsageError(f"--against {run}: there is no such run")
    is_there = os.path.realpath(folder) in map(os.path.realpath, folders)
    return folders if is_there else [folder, *folders]


def _is_run(folder: Path) -> bool:
    """Whether there is anything of a run in a folder."""
    return any(os.path.isfile(folder / name) for name in (CONFIG, BEST, LAST, SUMMARY))


def _runs_below(folder: Path) -> list[Path]:
    """The runs right below a folder, by name; hidden ones are half made or removed."""
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [folder / name for name in names if _is_run(folder / name)]


def _epochs_so_far(folder: Path) -> int:
    """How many epochs the CVAE of a run has had. Raises DataError if there is no saying."""
    epochs = [record.get("epoch") for record in read_metrics(folder / METRICS) if record.get("phase") == "cvae"]
    if not epochs or type(epochs[-1]) is not int:
        raise DataError(f"{folder / METRICS}: has no epoch of the CVAE, whose weights are there")
    return epochs[-1]


def open_run(
    folder: Path,
    unfinished: bool,
    moved: Mapping[str, Any],
    device: torch.device,
    load_images: Callable[[Settings], TestImages],
) -> Subject:
    """All that is read of a run. Raises DataError where it cannot be evaluated.

    unfinished: whether a run that is not finished can be. moved: settings that say where its images are now.
    load_images: called with settings that are the same for runs on the same images.
    """
    settings = replace(read_settings(folder), **moved)
    is_finished = os.path.isfile(folder / SUMMARY)
    if not (is_finished or unfinished):
        way = f"{called('train.py')} --resume {quoted(folder)} goes on with it, and --unfinished evaluates it as it is"
        raise DataError(f"{folder}: is not finished; {way}")
    model = load(folder, device)
    epochs = None if is_finished else _epochs_so_far(folder)
    test = load_images(Settings(**{name: getattr(settings, name) for name in OF_THE_IMAGES}))
    if (other := difference(read_record(folder), test.record)) is not None:
        raise DataError(f"{folder}: was begun on {other}; --data says where its own are")
    return Subject(folder, settings, model, test, epochs)


def compared(subjects: dict[str, Subject], run: Path | None, runs: Path, problems: list[str]) -> dict[str, str]:
    """The name of the run that each of the others is compared with, by name; a line is added about each that cannot be.

    run: the one that others are compared with, if any, as `with_reference` has found it. Raises DataError if it is not
    among the subjects: it was left out.
    """
    if run is None:
        return {}
    folder = find_run(run, runs).resolve()
    reference = next((name for name, subject in subjects.items() if subject.folder.resolve() == folder), None)
    if reference is None:
        raise DataError("\n".join([*problems, f"--against {run}: cannot be evaluated"]))
    found = {}
    for name, subject in subjects.items():
        if name == reference:
            continue
        if reason := _difference(subject, subjects[reference]):
            problems.append(f"{subject.folder}: cannot be compared with {subjects[reference].folder}: {reason}")
        else:
            found[name] = reference
    return found


def _difference(subject: Subject, other: Subject) -> str | None:
    """Why the estimates of two runs cannot be compared image by image; None where they can."""
    if not torch.equal(subject.test.images, other.test.images):
        return "the test images are others"
    return None if torch.equal(subject.model.split.observed, other.model.split.observed) else "the mask is another"


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder, and where several have it, as many folders above it as tell them apart.

    They differ with hyphens for the slashes too, as parts of file names.
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        counts = Counter(name.replace("/", "-") for name in names)
        alike = [i for i, name in enumerate(names) if counts[name.replace("/", "-")] > 1 and lengths[i] < len(parts[i])]
        if not alike:
            return names
        for i in alike:
            lengths[i] += 1
