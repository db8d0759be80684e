"""The command line of a training: which runs it is to make or to go on with, with which settings, on which images."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from cvae.context import Context, Interruption
from cvae.data.masks import MASKS
from cvae.data.sources import TrainImages, load_train, named
from cvae.errors import DataError, Interrupted, UsageError
from cvae.run.folder import CHOICES, RunFolder, find_run
from cvae.settings import PRESETS, Settings, add_flags, flag, with_preset

MOVABLE = ("epochs", "data", "data_root", "device")
"""What may change when a run is resumed: how long it goes on, and where."""


def parse(argv: Sequence[str] | None, manual: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command line, its words among it, and the settings given on it, by name; `quadrants` is a list still.

    manual: What --help prints.
    """
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, {**CHOICES, "observed": MASKS, "preset": PRESETS})
    add = partial(parser.add_argument, metavar="RUN")
    add("--runs", type=user_path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)")
    name = "name of the run's folder (default: q1, q2, q3 or the mask's name); with several runs, -q1, … is added"
    add("--name", metavar="NAME", help=name)
    add("--resume", type=user_path, help="name or folder of a run to go on with")
    add("--init", type=user_path, help="name or folder of a run with whose weights the new one begins")
    parser.add_argument("--overwrite", action="store_true", help="replace the run's folder if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words, argparse.Namespace(words=words))
    if options.resume is not None and (options.name is not None or options.overwrite or options.init is not None):
        parser.error("--resume goes on with a run as it is: leave --name, --overwrite and --init out")
    changes: dict[str, Callable[[Any], Any]] = {"hidden": tuple, "data": named, "data_root": absolute}
    given = {each.name: getattr(options, each.name) for each in fields(Settings) if hasattr(options, each.name)}
    given |= {name: change(given[name]) for name, change in changes.items() if name in given}
    if (mask := given.get("observed")) is not None:
        if "quadrants" in given:
            parser.error("--observed and --quadrants both say what is observed: leave one out")
        if mask in ("1", "2", "3"):
            given["quadrants"] = [int(given.pop("observed"))]
        elif mask not in MASKS:
            given["observed"] = absolute(mask)
            if not os.path.isfile(given["observed"]):
                parser.error(f"--observed {mask}: is no file, and no mask has this name; there are {', '.join(MASKS)}")
    try:
        given = with_preset(given) if options.resume is None else given
        for quadrants in given.get("quadrants", [1]):
            Settings(**{**given, "quadrants": quadrants})
    except ValueError as error:
        parser.error(str(error))
    return options, given


def user_path(word: str) -> Path:
    """Return a path as people write it, ~ expanded: a shell leaves it in --flag=~/path."""
    return Path(os.path.expanduser(word))


def absolute(path: str) -> str:
    """Return a path from the root, ~ expanded."""
    return os.path.realpath(user_path(path))


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings]]:
    """Return the folders and the settings of the runs to make or to go on with. Raises UsageError or DataError."""
    quadrants = given.pop("quadrants", None)
    if options.resume is not None:
        return [_to_go_on_with(RunFolder(find_run(options.resume, options.runs)), given, quadrants)]
    quadrants = quadrants or [Settings.quadrants]
    if len(set(quadrants)) < len(quadrants):
        raise UsageError("--quadrants names a number twice")
    name, mask = options.name, given.get("observed")
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not the plain name of a folder; --runs says where it is to be")
    runs = []
    for k in quadrants:
        default = f"q{k}" if mask is None else Path(mask).stem.lstrip(".") or "mask"
        own = default if name is None else f"{name}-q{k}" if len(quadrants) > 1 else name
        runs.append((options.runs / own, Settings(quadrants=k, **given)))
    for folder, _ in runs:
        if options.init and os.path.realpath(folder) == os.path.realpath(find_run(options.init, options.runs)):
            raise UsageError(f"--init {options.init} is the folder of the new run too; choose another --name")
    return runs


def _to_go_on_with(run: RunFolder, given: dict[str, Any], quadrants: list[int] | None) -> tuple[Path, Settings]:
    """Return the folder and the settings of a run that goes on, if the flags that are given do not contradict it."""
    settings = run.settings
    if run.is_passed_on:
        raise DataError(f"{run.path}: has published weights, for eval.py and --init; it cannot be resumed")
    if quadrants is not None and settings.observed is not None:
        raise UsageError(f"{run.path} was begun with --observed {settings.observed}; leave --quadrants out")
    if quadrants is not None:
        given["quadrants"] = quadrants[0] if len(quadrants) == 1 else quadrants
    for name, value in given.items():
        if name not in MOVABLE and value != (own := getattr(settings, name)):
            begun = f"without {flag(name)}" if own is None else f"with {flag(name)} {own}"
            raise UsageError(f"{run.path} was begun {begun}, which cannot change now; leave the flag out")
    return run.path, replace(settings, **{name: given[name] for name in MOVABLE if name in given})


def shared_images(
    runs: Sequence[Settings], context: Context, interruption: Interruption, quiet: bool
) -> Callable[[], TrainImages]:
    """Return what loads the images that these runs share, in all processes; those of several runs are kept.

    It raises Interrupted if a signal comes before they are read, or, with several processes, after that.
    """
    processes = context.processes

    def check(is_read: bool = False) -> None:
        if (is_read or processes.count == 1) and (number := processes.maximum(interruption.signal_number)):
            raise Interrupted("interrupted before the training began: nothing was written", number)

    def load() -> TrainImages:
        images = processes.on_all(partial(load_train, runs[0], processes.is_main and not quiet, check))
        check(is_read=True)
        return images

    return cache(load) if len(runs) > 1 else load
