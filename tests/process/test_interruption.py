"""Signals, bad numbers, two trainings in one folder, and readers beside a training: nothing is lost, nothing half."""

import re
import signal
import sys
from pathlib import Path

import pytest
from support.inprocess import call_train
from support.trainings import (
    ENDLESS,
    ROOT,
    SMALL,
    Forked,
    assert_same,
    checkpoints,
    contents,
    epochs_logged,
    events,
    finish,
    fork_script,
    running,
    said,
    start,
    train_command,
    wait_until,
)

from cvae.run import checkpoint
from cvae.run.folder import RunFolder
from cvae.run.load import load
from cvae.training.phase import Phase


def test_ctrl_c_and_a_second_training_in_the_folder(work: Path, forked: Forked) -> None:
    """The second is refused; the first leaves at a step's end, and whoever goes on comes to the same end."""
    folder = work / "runs/held"
    with running(*train_command("--data", "data", *ENDLESS, "--name", "held", "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 1) in epochs_logged(folder), process)
        config = contents(folder)["config.json"]
        held = "train.py: runs/held is held by another training; wait for it, or choose another --name\n"
        answer = forked("--resume", "held", "--epochs", "7", "--quiet")
        assert (answer["code"], answer["output"]) == (2, held)
        answer = forked("--data", "data", *SMALL, "--name", "held", "--overwrite")
        assert (answer["code"], said(answer["output"])) == (2, held)
        assert contents(folder)["config.json"] == config
        seen = len(epochs_logged(folder))  # the first one is none the worse for it
        wait_until(lambda: len(epochs_logged(folder)) > seen + 1, process)
        process.send_signal(signal.SIGINT)
        seen = len(epochs_logged(folder))
        code, out, err = finish(process)
    assert len(epochs_logged(folder)) <= seen + 1  # the one that was being written
    assert (code, out) == (130, "")
    assert err == "train.py: interrupted; to go on: python train.py --resume runs/held\n"
    assert not (folder / "summary.json").exists()
    epochs = str(len(epochs_logged(folder)))  # those of the baseline, 2, are the two more
    assert forked("--resume", "held", "--epochs", epochs)["code"] == 0
    assert forked("--data", "data", *ENDLESS, "--epochs", epochs, "--name", "undisturbed")["code"] == 0
    assert_same(folder, folder.with_name("undisturbed"), apart_from="texts")  # of the settings that it began with


def test_readers_see_whole_files(work: Path, forked: Forked) -> None:
    """A run that was finished and goes on, read all the time until SIGTERM; beside it one that stays finished."""
    for name in ("still", "moving"):
        assert forked("--data", "data", *ENDLESS, "--epochs", "1", "--name", name)["code"] == 0
    folder, bests, reads = work / "runs/moving", set(), 0
    with running(*train_command("--resume", "moving", "--epochs", "5000", "--quiet"), cwd=work) as process:
        wait_until(lambda: len(epochs_logged(folder)) > 4, process)
        while len(bests) < 5 or reads < 20:
            assert process.poll() is None
            bests.add(str(load(folder).state_dict()["generation_net.layers.0.bias"].tolist()))
            last = checkpoint.load(folder / "last.pt")
            records = RunFolder(folder).metrics()
            assert [record["epoch"] for record in records] == [1, 2, *range(1, len(records) - 1)]
            assert last["progress"]["epoch"] <= RunFolder(folder).metrics()[-1]["epoch"]
            reads += 1
        steps = [step for step, _ in events(folder)["scalars"]["cvae/kl/train"]]
        assert steps == list(range(1, len(steps) + 1))

        words = ["--samples", "2", "--format", "csv", "--runs", "runs/still", "runs/moving"]
        scores = fork_script("eval.py", *words, cwd=work)
        line = "eval.py: runs/moving: is not finished; "
        assert (scores.returncode, scores.stderr.startswith(line), scores.stderr.count("\n")) == (3, True, 1)
        assert "still" in scores.stdout
        assert "moving" not in scores.stdout
        process.send_signal(signal.SIGTERM)
        assert finish(process)[::2] == (143, "train.py: interrupted; to go on: python train.py --resume runs/moving\n")


SLOW = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from cvae.console import before_torch
before_torch()
import train
from cvae.run.session import Run

save_epoch = Run.save_epoch
def slow(run, *arguments):
    save_epoch(run, *arguments)
    print("saved", file=sys.__stdout__, flush=True)
    while not run.interruption.signal_number:
        time.sleep(0.01)
    print("remembered", file=sys.__stdout__, flush=True)
    time.sleep(1e6)
Run.save_epoch = slow
sys.exit(train.main(sys.argv[1:]))
"""
"""A training that is far from the end of a step, as one with very large networks may be."""


def test_second_ctrl_c_leaves_at_once(work: Path) -> None:
    command = [sys.executable, "-c", SLOW, ROOT, "--data", "data", *ENDLESS, "--name", "twice", "--quiet"]
    with running(*command, cwd=work) as process:
        assert process.stdout is not None
        for line in ("saved\n", "remembered\n"):
            assert process.stdout.readline() == line
            assert process.poll() is None  # the first one waits for a good moment
            process.send_signal(signal.SIGINT)
        assert finish(process) == (-signal.SIGINT, "", "")
    assert epochs_logged(work / "runs/twice") == [("baseline", 1)]


AMID_IMPORTS = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[2], run_name="__main__")
"""
"""A script to which Ctrl-C comes at the moment at which it imports a certain module."""


@pytest.mark.parametrize(
    ("script", "module"), [("train.py", "torch"), ("eval.py", "torch"), ("eval.py", "cvae.run.plan")]
)
def test_ctrl_c_while_it_starts(work: Path, script: str, module: str) -> None:
    """Amid the imports, the first or the last, there is nothing to say: no traceback, and no folder was made."""
    before = sorted(work.rglob("*"))
    command = [sys.executable, "-c", AMID_IMPORTS, module, ROOT / script]
    assert finish(start(command, work)) == (-signal.SIGINT, "", "")
    assert sorted(work.rglob("*")) == before


def test_exploding_weights(work: Path) -> None:
    """One of nine steps explodes and eight are skipped; two steps later there were ten in a row."""
    argv = ["--data", work / "data", *SMALL, "--schedule", "constant", "--warmup-epochs", "0", "--average", "0"]
    argv += ["--device", "cpu", "--runs", work / "runs", "--name"]
    folder = work / "runs/exploding"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phase, "learning_rate", lambda self, s, epoch: 1e36 if epoch >= 2 else s.learning_rate)
        ended = call_train(*argv, "exploding", "--epochs", "9")
    assert ended.code == 4
    reason = "the loss or its gradient was NaN, infinite or too large 10 steps in a row; the weights have not taken it"
    assert re.fullmatch(rf"cvae, epoch 4/9: {reason}\. [^\n]+", ended.line)
    records = RunFolder(folder).metrics()[2:]
    assert [record["skipped_steps"] for record in records] == [0, 0, 8]
    assert [record["validation_elbo"] is None for record in records] == [False, False, True]

    # The weights of its best epoch, the second, are those of a training that did not come to the third.
    assert call_train(*argv, "sound", "--epochs", "2").code == 0
    assert checkpoints(folder)["best"] == checkpoints(work / "runs/sound")["best"]
    last = checkpoint.load(folder / "last.pt")
    assert last["progress"]["best_epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in (*last["model"].values(), *last["optimizer"]["moments"]))

    # Two more bad steps, and it says so again: the eight are not forgotten.
    assert call_train("--resume", folder)[::2] == (4, ended.err)


def test_not_one_good_epoch(work: Path) -> None:
    """Two steps an epoch: before there were ten bad ones in a row, the epochs are over."""
    argv = ["--data", work / "data", *SMALL, "--learning-rate", "1e38", "--batch-size", "128", "--average", "0"]
    ended = call_train(*argv, "--device", "cpu", "--runs", work / "runs", "--name", "none")
    assert ended.code == 4
    assert ended.line.startswith("baseline: the validation loss was NaN or infinite after each of 2 epochs. ")
    assert not (work / "runs/none/best.pt").exists()
