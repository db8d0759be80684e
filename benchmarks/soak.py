"""Real trainings, each ended at random moments and resumed until done: do all end like one that nothing disturbed?

    python benchmarks/soak.py                                       # 50 trainings, kill -9: some ten minutes
    python benchmarks/soak.py --trainings 20 --signal TERM          # or INT, as Ctrl-C sends it
    python benchmarks/soak.py --seed 1 --format json

A training is the real one (`python train.py`: two epochs of the baseline, three of the CVAE, on 500 images of MNIST).
The signal comes half of the time after a random share of the time that an undisturbed training takes, the other half
while the temporary file of a save is there, of a random one of the saves. The training is then resumed, and at even
odds ended once more, and so on.

At its end the weights, the averaged weights, the optimizer's state and the progress in last.pt, the weights in best.pt
and the lines of metrics.jsonl have to be bit for bit those of the undisturbed training, times aside, and TensorBoard
has to find each epoch once, in order. Exit code 0 if all ended alike and saves were hit, else 1.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, count, machine, show
from start import GIVEN, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cvae.data.sources import load_train
from cvae.settings import Settings

FLAGS = [
    "--hidden", "64", "64", "--latent-dim", "16", "--batch-size", "50", "--baseline-epochs", "2", "--epochs", "3",
    "--device", "cpu",
]  # fmt: skip
SAVES = 10  # at most: last.pt and best.pt, five epochs
TIMED = ("seconds", "images_per_second")
AGAIN = 0.5  # the odds that a resumed training is ended too
POLL_S = 0.0003


def plain(value: Any) -> Any:
    """Return tensors as their bits, so that == compares bit for bit, and leave times out."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in (*TIMED, "log")}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that has to be alike at the end: checkpoints, metrics, and the steps of TensorBoard's tags."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "weights": [plain(torch.load(folder / name, weights_only=True)) for name in ("last.pt", "best.pt")],
        "metrics": [plain(json.loads(line)) for line in lines],
        "events": (scalars, images),
        "leftovers": [path.name for path in folder.glob(".*.tmp*")],
    }


class Soak:
    """Trainings in a folder, on a slice of MNIST, ended by a signal."""

    def __init__(self, work: Path, options: argparse.Namespace):
        self.work, self.options = work, options
        self.signal = signal.Signals[f"SIG{options.signal}"]
        np.save(work / "data.npy", load_train(Settings()).train[:600].numpy())  # a sixth of them for validation
        started = time.monotonic()
        self.start(work / "undisturbed").wait()
        self.usual_s = time.monotonic() - started
        self.wanted = outcome(work / "undisturbed")
        self.places: Counter[str] = Counter()
        self.amid_save = 0

    def start(self, folder: Path) -> "subprocess.Popen[bytes]":
        """Begin a training, or go on with it, as from a shell."""
        words = ["--data", self.work / "data.npy", *FLAGS, "--runs", folder.parent, "--name", folder.name]
        if folder.exists():
            words = ["--resume", folder]
        command = list(map(str, [sys.executable, ROOT / "train.py", *words]))
        return subprocess.Popen(
            command, env={**GIVEN, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def train(self, number: int) -> str:
        """Take one training through all its ends; return what is wrong with it then, or an empty string."""
        folder, dice = self.work / f"training-{number}", random.Random(f"{self.options.seed}-{number}")
        again = True
        while again:
            self.end(folder, dice)
            again = dice.random() < AGAIN
        code = self.start(folder).wait()
        if code:
            return f"training {number}: exit code {code}"
        differs = [name for name, value in outcome(folder).items() if value != self.wanted[name]]
        return f"training {number}: other {', '.join(differs)}" if differs else ""

    def end(self, folder: Path, dice: random.Random) -> None:
        """Run the training until the signal has ended it, or it was done before."""
        at, save = time.monotonic() + dice.random() * self.usual_s, dice.randint(1, SAVES) * (dice.random() < 0.5)
        process, saves, saving = self.start(folder), 0, False
        while process.poll() is None:
            before, saving = saving, folder.exists() and any(folder.glob(".*.tmp*"))
            saves += saving and not before
            if saves == save if save else time.monotonic() >= at:
                process.send_signal(self.signal)
                process.wait()
                self.amid_save += saving
                path = folder / "metrics.jsonl"
                self.places[f"after {len(path.read_text().splitlines()) if path.exists() else 0} epochs"] += 1
                return
            time.sleep(POLL_S)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--trainings", type=count, default=50, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="at a time (default: %(default)s)")
    options = parser.parse_args()
    on = machine()
    with tempfile.TemporaryDirectory(prefix="soak-") as work, ThreadPoolExecutor(options.workers) as pool:
        soak = Soak(Path(work), options)
        wrong = list(filter(None, pool.map(soak.train, range(options.trainings))))
    result: dict[str, Any] = {
        "signal": options.signal, "trainings": options.trainings, "alike": options.trainings - len(wrong),
        "ends": soak.places.total(), "ends_amid_a_save": soak.amid_save, "places": dict(sorted(soak.places.items())),
        "wrong": wrong, "seed": options.seed, "machine": on,
    }  # fmt: skip
    rows = [
        [f"SIG{options.signal}, seed {options.seed}", "number"],
        ["trainings", str(options.trainings)],
        ["that ended bit for bit like the undisturbed one", str(result["alike"])],
        ["times they were ended and resumed", str(result["ends"])],
        ["of these amid a save", str(soak.amid_save)],
        *([f"of these {place}", str(number)] for place, number in result["places"].items()),
    ]
    show(result, rows, wrong, options.format)
    return 0 if not wrong and soak.amid_save else 1


if __name__ == "__main__":
    sys.exit(main())
