"""The trainings of this checkout, in a process of their own: started by other benchmarks, which ask it for steps.

    echo "cvae bf16 100" | python benchmarks/worker.py          # the seconds of 100 steps

Each line of the input is a phase (baseline, cvae), a precision and a number of steps. A training is made when it is
first asked for. What the process says of itself first is how its threads wait.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import argparse
from functools import lru_cache

from common import DEVICE, Training, count, waiting
from start import serve

from cvae import context
from cvae.settings import Settings


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--network", default=Settings.network, help="(default: %(default)s)")
    parser.add_argument("--objective", default=Settings.objective, help="(default: %(default)s)")
    settings = Settings(**vars(parser.parse_args()))
    context.prepare(DEVICE)
    training = lru_cache(lambda phase, precision: Training(phase, settings, precision))
    serve(lambda phase, precision, steps: training(phase, precision).run(steps), waiting())


if __name__ == "__main__":
    main()
