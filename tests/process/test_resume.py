"""Exact resume: wherever a training is killed, it can go on, and leaves what one leaves that was never interrupted."""

import random
import shutil
from pathlib import Path

import pytest
from support.inprocess import TINY, make_tiny_data
from support.scripts import run_script
from support.trainings import SMALL, Forked, assert_same, epochs_logged, finish, said, start, train_command

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


def test_moments_are_those_of_every_write(reference: tuple[Path, list[str]]) -> None:
    """The control of the next test: what it kills before."""
    for what, times in {
        "create_run rename": 1,
        "atomic_file replace config.json": 1,
        "atomic_file replace last.pt": 3,
        "atomic_file replace best.pt": 2,
        "atomic_file replace learning.gif": 1,
        "atomic_file replace completions.png": 1,
        "atomic_file replace summary.json": 1,
        "write_atomically write last.pt": 3,
        "epoch flush": 3,
        "_add flush": 5,
    }.items():
        assert sum(moment.startswith(what) for moment in reference[1]) == times, (what, reference[1])


def test_killed_before_any_write_and_again_as_it_goes_on(
    work: Path, forked: Forked, reference: tuple[Path, list[str]]
) -> None:
    """A training killed at any moment, and killed a second time after it was resumed, ends like the undisturbed one."""
    whole, moments = reference
    dice, best_behind = random.Random(0), 0
    for kill_at, moment in enumerate(moments):
        if moment.startswith(("write_atomically write", "atomic_file flush")) and moment != moments[-1]:
            continue  # the next moment finds the same at its place
        name = f"killed-{kill_at}"
        folder, argv = work / "runs" / name, [*WORDS, "--name", name]
        assert forked(*argv, kill_at=kill_at)["code"] == -9
        if (folder / "config.json").exists():
            best_behind += is_best_behind(folder)
            argv = ["--resume", name]
            second = forked(*argv, kill_at=dice.randrange(12)) if kill_at % 3 == 0 else {"code": 0}
            assert second["code"] in (0, -9), second
        else:
            assert "create_run rename" not in moments[:kill_at]
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
    (folder / ".classifier.safetensors.01.tmp").write_bytes(b"another program's")
    foreign = folder / "events.out.tfevents.1.somebody"
    foreign.write_bytes(b"foreign")
    assert forked("--resume", "torn")["code"] == 0
    assert foreign.read_bytes() == b"foreign"
    for path in (foreign, folder / ".classifier.safetensors.01.tmp"):
        path.unlink()
    assert_same(folder, reference[0])


def test_by_the_command_itself(work: Path, forked: Forked) -> None:
    """A process of its own comes to the same as one that was forked; its output tells the epochs that were left."""
    argv = ["--data", "data", *SMALL, "--name"]
    code, _, err = finish(start(train_command(*argv, "undisturbed"), work))
    assert (code, err) == (0, "")
    answer = forked(*argv, "resumed", watched=True)
    assert_same(work / "runs/resumed", work / "runs/undisturbed")
    shutil.rmtree(work / "runs/resumed")
    second = [i for i, moment in enumerate(answer["moments"]) if moment.startswith("epoch flush")][1]
    assert forked(*argv, "resumed", kill_at=second)["code"] == -9
    ended = run_script("train.py", "--resume", "resumed", cwd=work)
    assert (ended.returncode, ended.stderr) == (0, "")
    epochs = ["baseline, epoch 2", "cvae, epoch 1", "cvae, epoch 2", "cvae, epoch 3"]
    assert [line.split("/")[0] for line in said(ended.stdout).splitlines()[:-1]] == epochs
    assert_same(work / "runs/resumed", work / "runs/undisturbed")
    answer = forked("--resume", "nowhere")
    line = "train.py: runs/nowhere is no run folder: it has no config.json\n"
    assert (answer["code"], answer["output"]) == (3, line)
    assert not (work / "runs/nowhere").exists()
