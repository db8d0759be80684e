"""How the cost of a training step and of evaluation grows: with the batch, the hidden size, the pixels, S, the ranks.

    python benchmarks/scaling.py                      # about three minutes on two cores
    python benchmarks/scaling.py --format json
    python benchmarks/scaling.py --rounds 1 --steps 3         # a trial of the script itself

Each figure is the median of several rounds, and its neighbours in a table were measured in turn with it. A step is
that of `train.py` for the CVAE (`common.Training`) on random pictures of the given size, one quadrant observed;
evaluation is `cvae.model.likelihood.evaluate` with its four estimates. The rank figures are the images/s that
`torchrun … train.py` reports of itself for one epoch of the CVAE on MNIST, one thread per rank.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import DEVICE, Training, arguments, count, machine, run, show
from start import ROOT
from torch import Tensor

from cvae import context
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.model.likelihood import evaluate
from cvae.model.networks import build
from cvae.run.folder import METRICS, read_metrics
from cvae.settings import Settings

BATCHES = (32, 64, 128, 256, 512, 1024)
HIDDEN = (125, 250, 500, 1000, 2000)
SIDES = (14, 28, 56, 112)
SAMPLES = (100, 200, 1000)
RANKS = (1, 2)


def pictures(side: int, number: int) -> Tensor:
    """Random ones, uint8 `[number, side, side]`."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, side, side), dtype=torch.uint8, generator=random)


def step_times(variants: dict[str, Training], rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds per step of each variant, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for ours in variants.values():
        ours.run(5)
    for _ in range(rounds):
        for name, ours in variants.items():
            seconds[name].append(ours.run(steps) / steps)
    return {name: 1000 * median(values) for name, values in seconds.items()}


def evaluation_times(rounds: int) -> dict[str, float]:
    """Seconds per 1,000 images for each S."""
    split = Split(quadrants(1))
    model, images = build(split, Settings()).requires_grad_(False).eval(), ImageSet(pictures(split.height, 250), split)
    seconds: dict[str, list[float]] = {str(samples): [] for samples in SAMPLES}
    for _ in range(rounds):
        for samples in SAMPLES:
            started = time.perf_counter()
            list(evaluate(model, images, [samples], seed=0))
            seconds[str(samples)].append((time.perf_counter() - started) * 1000 / len(images))
    return {name: median(values) for name, values in seconds.items()}


def rank_speeds() -> dict[str, float]:
    """Images/s of one CVAE epoch on all of MNIST for each number of ranks, one thread each."""
    speeds = {}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += [str(ROOT / "train.py"), "--epochs", "1", "--baseline-epochs", "1", "--runs", folder, "--quiet"]
            run(command, OMP_NUM_THREADS="1")
            speeds[str(ranks)] = read_metrics(Path(folder) / "q1" / METRICS)[-1]["images_per_second"]
    return speeds


def main() -> int:
    """Run the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=count, default=5, help="(default: %(default)s)")
    parser.add_argument("--steps", type=count, default=20, help="per round (default: %(default)s)")
    options = parser.parse_args()
    on = machine()
    context.prepare(DEVICE)

    def ours(side: int = 28, hidden: int = 500, batch: int = 128) -> Training:
        settings = Settings(hidden=(hidden, hidden), batch_size=batch, learning_rate=1e-5)  # no warm-up comes before
        return Training("cvae", settings, images=pictures(side, batch * options.steps))

    result: dict[str, Any] = {
        "ms_per_step_by_batch": step_times({str(b): ours(batch=b) for b in BATCHES}, options.rounds, options.steps),
        "ms_per_step_by_hidden": step_times({str(h): ours(hidden=h) for h in HIDDEN}, options.rounds, options.steps),
        "ms_per_step_by_side": step_times({str(s): ours(side=s) for s in SIDES}, options.rounds, options.steps),
        "s_per_1000_images_by_samples": evaluation_times(options.rounds),
        "images_per_s_by_ranks": rank_speeds(),
    }
    rows = [["quantity", "of", "measured"]]
    rows += [[quantity, name, f"{value:.4g}"] for quantity, values in result.items() for name, value in values.items()]
    show(result | {"machine": on}, rows, [], options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
