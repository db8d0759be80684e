"""The context of a training or an evaluation, which `opened` prepares: device, precision, processes; seeds, signals."""

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cvae.errors import Interrupted, UsageError
from cvae.processes import Processes

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int = 0, local_count: int = 1) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` (each process of a machine takes its own) or `cuda:n`.

    Raises UsageError if there is no such device, or there are not enough of them; in all processes alike.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if name not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:n")
    if number and local_count > 1:
        raise UsageError(f"{local_count} processes cannot share {name}; say --device cuda, and each takes its own")
    if (needed := int(number) + 1 if number else local_count) > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UsageError(f"--device {name} needs {needed} GPUs, and PyTorch finds {there}; --device cpu needs none")
    return torch.device("cuda", int(number) if number else local_rank)


def resolve_precision(name: str, device: torch.device) -> str:
    """Return `fp32`, `bf16` or `fp16`; `auto` is bf16 where it is native, else fp16 on CUDA and fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in all versions of PyTorch
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class Context:
    """A device, the precision of matrix products on it (`fp32`, `bf16` or `fp16`), and the processes of the job."""

    device: torch.device
    precision: str = "fp32"
    processes: Processes = field(default_factory=Processes)

    @property
    def half(self) -> torch.dtype | None:
        """The type of matrix products if it is a half precision, else None."""
        return HALF.get(self.precision)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute matrix products within the block in this precision; the parameters stay in float32."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)

    def with_precision(self, name: str) -> "Context":
        """Return this context in another precision: `auto`, as the main process resolves it, or a precision's name."""
        return replace(self, precision=self.processes.on_main(partial(resolve_precision, name, self.device)))


@contextmanager
def opened(device: str = "auto", precision: str = "auto") -> Iterator[Context]:
    """Open the context that a script runs in, and put the process back at the end of the block.

    Raises UsageError if there is no such device; PeerLost if the processes cannot meet, or one of them is lost.
    """
    processes = Processes()
    chosen = resolve_device(device, processes.local_rank, processes.local_count)
    with prepare(chosen), processes.connected(chosen):
        yield Context(chosen, processes=processes).with_precision(precision)


def prepare(device: torch.device) -> ExitStack:
    """Prepare the process: TF32 off, cuDNN deterministic. The returned stack puts all back, random generators too."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    products = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    choices: list[tuple[Any, str, object]] = [(product, "fp32_precision", "ieee") for product in products]
    choices += [(cudnn, "allow_tf32", False), (cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    with ExitStack() as stack:
        for place, name, _ in choices:  # all are read before one is set: some change others
            with suppress(RuntimeError):  # the older names of a precision, if the user has set the newer ones
                stack.callback(setattr, place, name, getattr(place, name))
        with suppress(RuntimeError):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        for place, name, value in reversed(choices):  # older names first
            setattr(place, name, value)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.enable_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        on_gpu = device.type == "cuda" or torch.cuda.is_initialized()
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []))
        return stack.pop_all()


def derive_seed(*key: object) -> int:
    """Return a seed of 63 bits that depends on the whole key, as (seed, phase, epoch): there is no state to keep."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def generator(device: torch.device, *key: object) -> torch.Generator:
    """Return a generator of random numbers on the device, seeded by `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


def permutation(length: int, *key: object) -> Tensor:
    """Return a permutation of 0 to length − 1, int64 `[length]`, from the CPU: a GPU's depends on the GPU."""
    return torch.randperm(length, generator=generator(torch.device("cpu"), *key, "permutation"))


def seed_dropout(*key: object) -> None:
    """Seed what draws random numbers without being given a generator, as dropout does."""
    torch.manual_seed(derive_seed(*key, "dropout"))


class Interruption(ExitStack):
    """A block of the main thread in which the first Ctrl-C and SIGTERM are only remembered, in `signal_number`.

    While `at_once` is True they raise Interrupted wherever the program is: there is nothing to be lost yet.
    A second Ctrl-C does what it did before: it ends a script at once, and raises KeyboardInterrupt in a notebook.
    """

    signal_number, at_once = 0, False

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = partial(self._remember, signal.getsignal(number))
                self.callback(signal.signal, number, signal.signal(number, handler))
        return self

    def _remember(self, previous: Any, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if number == signal.SIGINT:
            signal.signal(number, previous)
        if self.at_once:
            raise Interrupted("interrupted before the training began", number)
