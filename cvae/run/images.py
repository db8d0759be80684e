"""The images of the runs of one command: read once, unless a signal comes before; and those of a resumed run."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from cvae.context import Interruption, Processes
from cvae.data.sources import MNIST, TrainImages, difference, load_train
from cvae.errors import DataError, Interrupted
from cvae.run.folder import CONFIG, read_record, read_settings
from cvae.run.state import advice
from cvae.settings import Settings


def leave_unwritten(signal_number: int) -> None:
    """Raises Interrupted if a signal came, before anything of a run is written."""
    if signal_number:
        raise Interrupted("interrupted before the training began: nothing was written", signal_number)


def once_for_all(
    runs: Iterable[Settings], device: torch.device, processes: Processes, interruption: Interruption, quiet: bool
) -> Callable[[], TrainImages]:
    """What loads the images that these runs share, in all processes, once; where there are several runs, they are kept.

    It raises Interrupted if a signal comes before they are read. No process of several leaves alone, since the
    others wait for it: all of them do when they have read.
    """
    first, *others = sorted(runs, key=lambda s: s.quadrants)  # where the fewest are given, the most guesses are kept

    def check() -> None:
        leave_unwritten(interruption.signal_number if processes.count == 1 else 0)

    def load() -> TrainImages:
        images = processes.on_all(partial(load_train, first, processes.is_main and not quiet, check))
        leave_unwritten(processes.maximum(interruption.signal_number))
        return images

    return cache(load) if others else load


def recognised(folder: Path, images: dict[str, Any], data: str | None) -> tuple[dict[str, Any], list[str]]:
    """What `config.json` is to say of the images of a run that goes on, and what there is to say of them.

    images: what identifies those that are here. data: the setting that names them. A run of version 0.2 does not say
    what its images are. Its validation images were the last ones, which they still are of MNIST, and of no other set.
    Raises DataError if they are not those that the run was begun on, or if there is no saying.
    """
    recorded, remarks = read_record(folder), []
    if differs := difference(recorded, images):
        raise DataError(f"{folder}: was begun on {differs}; --data says where those are that it was begun on")
    if "train" not in recorded:
        if not {read_settings(folder).data, data} <= {None, MNIST}:
            with advice(folder):
                raise DataError(
                    f"{folder / CONFIG}: does not say on which images it was begun, as version 0.2 did not, "
                    "and this version divides all but MNIST in another way"
                )
        remarks.append(f"{folder}: does not say on which images it was begun; MNIST is taken for them")
    unknown = {part: record for part, record in images.items() if recorded.get(part) is None}
    return recorded | unknown, remarks
