"""How fast training steps and evaluation are: ours, the plain way, the tutorial's, NumPyro's, and another checkout's.

    python benchmarks/speed.py                        # some three minutes on two cores, which nothing else should use
    python benchmarks/speed.py --format json
    python benchmarks/speed.py --against ../older --numpyro       # `git worktree add ../older COMMIT` makes one
    python benchmarks/speed.py --machinery            # what the derivative of the Bernoulli that is written out buys
    python benchmarks/speed.py --network paper --sides ours --no-trainings
    python benchmarks/speed.py --rounds 2 --steps 5 --no-trainings        # a trial of the script itself

    # As on a processor with AVX2 only, as far as the libraries let themselves be told:
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 XLA_FLAGS=--xla_cpu_max_isa=AVX2

The extra `bench` has what the other sides need: pip install -e ".[bench]".

Counted are images/s on MNIST with one quadrant observed, everything from the stored images to the updated weights (or
to nats per image) included, in the phases baseline and cvae, in the default precision and in fp32, and of an
evaluation with S = 100. All sides take turns, each in a process of its own; medians of the rounds are given, and how
many times as fast as a side ours is: by the medians, and in brackets the median of the rounds' ratios.

ours        The loop of `train.py` (its `train_epoch`) and the estimates of `eval.py`: all that is printed by it.
plain       `plain.py`: autocast, AdamW with fused=True, clip_grad_norm_, an average of the weights.
tutorial    `tutorial.py`: float32; its evaluation is RenyiELBO's, one estimate in place of four.
numpyro     `numpyro_way.py`: float32, the same sizes, whole epochs compiled.
plain Bernoulli    Ours, with the log-likelihood and its derivative by the library.

gemm_share  is the share of the best rate of a large product of the same precision that the CVAE's step makes use of.
Counted is what has to be computed: 2 FLOPs for each weight of a network and image in the forward pass, 2 for the
gradient of the weights and 2 for that of the inputs, the latter without the first layers of the prior and recognition
networks: 12.4 MFLOP per image. With `--no-trainings` memory and start of a real `train.py` are left out.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpyro_way
import torch
from common import arguments, count, machine, run, show, speeds, turns, worker
from start import ROOT
from worker import DEVICE

from cvae.context import HALF, resolve_precision
from cvae.settings import Settings

WARM_UP = 5  # steps
MFLOP_PER_IMAGE = 12.4

# A child's ru_maxrss is never below what its parent had when it started it: so a small process is put in between.
PEAK_MEMORY = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""

# CLOCK_MONOTONIC is the same for all processes.
FIRST_STEP = """
import os, runpy, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
from cvae.console import before_torch
before_torch()
from cvae.training.optimizer import GuardedAdam
step = GuardedAdam.step
def first(*arguments):
    step(*arguments)
    print("first step at", time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)
    os._exit(0)
GuardedAdam.step = first
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def matrix_rate(precision: str, size: int = 2048) -> float:
    """Return the rate of a large product of a precision just now, FLOP/s, the best of a few."""
    a, b = (torch.randn(size, size).to(HALF.get(precision, torch.float32)) for _ in range(2))
    seconds = math.inf
    for _ in range(6):  # the first one warms up
        started = time.perf_counter()
        torch.mm(a, b)
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * size**3 / seconds


def start_sides(options: Any) -> dict[str, Callable[[str, str, int], float]]:
    """Start the processes of all sides that are asked for."""
    flags = ("--network", options.network, "--objective", options.objective)
    start = partial(worker, options.batch_size)
    sides: dict[str, Callable[[str, str, int], float]] = {}
    for name in options.sides:
        sides[name] = start(name, *flags)
    if options.machinery:
        sides["plain Bernoulli"] = start(*flags, "--plain-bernoulli")
    if options.against:
        sides["against"] = start(folder=options.against)
    if options.numpyro:
        sides["numpyro"] = numpyro_way.worker(options.python, options.batch_size)
    return sides


def can(side: str, phase: str) -> bool:
    """Return whether a side has a phase."""
    return phase != "evaluation" or side in ("ours", "tutorial", "plain Bernoulli")


def measure(options: Any, precision: str) -> dict[str, Any]:
    """Return the speeds of all sides by phase and precision, images/s, and the shares of the matrix rates."""
    sides = start_sides(options)
    measured: dict[str, Any] = {}
    rates = dict.fromkeys(dict.fromkeys((precision, "fp32")), 0.0)
    for phase in ("baseline", "cvae", "evaluation"):
        number = work = options.images
        if phase != "evaluation":
            number, work = options.steps, options.steps * options.batch_size
        for kind in rates:
            calls: dict[str, Callable[[], float]] = {}
            for name, side in sides.items():
                if can(name, phase):
                    own = "fp32" if name in ("tutorial", "numpyro") else kind  # they know no other
                    side(phase, own, WARM_UP)
                    calls[name] = partial(side, phase, own, number)
            measured[f"{phase}, {kind}"] = speeds(turns(options.rounds, calls), work, options.sides[0])
            rates[kind] = max(rates[kind], matrix_rate(kind))
    shares = {
        kind: MFLOP_PER_IMAGE * 1e6 * measured[f"cvae, {kind}"][options.sides[0]]["speed"] / rate
        for kind, rate in rates.items()
    }
    default = (options.network, options.objective) == (Settings.network, Settings.objective)
    return {"images_per_second": measured, "matrix_rates": rates, "gemm_share": shares if default else {}}


def measure_trainings(starts: int = 3) -> dict[str, Any]:
    """Return the peak memory of a training of one epoch each, and the seconds from start to first step."""
    train = [sys.executable, ROOT / "train.py", "--quiet", "--epochs", 1, "--baseline-epochs", 1, "--runs"]
    first_steps = []
    with tempfile.TemporaryDirectory() as folder:
        peak = int(run([sys.executable, "-S", "-c", PEAK_MEMORY, *train, folder]))
        for i in range(starts + 1):  # the first one warms the disk
            started = time.clock_gettime(time.CLOCK_MONOTONIC)
            printed = run([sys.executable, "-c", FIRST_STEP, *train[1:], f"{folder}/{i}"])
            first_steps.append(float(printed.rsplit("first step at", 1)[1]) - started)
    return {"peak_rss_mib": peak / 1024, "start_to_first_step_s": median(first_steps[1:])}  # Linux gives KiB


def main() -> int:
    """Run the command line."""
    parser = arguments(__doc__, rounds=7, steps=100)
    parser.add_argument("--sides", nargs="+", choices=("ours", "plain", "tutorial"),
                        default=["ours", "plain", "tutorial"], help="(default: all)")  # fmt: skip
    parser.add_argument("--network", default=Settings.network, help="ours (default: %(default)s)")
    parser.add_argument("--objective", default=Settings.objective, help="ours (default: %(default)s)")
    parser.add_argument("--machinery", action="store_true", help="measure what each piece of machinery buys")
    parser.add_argument("--numpyro", action="store_true", help="compare with NumPyro's way too")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="that has NumPyro (default: this one)")
    parser.add_argument(
        "--images", type=count, default=100, metavar="N", help="of an evaluation (default: %(default)s)"
    )
    parser.add_argument("--no-trainings", action="store_true", help="start no real training")
    options = parser.parse_args()
    on = machine()
    precision = resolve_precision(options.precision, DEVICE)
    result: dict[str, Any] = {"precision": precision, **measure(options, precision)}
    if not options.no_trainings:
        result |= measure_trainings()
    result |= {name: getattr(options, name) for name in ("batch_size", "steps", "rounds", "network", "objective")}
    result["machine"] = on

    rows = [["images/s", *(name for side in result["images_per_second"] for name in (side, "ours ÷"))]]
    names = list(result["images_per_second"]["cvae, fp32"])
    for name in names:
        cells = [name]
        for by_side in result["images_per_second"].values():
            side = by_side.get(name)
            cells += [f"{side['speed']:,.0f}", f"{side['ratio']:.2f} ({side['by_rounds']:.2f})"] if side else ["", ""]
        rows.append(cells)
    notes = [
        f"best product of {kind}: {rate / 1e9:.0f} GFLOP/s"
        + (f"; share of it in the CVAE's step: {result['gemm_share'][kind]:.2f}" if result["gemm_share"] else "")
        for kind, rate in result["matrix_rates"].items()
    ]
    if not options.no_trainings:
        notes.append(
            f"peak memory of a training: {result['peak_rss_mib']:.0f} MiB; start to the end of the first step: "
            f"{result['start_to_first_step_s']:.1f} s"
        )
    notes.append(f"medians of {options.rounds} rounds of {options.steps} steps, batch {options.batch_size}, in turn")
    show(result, rows, notes, options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
