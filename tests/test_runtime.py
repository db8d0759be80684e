"""What a training or an evaluation finds in its process, it leaves as it was; it needs no main thread, and no Linux."""

import ctypes
import errno
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inprocess import TINY, Ended, call_eval, call_train, make_tiny_data

from cvae import console, context
from cvae.console import complain, say
from cvae.errors import DiskError

CPU = torch.device("cpu")
TINIEST = math.ulp(0.0)  # the smallest number above 0


def surroundings() -> dict[str, Any]:
    """Whatever of the process a training changes while it lasts."""
    backends: Any = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (threading.excepthook, sys.excepthook),
        "precisions": [operation.fp32_precision for operation in operations],
        "defaults": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "random": torch.get_rng_state().tolist(),
        "denormals": (TINIEST * 1.0 == 0, denormals_flushed()),
        "streams": (sys.stdout, sys.stderr),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
        "folder": os.getcwd(),
    }


def denormals_flushed() -> bool:
    """Whether any of the threads that share an operation takes denormals for zero."""
    bits = torch.ones(1 << 20, dtype=torch.int32)
    return bool(((bits.view(torch.float32) * 1).view(torch.int32) != 1).any())


def odd_handler(number: int, frame: object) -> None:
    """A handler like no other."""


@pytest.fixture
def odd_surroundings() -> Iterator[None]:
    """A user's, who has changed all of it."""
    backends: Any = torch.backends
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, odd_handler))
        stack.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = lambda failure: None
        stack.callback(torch.set_grad_enabled, True)
        torch.set_grad_enabled(False)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.callback(setattr, backends.cuda.matmul, "fp32_precision", backends.cuda.matmul.fp32_precision)
        backends.cuda.matmul.fp32_precision = "tf32"
        torch.manual_seed(17)
        yield


@pytest.mark.usefixtures("odd_surroundings")
def test_all_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a training, an evaluation, and both where they fail: on settings that would change their results."""
    monkeypatch.chdir(tmp_path)
    make_tiny_data(tmp_path / "data")
    before = surroundings()
    assert call_train(*TINY, "--data", "data").code == 0
    assert surroundings() == before
    assert call_train(*TINY, "--data", "data").code == 2
    assert surroundings() == before
    assert call_train(*TINY, "--data", "data", "--name", "hot", "--learning-rate", "1e30").code == 4
    assert surroundings() == before
    assert call_eval("--runs", "runs/q1").code == 0
    assert surroundings() == before
    (tmp_path / "runs/q1/best.pt").write_bytes(b"")
    assert call_eval("--runs", "runs/q1").code == 3
    assert surroundings() == before


def test_while_prepared_and_after() -> None:
    """Also by threads that PyTorch makes meanwhile."""
    assert not denormals_flushed()
    with context.prepare(CPU):
        bits = torch.ones(1 << 20, dtype=torch.int32)
        assert not (bits.view(torch.float32) * 1).view(torch.int32).any()
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "highest"
    assert not denormals_flushed()


@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_stay_as_the_user_has_them(flushed: bool) -> None:
    try:
        torch.set_flush_denormal(flushed)
        context.prepare(CPU).close()
        assert (TINIEST * 1.0 == 0) is flushed
    finally:
        torch.set_flush_denormal(False)


def test_in_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main thread may set handlers: the others train and evaluate without."""
    monkeypatch.chdir(tmp_path)
    make_tiny_data(tmp_path / "data")

    def in_thread(call: Callable[..., Ended], *words: str) -> Ended:
        ended: list[Ended] = []
        thread = threading.Thread(target=lambda: ended.append(call(*words)))
        thread.start()
        thread.join()
        return ended[0]

    trained = in_thread(call_train, *TINY, "--data", "data", "--quiet")
    assert (trained.code, trained.err) == (0, "")
    evaluated = in_thread(call_eval, "--runs", "runs/q1")
    assert (evaluated.code, evaluated.err) == (0, "")
    assert evaluated == call_eval("--runs", "runs/q1")


def test_a_second_interrupt_does_what_it_did_before() -> None:
    """The first one is remembered."""
    with context.Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("odd_surroundings")
def test_all_is_put_back_where_the_preparation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = surroundings()

    def fail(keep: bool) -> None:
        if keep:
            raise KeyboardInterrupt

    monkeypatch.setattr(context, "keep_freed_memory", fail)
    with pytest.raises(KeyboardInterrupt):
        context.prepare(CPU)
    assert surroundings() == before


def test_output_that_has_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook's; what cannot be written to it is an expected failure still."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    with pytest.raises(DiskError, match="standard output: cannot be written"):
        say("line")
    complain("line")


def test_without_what_only_linux_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No processors to count, no /proc, no library of the process itself: as on Windows."""

    def refuse(*_: object) -> Any:
        raise TypeError("no path")

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (tmp_path / "none").open())
    assert not console.others_want_the_processors()
    with context.prepare(CPU):
        pass
