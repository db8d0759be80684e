"""What the benchmarks share: the steps of a training, other processes, what they ran on, printing."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from start import GIVEN, READY, ROOT
from torch import Tensor, nn

import train
from cvae import context
from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.sources import load_train
from cvae.model.cvae import CVAE
from cvae.model.likelihood import noise
from cvae.model.networks import build
from cvae.model.objectives import log_likelihood, objective
from cvae.run.machine import processor
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.optimizer import GuardedAdam
from cvae.training.phase import Phase

DEVICE = torch.device("cpu")
PRECISION = context.resolve_precision("auto", DEVICE)
PHASES = ("baseline", "cvae")
LATE, EPOCHS = 100, 1000
"""The epochs of a `Training` begin as if so many had been before: in most of a training its average is taken in every
20 steps, and its learning rate is high."""

mnist = lru_cache(load_train)


class Training:
    """The training of `train.py` in one phase, with its own loop, and without what is between two epochs.

    phase: "baseline", or "cvae" on top of an untrained baseline, whose guesses are computed here. images: uint8
    `[N, height, width]`; the training images of MNIST where not given. optimizer: its class.
    """

    def __init__(
        self, phase: str, s: Settings, precision: str = PRECISION, images: Tensor | None = None,
        optimizer: type[GuardedAdam] = GuardedAdam,
    ):  # fmt: skip
        images = mnist()[0] if images is None else images
        split = Split(quadrants(s.quadrants, *images.shape[1:]))
        image_set = ImageSet(images, split, DEVICE)
        half = context.HALF.get(precision)
        cvae = build(split, s).to(DEVICE)
        parts: dict[str, Any] = {
            "epochs": EPOCHS,
            "train": image_set,
            "validation": image_set,
            "picture": lambda model: images[:0],
        }
        if phase == "baseline":
            baseline = cvae.baseline_net.requires_grad_(True)
            self.phase = Phase(phase, baseline, log_likelihood, noise=lambda *_: (), **parts)
        else:
            image_set.set_guesses(cvae.baseline_net, half)
            self.phase = Phase(phase, cvae, objective(s), noise=partial(one_noise, s.particles, cvae), **parts)
        self.model: nn.Module = self.phase.model
        run = Run(Path(), s, DEVICE, precision, Processes(), context.Interruption(), quiet=True)  # writes nothing
        self.step = train.Step(self.phase, run)
        if optimizer is not GuardedAdam:
            self.step.optimizer = optimizer(self.step.weights, s.learning_rate, s.weight_decay)
        self.batch_size, self.steps_of_epoch = self.step.batch_size, self.step.count
        self.epoch = LATE

    def run(self, steps: int) -> float:
        """Seconds for so many steps."""
        started = time.perf_counter()
        while steps > 0:
            self.epoch += 1
            self.step.count = min(steps, self.steps_of_epoch)
            train.train_epoch(self.phase, self.step, self.step, self.epoch)
            steps -= self.step.count
        return time.perf_counter() - started


def one_noise(particles: int, cvae: CVAE, count: int, random: torch.Generator) -> tuple[Tensor]:
    """The noise of a batch, as `train.py` draws it."""
    return (noise(particles, count, cvae, random),)


def arguments(manual: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's manual, with the flags that every benchmark has."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C removes temporary folders from here on
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    return parser


def add_steps(parser: argparse.ArgumentParser, rounds: int, steps: int) -> None:
    """The flags of a benchmark that has its sides take training steps in turn, with these defaults."""
    default = "(default: %(default)s)"
    precisions = ("auto", "fp32", "bf16")
    parser.add_argument("--precision", choices=precisions, default="auto", help=f"the type of our products {default}")
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help=default)
    parser.add_argument("--rounds", type=count, default=rounds, metavar="N", help=default)
    parser.add_argument("--steps", type=count, default=steps, metavar="N", help=f"how many, per round {default}")


def count(word: str) -> int:
    """A positive whole number."""
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"has to be positive, not {value}")
    return value


def checkout(word: str) -> Path:
    """The folder of a checkout that has benchmarks."""
    if not (Path(word) / "benchmarks" / "speed.py").is_file():
        raise argparse.ArgumentTypeError(f"{word} is no checkout: it has no benchmarks/speed.py")
    return Path(word).resolve()


def machine() -> dict[str, Any]:
    """Hardware, versions and settings that the numbers depend on."""
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
    """How this process's threads wait for work, by the variables that say so."""
    said = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return " ".join(said) or "as OpenMP chooses"


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Worker:
    """A program in a process of its own which does steps of a training when it is asked to (`start.serve`).

    Calling this object has it do so many steps of a phase in a precision, and gives their seconds; meanwhile this
    process rests, and that one rests otherwise. Its environment is the user's, with the variables in `environment`.
    If it does not come to be ready, this program ends with its exit code; it has said why.

    Attributes: `about`: what it says of itself.
    """

    def __init__(self, command: Sequence[object], environment: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**GIVEN, **(environment or {})},
        )  # fmt: skip
        self.about = self._read().removeprefix(READY).strip()

    def __call__(self, phase: str, precision: str, steps: int) -> float:
        assert self._process.stdin is not None
        print(phase, precision, steps, file=self._process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait() or 1)
        return line


def ours(precision: str, batch_size: int, environment: Mapping[str, str] | None = None, *more: str) -> Worker:
    """The steps of this checkout. more: flags of `worker.py`."""
    command = [sys.executable, ROOT / "benchmarks" / "worker.py", "--batch-size", str(batch_size), *more]
    return ready(Worker(command, environment), precision)


def older(folder: Path, precision: str, batch_size: int) -> Worker:
    """The steps of another checkout, by its own `worker.py`, or by `older.py` if it has none."""
    worker = folder / "benchmarks" / "worker.py"
    if worker.exists():
        return ready(Worker([sys.executable, worker, "--batch-size", str(batch_size)]), precision)
    command = [sys.executable, ROOT / "benchmarks" / "older.py", folder, str(batch_size)]
    return ready(Worker(command), precision)


def ready(worker: Worker, precision: str, phases: Sequence[str] = ("cvae",), steps: int = 20) -> Worker:
    """The same, warmed up."""
    for phase in phases:
        worker(phase, precision, steps)
    return worker


class OtherProcess:
    """A function in a process of its own, which has none of this process's settings of memory, denormals or generators.

    make: returns the function; it and its arguments are sent there. Calling this object calls the function there and
    waits for its result; meanwhile this process rests, and that one rests otherwise. Its threads wait as the library's
    choice is, unless the user has said how.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: object):
        context = get_context("spawn")
        self._connection, there = context.Pipe()
        with given_environment():
            context.Process(target=_serve, args=(there, make, arguments), daemon=True).start()
        there.close()  # or the end of the process would go unnoticed

    def __call__(self, *arguments: object) -> Any:
        self._connection.send(arguments)
        return self._connection.recv()


@contextmanager
def given_environment() -> Iterator[None]:
    """Within it, processes begin with the user's variables for how threads wait."""
    chosen = {name: os.environ.pop(name) for name in WAITING if name in os.environ and name not in GIVEN}
    try:
        yield
    finally:
        os.environ.update(chosen)


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
        for i in in_turn(number, range(len(sides))):
            seconds[i].append(sides[i]())
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    print(" " * 30, end="\r", file=sys.stderr, flush=True)
    return seconds


def in_turn(number: int, sides: Sequence[Any]) -> Sequence[Any]:
    """The order of the sides in the round of this number: forwards and backwards."""
    return sides if number % 2 == 0 else sides[::-1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def compared(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Two sides' speeds, round by round: medians, their ratio, the median of the rounds' ratios, spreads."""
    return {
        "speed": median(other),
        "ratio": median(own) / median(other),
        "ratio_by_rounds": median(a / b for a, b in zip(own, other, strict=True)),
        "spread": spread(other),
    }


def train_command(runs: str | Path, *flags: str) -> list[str]:
    """The command of a real training into a folder of runs."""
    return [sys.executable, str(ROOT / "train.py"), "--runs", str(runs), *flags]


def run(command: Sequence[str], **environment: str) -> str:
    """What a command prints, run in the user's environment with these variables set as well.

    If it fails, this program ends with what it said.
    """
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**GIVEN, **environment})
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
        f"On {on['processor']}, {on['cores']} cores, {on['threads']} threads, {on['vector_instructions']}; threads "
        f"wait: {on['waiting']}; {versions}; load before: {on['load_before']}"
    )
