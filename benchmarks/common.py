"""What the benchmarks share: other processes that do steps when asked, turns, what they ran on, printing."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from start import GIVEN, ROOT

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
READY = "ready "
PRECISIONS = ("auto", "fp32", "bf16")


def arguments(manual: str | None, rounds: int, steps: int = 0) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's manual, with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("--format", choices=("text", "json"), default="text", help=default)
    parser.add_argument("--rounds", type=count, default=rounds, metavar="N", help=default)
    if steps:
        parser.add_argument("--steps", type=count, default=steps, metavar="N", help=f"of a round {default}")
        parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=f"of our products {default}")
        parser.add_argument("--batch-size", type=count, default=128, metavar="N", help=default)
        parser.add_argument("--against", type=checkout, metavar="DIR", help="another checkout, to compare with")
    return parser


def count(word: str) -> int:
    """Return a positive whole number."""
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"has to be positive, not {value}")
    return value


def checkout(word: str) -> Path:
    """Return the folder of a checkout that has a `benchmarks/worker.py`."""
    if not (Path(word) / "benchmarks" / "worker.py").is_file():
        raise argparse.ArgumentTypeError(f"{word} has no benchmarks/worker.py")
    return Path(word).resolve()


def serve(steps: Callable[[str, str, int], float], about: str) -> None:
    """Take lines "phase precision number" from standard input, and print the seconds that so many steps take.

    Args:
        steps: Does the steps, and returns their seconds.
        about: Printed first, in one line, for `Worker`. What else is printed goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        print(READY + about, file=answers)
        for line in sys.stdin:
            phase, precision, number = line.split()
            print(steps(phase, precision, int(number)), file=answers)


class Worker:
    """A program in a process of its own that does steps of a training when asked to (`serve`), and else rests.

    Its environment is the user's, with more variables. If it does not come to be ready, this program ends with its
    exit code; it has said why. `about` is what it says of itself.
    """

    def __init__(self, command: Sequence[object], environment: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**GIVEN, **(environment or {})},
        )  # fmt: skip
        self.about = self._read().removeprefix(READY).strip()

    def __call__(self, phase: str, precision: str, steps: int) -> float:
        """Return the seconds that so many steps of a phase take in a precision."""
        assert self._process.stdin is not None
        print(phase, precision, steps, file=self._process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait() or 1)
        return line


def worker(
    batch_size: int, *flags: object, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> Worker:  # fmt: skip
    """Start the `worker.py` of this or another checkout."""
    return Worker(
        [sys.executable, folder / "benchmarks" / "worker.py", "--batch-size", batch_size, *flags], environment
    )


def turns(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return the seconds of each side in each round. Whoever goes first goes last in the next round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in in_turn(number, list(sides)):
            seconds[name].append(sides[name]())
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    print(" " * 30, end="\r", file=sys.stderr, flush=True)
    return seconds


def in_turn(number: int, sides: Sequence[Any]) -> Sequence[Any]:
    """Return the order of the sides in the round of this number: forwards and backwards."""
    return sides if number % 2 == 0 else sides[::-1]


def speeds(seconds: Mapping[str, Sequence[float]], work: float, reference: str) -> dict[str, dict[str, float]]:
    """Return each side's speed, its spread, and how many times as fast as that side the reference is.

    Args:
        seconds: Of each side, by rounds.
        work: What is done in a round.
        reference: The side that is compared with all others.

    Returns:
        By side: the median `speed`, `min` and `max`, the `ratio` of medians, and the median ratio `by_rounds`.
    """
    rates = {name: [work / s for s in values] for name, values in seconds.items()}
    own = rates[reference]
    return {
        name: {
            "speed": median(values),
            "min": min(values),
            "max": max(values),
            "ratio": median(own) / median(values),
            "by_rounds": median(a / b for a, b in zip(own, values, strict=True)),
        }
        for name, values in rates.items()
    }


def machine() -> dict[str, Any]:
    """Return the hardware, versions and settings that the numbers depend on."""
    import torch

    from cvae.run.session import processor

    versions = {"python": platform.python_version()}
    for name in ("torch", "pyro-ppl", "numpyro", "jax"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "waiting": waiting(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "load_before": round(os.getloadavg()[0], 2),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def waiting() -> str:
    """Return how this process's threads wait for work, by the variables that say so."""
    return " ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ) or "as OpenMP chooses"


def run(command: Sequence[object], **environment: str) -> str:
    """Return what a command prints in the user's environment with more variables; end this program if it fails."""
    words = list(map(str, command))
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**GIVEN, **environment})
    if result.returncode:
        sys.exit(f"{' '.join(words[:3])} … exited with {result.returncode}: {result.stderr.strip()[-2000:]}")
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
    on = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    print("", *notes, sep="\n")
    print(
        f"On {on['processor']}, {on['cores']} cores, {on['threads']} threads, {on['vector_instructions']}; threads "
        f"wait: {on['waiting']}; {versions}; load before: {on['load_before']}"
    )
