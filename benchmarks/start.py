"""What comes before PyTorch is loaded, and what a process needs that is asked for steps. Does not load PyTorch.

A benchmark begins as `train.py` does, with `before_torch()`, so that its threads wait as those of a training do.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code of this checkout, installed or not

GIVEN = dict(os.environ)  # the environment as the user has it; before_torch adds to it

from cvae.console import before_torch  # noqa: E402

__all__ = ["GIVEN", "ROOT", "before_torch", "serve"]

READY = "ready "


def serve(steps: Callable[[str, str, int], float], about: str) -> None:
    """Take lines "phase precision number" from standard input until it ends, and print the seconds of so many steps.

    steps: does them. about: printed first, in one line, for `common.Worker`. What else is printed goes to standard
    error.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        print(READY + about, file=answers)
        for line in sys.stdin:
            phase, precision, number = line.split()
            print(steps(phase, precision, int(number)), file=answers)
