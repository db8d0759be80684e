"""How long until a CVAE of a given quality: ours by its default command, and the tutorial's way.

    python benchmarks/time_to_quality.py              # some minutes on two cores
    python benchmarks/time_to_quality.py --format json
    python benchmarks/time_to_quality.py --target 150 --slice 640 -- --train-limit 5000     # a trial of the script

Ours is the wall time from starting the process `python train.py --quadrants 1` until its metrics.jsonl has a line
that says validation −ELBO ≤ 72.5 nats per image: imports, reading MNIST, the training of the baseline, validation,
checkpoints, pictures and TensorBoard's events included. Then it gets SIGTERM. What follows `--` is given to train.py.

The tutorial's way (`tutorial.py`) takes 29 epochs of the baseline and 36 of the CVAE, as one full run of the
tutorial's own code on MNIST took them. A full run, of most of an hour, would say little more than its seconds per
epoch times these: they are measured here, on a slice, in half of the rounds before ours and in the other half after
it, as medians. An epoch trains on 60,000 images and validates on 10,000. Its slices are cut from the training images:
the test images, on which the tutorial validates, take as long.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tutorial
from common import arguments, count, machine, show, train_command
from start import GIVEN, ROOT

from cvae.data.sources import load_train
from cvae.run.folder import METRICS, read_metrics

TUTORIAL_EPOCHS = {"baseline": 29, "cvae": 36}
TRAIN_IMAGES, VALIDATION_IMAGES = 60_000, 10_000  # of an epoch of the tutorial's
BATCH_SIZE = 128
POLL_S = 0.05


def time_ours(target: float, flags: Sequence[str]) -> tuple[float | None, list[dict[str, Any]]]:
    """Seconds until the target is reached, None if it never was, and the epochs up to then."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "timed" / METRICS
        command = train_command(folder, "--quadrants", "1", "--name", "timed", *flags)
        started = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, env=GIVEN, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            seconds, records = None, []
            while seconds is None:
                ended = process.poll() is not None  # looked at first, so that the last line is not missed
                now = time.monotonic()
                records = read_metrics(metrics) if metrics.exists() else []
                if any(reaches(record, target) for record in records):
                    seconds = now - started
                elif ended:
                    break
                else:
                    time.sleep(POLL_S)
            process.send_signal(signal.SIGTERM)
            errors = process.stderr.read() if process.stderr else ""
            if process.wait() not in (0, 128 + signal.SIGTERM):
                sys.exit(f"train.py exited with {process.returncode}: {errors.strip()[-2000:]}")
    return seconds, records


def reaches(record: dict[str, Any], target: float) -> bool:
    """Whether this epoch of the CVAE has the quality."""
    return record["phase"] == "cvae" and neg_elbo(record) <= target


def neg_elbo(record: dict[str, Any]) -> float:
    """The validation −ELBO after an epoch of the CVAE, nats per image; infinite where it was not finite."""
    elbo = record["validation_elbo"]
    return math.inf if elbo is None else -elbo


class TutorialEpochs:
    """The tutorial's way on slices of the data, timed as often as asked."""

    def __init__(self, images: torch.Tensor, size: int):
        train, validation = images[:size], images[size : size + max(BATCH_SIZE, size // 6)]
        self.train = tutorial.batches(train, 1, BATCH_SIZE, shuffle=True)
        self.validation = tutorial.batches(validation, 1, BATCH_SIZE, shuffle=False)
        baseline = tutorial.BaselineTraining()
        self.trainings = {"baseline": baseline, "cvae": tutorial.CvaeTraining(baseline.net)}
        for training in self.trainings.values():
            tutorial.timed(training.step, self.train, 5)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.trainings}

    def measure(self) -> None:
        """Add the seconds of an epoch on all the data, by what the slices take."""
        for name, training in self.trainings.items():
            per_image = [
                tutorial.timed(work, loader) / len(loader.dataset)  # type: ignore[arg-type]
                for work, loader in ((training.step, self.train), (training.evaluate, self.validation))
            ]
            self.seconds[name].append(per_image[0] * TRAIN_IMAGES + per_image[1] * VALIDATION_IMAGES)


def main() -> int:
    """Run the command line; returns 1 if the quality was never reached."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--target", type=float, default=72.5, metavar="NATS", help="validation −ELBO (default: %(default)s)"
    )
    parser.add_argument(
        "--slice", type=count, default=6400, metavar="N", help="images of the tutorial's epoch (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=count, default=4, metavar="N", help="how often the slice is measured (default: %(default)s)"
    )
    parser.add_argument("train_flags", nargs="*", metavar="FLAG", help="for train.py, after --")
    options = parser.parse_args()
    on = machine()
    images = load_train().train

    theirs = TutorialEpochs(images, options.slice)
    before = (options.rounds + 1) // 2
    for _ in range(before):
        theirs.measure()
    ours, records = time_ours(options.target, options.train_flags)
    for _ in range(options.rounds - before):
        theirs.measure()

    per_epoch = {name: median(seconds) for name, seconds in theirs.seconds.items()}
    tutorial_s = sum(TUTORIAL_EPOCHS[name] * per_epoch[name] for name in per_epoch)
    epochs = {phase: sum(record["phase"] == phase for record in records) for phase in TUTORIAL_EPOCHS}
    result = {
        "ours_s": ours,
        "tutorial_s": tutorial_s,
        "ratio": None if ours is None else tutorial_s / ours,
        "epochs": {"ours": epochs, "tutorial": TUTORIAL_EPOCHS},
        "tutorial_epoch_s": per_epoch,
        "tutorial_epoch_s_rounds": theirs.seconds,
        "ours_epoch_s": {
            phase: median([record["seconds"] for record in records if record["phase"] == phase] or [0.0])
            for phase in epochs
        },
        "ours_validation": [neg_elbo(record) for record in records if record["phase"] == "cvae"],
        "target": options.target,
        "train_flags": options.train_flags,
        "machine": on,
    }

    rows = [["", "seconds", "epochs of the baseline", "s each", "epochs of the CVAE", "s each"]]
    for name, key, total in (("ours", "ours", ours), ("tutorial's way", "tutorial", tutorial_s)):
        of = result["epochs"][key], result[f"{key}_epoch_s"]
        cells = [text for phase in epochs for text in (str(of[0][phase]), f"{of[1][phase]:.1f}")]
        rows.append([name, "never" if total is None else f"{total:,.0f}", *cells])
    ratio = "the target was not reached" if ours is None else f"ratio {result['ratio']:.1f}"
    notes = [
        f"until validation −ELBO ≤ {options.target:g} nats per image, from the start of the process: {ratio}",
        f"the tutorial's way: seconds per epoch measured on {options.slice} images, medians of {options.rounds} rounds",
    ]
    show(result, rows, notes, options.format)
    return 1 if ours is None else 0


if __name__ == "__main__":
    sys.exit(main())
