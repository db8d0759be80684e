"""What a run runs on: device, precision and processes; several of them agree, or one line says why they cannot."""

import pytest

from cvae.context import Processes
from cvae.errors import UsageError

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MEETING}, (3, 4, 1)),
        ({"WORLD_SIZE": "4", **MEETING}, "WORLD_SIZE is 4 and RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is set to 'two', which is no whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is set to '-1', which is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK is 2 and WORLD_SIZE 2, but ranks are counted from 0"),
    ],
    ids=str,
)
def test_processes_of_the_environment(
    variables: dict[str, str], expected: tuple[int, int, int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=f"^{expected}[^\n]*: several processes are started by torchrun; for one,"):
            Processes()
    else:
        processes = Processes()
        assert (processes.rank, processes.count, processes.local_rank) == expected
        assert processes.is_main == (processes.rank == 0)
