"""The device of the tests: a GPU where there is one, and the CPU with CUDA graphs emulated everywhere."""

from collections.abc import Iterator

import pytest
import torch
from simulation import Emulation, emulated_graphs
from support.steps import CPU

from cvae import context


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """CUDA graphs on the CPU."""
    return emulated_graphs(monkeypatch)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A GPU, prepared as a script prepares it."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    device = torch.device("cuda", 0)
    with context.prepare(device):
        yield device


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, with graphs emulated, and the GPU."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    request.getfixturevalue("emulation")
    return CPU
