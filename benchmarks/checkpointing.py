"""What it costs that a run is never lost: the saves of an epoch, and the guard against bad numbers in each step.

    python benchmarks/checkpointing.py                # about three minutes on two cores
    python benchmarks/checkpointing.py --format json
    python benchmarks/checkpointing.py --rounds 2 --steps 10      # a trial of the script itself

A round of the CVAE on all of MNIST: steps of `train.py` with its guarded Adam and with the same Adam unguarded, and the
saves of an epoch that is the best so far, `last.pt` and `best.pt`, through to the disk, in turn. The cost of an epoch
is that of its saves and the difference of its steps, over the steps unguarded; medians of the rounds.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import DEVICE, Training, arguments, count, machine, show, turns
from torch import Tensor

from cvae import context
from cvae.run import checkpoint
from cvae.run.folder import BEST, LAST
from cvae.settings import Settings
from cvae.training.optimizer import GuardedAdam


class UnguardedAdam(GuardedAdam):
    """The same optimizer, which takes every step and counts nothing."""

    @torch.inference_mode()
    def step(self, loss: Tensor) -> Tensor:
        self._update(None, None)  # type: ignore[arg-type]
        return loss.new_zeros((), dtype=torch.bool)  # not skipped


def save(ours: Training, folder: Path) -> float:
    """Seconds for the two files of an epoch."""
    started = time.perf_counter()
    state = {
        "model": ours.model.state_dict(),
        "average": ours.step.average.model.state_dict(),
        "optimizer": ours.step.optimizer.state_dict(),
    }
    checkpoint.save(folder / LAST, state)
    checkpoint.save(folder / BEST, {"model": state["average"]})
    return time.perf_counter() - started


def main() -> int:
    """Run the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=count, default=15, help="(default: %(default)s)")
    parser.add_argument("--steps", type=count, default=100, help="per round (default: %(default)s)")
    options = parser.parse_args()
    on = machine()
    context.prepare(DEVICE)
    guarded = Training("cvae", Settings())
    unguarded = Training("cvae", Settings(), optimizer=UnguardedAdam)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for ours in (guarded, unguarded):
            ours.run(10)
        seconds = turns(
            options.rounds,
            lambda: guarded.run(options.steps),
            lambda: unguarded.run(options.steps),
            lambda: save(guarded, Path(folder)),
        )
    with_guard, without, saves = (median(values) for values in seconds)
    epoch = guarded.steps_of_epoch / options.steps  # rounds that make an epoch
    result = {
        "epoch_s": without * epoch,
        "guard_s": (with_guard - without) * epoch,
        "saves_s": saves,
        "cost": ((with_guard - without) * epoch + saves) / (without * epoch),
        "machine": on,
    }
    rows = [
        ["of an epoch of the CVAE", "s", "share"],
        ["its steps, unguarded", f"{result['epoch_s']:.2f}", ""],
        ["the guard", f"{result['guard_s']:.3f}", f"{result['guard_s'] / result['epoch_s']:.1%}"],
        ["last.pt and best.pt", f"{saves:.3f}", f"{saves / result['epoch_s']:.1%}"],
        ["together", "", f"{result['cost']:.1%}"],
    ]
    show(result, rows, [], options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
