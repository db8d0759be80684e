"""The images of the runs of one command: read once, unless a signal comes before."""

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch

from cvae.data.parts import Reading
from cvae.data.sources import TrainImages, load_train
from cvae.distributed import Processes
from cvae.errors import Interrupted
from cvae.runtime import Interruption
from cvae.settings import Settings


def leave_unwritten(signal_number: int) -> None:
    """Raises Interrupted if a signal came, before anything of a run is written."""
    if signal_number:
        raise Interrupted("interrupted before the training began: nothing was written", signal_number)


def once_for_all(
    runs: Iterable[Settings], device: torch.device, processes: Processes, interruption: Interruption, quiet: bool
) -> Callable[[], TrainImages]:
    """What loads the images that these runs share, in all processes, once; where there are several runs, they are kept.

    It raises Interrupted if a signal comes before they are read. Of several processes none leaves alone, since the
    others wait for it: all of them do when they have read.
    """
    first, *others = sorted(runs, key=lambda s: s.quadrants)  # where the fewest are given, the most guesses are kept
    reading = Reading.on(
        device,
        processes.local_count,
        keep=bool(others),
        show=processes.is_main and not quiet,
        check=lambda: leave_unwritten(interruption.signal_number if processes.count == 1 else 0),
    )

    def load() -> TrainImages:
        images = processes.on_all(partial(load_train, first, reading))
        leave_unwritten(processes.maximum(interruption.signal_number))
        return images

    return cache(load) if others else load
