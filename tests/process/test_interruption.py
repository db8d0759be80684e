"""Signals, bad numbers, two trainings in one folder, and readers beside a training: nothing is lost, nothing half."""

import re
import signal
import struct
import sys
from pathlib import Path

import pytest
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
    plain,
    running,
    said,
    start,
    train_command,
    wait_until,
)

from cvae.run import checkpoint
from cvae.run.folder import RunFolder
from cvae.run.load import load


def assert_goes_on_to_the_same_end(folder: Path, forked: Forked) -> None:
    """That an endless training that was ended can be finished two epochs later, like one that never was ended."""
    epochs = len(epochs_logged(folder))  # those of the baseline, 2, are the two more
    answer = forked("--resume", folder.name, "--epochs", str(epochs))
    assert answer["code"] == 0, answer
    reference = folder.with_name(folder.name + "-undisturbed")
    answer = forked("--data", "data", *ENDLESS, "--epochs", str(epochs), "--name", reference.name)
    assert answer["code"] == 0, answer
    assert_same(folder, reference, apart_from="texts")  # of the settings, which the first one began with


def assert_whole_records(log: Path) -> None:
    """That an event file ends where a record ends: length, its checksum, content, its checksum, and so on."""
    content, position = log.read_bytes(), 0
    while position < len(content):
        position += 16 + struct.unpack_from("<Q", content, position)[0]
    assert position == len(content) > 0


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal(work: Path, forked: Forked, name: str) -> None:
    """It leaves at a step's end, says in one line how to go on, and whoever goes on comes to the same end."""
    number = signal.Signals[name]
    folder = work / "runs" / name
    with running(*train_command("--data", "data", *ENDLESS, "--name", name, "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 3) in epochs_logged(folder), process)
        process.send_signal(number)
        seen = len(epochs_logged(folder))
        code, out, err = finish(process)
    assert len(epochs_logged(folder)) <= seen + 1  # the one that was being written
    assert (code, out) == (128 + number, "")
    assert err == f"train.py: interrupted; to go on: python train.py --resume runs/{name}\n"
    assert not (folder / "summary.json").exists()
    [log] = folder.glob("events.*")
    assert_whole_records(log)
    assert [step for step, _ in events(folder)["scalars"]["cvae/kl/train"]] == [n for _, n in epochs_logged(folder)[2:]]
    assert_goes_on_to_the_same_end(folder, forked)


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
    print("saved", flush=True)
    while not run.interruption.signal_number:
        time.sleep(0.01)
    print("remembered", flush=True)
    time.sleep(1e6)
Run.save_epoch = slow
sys.exit(train.main(sys.argv[1:]))
"""
"""A training that is far from the end of a step, as one with very large networks may be."""


def test_second_ctrl_c_leaves_at_once(work: Path, forked: Forked) -> None:
    folder = work / "runs/twice"
    command = [sys.executable, "-c", SLOW, ROOT, "--data", "data", *ENDLESS, "--name", "twice", "--quiet"]
    with running(*command, cwd=work) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "remembered\n"
        assert process.poll() is None  # the first one waits for a good moment
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
    assert (code, out, err) == (130, "", "")
    assert epochs_logged(folder) == [("baseline", 1)]
    answer = forked("--resume", "twice", "--epochs", "1")
    assert answer["code"] == 0, answer


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
    ("script", "module"),
    [
        ("train.py", "torch"),
        ("train.py", "cvae.training.phase"),
        ("eval.py", "torch"),
        ("eval.py", "cvae.run.plan"),
    ],
)
def test_ctrl_c_while_it_starts(work: Path, script: str, module: str) -> None:
    """Amid the imports, the first or the last, there is nothing to say: no traceback, and no folder was made."""
    before = sorted(work.rglob("*"))
    command = [sys.executable, "-c", AMID_IMPORTS, module, ROOT / script]
    assert finish(start(command, work)) == (-signal.SIGINT, "", "")
    assert sorted(work.rglob("*")) == before


INTERRUPTED_EVALUATION = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from cvae.console import before_torch
before_torch()
import eval as evaluation

evaluation.find_runs = lambda *_: os.kill(os.getpid(), signal.SIGINT)
code = evaluation.main([])
print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL)
sys.exit(code)
"""
"""An evaluation to which Ctrl-C comes as it looks for runs."""


def test_ctrl_c_ends_an_evaluation_in_one_line(work: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_EVALUATION, ROOT]
    assert finish(start(command, work)) == (130, "True\n", "eval.py: interrupted\n")


# Bad numbers


EXPLODING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train

train.Phase.learning_rate = lambda self, s, epoch: 1e36 if epoch >= 2 else s.learning_rate
sys.exit(train.main(sys.argv[1:]))
"""
"""A training whose weights explode in the first step of the third epoch of a phase that has so many."""


def test_exploding_weights(work: Path, forked: Forked) -> None:
    """One of nine steps explodes and eight are skipped; two steps later there were ten in a row."""
    argv = ["--data", "data", *SMALL, "--schedule", "constant", "--warmup-epochs", "0", "--average", "0", "--name"]
    folder, command = work / "runs/exploding", [sys.executable, "-c", EXPLODING, ROOT]
    code, _, err = finish(start([*command, *argv, "exploding", "--epochs", "9"], work))
    assert code == 4
    reason = "the loss or its gradient was NaN, infinite or too large 10 steps in a row; the weights have not taken it"
    assert re.fullmatch(rf"train\.py: cvae, epoch 4/9: {reason}\. [^\n]+\n", err)
    records = RunFolder(folder).metrics()[2:]
    assert [record["skipped_steps"] for record in records] == [0, 0, 8]
    assert [record["validation_elbo"] is None for record in records] == [False, False, True]

    # The weights of its best epoch, the second, are those of a training that did not come to the third.
    assert forked(*argv, "sound", "--epochs", "2")["code"] == 0
    assert checkpoints(folder)["best"] == checkpoints(work / "runs/sound")["best"]
    last = checkpoint.load(folder / "last.pt")
    assert last["progress"]["best_epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in (*last["model"].values(), last["optimizer"]["moments"]))

    # Two more bad steps, and it says so again: the eight are not forgotten.
    answer = forked("--resume", "exploding")
    assert (answer["code"], answer["err"]) == (4, err)


def test_not_one_good_epoch(work: Path, forked: Forked) -> None:
    """Two steps an epoch: before there were ten bad ones in a row, the epochs are over."""
    argv = ["--data", "data", *SMALL, "--learning-rate", "1e38", "--batch-size", "128", "--average", "0"]
    answer = forked(*argv, "--name", "none")
    assert answer["code"] == 4, answer
    line = answer["output"].splitlines()[-1]
    assert line.startswith("train.py: baseline: the validation loss was NaN or infinite after each of 2 epochs. ")
    assert not (work / "runs/none/best.pt").exists()


# One training at a time


def test_second_training_in_a_folder(work: Path, forked: Forked) -> None:
    folder = work / "runs/held"
    with running(*train_command("--data", "data", *ENDLESS, "--name", "held", "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 1) in epochs_logged(folder), process)
        inode, config = folder.stat().st_ino, contents(folder)["config.json"]
        held = "train.py: runs/held is held by another training; wait for it, or choose another --name\n"
        answer = forked("--resume", "held", "--epochs", "7", "--quiet")
        assert (answer["code"], answer["out"], answer["err"]) == (2, "", held)
        answer = forked("--data", "data", *SMALL, "--name", "held", "--overwrite")
        assert (answer["code"], said(answer["output"])) == (2, held)
        answer = forked("--data", "data", *SMALL, "--name", "held")
        assert answer["code"] == 2
        assert answer["output"].startswith("train.py: runs/held exists already: ")
        assert (folder.stat().st_ino, contents(folder)["config.json"]) == (inode, config)
        assert not list((work / "runs").glob(".held*"))

        seen = len(epochs_logged(folder))  # the first one is none the worse for it
        wait_until(lambda: len(epochs_logged(folder)) > seen + 2, process)
        process.kill()
        process.communicate()
    assert (folder / ".lock").exists()  # stale now, and no obstacle
    done = checkpoint.load(folder / "last.pt")["progress"]["epoch"]
    answer = forked("--resume", "held", "--epochs", str(done + 1))
    assert answer["code"] == 0, answer


# Readers beside a training


def test_readers_see_whole_files(work: Path, forked: Forked) -> None:
    """A run that was finished and goes on, read all the time; beside it one that stays finished."""
    argv = ["--data", "data", *ENDLESS, "--epochs", "1", "--name"]
    for name in ("still", "moving"):
        assert forked(*argv, name)["code"] == 0
    folder = work / "runs/moving"
    bests = set()
    with running(*train_command("--resume", "moving", "--epochs", "5000", "--quiet"), cwd=work) as process:
        wait_until(lambda: len(epochs_logged(folder)) > 4, process)
        reads = 0
        while len(bests) < 5 or reads < 20:
            assert process.poll() is None
            bests.add(str(plain(load(folder).state_dict())["generation_net.layers.0.bias"]))
            last = checkpoint.load(folder / "last.pt")
            records = RunFolder(folder).metrics()
            assert [record["epoch"] for record in records] == [1, 2, *range(1, len(records) - 1)]
            assert last["progress"]["epoch"] <= RunFolder(folder).metrics()[-1]["epoch"]
            assert RunFolder(folder).settings.epochs == 5000
            reads += 1
        steps = [step for step, _ in events(folder)["scalars"]["cvae/kl/train"]]
        assert steps == list(range(1, len(steps) + 1))

        words = ["--samples", "2", "--format", "csv", "--runs", "runs/still", "runs/moving"]
        scores = fork_script("eval.py", *words, cwd=work)
        assert scores.returncode == 3
        assert "eval.py: runs/moving: is not finished; python train.py --resume runs/moving goes on" in scores.stderr
        assert scores.stderr.count("\n") == 1
        assert "still" in scores.stdout
        assert "moving" not in scores.stdout
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 143
