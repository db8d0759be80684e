"""What a run writes as it goes: each epoch once, for TensorBoard and for programs; a full disk in one line."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainings import events, largest_file

from cvae.run.log import RunLog, read_pictures

SETTINGS = {"seed": 0, "data": "a\\b", "hidden": [8, 7]}
PICTURE = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)


def record(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_elbo": -1.5 * epoch, "validation_elbo": float("nan"), "learning_rate": 0.5}


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    """The log of a run, closed in the end as far as it can be."""
    log = RunLog(tmp_path, {}, SETTINGS)
    yield log
    with suppress(OSError):
        log.close()


def test_what_is_logged(log: RunLog, tmp_path: Path) -> None:
    log.epoch("cvae", record(1), PICTURE)
    log.finish({"seed": 0, "hidden": [8, 7]}, {"validation_loss": 2.0})
    assert logged(tmp_path) == [{"phase": "cvae", **record(1), "validation_elbo": None}]
    view = events(tmp_path)
    assert view["scalars"]["cvae/elbo/train"] == [(1, -1.5)]
    assert "cvae/elbo/validation" not in view["scalars"]
    assert b"| seed | 0 |" in view["texts"]["settings/text_summary"][0][1]
    assert "hparams" in view["plugins"].values()
    assert view["scalars"]["validation_loss"] == [(0, 2.0)]
    assert read_pictures(tmp_path).keys() == {("cvae", 1)}


def test_taken_back_to_a_position(log: RunLog, tmp_path: Path) -> None:
    """What was written after it is gone from both files, torn records too; what is not ours stays as it is."""
    log.epoch("cvae", record(1), PICTURE)
    position = log.position()
    log.epoch("cvae", record(2), PICTURE)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"phase": "cv')
    assert [line["epoch"] for line in logged(tmp_path)] == [1, 2]
    [path] = tmp_path.glob("events.*")
    with open(path, "ab") as file:
        file.write(b"torn")
    foreign, later = path.with_suffix(".somebody"), path.with_suffix(".9.train")
    foreign.write_bytes(b"foreign")
    later.write_bytes(b"begun and not saved")
    for _ in range(2):
        again = RunLog(tmp_path, position, SETTINGS)
        again.epoch("cvae", record(2), PICTURE)
        again.close()
        assert [line["epoch"] for line in logged(tmp_path)] == [1, 2]
        assert foreign.read_bytes() == b"foreign"
        assert not later.exists()
    foreign.unlink()
    assert list(tmp_path.glob("events.*")) == [path]
    assert [step for step, _ in events(tmp_path)["scalars"]["cvae/elbo/train"]] == [1, 2]


def test_events_that_are_lost_are_no_obstacle(log: RunLog, tmp_path: Path) -> None:
    """What follows goes into a file of its own, which TensorBoard can read."""
    log.epoch("cvae", record(1), PICTURE)
    position = log.position()
    log.close()
    [path] = tmp_path.glob("events.*")
    path.unlink()
    again = RunLog(tmp_path, position, SETTINGS)
    again.epoch("cvae", record(2), PICTURE)
    again.close()
    assert read_pictures(tmp_path).keys() == {("cvae", 2)}
    assert [line["epoch"] for line in logged(tmp_path)] == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of files")
def test_full_disk(log: RunLog) -> None:
    """No sign of an epoch that was not written."""
    log.epoch("cvae", record(1), PICTURE)
    with largest_file(max(log.position().values())), pytest.raises(OSError, match="File too large"):
        log.epoch("cvae", record(2), PICTURE)
