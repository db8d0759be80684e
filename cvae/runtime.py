"""What a training runs on: device, precision, seeds, memory, signals, CUDA graphs. Knows nothing of CVAEs."""

import ctypes
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cvae.errors import UsageError, first_line
from cvae.memory import available_memory, keep_freed_memory

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int = 0, local_count: int = 1) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:n`.

    Of several processes on one machine, each takes a GPU of its own, that of its `local_rank`. Raises UsageError for
    another name, and for a device that is not there or not enough of them: in all processes alike.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":"):
        raise UsageError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:n")
    if not torch.cuda.is_available():
        raise UsageError("CUDA is not available here (no GPU, no driver, or a PyTorch without CUDA); use --device cpu")
    if number and local_count > 1:
        raise UsageError(f"{local_count} processes cannot share {name}; say --device cuda, and each takes its own")
    needed = int(number) + 1 if number else local_count
    if needed > torch.cuda.device_count():
        raise UsageError(f"--device {name} needs {needed} GPUs; {torch.cuda.device_count()} are visible")
    return torch.device("cuda", int(number) if number else local_rank)


def resolve_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` is bf16 where the device computes it, else fp16 on CUDA and fp32 on a CPU.

    A CPU computes bfloat16 products by AVX512-BF16 or AMX, about twice as fast as those of float32.
    """
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in all versions of PyTorch
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in `precision`; the parameters stay in float32."""
    return torch.autocast(device.type, HALF[precision]) if precision in HALF else nullcontext()


def prepare(device: torch.device) -> ExitStack:
    """Process-wide settings, before the first tensor of any size.

    What it returns is a context manager, at whose end all is as it was before, for the sake of notebooks: these
    settings, and the default random generators.

    A float32 product is one: TF32, with ten bits of mantissa, is off, for convolutions too.
    """
    with ExitStack() as before:
        backends: Any = torch.backends
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        operations = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        for operation in operations:
            before.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
        with suppress(RuntimeError):  # the older names of the same cannot be read where the user has set the newer ones
            before.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        with suppress(RuntimeError):
            before.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for operation in operations:
            operation.fp32_precision = "ieee"
        before.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        before.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        before.callback(torch.set_rng_state, torch.get_rng_state())
        if device.type == "cuda":
            before.enter_context(torch.cuda.device(device))
        if device.type == "cuda" or torch.cuda.is_initialized():
            current = torch.cuda.current_device()
            before.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(current), current)
        before.callback(keep_freed_memory, False)
        keep_freed_memory(True)
        before.callback(_flush_denormals, sys.float_info.min / 2 == 0)
        _flush_denormals(True)
        return before.pop_all()


def _flush_denormals(flush: bool) -> None:
    """Whether numbers under 1e-38 count as zero: arithmetic with them takes a hundred times as long.

    A thread has this from the one that made it: where OpenMP can end its idle threads, the next ones are made anew.
    """
    torch.set_flush_denormal(flush)
    if sys.platform == "linux":
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).omp_pause_resource_all(2)  # omp_pause_hard


def free_memory(device: torch.device, processes: int = 1) -> int | None:
    """Bytes of the device's memory that each of so many processes on this machine may take; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory()
    return None if available is None else available // processes


def derive_seed(*key: object) -> int:
    """A seed of 63 bits that depends on the whole key: (seed, phase, epoch), say, so that there is no state to keep."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator of random numbers on the device, seeded by `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


def permutation(length: int, *key: object) -> Tensor:
    """A permutation of 0 to length − 1, on the CPU: a GPU's depends on the GPU. int64 `[length]`."""
    return torch.randperm(length, generator=generator(torch.device("cpu"), *key, "permutation"))


def seed_dropout(*key: object) -> None:
    """Seed what draws random numbers without being given a generator, as dropout does: on the CPU, and on its GPU."""
    seed = derive_seed(*key, "dropout")
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class Interruption:
    """While it is entered, Ctrl-C and SIGTERM are only remembered, in `signal_number`, for a good moment to leave.

    A second Ctrl-C does what it did before: it ends a script at once, and raises KeyboardInterrupt in a notebook. Only
    the main thread is told of signals: in another one nothing is changed. Nor is a handler that is not Python's, as a
    program may have in which Python is embedded: it could not be put back.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._ctrl_c = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        in_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if in_main else ():
            if signal.getsignal(number) is None:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._ctrl_c:
                before = self._previous[number]
                if not callable(before):
                    os._exit(128 + number)
                before(number, frame)
            self._ctrl_c = True
        self.signal_number = self.signal_number or number


class GraphedStep:
    """A training step, captured whole in a CUDA graph and replayed: one launch for some hundred kernels.

    `step(*inputs)` must be free of host synchronisation, keep its results in tensors that it updates in place, and be
    called with inputs of the same shapes each time. The first calls run as they are, on the side stream that capture
    asks for: they are steps like any other, and they let the libraries and the optimizer make what they allocate once.

    Where the capture fails, `warn` is told in one line, and all steps run as they are, this one included: a capture
    executes nothing. Each graph has a stream of its own, the one that it was warmed up on.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., None], warn: Callable[[str], None]):
        self._step, self._warn = step, warn
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        if self._calls < self.WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
        elif self._calls == self.WARM_UP:
            self._capture(inputs)
        self._calls += 1
        if self._calls > self.WARM_UP:
            self._replay(inputs)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        assert self._graph is not None
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._step(*self._inputs)
        except RuntimeError as error:
            self._graph = None
            torch.cuda.set_stream(current)  # a failed capture leaves its own as the current one
            torch.cuda.synchronize()
            reason = _first_cause(error)
            self._warn(f"the training step could not be captured in a CUDA graph and runs without one ({reason})")

    def _replay(self, inputs: tuple[Tensor, ...]) -> None:
        if self._graph is None:
            self._step(*inputs)
            return
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        self._graph.replay()


def _first_cause(error: BaseException) -> str:
    """What went wrong first: the end of the capture fails too, because of it, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)
