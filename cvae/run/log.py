"""What a run writes as it goes: `metrics.jsonl`, and the same numbers and a picture as TensorBoard's events."""

import json
import math
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cvae.errors import DiskError
from cvae.run.folder import EVENTS, METRICS

PICTURES = "/completions"
"""What the tags of the pictures end with, after the phase."""

OURS = ".train"
"""What the names of our event files end with."""


class RunLog:
    """The log of the run in a folder, which can be taken back to an earlier position: a resumed run goes on from there.

    `position` is the size of each file, by name, as a checkpoint keeps it; what was written after it is dropped, so
    that each epoch stands in the log once. Methods raise DiskError if the log cannot be written.
    """

    def __init__(self, folder: Path, position: dict[str, int]):
        self._folder = folder
        try:
            with ExitStack() as stack:
                stack.callback(setattr, threading, "excepthook", threading.excepthook)
                threading.excepthook = _leave_to_flush
                self._rewind(position)
                self._metrics = stack.enter_context(open(folder / METRICS, "ab", buffering=0))
                self._events = SummaryWriter(str(folder), max_queue=1000, flush_secs=3600, filename_suffix=OURS)
                stack.callback(self._events.close)
                self._open = stack.pop_all()
        except OSError as error:
            raise self._failure(error) from None

    def _rewind(self, position: dict[str, int]) -> None:
        """Cut what was written after the position, at most an epoch; other event files are somebody else's."""
        for path in [self._folder / METRICS, *self._folder.glob(EVENTS + "*")]:
            size = position.get(path.name, 0)
            if size == 0 and (path.name == METRICS or path.name.endswith(OURS)):
                path.unlink(missing_ok=True)
            elif 0 < size < path.stat().st_size:
                os.truncate(path, size)

    def describe(self, settings: dict[str, Any]) -> None:
        """The settings, as a text for TensorBoard."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self._events.add_text("settings", "| setting | value |\n|---|---|\n" + rows)

    def epoch(self, phase: str, record: dict[str, Any], picture: Tensor) -> None:
        """One epoch of a phase: its numbers, and a picture, uint8 `[3, height, width]`."""
        step = record["epoch"]
        line = {"phase": phase, **{key: _finite(value) for key, value in record.items()}}
        try:
            self._metrics.write((json.dumps(line) + "\n").encode())
            for key, value in line.items():
                if key not in ("phase", "epoch") and value is not None:
                    # "train_kl" becomes "cvae/kl/train", so that the two curves stand side by side.
                    part, _, quantity = key.partition("_")
                    tag = f"{quantity}/{part}" if part in ("train", "validation") else key
                    self._events.add_scalar(f"{phase}/{tag}", value, step)
            self._events.add_image(phase + PICTURES, picture, step)
            self._events.flush()
        except (OSError, ValueError) as error:
            raise self._failure(error) from None

    def finish(self, settings: dict[str, Any], results: dict[str, float]) -> None:
        """The settings and the results as hyperparameters of one run."""
        plain = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()
        }
        try:
            for summary in hparams(plain, results):
                self._events.file_writer.add_summary(summary)  # type: ignore[attr-defined]
            for name, value in results.items():
                self._events.add_scalar(name, value)
            self._events.flush()
        except (OSError, ValueError) as error:
            raise self._failure(error) from None

    def position(self) -> dict[str, int]:
        """The size of each file of the log, all of it being on the disk."""
        sizes = {}
        try:
            for path in [self._folder / METRICS, *self._folder.glob(EVENTS + "*")]:
                with open(path, "r+b") as file:  # Windows has only what is open for writing written to the disk
                    os.fsync(file.fileno())
                    sizes[path.name] = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._failure(error) from None
        return sizes

    def close(self) -> None:
        """Close the files."""
        try:
            self._open.close()
        except (OSError, ValueError) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> DiskError:
        return DiskError(f"{self._folder}: the log cannot be written ({getattr(error, 'strerror', None) or error})")


def read_pictures(folder: Path) -> dict[tuple[str, int], bytes]:
    """The pictures of a run, PNG files, by phase and epoch, as far as its events can be read.

    A run that was resumed has several event files; of an epoch that is in them twice, the last picture counts.
    """
    view = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 1, "tensors": 1}).Reload()
    return {
        (tag.removesuffix(PICTURES), event.step): event.encoded_image_string
        for tag in view.Tags()["images"]
        if tag.endswith(PICTURES)
        for event in view.Images(tag)
    }


def _leave_to_flush(failure: threading.ExceptHookArgs) -> None:
    """Have no traceback printed for TensorBoard's writer thread on a full disk: its next `flush` raises the error."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _finite(value: Any) -> Any:
    """The value, or None in the place of a NaN or an infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
