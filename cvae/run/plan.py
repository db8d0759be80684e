"""The command line of a training: which runs it is to make or to go on with, with which settings."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cvae.data.masks import MASKS
from cvae.data.sources import named
from cvae.errors import UsageError
from cvae.run.folder import CHOICES, find_run, read_settings
from cvae.run.state import advice
from cvae.settings import PRESETS, Settings, add_flags, flag, with_preset

MOVABLE = ("epochs", "data", "data_root", "device")
"""What may change when a run is resumed: how long it goes on, and where."""


def parse(argv: Sequence[str] | None, manual: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the settings given on it, by name; `quadrants` is a list still. manual: for --help.

    `words` of the first is the command line as it was given.
    """
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, {**CHOICES, "observed": MASKS, "preset": PRESETS})
    parser.add_argument(
        "--runs", type=user_path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)"
    )
    parser.add_argument(
        "--name",
        help="name of the run's folder (default: q1, q2, q3 or the mask's name); with several runs, -q1, … is added",
    )
    parser.add_argument("--resume", type=user_path, metavar="RUN", help="name or folder of a run to go on with")
    parser.add_argument(
        "--init", type=user_path, metavar="RUN", help="name or folder of a run with whose weights the new one begins"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run's folder if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv, argparse.Namespace(words=argv))
    if options.resume is not None and (options.name is not None or options.overwrite or options.init is not None):
        parser.error("--resume goes on with a run as it is: leave --name, --overwrite and --init out")

    given = {each.name: getattr(options, each.name) for each in fields(Settings) if hasattr(options, each.name)}
    if "hidden" in given:
        given["hidden"] = tuple(given["hidden"])
    if "data" in given:
        given["data"] = named(given["data"])
    if "data_root" in given:
        given["data_root"] = absolute(given["data_root"])
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
    """A path as people write it, ~ expanded: a shell leaves it in --flag=~/path."""
    return Path(os.path.expanduser(word))


def absolute(path: str) -> str:
    """A path from the root, ~ expanded."""
    return os.path.realpath(user_path(path))


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings]]:
    """The runs to make or to go on with: their folders and settings. Raises UsageError or DataError."""
    quadrants = given.pop("quadrants", None)
    if options.resume is not None:
        folder = find_run(options.resume, options.runs)
        with advice(folder):
            settings = read_settings(folder)
        if quadrants is not None and settings.observed is not None:
            raise UsageError(f"{folder} was begun with --observed {settings.observed}; leave --quadrants out")
        wanted = (
            given if quadrants is None else given | {"quadrants": quadrants[0] if len(quadrants) == 1 else quadrants}
        )
        for name, value in wanted.items():
            if name not in MOVABLE and value != getattr(settings, name):
                own = getattr(settings, name)
                begun = f"without {flag(name)}" if own is None else f"with {flag(name)} {own}"
                raise UsageError(f"{folder} was begun {begun}, which cannot change now; leave the flag out")
        return [(folder, replace(settings, **{name: given[name] for name in MOVABLE if name in given}))]

    quadrants = quadrants or [Settings.quadrants]
    if len(set(quadrants)) < len(quadrants):
        raise UsageError("--quadrants names a number twice")
    name = options.name
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not the plain name of a folder; --runs says where it is to be")
    suffixes = [f"-q{k}" if len(quadrants) > 1 else "" for k in quadrants]
    mask = given.get("observed")
    own = [f"q{k}" if mask is None else Path(mask).stem.lstrip(".") or "mask" for k in quadrants]
    names = [default if name is None else name + suffix for default, suffix in zip(own, suffixes, strict=True)]
    found = [(options.runs / name, Settings(quadrants=k, **given)) for name, k in zip(names, quadrants, strict=True)]
    for folder, _ in found:
        if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):  # bytes that are no text here
            raise UsageError(f"{str(folder)!a}: is no text in this system's encoding; choose another --name or --runs")
        if options.init is not None and os.path.realpath(folder) == os.path.realpath(
            find_run(options.init, options.runs)
        ):
            raise UsageError(f"--init {options.init} is the folder of the new run too; choose another --name")
    return found
