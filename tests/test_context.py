"""What a run runs on: prepared, put back as it was, and agreed on by several processes, or refused in one line."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.inprocess import TINY, call_eval, call_train, make_tiny_data

from cvae import context
from cvae.context import Context, Interruption, opened, prepare, resolve_device
from cvae.errors import DataError, PeerLost, UsageError
from cvae.processes import Processes, exchange

CPU = torch.device("cpu")


def surroundings() -> list[Any]:
    """Return whatever of the process a training changes while it lasts."""
    backends: Any = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [
        *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)),
        *(operation.fp32_precision for operation in operations),
        *(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.get_rng_state().tolist()),
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        *(sys.stdout, sys.stderr, os.getcwd()),
        {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
    ]


@pytest.fixture
def odd_surroundings() -> Iterator[None]:
    """The process of a user who has changed all of it."""
    matmul: Any = torch.backends.cuda.matmul
    precision, dtype = matmul.fp32_precision, torch.get_default_dtype()
    matmul.fp32_precision = "tf32"
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        yield
    torch.set_default_dtype(dtype)
    matmul.fp32_precision = precision
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("odd_surroundings")
def test_all_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a training, an evaluation, and both where they fail; in another thread than the main one, too."""
    monkeypatch.chdir(tmp_path)
    make_tiny_data(tmp_path / "data")
    torch.manual_seed(17)
    before = surroundings()
    assert call_train(*TINY, "--data", "data").code == 0
    assert surroundings() == before
    assert call_train(*TINY, "--data", "data", "--name", "hot", "--learning-rate", "1e30").code == 4
    assert surroundings() == before
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(call_eval, "--runs", "runs/q1").result()
    assert ended == call_eval("--runs", "runs/q1")
    assert ended.code == 0
    (tmp_path / "runs/q1/best.pt").write_bytes(b"")
    assert call_eval("--runs", "runs/q1").code == 3
    assert surroundings() == before


def test_prepared() -> None:
    """Products of float32 are of float32, and results reproducible."""
    with prepare(CPU):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.deterministic


def test_a_second_interrupt_does_what_it_did_before() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


# Device and precision


@pytest.mark.parametrize(
    ("name", "gpus", "processes", "expected"),
    [
        ("auto", 0, (0, 1), "cpu"),
        ("auto", 2, (1, 2), "cuda:1"),
        ("cuda:1", 2, (0, 1), "cuda:1"),
        ("cuda", 0, (0, 1), "--device cuda needs 1 GPUs, and PyTorch finds 0"),
        ("cuda:1", 2, (0, 2), "2 processes cannot share cuda:1"),
        ("cuda:2", 2, (0, 1), "--device cuda:2 needs 3 GPUs, and PyTorch finds 2"),
        ("cuda", 1, (0, 2), "--device cuda needs 2 GPUs, and PyTorch finds 1"),
        ("tpu", 0, (0, 1), "there is no device 'tpu'"),
        ("cuda:x", 2, (0, 1), "there is no device 'cuda:x'"),
    ],
)  # fmt: skip
def test_device(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, processes: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if " " not in expected:
        assert resolve_device(name, *processes) == torch.device(expected)
    else:
        with pytest.raises(UsageError, match=f"^{expected}"):
            resolve_device(name, *processes)


@pytest.mark.parametrize(("precision", "epsilon"), [("fp32", 2**-23), ("bf16", 2**-7), ("fp16", 2**-10)])
def test_products_in_a_precision(precision: str, epsilon: float) -> None:
    """Their relative error is between an eighth of a last bit and two, for 256 × 256 products of 3 terms."""
    exact = torch.rand(256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with opened("cpu", precision) as here, here.autocast():
        product = exact.float() @ exact.float().T
    error = ((product.double() - exact @ exact.T) / (exact @ exact.T)).abs().max()
    assert (product.dtype == torch.float32) == (precision == "fp32")
    assert epsilon / 8 <= error <= 2 * epsilon
    assert Context(CPU, precision).half == (None if precision == "fp32" else product.dtype)


def test_precision_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where the processor computes it, by either of its instructions."""
    for capabilities, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert Context(CPU).with_precision("auto").precision == expected
        assert Context(CPU).with_precision("fp16").precision == "fp16"


def test_seeds_are_those_of_all_versions() -> None:
    assert context.derive_seed(0, "weights") == 5147875554478041081
    assert context.permutation(5, 0, "a").tolist() == [1, 3, 4, 0, 2]
    draws = {torch.rand(4, generator=context.generator(CPU, *key)).sum().item() for key in ((0,), (1,), (0, "a"))}
    assert len(draws) == 3


# Several processes


def test_processes_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun describes them; an environment that is not complete is told in one line."""
    alone = Processes()
    assert (alone.rank, alone.count, alone.local_rank, alone.local_count) == (0, 1, 0, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    third = Processes()
    assert (third.rank, third.count, third.local_rank, third.local_count) == (3, 4, 1, 2)
    assert (alone.is_main, third.is_main) == (True, False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(PeerLost, match=r"could not meet .*MASTER_ADDR expected"), third.connected(CPU):
        pass


LOST = {
    RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7"): "has ended",
    RuntimeError(
        "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1ms"
    ): "did not answer within 30 minutes",
    dist.DistBackendError("NCCL error"): "has ended",
    RuntimeError("[/gloo/transport/tcp/buffer.cc:9] Cannot allocate memory"): None,
    RuntimeError("shape '[3]' is invalid for input of size 4"): None,
    DataError("a.png: is damaged"): None,
}


@pytest.mark.parametrize(("error", "expected"), LOST.items(), ids=str)
def test_only_what_the_network_says_is_a_lost_process(error: Exception, expected: str | None) -> None:
    """Too little memory, a mistake of the program and expected failures pass as they are."""
    with pytest.raises(PeerLost if expected else type(error), match=expected or re.escape(str(error))), exchange():
        raise error
