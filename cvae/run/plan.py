"""The command line of a training: which runs it is to make or to go on with, with which settings."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cvae.data.masks import MASKS
from cvae.data.sources import named
from cvae.errors import DataError, UsageError
from cvae.run.folder import CHOICES, RunFolder, find_run
from cvae.settings import PRESETS, Settings, add_flags, flag, with_preset

MOVABLE = ("epochs", "data", "data_root", "device")  # what may change when a run is resumed


def parse(argv: Sequence[str] | None, manual: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command line, and the settings given on it, by name; manual: what --help prints."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, {**CHOICES, "observed": MASKS, "preset": PRESETS})
    add = parser.add_argument
    add("--runs", type=user_path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--name", help="the folder's name (default: q1, q2, q3 or the mask's name); with several runs, -q1, … is added")
    add("--resume", type=user_path, metavar="RUN", help="name or folder of a run to go on with")
    add("--init", type=user_path, metavar="RUN", help="name or folder of a run with whose weights the new one begins")
    add("--overwrite", action="store_true", help="replace the run's folder if it exists")
    add("--quiet", action="store_true", help="print nothing but errors")
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


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings, str]]:
    """Return folder, settings and precision of the runs to make or to go on with. Raises UsageError or DataError."""
    quadrants = dict.fromkeys(given.pop("quadrants", ()))  # each number once
    if options.resume is not None:
        run = RunFolder(find_run(options.resume, options.runs))
        settings = run.settings
        if run.is_passed_on:
            raise DataError(f"{run.path}: has published weights, for eval.py and --init; it cannot be resumed")
        for name, value in [*given.items(), *(("quadrants", count) for count in quadrants)]:
            if name not in MOVABLE and value != (begun := getattr(settings, name)):
                words = f"{run.path} was begun with {flag(name)} {begun}"
                raise UsageError(f"{words}, which cannot change now; leave the flag out")
        moved = {name: given[name] for name in MOVABLE if name in given}
        return [(run.path, replace(settings, **moved), run.precision)]
    name, mask = options.name, given.get("observed")
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not the plain name of a folder; --runs says where it is to be")
    runs = []
    for k in quadrants or [Settings.quadrants]:
        default = f"q{k}" if mask is None else Path(mask).stem.lstrip(".") or "mask"
        chosen = default if name is None else f"{name}-q{k}" if len(quadrants) > 1 else name
        runs.append((options.runs / chosen, s := Settings(quadrants=k, **given), s.precision))
    return runs
