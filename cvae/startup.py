"""What a script does before PyTorch is loaded, which looks at some of it only then."""

import os
import signal
import time
from pathlib import Path

SPIN_ALONE, SPIN_BESIDE_OTHERS = "4000", "500"
"""How often a waiting thread of libgomp looks for work before it sleeps, in turns of some 20 ns. Its own choice is
300,000: some milliseconds, in which it keeps the processor from another program, or from the very thread that it waits
for. Measured: docs/speed.md."""

LOOKS, PAUSE_S = 5, 0.01  # at what else runs


def before_torch() -> None:
    """Let Ctrl-C simply end the process, until a run's own handlers are in place, and bound how long threads spin.

    Whatever the user has set of the two variables that say how OpenMP's threads wait is left alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPIN_BESIDE_OTHERS if others_want_the_processors() else SPIN_ALONE


def others_want_the_processors() -> bool:
    """Whether other programs leave fewer processors idle than this one may use, where Linux tells; else False."""
    try:
        usable, running = len(os.sched_getaffinity(0)), []
        for _ in range(LOOKS):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
            time.sleep(PAUSE_S)
    except (OSError, AttributeError, ValueError, IndexError):
        return False
    return (os.cpu_count() or usable) - sorted(running)[LOOKS // 2] < usable
