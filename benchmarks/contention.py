"""How fast a training is beside other programs that want the processors, by how its threads wait for work.

    python benchmarks/contention.py                   # some six minutes on two cores, which nothing else should use
    python benchmarks/contention.py --against ../older        # another checkout, as its user starts it
    python benchmarks/contention.py --rounds 1 --steps 5      # a trial of the script itself

Counted are images/s of training steps of the CVAE, as in `speed.py`: beside nothing, beside one busy process and
beside two, each a single thread that never rests.

train.py      What `train.py` chooses by itself (`cvae/console.py`). It does so as it starts, by a look at what else
              runs, so there is one process for each surrounding, started in it; what it chose is printed.
libgomp       libgomp's own choice: its threads look for work 300,000 times, which takes milliseconds, then sleep.
passive       OMP_WAIT_POLICY=PASSIVE: they sleep at once.

Medians of the rounds are given, and their ratios to the same side's beside nothing.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from common import WAITING, arguments, machine, show, speeds, turns, worker
from start import GIVEN
from worker import DEVICE

from cvae.context import resolve_precision

BUSY = [sys.executable, "-S", "-E", "-c", "while True: pass"]
SETTLE_S = 0.5  # after other processes have started
SIDES = {
    "train.py": {},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
SURROUNDINGS = {"nothing": 0, "one busy": 1, "two busy": 2}


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run so many processes of one busy thread each beside the block."""
    processes = [subprocess.Popen(BUSY) for _ in range(number)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> int:
    """Run the command line; returns 2 if the environment says how threads wait already."""
    options = arguments(__doc__, rounds=7, steps=60).parse_args()
    if given := [name for name in WAITING if name in GIVEN]:
        print(f"contention.py: unset {' and '.join(given)} first: that is what is compared here", file=sys.stderr)
        return 2
    on = machine()
    precision = resolve_precision(options.precision, DEVICE)
    measured, chosen = {}, []
    for surrounding, busy in SURROUNDINGS.items():
        with busy_processes(busy):
            start = partial(worker, options.batch_size)
            sides = {name: start(environment=environment) for name, environment in SIDES.items()}
            if options.against is not None:
                sides[options.against.name] = start(folder=options.against)
            chosen.append(f"beside {surrounding} {sides['train.py'].about}")
            for side in sides.values():
                side("cvae", precision, 10)
            calls = {name: partial(side, "cvae", precision, options.steps) for name, side in sides.items()}
            seconds = turns(options.rounds, calls)
        measured[surrounding] = speeds(seconds, options.steps * options.batch_size, "train.py")
    rows = [["images/s, beside:", *(text for each in SURROUNDINGS for text in (each, "ratio to quiet"))]]
    for name, quiet in measured["nothing"].items():
        values = [by_side[name]["speed"] for by_side in measured.values()]
        rows.append([name, *(text for v in values for text in (f"{v:,.0f}", f"{v / quiet['speed']:.2f}"))])
    notes = [f"train.py chose: {', '.join(chosen)}", f"precision {precision}; medians of {options.rounds} rounds"]
    show({"precision": precision, "images_per_second": measured, "chosen": chosen, "machine": on}, rows, notes,
         options.format)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
