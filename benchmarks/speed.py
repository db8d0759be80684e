"""How fast a training step is, data path included: ours, and the tutorial's way.

    python benchmarks/speed.py                        # about two minutes on two cores
    python benchmarks/speed.py --format json
    python benchmarks/speed.py --rounds 2 --steps 20 -- --train-limit 1000       # a trial of the script itself

What is measured, on the real MNIST with one quadrant observed:

images/s    Of a loop of training steps at the batch size, for the baseline and for the CVAE, everything from the stored
            images to the updated weights included. Ours is the loop of `train.py`: permutation, slices of it, noise,
            learning rate, step, running totals, average of the weights. The tutorial's way is in `tutorial.py`. The two
            take turns, each in a process of its own, so that neither has the other's settings of memory and denormals;
            medians of the rounds are given. The weights are a training's first; ŷ stands ready, as in `train.py`, whose
            own images/s over a whole epoch is printed beside as a check. Where the default precision is not fp32, that
            is measured too.
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
            128. PyTorch's FlopCounterMode counts a real step beside.
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

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tutorial
from common import OtherProcess, arguments, count, machine, run, show, spread, train_command, turns
from torch.utils.flop_counter import FlopCounterMode

import train as script
from cvae import runtime
from cvae.data.images import ImageSet
from cvae.data.masks import Quadrants
from cvae.data.sources import load_train
from cvae.distributed import Processes
from cvae.model.networks import CVAE, Baseline
from cvae.run.folder import METRICS, read_metrics
from cvae.settings import Settings
from cvae.training.gradients import by_hand
from cvae.training.optimizer import GuardedAdam
from cvae.training.weights import WeightAverage, Weights

NUM_QUADRANTS = 1
DEVICE = torch.device("cpu")
PRECISION = runtime.resolve_precision("auto", DEVICE)

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
from cvae.training.optimizer import GuardedAdam
step = GuardedAdam.step
def first_step(self, loss):
    step(self, loss)
    print("first step at", time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)
    os._exit(0)
GuardedAdam.step = first_step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Ours:
    """The loop of `fit` in `train.py`, without its progress bar and signals, and without what is between epochs."""

    def __init__(
        self, model: Baseline | CVAE, images: ImageSet, batch_size: int, precision: str = PRECISION,
        optimizer: type[GuardedAdam] = GuardedAdam,
    ):  # fmt: skip
        self.model, self.images, self.batch_size = model, images, batch_size
        self.settings = Settings(quadrants=NUM_QUADRANTS, batch_size=batch_size)
        self.weights = Weights(model.parameters(), runtime.HALF.get(precision))
        self.average = WeightAverage(model, self.weights, self.settings.average)
        self.optimizer = optimizer(self.weights, self.settings.learning_rate, self.settings.weight_decay)
        self.gradients = by_hand(model, self.optimizer)
        self.totals = torch.zeros(3, dtype=torch.float64)
        self.epoch = 0

    def step(self, rows: torch.Tensor, eps: torch.Tensor) -> None:
        """One step of Adam, as in `fit`."""
        script.training_step(
            self.gradients, self.images, self.optimizer, self.totals, self.batch_size, Processes(), rows, eps
        )

    def run(self, steps: int) -> float:
        """Seconds for so many steps of an epoch."""
        started = time.perf_counter()
        self.epoch += 1
        random = runtime.generator(DEVICE, 0, "speed", self.epoch)
        permutation = torch.randperm(len(self.images), generator=random)
        self.optimizer.start_epoch()
        self.totals.zero_()
        for i in range(steps):
            rows = permutation[i * self.batch_size : (i + 1) * self.batch_size]
            eps = script.noise(self.settings.particles, self.batch_size, self.model, random)
            rate = script.scheduled_rate(self.settings, i / steps, self.settings.epochs)
            self.optimizer.learning_rate.fill_(rate)
            self.step(rows, eps)
            self.average.update((self.epoch - 1) * steps + i)
            if i % script.REPORT_EVERY == 0:
                self.optimizer.check("the benchmark")
        self.optimizer.check("the benchmark")
        return time.perf_counter() - started


def counted_flops(cvae: CVAE, batch_size: int) -> int:
    """The matrix FLOPs that a step of the CVAE has to do, from the sizes of its layers (see the manual above)."""

    def sizes(net: torch.nn.Module) -> list[int]:
        return [layer.in_features * layer.out_features for layer in net.layers if isinstance(layer, torch.nn.Linear)]

    encoder, decoder = sizes(cvae.prior_net), sizes(cvae.generation_net)
    return 2 * batch_size * (2 * (3 * sum(encoder) - encoder[0]) + 3 * sum(decoder))


def performed_flops(ours: Ours) -> int:
    """The matrix FLOPs of a real step, by PyTorch's own counter."""
    rows = torch.arange(ours.batch_size)
    eps = torch.zeros(1, ours.batch_size, ours.model.latent_dim)
    with FlopCounterMode(display=False) as counter:
        ours.step(rows, eps)
    return counter.get_total_flops()


def matrix_rate(size: int, precision: str, repeats: int = 5) -> float:
    """The best rate of a product of that size and precision just now, FLOP/s."""
    a, b, c = (torch.randn(size, size).to(runtime.HALF.get(precision, torch.float32)) for _ in range(3))
    seconds = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        torch.mm(a, b, out=c)
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * size**3 / seconds


def tutorial_way(batch_size: int) -> Callable[[str, int], float]:
    """The tutorial's trainings; gives the seconds that so many steps of a phase take."""
    samples = tutorial.endless(tutorial.batches(load_train()[0], NUM_QUADRANTS, batch_size, shuffle=True))
    baseline = tutorial.BaselineTraining()
    trainings = {"baseline": baseline, "cvae": tutorial.CvaeTraining(baseline.net)}
    return lambda phase, steps: tutorial.timed(trainings[phase].step, samples, steps)


def measure_steps(precision: str, batch_size: int, steps: int, rounds: int, matrix_size: int) -> dict[str, Any]:
    """Images/s of both phases, ours in `precision` and in fp32 and the tutorial's, and shares of the matrix rates."""
    runtime.prepare(DEVICE)
    images, _ = load_train()
    quadrants = Quadrants(NUM_QUADRANTS, *images.shape[1:])
    sizes = (quadrants.num_observed, quadrants.num_pixels)
    theirs = OtherProcess(tutorial_way, batch_size)
    precisions = list(dict.fromkeys((precision, "fp32")))
    image_sets = {kind: ImageSet(images, quadrants) for kind in precisions}
    best_rates = dict.fromkeys(precisions, 0.0)
    measured: dict[str, Any] = {}

    def product(kind: str) -> float:
        best_rates[kind] = max(best_rates[kind], matrix_rate(matrix_size, kind))
        return 0.0

    def compare(phase: str, make: Callable[[], Baseline | CVAE]) -> Ours:
        ours = {kind: Ours(make(), image_sets[kind], batch_size, kind) for kind in precisions}
        for one in ours.values():
            one.run(5)
        theirs(phase, 5)
        sides = [partial(one.run, steps) for one in ours.values()] + [lambda: theirs(phase, steps)]
        seconds = turns(rounds, *sides, *(partial(product, kind) for kind in precisions))
        *speeds, tutorials = ([steps * batch_size / s for s in side] for side in seconds[: len(sides)])
        for kind, own in zip(precisions, speeds, strict=True):
            suffix = "" if kind == precision else "_fp32"
            measured[phase + suffix] = {
                "ours": median(own),
                "tutorial": median(tutorials),
                "ratio": median(own) / median(tutorials),
                "ours_spread": spread(own),
                "tutorial_spread": spread(tutorials),
            }
        return ours[precision]

    compare("baseline", lambda: Baseline(*sizes))
    baseline = Baseline(*sizes)
    for kind, image_set in image_sets.items():
        image_set.set_guesses(baseline.guess, runtime.HALF.get(kind))
    ours = compare("cvae", lambda: CVAE(baseline, *sizes))

    flops = counted_flops(CVAE(baseline, *sizes), batch_size)

    def share(phase: str, kind: str) -> float:
        return flops * measured[phase]["ours"] / batch_size / best_rates[kind]

    shares = {"gemm_share": share("cvae", "fp32")}
    if precision != "fp32":
        shares |= {
            f"gemm_share_of_{precision}_rate": share("cvae", precision),
            "gemm_share_with_fp32": share("cvae_fp32", "fp32"),
        }
    return {
        **measured,
        **shares,
        "flops_per_step": flops,
        "flops_performed": performed_flops(ours),
        "matrix_rates": best_rates,
        "step_seconds": batch_size / measured["cvae"]["ours"],
    }


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
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of our products (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--steps", type=count, default=100, metavar="N", help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--matrix-size", type=count, default=2048, metavar="N", help="of the large product (default: %(default)s)"
    )
    parser.add_argument("--starts", type=count, default=3, metavar="N", help="of train.py (default: %(default)s)")
    parser.add_argument(
        "--no-trainings", action="store_true", help="leave memory and start out: no real training is started"
    )
    parser.add_argument("train_flags", nargs="*", metavar="FLAG", help="for train.py, after --")
    options = parser.parse_args()
    on = machine()
    precision = runtime.resolve_precision(options.precision, DEVICE)
    result = {"precision": precision}
    result |= measure_steps(precision, options.batch_size, options.steps, options.rounds, options.matrix_size)
    if not options.no_trainings:
        result |= measure_trainings(options.starts, options.train_flags)
    result |= {"batch_size": options.batch_size, "steps": options.steps, "rounds": options.rounds}
    result |= {"train_flags": options.train_flags, "machine": on}

    rows = [["images/s", "ours", "tutorial's way", "ratio", "train.py itself"]]
    for phase in ("baseline", "cvae", "baseline_fp32", "cvae_fp32"):
        if phase in result:
            own = result.get("train_py_images_per_second", {}).get(phase)
            numbers = result[phase]
            ratio = f"{numbers['ratio']:.1f}"
            own_text = "—" if own is None else f"{own:,.0f}"
            rows.append([phase, f"{numbers['ours']:,.0f}", f"{numbers['tutorial']:,.0f}", ratio, own_text])
    rates = " and ".join(f"{rate / 1e9:.0f} GFLOP/s in {kind}" for kind, rate in result["matrix_rates"].items())
    notes = [
        f"precision {precision}: {result['flops_per_step'] / 1e9:.3f} GFLOP per step of the CVAE (PyTorch counts "
        f"{result['flops_performed'] / 1e9:.3f}) in {result['step_seconds'] * 1e3:.1f} ms; the best product of "
        f"{options.matrix_size}³ ran at {rates}",
        ", ".join(f"{name} {value:.2f}" for name, value in result.items() if name.startswith("gemm_share")),
        f"medians of {options.rounds} rounds of {options.steps} steps at batch {options.batch_size}, the sides in turn",
    ]
    if not options.no_trainings:
        notes[2:2] = [
            f"peak resident memory of a training: {result['peak_rss_mib']:.0f} MiB",
            f"start to the end of the first training step: {result['start_to_first_step_s']:.1f} s",
        ]
    show(result, rows, notes, options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
