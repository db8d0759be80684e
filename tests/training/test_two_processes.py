"""Two real processes, which exchange by gloo, train and validate as one does."""

import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support.steps import CPU, Regularised, make_run, make_training, state

from cvae.data.sources import record
from cvae.errors import CvaeError, DataError
from cvae.processes import Processes
from cvae.run import checkpoint
from cvae.training import phase
from train import fit, train_epoch

BINARY = {"targets": "binary"}
TOGETHER = [("tutorial", "baseline", {}), ("tutorial", "iwae", BINARY), ("paper", "gsnn", {}), ("deep", "elbo", BINARY)]


class Ranked(Regularised):
    """A network whose running statistic is the number of its process, from 1."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.register_buffer("statistic", torch.ones(()))

    def encode(self, *arguments: Any) -> Any:
        if self.training:
            self.statistic.fill_(1.0 + int(os.environ["RANK"]))
        return super().encode(*arguments)


def train_all(processes: Processes) -> list[dict[str, torch.Tensor]]:
    """Two epochs of several networks and objectives in float64: what they left, and what a validation finds."""
    phase.VALIDATION_IMAGES = 8
    torch.set_default_dtype(torch.float64)
    found = []
    for network, objective, settings in TOGETHER:
        training = make_training(network, objective, processes=processes, weight_decay=0.2, **settings)
        for number in (1, 2):
            train_epoch(training.phase, training.run, training.step, training.step, number)
        dropout = torch.rand(4)  # what would be dropped next
        processes.sum_on_host_(training.step.totals.sums)
        totals = training.phase.validate(training.step.average.model, 0, training.run.context)
        found.append(state(training) | {"validation": totals.sums, "dropout": dropout})
    torch.set_default_dtype(torch.float32)
    return found


def fit_ranked(processes: Processes, folder: Path) -> None:
    training = make_training(Ranked, processes=processes, epochs=1)
    with make_run(training.run.settings, processes=processes, folder=folder) as run:
        run.open(record(train=training.phase.train.images))
        fit(training.phase, run, {})


def skip_together(processes: Processes) -> dict[str, int]:
    """The skipped steps of an epoch in which the loss of the second process is infinite, and all gradients finite."""
    training = make_training(processes=processes)
    objective, constant = training.step.objective, math.inf if processes.rank else 0.0
    training.step.objective = lambda *given: {name: term + constant for name, term in objective(*given).items()}
    train_epoch(training.phase, training.run, training.step, training.step, 1)
    return training.step.optimizer.skipped()


def exchange_all(processes: Processes) -> list[Any]:
    """What comes of sums, means, gathered objects, and of a failure in one of the processes."""

    def read(at: int) -> str:
        if processes.rank == at:
            raise MemoryError("no room here") if at else DataError("no such file here")
        return f"read by {processes.rank}"

    def outcome(ask: Any, at: int) -> Any:
        try:
            return ask(lambda: read(at))
        except CvaeError as error:
            return str(error)

    rank = processes.rank
    half, loss, statistics = torch.full((3,), 2.0**rank).bfloat16(), torch.tensor(1.5 + rank), torch.tensor([rank, 5.0])
    counter, total = torch.tensor(rank), torch.tensor([0.1, rank], dtype=torch.float64)
    processes.sum_(half, loss)
    processes.average_(statistics, counter)
    processes.sum_on_host_(total)
    tensors = [each.tolist() for each in (half, loss, statistics, counter, total)]
    gathered = processes.gather(torch.tensor([[float(rank)]])).tolist()
    asked = [(processes.on_all, 1), (processes.on_all, 2), (processes.on_main, 0), (processes.on_main, 1)]
    return [*tensors, processes.maximum(10 * rank), gathered, *(outcome(*each) for each in asked)]


def one_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = Processes()
    with processes.connected(CPU):
        torch.save([train_all(processes), exchange_all(processes), skip_together(processes)], folder / f"{rank}.pt")
        fit_ranked(processes, folder / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=one_of_two, args=(rank, port, folder)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    return folder


def test_two_processes_train_what_one_does(two, monkeypatch):
    """Weights, averages, the optimizer's state and all sums; both processes end with the same, bit for bit.

    They add up a gradient in another order. In float64 it is off by some 1e-15, of which Adam makes less than 1e-7 of a
    step where a gradient is as small as its ε, 1e-8; errors grow over the six steps.
    """
    monkeypatch.setattr(phase, "VALIDATION_IMAGES", 8)  # put back after it
    both = [torch.load(two / f"{rank}.pt")[0] for rank in (0, 1)]
    for case, one, first, second in zip(TOGETHER, train_all(Processes()), *both, strict=True):
        assert not torch.equal(first.pop("dropout"), second.pop("dropout"))
        assert one.pop("dropout").shape == (4,)
        assert one.keys() == first.keys() == second.keys()
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name]), (case, name)
            scale = max(1.0, tensor.abs().max().item())
            assert (first[name] - tensor).abs().max() <= 1e-5 * 1e-2 * scale, (case, name)


def test_running_statistics_are_the_mean_over_the_processes(two):
    last = checkpoint.load(two / "run/last.pt")
    assert last["model"]["statistic"] == last["average"]["statistic"] == 1.5  # of 1 and 2


def test_sums_means_and_objects(two):
    """Whole numbers are not averaged; a failure in one process is raised in all; the main one answers for all."""
    for rank in (0, 1):
        *numbers, memory, everybody, lost, main = torch.load(two / f"{rank}.pt")[1]
        assert numbers == [[3.0] * 3, 4.0, [0.5, 5.0], rank, [0.2, 1.0], 10, [[0.0, 1.0]]]
        assert memory.startswith("the memory does not suffice (no room here)")
        assert (everybody, lost, main) == (f"read by {rank}", "no such file here", "read by 0")


def test_step_is_skipped_by_all_or_by_none(two):
    assert [torch.load(two / f"{rank}.pt")[2] for rank in (0, 1)] == [{"skipped_steps": 3}] * 2


def test_process_without_a_portion_validates_nothing(monkeypatch):
    """Three of five processes have a portion, the others zeros of the same names; all in all it is the same."""
    monkeypatch.setattr(phase, "VALIDATION_IMAGES", 8)
    monkeypatch.setattr(Processes, "sum_on_host_", lambda self, tensor: None)
    parts = []
    for rank, count in ((0, 1), *((rank, 5) for rank in range(5))):
        processes = Processes()
        processes.rank, processes.count = rank, count
        training = make_training(processes=processes)
        parts.append(training.phase.validate(training.model, 0, training.run.context))
    whole, *shares = parts
    assert all(share.names == whole.names for share in shares)
    torch.testing.assert_close(sum(share.sums for share in shares), whole.sums, rtol=1e-12, atol=0)
    assert sum(share.sums.eq(0).all().item() for share in shares) == 2
