"""Two real processes, which exchange by gloo, train and validate as one does."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from support.steps import CPU, make_training, state

from cvae.processes import Processes
from cvae.training import phase
from train import train_epoch

TOGETHER = [("tutorial", "baseline"), ("tutorial", "iwae"), ("paper", "gsnn"), ("deep", "elbo")]


def train_all(processes: Processes) -> list[dict[str, torch.Tensor]]:
    """Two epochs of several networks and objectives in float64: what they left, and what a validation finds."""
    phase.VALIDATION_IMAGES = 8
    torch.set_default_dtype(torch.float64)
    found = []
    for network, objective in TOGETHER:
        training = make_training(network, objective, processes=processes, weight_decay=0.2)
        for number in (1, 2):
            train_epoch(training.phase, training.run, training.step, training.step, number)
        dropout = torch.rand(4)  # what would be dropped next
        processes.sum_on_host_(training.step.totals.sums)
        totals = training.phase.validate(training.step.average.model, 0, training.run.context)
        found.append(state(training) | {"validation": totals.sums, "dropout": dropout})
    torch.set_default_dtype(torch.float32)
    return found


def one_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = Processes()
    with processes.connected(CPU):
        torch.save(train_all(processes), folder / f"{rank}.pt")


def test_two_processes_train_what_one_does(tmp_path, monkeypatch):
    """Weights, averages, the optimizer's state and all sums; both processes end with the same, bit for bit.

    They add up a gradient in another order. In float64 it is off by some 1e-15, of which Adam makes less than 1e-7 of a
    step where a gradient is as small as its ε, 1e-8; errors grow over the six steps.
    """
    monkeypatch.setattr(phase, "VALIDATION_IMAGES", 8)  # which the children do for themselves
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for child in children:
        child.start()
    alone = train_all(Processes())
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case, one, first, second in zip(TOGETHER, alone, *both, strict=True):
        assert not torch.equal(first.pop("dropout"), second.pop("dropout"))
        assert one.pop("dropout").shape == (4,)
        assert one.keys() == first.keys() == second.keys()
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name]), (case, name)
            scale = max(1.0, tensor.abs().max().item())
            assert (first[name] - tensor).abs().max() <= 1e-5 * 1e-2 * scale, (case, name)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_a_validation_add_up(monkeypatch, count):
    """Of three portions: a process may have none, and has zeros of the same names."""
    monkeypatch.setattr(phase, "VALIDATION_IMAGES", 8)
    parts = []
    for rank in range(count):
        processes = Processes()
        processes.rank, processes.count = rank, count
        monkeypatch.setattr(processes, "sum_on_host_", lambda tensor: None)
        training = make_training(processes=processes)
        parts.append(training.phase.validate(training.model, 0, training.run.context))
    training = make_training()
    whole = training.phase.validate(training.model, 0, training.run.context)
    assert all(part.names == whole.names for part in parts)
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-12, atol=0)
    assert sum(part.sums.eq(0).all().item() for part in parts) == max(0, count - 3)
