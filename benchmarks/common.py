"""What the benchmarks share: where the code is, what they ran on, real trainings as subprocesses, printing."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code of this checkout, installed or not

from cvae.run.folder import processor  # noqa: E402


def arguments(manual: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's manual, with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    return parser


def count(word: str) -> int:
    """A positive whole number."""
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"has to be positive, not {value}")
    return value


def machine() -> dict[str, Any]:
    """Hardware and versions that the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import pyro
    except ImportError:
        pass
    else:
        versions["pyro"] = pyro.__version__
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "load_before": round(os.getloadavg()[0], 2),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


class OtherProcess:
    """A function in a process of its own, which has none of this process's settings of memory, denormals or generators.

    make: returns the function; it and its arguments are sent there. Calling this object calls the function there and
    waits for its result; meanwhile this process rests, and that one rests otherwise.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: object):
        context = get_context("spawn")
        self._connection, there = context.Pipe()
        context.Process(target=_serve, args=(there, make, arguments), daemon=True).start()
        there.close()  # or the end of the process would go unnoticed

    def __call__(self, *arguments: object) -> Any:
        self._connection.send(arguments)
        return self._connection.recv()


def _serve(connection: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[object, ...]) -> None:
    function = make(*arguments)
    while True:
        try:
            connection.send(function(*connection.recv()))
        except EOFError:
            return


def turns(rounds: int, *sides: Any) -> list[list[float]]:
    """Seconds that each side takes, in `rounds` turns: a list per side. Whoever goes first goes last in the next round.

    sides: functions that do their work once and return their seconds.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            seconds[i].append(sides[i]())
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    print(" " * 30, end="\r", file=sys.stderr, flush=True)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def train_command(runs: str | Path, *flags: str) -> list[str]:
    """The command of a real training into a folder of runs."""
    return [sys.executable, str(ROOT / "train.py"), "--runs", str(runs), *flags]


def run(command: Sequence[str], **environment: str) -> str:
    """What a command prints, run with these variables set; if it fails, this program ends with what it said."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"{' '.join(command[:3])} … exited with {result.returncode}: {result.stderr.strip()[-2000:]}")
    return result.stdout


def show(result: dict[str, Any], rows: Sequence[Sequence[str]], notes: Sequence[str], style: str) -> None:
    """Print the result: as JSON, or as a table (the first row is its heading), notes, and what it ran on."""
    if style == "json":
        print(json.dumps(result, indent=2))
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print()
    for note in notes:
        print(note)
    on = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    print(
        f"On {on['processor']}, {on['cores']} cores, {on['threads']} threads, {on['vector_instructions']}; {versions}; "
        f"load before: {on['load_before']}"
    )
