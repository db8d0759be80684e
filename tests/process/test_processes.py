"""What several processes tell each other, by two that do nothing else."""

import json
import sys

from support.scripts import ROOT
from support.trainings import ENVIRONMENT, finish, start, two_ranks

CODE = """
import json, sys
import torch
from cvae.context import Processes
from cvae.errors import DataError

def read():
    if processes.rank == 1:
        raise DataError("no such file here")

processes = Processes()
with processes.connected(torch.device("cpu")):
    rank = processes.rank
    half = torch.full((3,), 2.0 ** rank).bfloat16()
    statistics, counter = torch.tensor([1.0 + rank, 5.0]), torch.tensor(rank)
    total = torch.tensor([0.1, rank], dtype=torch.float64)
    loss = torch.tensor(1.5 + rank)
    processes.sum_(half, loss)
    processes.average_(statistics, counter)
    processes.sum_on_host_(total)
    try:
        processes.on_all(read)
        refused = "nothing"
    except DataError as error:
        refused = str(error)
    own = processes.on_all(lambda: "of " + str(rank))
    print(json.dumps([half.tolist(), loss.item(), statistics.tolist(), counter.item(), total.tolist(),
                      processes.maximum(10 * rank), processes.on_main(lambda: "of " + str(rank)),
                      processes.gather(torch.tensor([[float(rank)]])).tolist(), refused, own]))
"""


def test_sums_means_and_objects() -> None:
    command = [sys.executable, "-c", CODE]
    processes = [start(command, ROOT, environment={**ENVIRONMENT, **rank}) for rank in two_ranks()]
    results = [finish(process) for process in processes]
    assert [(code, err) for code, _, err in results] == [(0, ""), (0, "")]
    for rank, (_, out, _) in enumerate(results):
        half, loss, statistics, counter, total, largest, told, gathered, refused, own = json.loads(out)
        assert (half, loss) == ([3.0] * 3, 4.0)
        assert statistics == [1.5, 5.0]
        assert counter == rank  # whole numbers are left alone
        assert total == [0.2, 1.0]
        assert (refused, own) == ("no such file here", f"of {rank}")
        assert (largest, told, gathered) == (10, "of 0", [[0.0, 1.0]])
