"""What a run writes as it goes: a disk that is full is said by each method by itself, whatever comes after it."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.disk import largest_file

from cvae.errors import DiskError
from cvae.run.folder import METRICS
from cvae.run.log import RunLog

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of files")

PICTURE = torch.zeros(3, 8, 8, dtype=torch.uint8)
WRITES: dict[str, Callable[[RunLog], object]] = {
    "epoch": lambda log: log.epoch("cvae", {"epoch": 1, "train_elbo": -1.0}, PICTURE),
    "finish": lambda log: log.finish({"seed": 0}, {"validation_elbo": -1.0}),
}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    """The log of a run, closed in the end as far as it can be."""
    log = RunLog(tmp_path, {})
    yield log
    with suppress(DiskError):
        log.close()


@pytest.mark.parametrize("method", WRITES)
def test_full_disk(log: RunLog, tmp_path: Path, method: str) -> None:
    """One line of text with the folder in it."""
    log.epoch("cvae", {"epoch": 0, "train_elbo": -2.0}, PICTURE)
    expected = rf"{re.escape(str(tmp_path))}: the log cannot be written \([^\n]+\)\Z"
    with largest_file(max(log.position().values())), pytest.raises(DiskError, match=expected):
        WRITES[method](log)


def test_metrics_that_cannot_grow(log: RunLog, tmp_path: Path) -> None:
    """The line of an epoch is refused at once, not when the log is brought to the disk."""
    with largest_file(0), pytest.raises(DiskError, match=r"the log cannot be written \([^\n]+\)\Z"):
        log.epoch("cvae", {"epoch": 1, "train_elbo": -1.0}, PICTURE)
    assert (tmp_path / METRICS).stat().st_size == 0
