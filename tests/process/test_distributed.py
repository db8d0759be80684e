"""Training and evaluating on two processes, by torchrun: the same as on one, and no process is left waiting."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from support.trainings import (
    ENDLESS,
    ROOT,
    SMALL,
    Forked,
    epochs_logged,
    events,
    finish,
    fork_two,
    running,
    start,
    torchrun,
    wait_until,
)

from cvae.run import checkpoint
from cvae.run.folder import read_json, read_metrics
from cvae.settings import Settings

STOPS = [
    *SMALL, "--data", "contrary", "--batch-size", "60", "--baseline-epochs", "1", "--epochs", "9", "--patience", "1",
    "--schedule", "constant", "--warmup-epochs", "0", "--precision", "fp32",
]  # fmt: skip
"""The CVAE's second epoch is no better, and the last: ten steps of the CVAE, and five of the baseline before them."""
ROUNDING = 4 * 2**-23


@pytest.fixture(scope="module")
def on_one(work: Path, forked: Forked) -> Path:
    """The folder of a training on one process."""
    answer = forked(*STOPS, "--name", "one")
    assert answer["code"] == 0, answer
    return work / "runs/one"


@pytest.fixture(scope="module")
def on_two(work: Path) -> tuple[Path, str]:
    """The folder of the same training on two, and what they printed."""
    code, out, err = finish(start(torchrun("train.py", *STOPS, "--name", "two"), work))
    assert (code, err) == (0, "")
    return work / "runs/two", out


def train_on_two(work: Path, *words: str) -> str:
    """What the first of two processes printed; the other printed nothing."""
    (code, out, err), other = fork_two("train.py", *words, cwd=work)
    assert (code, err, other) == (0, "", (0, "", ""))
    return out


def assert_agree(left: Path, right: Path, rounding: float = ROUNDING) -> None:
    """That two trainings agree to float32 rounding.

    Two processes add up a gradient in another order, so that it differs in its last bits. Where a gradient is close to
    zero these are most of it, and Adam makes a step of its own of them: one weight in 500 may differ by a hundredth of
    a step. The others of a tensor together may not, by more than a few units in the last place.
    """
    a, b = checkpoint.load(left / "last.pt"), checkpoint.load(right / "last.pt")
    assert (a["phase"], a["progress"]["epoch"]) == (b["phase"], b["progress"]["epoch"])
    for part in ("model", "average"):
        for name, tensor in a[part].items():
            differences = (tensor - b[part][name]).abs().flatten().sort().values
            most = differences[: len(differences) - len(differences) // 500]
            assert most.norm() <= rounding * tensor.norm(), (part, name)
            assert differences[-1] <= Settings.learning_rate / 100, (part, name)
    for part in ("moments", "squares"):
        for tensor, other in zip(a["optimizer"][part], b["optimizer"][part], strict=True):
            assert (tensor - other).abs().max() <= 1e-5 * tensor.abs().max(), part
    for one, other in zip(read_metrics(left / "metrics.jsonl"), read_metrics(right / "metrics.jsonl"), strict=True):
        assert one.keys() == other.keys()
        assert one["phase"] == other["phase"]
        for key in one.keys() - {"phase", "seconds", "images_per_second"}:
            assert one[key] == pytest.approx(other[key], rel=max(1e-6, rounding), abs=1e-9), key


def test_two_processes_train_what_one_does(work: Path, forked: Forked, on_one: Path, on_two: tuple[Path, str]) -> None:
    assert_agree(on_one, on_two[0])
    # The control: the weights have gone thousands of times as far as they may differ.
    assert forked(*STOPS, "--epochs", "1", "--learning-rate", "1e-30", "--name", "still")["code"] == 0
    before, after = (checkpoint.load(folder / "last.pt")["model"] for folder in (work / "runs/still", on_one))
    for name, tensor in after.items():
        assert (tensor - before[name]).norm() > 1000 * ROUNDING * tensor.norm(), name


def test_two_machines_train_what_one_does(work: Path, on_one: Path, tmp_path: Path) -> None:
    """By two agents of torchrun, without a common disk: the run is on that of the first process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    folders = [tmp_path / "one", tmp_path / "other"]
    agents = []
    for folder in folders:
        folder.mkdir()
        agents.append(start([*agent, *meeting, ROOT / "train.py", *STOPS, "--data", work / "contrary"], folder))
    ends = [finish(each) for each in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    (run,) = (folder / "runs/q1" for folder in folders if (folder / "runs").exists())
    assert_agree(on_one, run)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_processes_in_half_precision(work: Path, forked: Forked, precision: str) -> None:
    """They round otherwise, but learn the same. In float16 both give their first steps up, until the scale fits."""
    argv = ["--data", "data", *SMALL, "--epochs", "2", "--baseline-epochs", "1", "--precision", precision]
    assert forked(*argv, "--name", f"one-{precision}")["code"] == 0
    train_on_two(work, *argv, "--name", f"two-{precision}")
    one, two = (read_metrics(work / f"runs/{ranks}-{precision}/metrics.jsonl") for ranks in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["skipped_steps"] == b["skipped_steps"] == 0
        key = "validation_log_likelihood" if a["phase"] == "baseline" else "validation_elbo"
        assert a[key] == pytest.approx(b[key], rel=2e-2)
    if precision == "fp16":
        assert one[1]["overflow_steps"] > 0
        assert two[1]["overflow_steps"] > 0


@pytest.mark.parametrize(
    "words",
    ["--network paper --objective iwae --particles 3 --targets binary", "--objective hybrid --network paper",
     "--objective gsnn"],
)  # fmt: skip
def test_two_processes_with_any_network_and_objective(work: Path, forked: Forked, words: str) -> None:
    """On targets that both draw anew, too."""
    name = "-".join(words.replace("--", "").split())
    argv = [*STOPS, *words.split(), "--name"]
    assert forked(*argv, f"one-{name}")["code"] == 0
    train_on_two(work, *argv, f"two-{name}")
    assert_agree(work / f"runs/one-{name}", work / f"runs/two-{name}", 1e-5)  # sums of more that cancels


RANKED = """
import os, sys
import torch, train
from cvae.model.networks import NETWORKS, Tutorial

class Ranked(Tutorial):  # its running statistic is what its process saw, and nothing else: the process's own number

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("statistic", torch.zeros(()))

    def from_posterior(self, *arguments, **more):
        if self.training:
            self.statistic.fill_(1.0 + int(os.environ["RANK"]))
        return super().from_posterior(*arguments, **more)

NETWORKS["ranked"] = Ranked
sys.exit(train.main())
"""


def test_running_statistics_are_the_mean_over_the_processes(work: Path, tmp_path: Path) -> None:
    """Those of the model, and of the average of its weights: 1.5 where one process has 1 and the other one 2."""
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    words = [*SMALL, "--data", work / "data", "--network", "ranked", "--runs", tmp_path, "--quiet"]
    code, _, err = finish(start(torchrun(str(script), *words), work))
    assert code == 0, err
    last = checkpoint.load(tmp_path / "q1/last.pt")
    assert last["model"]["statistic"] == last["average"]["statistic"] == 1.5


def test_both_stop_early_at_the_same_epoch(on_one: Path, on_two: tuple[Path, str]) -> None:
    stopped = [("baseline", 1), ("cvae", 1), ("cvae", 2)]  # of 9
    assert epochs_logged(on_one) == epochs_logged(on_two[0]) == stopped
    for folder in (on_one, on_two[0]):
        assert read_json(folder / "summary.json")["best_epoch"] == 1


def test_only_the_first_process_writes_and_prints(on_one: Path, on_two: tuple[Path, str]) -> None:
    folder, out = on_two
    names = [{path.name.split(".vm")[0][:10] for path in each.iterdir()} for each in (on_one, folder)]
    assert names[0] == names[1]
    assert len(list(folder.glob("events.*"))) == 1
    assert len(out.splitlines()) == 5  # what was taken, three epochs, and what to do next
    assert read_json(folder / "config.json")["device"]["processes"] == 2
    assert [step for step, _ in events(folder)["scalars"]["cvae/kl/train"]] == [1, 2]


def test_begun_on_one_resumed_on_two(work: Path, forked: Forked, on_one: Path) -> None:
    moments = forked(*STOPS, "--name", "moved-through", watched=True)["moments"]
    second_epoch = [i for i, moment in enumerate(moments) if moment == "epoch write"][2]
    assert forked(*STOPS, "--name", "moved", kill_at=second_epoch)["code"] == -9
    assert epochs_logged(work / "runs/moved") == [("baseline", 1), ("cvae", 1)]
    out = train_on_two(work, "--resume", "moved")
    assert len(out.splitlines()) == 4  # what was taken, what is not bit for bit any more, an epoch, what to do next
    assert_agree(on_one, work / "runs/moved")


# When one of them ends


def workers(torchrun_pid: int) -> dict[int, int]:
    """The process ids of a job's ranks."""
    children = Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, children):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry.removeprefix(b"RANK="))] = pid
    return ranks


def own_lines(err: str) -> list[str]:
    """What the trainings themselves said, amid what torchrun has to say."""
    for ours in ("train.py", "eval.py", "cvae/"):
        assert f'File "{ROOT / ours}' not in err  # no traceback of theirs
    return [line for line in err.splitlines() if line.startswith("train.py: ")]


def assert_gone(pids: list[int]) -> None:
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_takes_the_job_down(work: Path, forked: Forked, rank: int) -> None:
    name = f"lost-{rank}"
    folder = work / "runs" / name
    with running(*torchrun("train.py", "--data", "data", *ENDLESS, "--name", name, "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 2) in epochs_logged(folder), process)
        pids = workers(process.pid)
        assert sorted(pids) == [0, 1]
        os.kill(pids[rank], signal.SIGKILL)
        code, out, err = finish(process)
    assert code not in (0, None)
    assert out == ""
    [line] = own_lines(err)
    assert line.startswith("train.py: another process of this job has ended, so this one ends too")
    assert "imed out" not in line  # it was noticed, and not waited for
    assert_gone(list(pids.values()))
    seen = len(epochs_logged(folder))
    answer = forked("--resume", name, "--epochs", str(seen))  # begun on two, and it goes on on one
    assert answer["code"] == 0, answer
    assert epochs_logged(folder) == [("baseline", 1), ("baseline", 2), *(("cvae", n + 1) for n in range(seen))]


@pytest.mark.parametrize("way", ["SIGTERM to torchrun", "Ctrl-C"])
def test_stopped_job_can_be_resumed(work: Path, forked: Forked, way: str) -> None:
    name = way.replace(" ", "-")
    folder = work / "runs" / name
    with running(*torchrun("train.py", "--data", "data", *ENDLESS, "--name", name, "--quiet"), cwd=work) as process:
        wait_until(lambda: ("cvae", 2) in epochs_logged(folder), process)
        pids = workers(process.pid)
        if way == "Ctrl-C":  # which a terminal sends to all of them, and torchrun to its children once more
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        code, out, err = finish(process)
    assert code not in (0, None)
    assert out == ""
    assert own_lines(err) == [f"train.py: interrupted; to go on: python train.py --resume runs/{name}"]
    assert_gone(list(pids.values()))
    seen = len(epochs_logged(folder))
    answer = forked("--resume", name, "--epochs", str(seen))
    assert answer["code"] == 0, answer
    assert epochs_logged(folder) == [("baseline", 1), ("baseline", 2), *(("cvae", n + 1) for n in range(seen))]


def test_batch_that_cannot_be_shared(work: Path) -> None:
    """Refused by both with exit code 2, which torchrun would replace by its own, and said by one."""
    results = fork_two("train.py", "--data", "data", *SMALL, "--batch-size", "33", "--name", "odd", cwd=work)
    reason = "train.py: a batch of 33 images cannot be shared evenly by 2 processes\n"
    assert results == [(2, "", reason), (2, "", "")]
    assert not (work / "runs/odd").exists()
