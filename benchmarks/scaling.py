"""How the cost of a training step and of evaluation grows: with the batch, the hidden size, the pixels, S, the ranks.

    python benchmarks/scaling.py                      # about three minutes on two cores
    python benchmarks/scaling.py --rounds 1 --steps 3         # a trial of the script itself

Each figure is the median of several rounds, and its neighbours in a table were measured in turn with it. A step is
that of `train.py` for the CVAE (`worker.Training`) on random pictures of the given size, one quadrant observed;
evaluation is `cvae.model.likelihood.evaluate` with its four estimates. The rank figures are the images/s that
`torchrun … train.py` reports of itself for one epoch of the CVAE on MNIST, one thread per rank.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import arguments, machine, run, show, turns
from start import ROOT
from torch import Tensor
from worker import DEVICE, Evaluation, Training

from cvae.context import prepare, resolve_precision
from cvae.model.likelihood import evaluate
from cvae.settings import Settings

STEPS = {
    "batch": (32, 64, 128, 256, 512, 1024),
    "hidden": (125, 250, 500, 1000, 2000),
    "side": (14, 28, 56, 112),
}
SAMPLES = (10, 50, 100, 200)
RANKS = (1, 2)


def pictures(side: int, number: int) -> Tensor:
    """Return random pictures, uint8 `[number, side, side]`."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, side, side), dtype=torch.uint8, generator=random)


def training(precision: str, steps: int, side: int = 28, hidden: int = 500, batch: int = 128) -> Training:
    """Return a training on random pictures, warmed up."""
    s = Settings(hidden=(hidden, hidden), batch_size=batch, learning_rate=1e-5)  # no warm-up comes before
    made = Training("cvae", s, precision, pictures(side, batch * steps))
    made.run(5)
    return made


def evaluation_seconds(side: Evaluation, samples: int) -> float:
    """Return the seconds that the images of a side take with S samples."""
    started = time.perf_counter()
    list(evaluate(side.model, side.images, [samples], 0, side.context))
    return time.perf_counter() - started


def rank_speed(ranks: int) -> float:
    """Return the images/s of one CVAE epoch on all of MNIST on so many ranks, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        flags = ["--epochs", "1", "--baseline-epochs", "1", "--runs", folder, "--quiet"]
        run([*torchrun, ROOT / "train.py", *flags], OMP_NUM_THREADS="1")
        *_, last = (Path(folder) / "q1" / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(last)["images_per_second"])


def main() -> int:
    """Run the command line."""
    options = arguments(__doc__, rounds=5, steps=20).parse_args()
    on, precision = machine(), resolve_precision(options.precision, DEVICE)
    prepare(DEVICE)
    result: dict[str, Any] = {}
    for what, values in STEPS.items():
        sides = {str(v): partial(training(precision, options.steps, **{what: v}).run, options.steps) for v in values}
        seconds = turns(options.rounds, sides)
        result[f"ms per step, {what}"] = {v: 1000 * median(s) / options.steps for v, s in seconds.items()}
    side = Evaluation(Settings(), precision, pictures(28, 250))
    seconds = turns(options.rounds, {str(s): partial(evaluation_seconds, side, s) for s in SAMPLES})
    result["s per 1,000 images, S"] = {s: 1000 * median(times) / len(side.images) for s, times in seconds.items()}
    result["images/s, ranks"] = {str(ranks): rank_speed(ranks) for ranks in RANKS}
    rows = [["quantity", "value", "measured"]]
    rows += [[quantity, name, f"{value:.4g}"] for quantity, values in result.items() for name, value in values.items()]
    show(result | {"machine": on}, rows, [], options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
