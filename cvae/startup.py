"""What a script does before PyTorch is loaded, which looks at some of it only then; and Ctrl-C after that."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cvae.errors import Interrupted

LOOKS, PAUSE_S = 5, 0.01  # how often it looks for other programs, and how long it waits in between


def before_torch() -> None:
    """Let Ctrl-C simply end the process, until a run's own handlers are in place, and choose how threads wait.

    libgomp's threads spin for some milliseconds before they sleep. On a processor of their own that is fastest; beside
    other programs they take the time that these, and the threads they wait for, are due: then they sleep at once.
    Measured: docs/speed.md. What the user has set of the two variables that say how threads wait is left alone.

    A process that goes on after the script, as a notebook's, is left as it is.
    """
    goes_on = hasattr(sys, "ps1") or sys.flags.interactive or threading.current_thread() is not threading.main_thread()
    if goes_on or "torch" in sys.modules:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and others_want_the_processors():
        os.environ["GOMP_SPINCOUNT"] = "0"


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


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, Ctrl-C raises Interrupted at once, where `before_torch` has let it end the process without a word."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("interrupted", number)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
