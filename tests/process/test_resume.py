"""Exact resume: wherever a training is killed, it can go on, and leaves what one leaves that was never interrupted."""

import random
import shutil
from pathlib import Path

import pytest
from support.inprocess import TINY, make_tiny_data
from support.trainings import Forked, assert_same, epochs_logged

from cvae.run import checkpoint

WORDS = [*TINY, "--data", "tiny"]
"""A baseline of one epoch and a CVAE of two, of which the second is no improvement."""


@pytest.fixture(scope="module")
def reference(work: Path, forked: Forked) -> tuple[Path, list[str]]:
    """The folder of a training, undisturbed, and the moments at which it changed the disk."""
    make_tiny_data(work / "tiny", contrary=True)
    answer = forked(*WORDS, "--name", "reference", watched=True)
    assert answer["code"] == 0, answer
    assert checkpoint.load(work / "runs/reference/last.pt")["progress"]["best_epoch"] == 1
    return work / "runs/reference", answer["moments"]


def test_killed_before_any_write_and_again_as_it_goes_on(
    work: Path, forked: Forked, reference: tuple[Path, list[str]]
) -> None:
    """A training killed at any moment, and killed a second time after it was resumed, ends like the undisturbed one."""
    whole, moments = reference
    for what, times in {
        "replace last.pt": 3,
        "replace best.pt": 2,
        "replace summary.json": 1,
        "epoch flush": 3,
    }.items():
        assert sum(what in moment for moment in moments) == times, moments  # the control: all are seen
    dice, best_behind = random.Random(0), 0
    for kill_at, moment in enumerate(moments):
        if not any(call in moment for call in ("rename", "replace", "epoch flush")):
            continue  # most others find the same at its place
        name = f"killed-{kill_at}"
        folder, argv = work / "runs" / name, [*WORDS, "--name", name]
        assert forked(*argv, kill_at=kill_at)["code"] == -9
        if (folder / "config.json").exists():
            best_behind += is_best_behind(folder)
            argv = ["--resume", name]
            second = forked(*argv, kill_at=dice.randrange(12)) if kill_at % 3 == 0 else {"code": 0}
            assert second["code"] in (0, -9), second
        answer = forked(*argv)
        assert answer["code"] == 0, (moment, answer)
        assert_same(folder, whole)
        shutil.rmtree(folder)
    assert best_behind >= 2  # last.pt is of a new best epoch, and best.pt of an earlier one or not there at all


def is_best_behind(folder: Path) -> bool:
    """Whether the last checkpoint is the best, and stands there already while `best.pt` does not hold it yet."""
    if not (folder / "last.pt").exists():
        return False
    last = checkpoint.load(folder / "last.pt")
    if last["progress"]["epoch"] != last["progress"]["best_epoch"]:
        return False
    return not (folder / "best.pt").exists() or last["phase"] != checkpoint.load(folder / "best.pt")["phase"]


def test_what_a_crash_leaves_is_dropped(work: Path, forked: Forked, reference: tuple[Path, list[str]]) -> None:
    """A whole epoch, a torn line, torn records, a log that was being begun, half a file. What is not ours stays."""
    folder, moments = work / "runs/torn", reference[1]
    third = [i for i, moment in enumerate(moments) if moment == "atomic_file replace last.pt"][2]
    assert forked(*WORDS, "--name", "torn", kill_at=third)["code"] == -9
    assert epochs_logged(folder)[-1] == ("cvae", 2)  # one more than last.pt has seen
    [log] = folder.glob("events.*")
    with open(folder / "metrics.jsonl", "ab") as metrics, open(log, "ab") as records:
        metrics.write(b'{"phase": "cv')
        records.write(log.read_bytes()[:1000])
    log.with_suffix(".later.train").write_bytes(log.read_bytes()[:777])
    (folder / ".last.pt.tmp").write_bytes(b"half a f")
    foreign = [folder / ".classifier.safetensors.01.tmp", folder / "events.out.tfevents.1.somebody"]
    for path in foreign:
        path.write_bytes(b"another program's")
    assert forked("--resume", "torn")["code"] == 0
    for path in foreign:
        assert path.read_bytes() == b"another program's"
        path.unlink()
    assert_same(folder, reference[0])
