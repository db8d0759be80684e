"""What a run writes as it goes: `metrics.jsonl`, and the same numbers and a picture as TensorBoard's events."""

import json
import math
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from cvae.errors import printable
from cvae.run.folder import EVENTS, METRICS

PICTURES, OURS = "/completions", ".train"  # ends of the pictures' tags, and of the names of our files of events


class RunLog(ExitStack):
    """The log of the run in a folder, taken back to an earlier position: each epoch stands in it once.

    position: the size of each file, by name, as a checkpoint keeps it, {} at the beginning. Methods raise OSError.
    """

    def __init__(self, folder: Path, position: dict[str, int], settings: dict[str, Any]):
        super().__init__()
        self._folder = folder
        for path in self._files():
            if path.name not in position:
                path.unlink(missing_ok=True)
            elif path.stat().st_size > position[path.name]:  # at most an epoch, which the run takes once more
                os.truncate(path, position[path.name])
        paths = folder / METRICS, folder / f"{EVENTS}{time.time():.0f}.{socket.gethostname()}.{os.getpid()}{OURS}"
        self._metrics, self._events = (self.enter_context(open(path, "ab")) for path in paths)  # noqa: SIM115
        self._add(file_version="brain.Event:2")
        if not position:
            rows = "".join(f"| {name} | {printable(str(value))} |\n" for name, value in settings.items())
            self._add(summary=summary.text("settings", "| setting | value |\n|---|---|\n" + rows), step=0)

    def epoch(self, phase: str, record: dict[str, Any], picture: Tensor) -> None:
        """Write an epoch of a phase: its numbers (null for NaN, as JSON), and a picture, uint8 `[3, height, width]`."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._metrics.write((json.dumps({"phase": phase, **numbers}) + "\n").encode())
        self._metrics.flush()
        step = numbers.pop("epoch")
        for key, value in numbers.items():
            if value is not None:
                # "train_kl" becomes "cvae/kl/train", so that the two curves stand side by side.
                part, _, quantity = key.partition("_")
                tag = f"{quantity}/{part}" if part in ("train", "validation") else key
                self._add(summary=summary.scalar(f"{phase}/{tag}", value), step=step)
        self._add(summary=summary.image(phase + PICTURES, picture, dataformats="CHW"), step=step)

    def finish(self, settings: dict[str, Any], results: dict[str, float]) -> None:
        """Write the settings and the results as hyperparameters of one run."""
        plain = {k: v if isinstance(v, int | float) else printable(str(v)) for k, v in settings.items()}
        for part in (*summary.hparams(plain, results), *(summary.scalar(*item) for item in results.items())):
            self._add(summary=part)

    def position(self) -> dict[str, int]:
        """Return the size of each file of the log, all of it being on the disk."""
        for file in (self._metrics, self._events):
            os.fsync(file.fileno())
        return {path.name: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return [self._folder / METRICS, *sorted(self._folder.glob(f"{EVENTS}*{OURS}"))]

    def _add(self, **content: Any) -> None:
        RecordWriter(self._events).write(Event(wall_time=time.time(), **content).SerializeToString())
        self._events.flush()


def read_pictures(folder: Path) -> dict[tuple[str, int], bytes]:
    """Return the pictures of a run, PNG files, by phase and epoch, as far as its events can be read."""
    view = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 1, "tensors": 1}).Reload()
    return {
        (tag.removesuffix(PICTURES), event.step): event.encoded_image_string
        for tag in view.Tags()["images"]
        if tag.endswith(PICTURES)
        for event in view.Images(tag)
    }
