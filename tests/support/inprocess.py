"""`train.py` and `eval.py` called in the test's own process, on images so small that a training takes a second."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import eval as evaluation
import train
from cvae.errors import Interrupted
from cvae.run.folder import RunFolder
from cvae.run.session import Run
from cvae.training.phase import Phase
from support.scripts import write_contrary, write_data
from support.trainings import checkpoints, untimed

TINY = [
    "--hidden", "8", "7", "--latent-dim", "4", "--batch-size", "20", "--epochs", "2", "--baseline-epochs", "1",
    "--device", "cpu",
]  # fmt: skip
"""Three steps an epoch."""


class Ended(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that it had to say of a failure."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith(("train.py: ", "eval.py: "))
        return self.err.partition(": ")[2].rstrip("\n")


def call(script: Any, *words: str | Path) -> Ended:
    """A script's `main` on these words."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = script.main([str(word) for word in words])
    return Ended(code, out.getvalue(), err.getvalue())


def call_train(*words: str | Path) -> Ended:
    return call(train, *words)


def call_eval(*words: str | Path) -> Ended:
    return call(evaluation, *words, "--device", "cpu", "--samples", "3")


def make_tiny_data(folder: Path, height: int = 10, width: int = 9, contrary: bool = False) -> Path:
    """60 random images to train on, 12 to validate, 12 to test.

    contrary: those to train on are all dark, those to validate all bright: no epoch is better than the one before.
    """
    random = torch.Generator().manual_seed(height * width)
    images, test = (torch.randint(0, 256, (n, height, width), dtype=torch.uint8, generator=random) for n in (72, 12))
    return write_contrary(folder, images // 4, test) if contrary else write_data(folder, images, test)


@contextlib.contextmanager
def interrupted_after(phase: str, epoch: int) -> Iterator[None]:
    """A training within it ends as by SIGTERM, once it has written this epoch."""
    save_epoch = Run.save_epoch

    def save_and_end(self: Run, trained: Phase, progress: Any, *more: Any) -> None:
        save_epoch(self, trained, progress, *more)
        if (trained.name, progress.epoch) == (phase, epoch):
            raise Interrupted("interrupted", 15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_epoch", save_and_end)
        yield


def results(folder: Path) -> dict[str, Any]:
    """The checkpoints and the metrics of a run, apart from times."""
    return {**checkpoints(folder), "metrics": [untimed(record) for record in RunFolder(folder).metrics()]}
