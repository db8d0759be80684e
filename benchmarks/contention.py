"""How fast a training is beside other programs that want the processors: under several ways for its threads to wait.

    python benchmarks/contention.py                   # some six minutes on two cores, which nothing else should use
    python benchmarks/contention.py --format json
    python benchmarks/contention.py --training        # beside a busy process and a second training, too: ten minutes
    python benchmarks/contention.py --against ../older --spins 2000        # another checkout; another bound of the spin
    python benchmarks/contention.py --rounds 1 --steps 5        # a trial of the script itself

Counted are images/s of training steps of the CVAE on MNIST with one quadrant observed, data path included, as in
`speed.py`: beside nothing, beside one busy process and beside two, each a single thread that never rests. With
`--training` also beside one busy process and a second training, whose threads wait as those of the first do.

train.py      What `train.py` chooses by itself (`cvae/console.py`). It does so as it starts, by a look at what else
              runs, so there is one process for each surrounding, started in it; what it chose is printed.
libgomp       libgomp's own choice: its threads look for work 300,000 times, which takes milliseconds, then sleep.
passive       OMP_WAIT_POLICY=PASSIVE: they sleep at once.
--against     Another checkout, as its user starts it.

All of them run in processes of their own, which are started first and then take turns, round by round and surrounding
by surrounding; medians of the rounds are given, and their ratios to the same side's beside nothing.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from common import (
    DEVICE,
    WAITING,
    Worker,
    add_steps,
    arguments,
    checkout,
    count,
    in_turn,
    machine,
    older,
    ours,
    show,
    spread,
)
from start import GIVEN

from cvae import context

BUSY = [sys.executable, "-S", "-E", "-c", "while True: pass"]
SETTLE_S = 0.5  # after other processes have started
SIDES: dict[str, Mapping[str, str]] = {
    "train.py": {},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
QUIET = "nothing"
BUSY_PROCESSES = {QUIET: 0, "one busy": 1, "two busy": 2}
SECOND_TRAINING = "one busy, one training"
STEPS_AT_ONCE = 3  # of the second training, between two looks at whether it is to stop


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Within it, so many processes of one busy thread each are running."""
    processes = [subprocess.Popen(BUSY) for _ in range(number)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def training(worker: Worker, precision: str) -> Iterator[None]:
    """Within it, this worker trains without end."""
    over = threading.Event()

    def train() -> None:
        while not over.is_set():
            worker("cvae", precision, STEPS_AT_ONCE)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        over.set()
        thread.join()


class Side:
    """The trainings of one side: one for each surrounding in which the side waits otherwise, and second trainings."""

    def __init__(self, surroundings: Mapping[str, int], start: Any, chooses: bool):
        """start: gives a worker, started now. chooses: whether how it waits depends on what else is running."""
        self.start = start
        self.workers: dict[str, Worker] = {}
        self.second: Worker | None = None
        common: Worker | None = None
        for surrounding, number in surroundings.items():
            if chooses or common is None:
                with busy_processes(number if chooses else 0):
                    common = start()
                    if surrounding == SECOND_TRAINING:
                        self.second = start()
            elif surrounding == SECOND_TRAINING:
                self.second = start()
            self.workers[surrounding] = common

    @property
    def chosen(self) -> dict[str, str]:
        """How the threads wait, by surrounding."""
        return {surrounding: worker.about for surrounding, worker in self.workers.items()}

    def images_per_second(self, surrounding: str, precision: str, steps: int, batch_size: int) -> float:
        """The speed just now."""
        with ExitStack() as stack:
            if surrounding == SECOND_TRAINING:
                assert self.second is not None
                stack.enter_context(training(self.second, precision))
            return steps * batch_size / self.workers[surrounding]("cvae", precision, steps)


def main() -> int:
    """Run the command line; returns 2 if the environment says how threads wait already."""
    parser = arguments(__doc__)
    add_steps(parser, rounds=7, steps=60)
    parser.add_argument("--training", action="store_true", help="measure beside a second training too")
    parser.add_argument("--spins", type=count, nargs="+", default=[], metavar="N", help="more sides: GOMP_SPINCOUNT")
    parser.add_argument("--against", type=checkout, metavar="DIR", help="another checkout, to compare with")
    options = parser.parse_args()
    if given := [name for name in WAITING if name in GIVEN]:
        print(f"contention.py: unset {' and '.join(given)} first: that is what is compared here", file=sys.stderr)
        return 2
    on = machine()
    precision = context.resolve_precision(options.precision, DEVICE)
    surroundings = BUSY_PROCESSES | ({SECOND_TRAINING: 1} if options.training else {})

    variants = SIDES | {f"GOMP_SPINCOUNT={spins}": {"GOMP_SPINCOUNT": str(spins)} for spins in options.spins}
    sides: dict[str, Side] = {}
    for name, environment in variants.items():
        print(f"starting {name}".ljust(60), end="\r", file=sys.stderr, flush=True)
        sides[name] = Side(
            surroundings,
            lambda environment=environment: ours(precision, options.batch_size, environment),
            chooses=not environment,
        )
    if options.against is not None:
        sides[options.against.name] = Side(
            surroundings, lambda: older(options.against, precision, options.batch_size), chooses=False
        )

    speeds: dict[str, dict[str, list[float]]] = {name: {each: [] for each in surroundings} for name in sides}
    for number in range(options.rounds):
        for surrounding, busy in surroundings.items():
            with busy_processes(busy):
                for name in in_turn(number, list(sides)):
                    print(
                        f"round {number + 1} of {options.rounds}: {name}, beside {surrounding}".ljust(60),
                        end="\r", file=sys.stderr, flush=True,
                    )  # fmt: skip
                    side = sides[name]
                    speed = side.images_per_second(surrounding, precision, options.steps, options.batch_size)
                    speeds[name][surrounding].append(speed)
    print(" " * 60, end="\r", file=sys.stderr, flush=True)

    medians = {name: {each: median(values) for each, values in by.items()} for name, by in speeds.items()}
    result: dict[str, Any] = {
        "precision": precision,
        "images_per_second": medians,
        "ratio_to_quiet": {
            name: {each: value / by[QUIET] for each, value in by.items() if each != QUIET}
            for name, by in medians.items()
        },
        "spread": {name: {each: spread(values) for each, values in by.items()} for name, by in speeds.items()},
        "chosen": {name: side.chosen for name, side in sides.items()},
        "batch_size": options.batch_size,
        "steps": options.steps,
        "rounds": options.rounds,
        "machine": on,
    }
    contended = [each for each in surroundings if each != QUIET]
    rows = [["images/s, beside:", QUIET, *(text for each in contended for text in (each, "ratio"))]]
    for name, by in medians.items():
        ratios = result["ratio_to_quiet"][name]
        cells = [text for each in contended for text in (f"{by[each]:,.0f}", f"{ratios[each]:.2f}")]
        rows.append([name, f"{by[QUIET]:,.0f}", *cells])
    chosen = ", ".join(f"beside {each} {about}" for each, about in sides["train.py"].chosen.items())
    notes = [
        f"train.py chose: {chosen}",
        f"precision {precision}; medians of {options.rounds} rounds of {options.steps} steps at batch "
        f"{options.batch_size}, the sides in turn; ratio: to the same side's beside nothing",
    ]
    show(result, rows, notes, options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
