"""The device that the tests run on: an emulated one everywhere, and a real one where there is one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from simulation import CUDA, NO_GPU, Emulation, emulated_cuda
from small import SIDE, SMALL, Convolutional, source

import eval as evaluation
import train
from cvae import context
from cvae.data.sources import TestImages, record
from cvae.model.networks import NETWORKS


@pytest.fixture(autouse=True)
def a_third_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`convolutional` is one of the networks."""
    monkeypatch.setitem(NETWORKS, "convolutional", Convolutional)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """The CPU as a CUDA device."""
    with emulated_cuda(monkeypatch) as emulation:
        yield emulation


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device: the CPU in its place, and the real one."""
    if request.param == "emulated":
        request.getfixturevalue("emulation")
    else:
        context.prepare(CUDA)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # sums in one order
    return CUDA


@pytest.fixture
def run_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`train.py` in this process, on images of 8×8 pixels; returns the run's folder."""
    random = torch.Generator("cpu").manual_seed(0)
    images = torch.randint(256, (120, SIDE, SIDE), dtype=torch.uint8, generator=random)
    monkeypatch.setattr("cvae.run.plan.load_train", lambda *_: source(images[:80], images[80:]))
    monkeypatch.setattr(evaluation, "load_test", lambda *_: TestImages(images[80:], "", record(test=images[80:])))

    def run(name: str, *words: str, code: int = 0) -> Path:
        begin = [*SMALL, "--name", name] if "--resume" not in words else []
        assert train.main([*begin, "--runs", str(tmp_path), *words]) == code
        return tmp_path / name

    yield run
    torch.set_flush_denormal(False)
