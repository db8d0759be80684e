"""The command line of a training: which runs it is to make or to go on with, with which settings."""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cvae.errors import UsageError
from cvae.run.folder import CHOICES, find_run, read_settings
from cvae.settings import Settings, add_flags, flag


def parse(argv: Sequence[str] | None, manual: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the settings given on it, by name; `quadrants` is a list still. manual: for --help."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, CHOICES)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)"
    )
    parser.add_argument(
        "--name",
        help="name of the run's folder (default: q1, q2, q3 or the mask's name); with several runs, -q1, … is added",
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="name or folder of a run to go on with")
    parser.add_argument("--overwrite", action="store_true", help="replace the run's folder if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(argv)
    if options.resume is not None and (options.name is not None or options.overwrite):
        parser.error("--resume goes on with a run as it is: leave --name and --overwrite out")

    given = {each.name: getattr(options, each.name) for each in fields(Settings) if hasattr(options, each.name)}
    if "hidden" in given:
        given["hidden"] = tuple(given["hidden"])
    if "data" in given:
        given["data"] = str(Path(given["data"]).resolve())
    try:
        for quadrants in given.get("quadrants", [1]):
            settings = Settings(**{**given, "quadrants": quadrants})
    except ValueError as error:
        parser.error(str(error))
    if settings.observed is not None and "quadrants" in given:
        parser.error("--observed and --quadrants both say what is observed: leave one out")
    if settings.compile and settings.objective == "iwae":
        parser.error("--compile cannot be used with --objective iwae, whose gradient takes two backward passes")
    return options, given


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings]]:
    """The runs to make or to go on with: their folders and settings. Raises UsageError or DataError."""
    quadrants = given.pop("quadrants", None)
    if options.resume is not None:
        folder = find_run(options.resume, options.runs)
        settings = read_settings(folder)
        wanted = (
            given if quadrants is None else given | {"quadrants": quadrants[0] if len(quadrants) == 1 else quadrants}
        )
        for name, value in wanted.items():
            if name != "epochs" and value != getattr(settings, name):
                own = getattr(settings, name)
                begun = f"without {flag(name)}" if own is None else f"with {flag(name)} {own}"
                raise UsageError(f"{folder} was begun {begun}, which cannot change now; leave the flag out")
        return [(folder, replace(settings, epochs=given.get("epochs", settings.epochs)))]

    quadrants = quadrants or [Settings.quadrants]
    if len(set(quadrants)) < len(quadrants):
        raise UsageError("--quadrants names a number twice")
    name = options.name
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not the plain name of a folder; --runs says where it is to be")
    suffixes = [f"-q{k}" if len(quadrants) > 1 else "" for k in quadrants]
    own = [given.get("observed") or f"q{k}" for k in quadrants]
    names = [default if name is None else name + suffix for default, suffix in zip(own, suffixes, strict=True)]
    return [(options.runs / name, Settings(quadrants=k, **given)) for name, k in zip(names, quadrants, strict=True)]
