"""What a script does before PyTorch is loaded, which reads some of it only then."""

import os
import signal

SPIN_COUNT = "1000"
"""How often a waiting thread of libgomp looks for work before it sleeps. Its own choice is 300,000: a few
milliseconds, in which a thread that waits takes the processor from another program, or from the very thread that it
waits for. See docs/speed.md for what was measured."""


def before_torch() -> None:
    """Let Ctrl-C simply end the process, until a run's own handlers are in place, and bound the waiting of threads.

    Whatever the user has set of the two variables that say how OpenMP's threads wait is left alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
