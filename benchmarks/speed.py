"""How fast a training step is, data path included: ours, and the tutorial's way.

    python benchmarks/speed.py                        # about two minutes on two cores
    python benchmarks/speed.py --format json
    python benchmarks/speed.py --against ../older --numpyro --rounds 7     # some seven minutes
    python benchmarks/speed.py --network paper --no-tutorial --no-trainings
    python benchmarks/speed.py --rounds 2 --steps 20 -- --train-limit 1000       # a trial of the script itself

    # As on a processor with AVX2 only, as far as the libraries let themselves be told:
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 XLA_FLAGS=--xla_cpu_max_isa=AVX2
    python benchmarks/speed.py --precision fp32 --numpyro -- --precision fp32

The extra `bench` has what the other sides need: pip install -e ".[bench]".

What is measured, on the real MNIST with one quadrant observed:

images/s    Of a loop of training steps at the batch size, for the baseline and for the CVAE, everything from the stored
            images to the updated weights included. Ours is the loop of `train.py` (its `train_epoch`): permutation,
            slices of it, noise, learning rate, step, running totals, average of the weights. The tutorial's way is in
            `tutorial.py`. The two take turns, each in a process of its own, so that neither has the other's settings of
            memory, denormals and waiting threads; medians of the rounds are given. The weights are a training's first;
            ŷ stands ready, as in `train.py`, whose own images/s over a whole epoch is printed beside as a check. Where
            the default precision is not fp32, that is measured too.
            More sides, if asked for: `--against DIR`, the same of another checkout, as `git worktree add DIR 214ba6c`
            makes one (by its own worker.py or benchmarks/speed.py: see `older.py`), in the same precision; `--numpyro`,
            NumPyro's way in float32 (`numpyro_way.py`, of the same sizes). For these, the ratio is given in two ways:
            of the medians, and as the median of the rounds' ratios, which is steadier where the machine's speed
            changes slowly. `--no-tutorial` leaves the tutorial's way out.
gemm_share  How much of what the machine can do the CVAE's step makes use of: its matrix FLOPs per second of its whole
            time, over the best rate of a large float32 product (N×N×N, 2N³ FLOPs), measured between the rounds.
            Where the default's products are in bfloat16, which this processor computes faster than float32, two more
            are given: the share of the best bfloat16 rate, and that of a step with --precision fp32 of the float32 one.
            A multiplication and an addition count as two. Counted is what has to be computed. With m the
            multiplications of a net's forward pass per image, fan-in × fan-out of its layers,
                prior, recognition  m = 784·500 + 500·500 + 500·400 = 842,000 each
                generation          m = 200·500 + 500·500 + 500·588 = 644,000: the logits of hidden pixels only
            a step takes 2m for the forward pass, 2m for the gradients of the weights, and 2m for those of the inputs,
            the latter without the first layers of prior and recognition network, whose inputs are data; and nothing for
            the frozen baseline, whose ŷ was computed once. That is 12.4 MFLOP per image, 1.587 GFLOP per step at batch
            128. PyTorch's FlopCounterMode counts a real step beside. It is not given for other networks or objectives.
memory      The peak resident memory of `train.py`, one epoch each on the full data (ru_maxrss of its process).
start       From starting the process `train.py --quadrants 1` to the end of its first training step: imports, reading
            and checking MNIST, the run folder, TensorBoard's writer. The first start is not counted: it warms the disk.
            Both are left out by `--no-trainings`; what follows `--` is given to train.py.

For CUDA, an estimate on paper, nothing of it measured: 1.6 GFLOP of a step at batch 128 take 0.1 ms at 15 TFLOP/s
(float32 on a mid-range GPU), less in bfloat16; Adam reads 16 and writes 12 bytes for each of 2.3 million parameters,
65 MB, 0.1 ms at 600 GB/s, and the conversions from and to bfloat16 add a quarter; some 100 kernels at 3 to 5 µs a
launch are 0.3 to 0.5 ms. So launches dominate an eager step, and one graph of them is bounded by memory traffic and by
the chain of kernels: some 0.3 ms.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpyro_way
import torch
import tutorial
from common import (
    DEVICE,
    PHASES,
    OtherProcess,
    Training,
    add_steps,
    arguments,
    checkout,
    compared,
    count,
    machine,
    mnist,
    older,
    run,
    show,
    spread,
    train_command,
    turns,
)
from torch.utils.flop_counter import FlopCounterMode

from cvae import context
from cvae.model.cvae import CVAE
from cvae.model.layers import Linear
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run.folder import METRICS, read_metrics
from cvae.settings import Settings

NUM_QUADRANTS = 1
WARM_UP = 5  # steps
RATIOS = {"ratio": "ratio", "by rounds": "ratio_by_rounds"}

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
def first_step(self, loss):
    step(self, loss)
    print("first step at", time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)
    os._exit(0)
GuardedAdam.step = first_step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def counted_flops(cvae: CVAE, batch_size: int) -> int:
    """The matrix FLOPs that a step of the CVAE has to do, from the sizes of its layers (see the manual above)."""
    layers = [layer for layer in cvae.modules() if isinstance(layer, Linear) and layer.weight.requires_grad]
    of_data = cvae.encoders.layers[0]  # no gradient of its inputs is needed
    return 2 * batch_size * (3 * sum(layer.weight.numel() for layer in layers) - of_data.weight.numel())


def performed_flops(ours: Training) -> int:
    """The matrix FLOPs of a real step, by PyTorch's own counter."""
    rows = torch.arange(ours.batch_size)
    eps = ours.phase.noise(ours.batch_size, torch.Generator())
    with FlopCounterMode(display=False) as counter:
        ours.step(rows, *eps)
    return counter.get_total_flops()


def matrix_rate(size: int, precision: str, repeats: int = 5) -> float:
    """The best rate of a product of that size and precision just now, FLOP/s."""
    a, b, c = (torch.randn(size, size).to(context.HALF.get(precision, torch.float32)) for _ in range(3))
    seconds = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        torch.mm(a, b, out=c)
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * size**3 / seconds


def tutorial_way(batch_size: int) -> Callable[[str, int], float]:
    """The tutorial's trainings; gives the seconds that so many steps of a phase take."""
    samples = tutorial.endless(tutorial.batches(mnist()[0], NUM_QUADRANTS, batch_size, shuffle=True))
    baseline = tutorial.BaselineTraining()
    trainings = {"baseline": baseline, "cvae": tutorial.CvaeTraining(baseline.net)}
    return lambda phase, steps: tutorial.timed(trainings[phase].step, samples, steps)


def other_sides(options: argparse.Namespace, precision: str) -> dict[str, Callable[[str, str, int], float]]:
    """The sides beside ours, by name, each in a process of its own: seconds of so many steps of a phase."""
    sides: dict[str, Callable[[str, str, int], float]] = {}
    if options.against is not None:
        sides["against"] = older(options.against, precision, options.batch_size)
    if options.numpyro:
        sides["numpyro"] = numpyro_way.worker(options.python, numpyro_way.VARIANTS[0], "sampled", options.batch_size)
    if not options.no_tutorial:
        theirs = OtherProcess(tutorial_way, options.batch_size)
        sides["tutorial"] = lambda phase, kind, steps: theirs(phase, steps)
    return sides


def measure_steps(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Images/s of both phases, ours in `precision` and in fp32 and the other sides', and shares of the matrix rates."""
    context.prepare(DEVICE)
    batch_size, steps = options.batch_size, options.steps
    settings = Settings(
        quadrants=NUM_QUADRANTS, batch_size=batch_size, network=options.network, objective=options.objective
    )
    others = other_sides(options, precision)
    precisions = list(dict.fromkeys((precision, "fp32")))
    best_rates = dict.fromkeys(precisions, 0.0)
    measured: dict[str, Any] = {}

    def product(kind: str) -> float:
        best_rates[kind] = max(best_rates[kind], matrix_rate(options.matrix_size, kind))
        return 0.0

    def compare(phase: str) -> Training:
        ours = {kind: Training(phase, settings, kind) for kind in precisions}
        sides: dict[tuple[str, str], Callable[[int], float]] = {}
        for kind in precisions:
            sides["ours", kind] = ours[kind].run
            if options.against is not None:
                sides["against", kind] = partial(others["against"], phase, kind)
        sides |= {(name, ""): partial(other, phase, "fp32") for name, other in others.items() if name != "against"}
        for side in sides.values():
            side(WARM_UP)
        seconds = turns(
            options.rounds,
            *(partial(side, steps) for side in sides.values()),
            *(partial(product, kind) for kind in precisions),
        )
        speeds = {key: [steps * batch_size / s for s in side] for key, side in zip(sides, seconds, strict=False)}
        for kind in precisions:
            own = speeds["ours", kind]
            found = {
                name: compared(own, side) for (name, of), side in speeds.items() if name != "ours" and of in ("", kind)
            }
            suffix = "" if kind == precision else f"_{kind}"
            measured[phase + suffix] = {"ours": median(own), "ours_spread": spread(own), **found}
        return ours[precision]

    for phase in PHASES:
        ours = compare(phase)
    result = {**measured, "matrix_rates": best_rates, "step_seconds": batch_size / measured["cvae"]["ours"]}
    if (options.network, options.objective) != (Settings.network, Settings.objective):
        return result

    flops = counted_flops(ours.model, batch_size)  # type: ignore[arg-type]

    def share(phase: str, kind: str) -> float:
        return flops * measured[phase]["ours"] / batch_size / best_rates[kind]

    shares = {"gemm_share": share("cvae", "fp32")}
    if precision != "fp32":
        shares |= {
            f"gemm_share_of_{precision}_rate": share("cvae", precision),
            "gemm_share_with_fp32": share("cvae_fp32", "fp32"),
        }
    return {**result, **shares, "flops_per_step": flops, "flops_performed": performed_flops(ours)}


def measure_trainings(starts: int, more: Sequence[str]) -> dict[str, Any]:
    """Peak memory and images/s of a real training of one epoch each, and seconds from start to first step."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = ("--quadrants", str(NUM_QUADRANTS), "--epochs", "1", "--baseline-epochs", "1", *more)
        peak = int(run([sys.executable, "-S", "-c", PEAK_MEMORY, *train_command(folder, *epochs)]))
        records = read_metrics(Path(folder) / f"q{NUM_QUADRANTS}" / METRICS)
        first_steps = []
        for i in range(starts + 1):
            _, script_path, *flags = train_command(Path(folder) / str(i), "--quadrants", str(NUM_QUADRANTS), *more)
            started = time.clock_gettime(time.CLOCK_MONOTONIC)
            printed = run([sys.executable, "-c", FIRST_STEP, script_path, *flags])
            first_steps.append(float(printed.rsplit("first step at", 1)[1]) - started)
    return {
        "peak_rss_mib": peak / 1024,  # Linux gives KiB
        "start_to_first_step_s": median(first_steps[1:]),
        "start_to_first_step_spread": spread(first_steps[1:]),
        "train_py_images_per_second": {record["phase"]: record["images_per_second"] for record in records},
    }


def main() -> int:
    """Run the command line."""
    parser = arguments(__doc__)
    add_steps(parser, rounds=5, steps=100)
    parser.add_argument("--network", choices=NETWORKS, default=Settings.network, help="ours (default: %(default)s)")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default=Settings.objective, help="ours (default: %(default)s)"
    )
    parser.add_argument("--against", type=checkout, metavar="DIR", help="another checkout, to compare with")
    parser.add_argument("--numpyro", action="store_true", help="compare with NumPyro's way too")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="that has NumPyro (default: the one that runs this)"
    )
    parser.add_argument("--no-tutorial", action="store_true", help="leave the tutorial's way out")
    parser.add_argument(
        "--matrix-size", type=count, default=2048, metavar="N", help="rows of the large product (default: %(default)s)"
    )
    parser.add_argument(
        "--starts", type=count, default=3, metavar="N", help="how often train.py is started (default: %(default)s)"
    )
    parser.add_argument(
        "--no-trainings", action="store_true", help="leave memory and start out: no real training is started"
    )
    parser.add_argument("train_flags", nargs="*", metavar="FLAG", help="for train.py, after --")
    options = parser.parse_args()
    on = machine()
    precision = context.resolve_precision(options.precision, DEVICE)
    result = {"precision": precision, "network": options.network, "objective": options.objective}
    result |= measure_steps(options, precision)
    if not options.no_trainings:
        flags = ["--network", options.network, "--objective", options.objective, *options.train_flags]
        result |= measure_trainings(options.starts, flags)
    result |= {"batch_size": options.batch_size, "steps": options.steps, "rounds": options.rounds}
    result |= {"against": options.against and str(options.against), "train_flags": options.train_flags, "machine": on}

    names = {"tutorial": "tutorial's way", "against": getattr(options.against, "name", ""), "numpyro": "NumPyro's way"}
    sides = [name for name in names if name in result["cvae"]]
    ratios = {name: ["ratio"] if name == "tutorial" else ["ratio", "by rounds"] for name in sides}
    rows = [["images/s", "ours", *(text for name in sides for text in (names[name], *ratios[name])), "train.py itself"]]
    for phase in ("baseline", "cvae", "baseline_fp32", "cvae_fp32"):
        if phase in result:
            own = result.get("train_py_images_per_second", {}).get(phase)
            numbers = result[phase]
            cells = []
            for name in sides:
                cells.append(f"{numbers[name]['speed']:,.0f}")
                cells += [f"{numbers[name][RATIOS[title]]:.2f}" for title in ratios[name]]
            rows.append([phase, f"{numbers['ours']:,.0f}", *cells, "—" if own is None else f"{own:,.0f}"])
    rates = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {kind}" for kind, rate in result["matrix_rates"].items())
    flops = ""
    if "flops_per_step" in result:
        flops = (
            f"{result['flops_per_step'] / 1e9:.3f} GFLOP per step of the CVAE (PyTorch counts "
            f"{result['flops_performed'] / 1e9:.3f}) in "
        )
    notes = [
        f"precision {precision}: {flops}{result['step_seconds'] * 1e3:.1f} ms a step; the best product of "
        f"{options.matrix_size}³ ran at {rates}",
        ", ".join(f"{name} {value:.2f}" for name, value in result.items() if name.startswith("gemm_share")),
        f"medians of {options.rounds} rounds of {options.steps} steps at batch {options.batch_size}, the sides in "
        "turn; ratio: of the medians" + ("; by rounds: median of the rounds' ratios" if len(sides) > 1 else ""),
    ]
    notes = [note for note in notes if note]
    if not options.no_trainings:
        notes[-1:-1] = [
            f"peak resident memory of a training: {result['peak_rss_mib']:.0f} MiB",
            f"start to the end of the first training step: {result['start_to_first_step_s']:.1f} s",
        ]
    show(result, rows, notes, options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
