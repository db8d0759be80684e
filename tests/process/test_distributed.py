"""Training on two processes: the same as on one, and no process is left waiting."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from support.trainings import (
    ENDLESS,
    ROOT,
    SMALL,
    Forked,
    epochs_logged,
    finish,
    fork_two,
    running,
    start,
    torchrun,
    wait_until,
)

from cvae.model.networks import build
from cvae.run import checkpoint
from cvae.run.checkpoint import read_json
from cvae.run.folder import RunFolder

STOPS = [
    *SMALL, "--data", "contrary", "--batch-size", "60", "--baseline-epochs", "1", "--epochs", "9", "--patience", "1",
    "--schedule", "constant", "--warmup-epochs", "0", "--precision", "fp32", "--bend", "0.5", "--unbent-epochs", "0",
]  # fmt: skip
"""The CVAE's second epoch is no better, and the last: ten steps of the CVAE, and five of the baseline before them."""


def train_on_two(work: Path, *words: str) -> str:
    """Return what the first of two processes printed; the other printed nothing."""
    (code, out, err), other = fork_two("train.py", *words, cwd=work)
    assert (code, err, other) == (0, "", (0, "", ""))
    return out


def assert_agree(left: Path, right: Path) -> None:
    """Assert that two trainings differ by rounding.

    A sum over two processes has another order, so that gradients differ in their last bits (2^-24 of their terms).
    Adam divides them by their size, so that one which nearly cancels may take a step of its own; few do. All in all
    the weights differ by less than a thousandth of the way that they have come, where other noise or other images
    would make it a large part.
    """
    first, second = checkpoint.load(left / "last.pt"), checkpoint.load(right / "last.pt")
    assert (first["phase"], first["progress"]["epoch"]) == (second["phase"], second["progress"]["epoch"])
    run = RunFolder(left)
    began = build(run.task, run.settings).state_dict()
    for part in ("model", "average"):
        one, other, zero = (
            torch.cat([each[name].flatten() for name in began]) for each in (first[part], second[part], began)
        )
        assert (one - zero).norm() > 0.01 * zero.norm()
        assert (one - other).norm() < 1e-3 * (one - zero).norm(), part
    for one, other in zip(RunFolder(left).metrics(), RunFolder(right).metrics(), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"phase", "seconds", "images_per_second"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key


@pytest.fixture(scope="module")
def on_one(work: Path, forked: Forked) -> Path:
    """Return the folder of a training on one process."""
    answer = forked(*STOPS, "--name", "one")
    assert answer["code"] == 0, answer
    return work / "runs/one"


def test_two_machines_train_what_one_does(work: Path, on_one: Path, tmp_path: Path) -> None:
    """By two agents of torchrun, without a common disk: the first process alone writes and prints."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    folders, agents = [tmp_path / "one", tmp_path / "other"], []
    for folder in folders:
        folder.mkdir()
        command = [*agent, "--rdzv-backend", "c10d", "--rdzv-endpoint", place, ROOT / "train.py", *STOPS]
        agents.append(start([*command, "--data", work / "contrary"], folder))
    ends = [finish(each) for each in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(len(out.splitlines()) for _, out, _ in ends) == [0, 5]  # images, three epochs, what to do next
    (run,) = (folder / "runs/q1" for folder in folders if (folder / "runs").exists())
    assert len(list(run.glob("events.*"))) == 1
    assert read_json(run / "config.json")["device"]["processes"] == 2
    assert epochs_logged(on_one) == epochs_logged(run) == [("baseline", 1), ("cvae", 1), ("cvae", 2)]  # of 9
    assert_agree(on_one, run)


def test_begun_on_one_resumed_on_two(work: Path, forked: Forked, on_one: Path) -> None:
    moments = forked(*STOPS, "--name", "moved-through", watched=True)["moments"]
    second_epoch = [i for i, moment in enumerate(moments) if moment == "epoch write"][2]
    assert forked(*STOPS, "--name", "moved", kill_at=second_epoch)["code"] == -9
    assert epochs_logged(work / "runs/moved") == [("baseline", 1), ("cvae", 1)]
    assert "processes 2 in place of 1" in train_on_two(work, "--resume", "moved")
    assert_agree(on_one, work / "runs/moved")


def test_batch_that_cannot_be_shared(work: Path) -> None:
    """Refused by both with exit code 2, which torchrun would replace by its own, and said by one."""
    words = ["--data", "data", *SMALL, "--batch-size", "33", "--name", "odd", "--quiet"]
    line = "train.py: a batch of 33 images cannot be shared evenly by 2 processes\n"
    assert fork_two("train.py", *words, cwd=work) == [(2, "", line), (2, "", "")]
    assert not (work / "runs/odd").exists()


# When one of them ends


def workers(torchrun_pid: int) -> dict[int, int]:
    """Return the process ids of a job, by rank."""
    ranks = {}
    for pid in map(int, Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split()):
        if found := re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()):
            ranks[int(found[1])] = pid
    return ranks


@pytest.mark.parametrize("way", ["kill 0", "kill 1", "Ctrl-C"])
def test_job_that_ends_can_be_resumed(work: Path, forked: Forked, way: str) -> None:
    """One line from one process, no traceback, nothing left running; begun on two, it goes on on one."""
    folder = work / "runs" / way
    with running(*torchrun("train.py", "--data", "data", *ENDLESS, "--name", way, "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 2) in epochs_logged(folder), process)
        pids = workers(process.pid)
        assert sorted(pids) == [0, 1]
        if way == "Ctrl-C":  # which a terminal sends to all of them, and torchrun to its children once more
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(pids[int(way[-1])], signal.SIGKILL)
        code, out, err = finish(process)
    assert code not in (0, None)
    assert out == ""
    assert not re.search(rf'File "{ROOT}/(train|cvae)', err)
    (line,) = (line for line in err.splitlines() if line.startswith("train.py: "))
    if way.startswith("kill"):
        assert line.startswith("train.py: another process of this job has ended, so this one ends too")
        assert "imed out" not in line  # it was noticed, and not waited for
    else:
        assert line == f"train.py: interrupted; to go on: python train.py --resume {folder.relative_to(work)}"
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    seen = len(epochs_logged(folder))
    assert forked("--resume", way, "--epochs", str(seen))["code"] == 0
    assert epochs_logged(folder) == [("baseline", 1), ("baseline", 2), *(("cvae", n + 1) for n in range(seen))]
