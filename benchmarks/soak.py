"""Real trainings, each ended at random moments and resumed until done: do all end like one that nothing disturbed?

    python benchmarks/soak.py                                       # 100 trainings, kill -9: some minutes
    python benchmarks/soak.py --trainings 20 --signal TERM          # or INT, as Ctrl-C sends it
    python benchmarks/soak.py --seed 1 --format json

A training is the real one (`train.main`: two epochs of the baseline, three of the CVAE, on 500 images of MNIST) in a
process forked from this one, which has imported PyTorch for all of them. The signal comes from outside: half of the
time after a random share of the time that an undisturbed training takes, the other half while the temporary file of a
save is there, of a random one of the saves. The training is then resumed, and at even odds ended once more, and so on.

At its end the weights, the averaged weights, the optimizer's state and the progress in last.pt, the weights in best.pt
and the lines of metrics.jsonl have to be bit for bit those of the undisturbed training, times aside, and TensorBoard
has to find each epoch once, in order. A kill counts as one amid a save if it left the temporary file behind; SIGTERM
and Ctrl-C if the file was there when they were sent. Exit code 0 if all ended alike and saves were hit, else 1.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import argparse
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # a training would import it: once for all of them
from common import arguments, count, machine, show
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import train
from cvae.data.names import mnist
from cvae.run import checkpoint
from cvae.run.folder import BEST, LAST, METRICS, read_metrics

FLAGS = [
    "--hidden", "64", "64", "--latent-dim", "16", "--batch-size", "50", "--baseline-epochs", "2", "--epochs", "3",
    "--device", "cpu",
]  # fmt: skip
IMAGES = {"train": 600, "t10k": 10}  # a sixth of the former for validation
SAVES = 10  # at most: last.pt and best.pt, five epochs
TEMPORARY = [f".{name}.tmp" for name in (LAST, BEST)]
TIMED = ("seconds", "images_per_second")
AGAIN = 0.5  # the odds that a resumed training is ended too
POLL_S = 0.0003


def write_data(folder: Path) -> None:
    """A slice of MNIST as IDX files."""
    folder.mkdir()
    for part, length in IMAGES.items():
        images = mnist(part)[:length]
        header = struct.pack(">HBB3I", 0, 8, 3, *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, length) + bytes(length))


def plain(value: Any) -> Any:
    """Tensors as their bits, so that == compares bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in TIMED}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def weights(folder: Path) -> Any:
    """All that the checkpoints hold but times and the sizes of the log's files."""
    return [
        plain({key: value for key, value in checkpoint.load(folder / name).items() if key != "log"})
        for name in (LAST, BEST)
    ]


def logs(folder: Path) -> Any:
    """The lines of metrics.jsonl, and the steps of each of TensorBoard's tags in the order in which it finds them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    return plain(read_metrics(folder / METRICS)), steps, pictures


class Training:
    """One training under way, from its start until it is done, through all its ends."""

    def __init__(self, name: str, work: Path, seed: int, signal_number: int, usual_s: float):
        self.folder = work / "runs" / name
        self.work = work
        self.dice = random.Random(f"{seed}-{name}")
        self.signal_number = signal_number
        self.usual_s = usual_s
        self.ends: list[str] = []  # where the training was, each time it was ended
        self.amid_save = 0
        self.failure = ""
        self.pid = 0
        self.start(aim=True)

    def start(self, aim: bool) -> None:
        """Begin it, or go on; `aim` to have it ended on the way."""
        data = str(self.work / "data")
        words = ["--resume", str(self.folder)]
        if not self.folder.exists():
            words = ["--data", data, *FLAGS, "--runs", str(self.folder.parent), "--name", self.folder.name]
        self.output = self.work / f"{self.folder.name}.output"
        self.started = time.monotonic()
        self.pid = fork_training(words, self.output, previous=self.pid)
        self.fire_at = self.fire_at_save = None
        if aim and self.dice.random() < 0.5:
            self.fire_at = self.started + self.dice.random() * self.usual_s
        elif aim:
            self.fire_at_save = self.dice.randint(1, SAVES)
        self.saves_seen, self.saving, self.fired_amid_save = 0, False, False

    def watch(self) -> bool:
        """Fire if it is time; whether the training is done with, well or badly."""
        saving = any(os.path.exists(self.folder / name) for name in TEMPORARY)
        self.saves_seen += saving and not self.saving
        self.saving = saving
        if (self.fire_at is not None and time.monotonic() >= self.fire_at) or (
            self.fire_at_save is not None and self.saves_seen == self.fire_at_save
        ):
            self.fired_amid_save = saving
            os.kill(self.pid, self.signal_number)
            self.fire_at = self.fire_at_save = None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return pid != 0 and self.ended(os.waitstatus_to_exitcode(status))

    def ended(self, code: int) -> bool:
        """Look at how a process ended, and go on unless all is done."""
        said = self.output.read_text()
        if code in (-self.signal_number, 128 + self.signal_number):
            if code > 0 and not said.endswith(f"interrupted; to go on: python train.py --resume {self.folder}\n"):
                self.failure = f"exit code {code} without a word: {said[-500:]}"
                return True
            left = any((self.folder / name).exists() for name in TEMPORARY)
            self.amid_save += left if self.signal_number == signal.SIGKILL else self.fired_amid_save
            self.ends.append(self.place())
            self.start(aim=self.dice.random() < AGAIN)
            return False
        if code != 0:
            self.failure = f"exit code {code}: {said[-500:]}"
            return True
        if not self.ends:  # the signal came too late: once more from the start
            shutil.rmtree(self.folder)
            self.start(aim=True)
            return False
        return True

    def place(self) -> str:
        """How far it has come, by its log."""
        if not self.folder.exists():
            return "before there was a folder"
        path = self.folder / METRICS
        phases = [record["phase"] for record in read_metrics(path)] if path.exists() else []
        places = {0: "before the first epoch was logged", 1: "in the baseline", 2: "between the phases or soon after"}
        return places.get(len(phases), "in the CVAE")

    def stop(self) -> None:
        """Kill it for good."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def fork_training(words: list[str], output: Path, previous: int) -> int:
    """A process that runs `train.py` with these words; its id. previous: that of the one before, in the same folder."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pid = os.fork()
    if pid == 0:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)  # as train.py has it until it listens
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    if pid:
        os.close(file)
        return pid
    code = 70
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        if str(os.getpid()) <= str(previous):
            time.sleep(1.1)  # event files are named after second and process, and are read in the order of their names
        code = train.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def undisturbed(work: Path) -> tuple[Path, float]:
    """The folder of a training that nothing ends, and the seconds it takes."""
    folder, output = work / "runs/undisturbed", work / "undisturbed.output"
    started = time.monotonic()
    words = ["--data", str(work / "data"), *FLAGS, "--runs", str(work / "runs"), "--name", folder.name]
    pid = fork_training(words, output, previous=0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        sys.exit(f"an undisturbed training ended with exit code {code}: {output.read_text()}")
    return folder, time.monotonic() - started


def soak(work: Path, options: argparse.Namespace) -> tuple[list[Training], dict[str, list[str]], float]:
    """All trainings, what is wrong with those that did not end as they should, and the usual seconds."""
    write_data(work / "data")
    reference, usual_s = undisturbed(work)
    wanted = weights(reference), logs(reference)
    number = signal.Signals[f"SIG{options.signal}"]
    waiting = [f"training-{i}" for i in range(options.trainings)]
    under_way: list[Training] = []
    done: list[Training] = []
    wrong: dict[str, list[str]] = {"failed": [], "weights": [], "logs": [], "leftovers": []}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < options.workers:
                under_way.append(Training(waiting.pop(0), work, options.seed, number, usual_s))
            for training in [each for each in under_way if each.watch()]:
                under_way.remove(training)
                done.append(training)
                judge(training, wanted, wrong)
                shutil.rmtree(training.folder, ignore_errors=True)
                print(f"{len(done)} of {options.trainings}", end="\r", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
    finally:
        for training in under_way:
            training.stop()
    print(" " * 30, end="\r", file=sys.stderr, flush=True)
    return done, wrong, usual_s


def judge(training: Training, wanted: tuple[Any, Any], wrong: dict[str, list[str]]) -> None:
    """Note what is wrong with a training that is done with."""
    name, folder = training.folder.name, training.folder
    if training.failure:
        wrong["failed"].append(f"{name}: {training.failure}")
        return
    if weights(folder) != wanted[0]:
        wrong["weights"].append(name)
    if logs(folder) != wanted[1]:
        wrong["logs"].append(name)
    if list(folder.glob(".*.tmp")):
        wrong["leftovers"].append(name)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--trainings", type=count, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="at a time (default: %(default)s)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a fork takes no other threads along
    on = machine()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        trainings, wrong, usual_s = soak(Path(work), options)
    ends = sum(len(training.ends) for training in trainings)
    amid_save = sum(training.amid_save for training in trainings)
    good = len(trainings) - len({line.split(":")[0] for lines in wrong.values() for line in lines})
    result: dict[str, Any] = {
        "signal": options.signal,
        "trainings": len(trainings),
        "alike": good,
        "ends": ends,
        "ends_amid_a_save": amid_save,
        "most_ends_of_one": max(len(training.ends) for training in trainings),
        "places": dict(Counter(place for training in trainings for place in training.ends).most_common()),
        "wrong": wrong,
        "undisturbed_seconds": usual_s,
        "seconds": time.monotonic() - started,
        "seed": options.seed,
        "machine": on,
    }
    name = f"SIG{options.signal}"
    rows = [
        [f"{name}, seed {options.seed}", "number"],
        ["trainings", str(len(trainings))],
        ["that ended bit for bit like the undisturbed one", str(good)],
        [f"times they got {name} and were resumed", str(ends)],
        ["of these amid a save", str(amid_save)],
        *([f"of these {place}", str(number)] for place, number in result["places"].items()),
        ["most of them in one training", str(result["most_ends_of_one"])],
    ]
    notes = [f"wrong, {kind}: {', '.join(lines)}" for kind, lines in wrong.items() if lines]
    notes.append(f"{result['seconds']:.0f} s in all; an undisturbed training takes {usual_s:.2f} s")
    show(result, rows, notes, options.format)
    return 0 if good == len(trainings) and amid_save else 1


if __name__ == "__main__":
    sys.exit(main())
