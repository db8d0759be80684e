"""The context of a training or an evaluation: device, precision and processes, seeds, signals, CUDA graphs.

`with opened(device, precision) as context` prepares all of it. Knows nothing of CVAEs. With one process, `Processes`
does nothing, and `torch.distributed` is never initialised.
"""

import ctypes
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cvae.errors import CvaeError, PeerLost, UsageError, first_line, is_out_of_memory, telling_of_memory

T = TypeVar("T")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT = timedelta(minutes=30)  # after which a process that does not answer is given up


class Processes:
    """The processes of this job, as `torchrun` starts them: this one's `rank`, and how many there are, `count`.

    Raises:
        UsageError: the environment variables of torchrun are incomplete or contradict each other.
    """

    def __init__(self) -> None:
        self.rank, self.count = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self.local_rank, self.local_count = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if self.count > 1 and missing:
            raise UsageError(f"WORLD_SIZE is {self.count} and {missing[0]} is not set: {ALONE}")
        if self.rank >= self.count:
            raise UsageError(f"RANK is {self.rank} and WORLD_SIZE {self.count}, but ranks are counted from 0: {ALONE}")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Have an error within the block told once on each machine; each process tells that it has lost another one."""
        try:
            with telling_of_memory():
                yield
        except CvaeError as error:
            error.is_told_elsewhere = self.local_rank > 0 and not isinstance(error, PeerLost)
            raise

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connect the processes: by gloo, which notices when one ends; on CUDA by NCCL too, for gradients."""
        if self.count == 1:
            yield
            return
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except RuntimeError as error:
            raise PeerLost(f"the processes of this job could not meet ({first_line(error)})") from None
        try:
            yield
        finally:
            dist.destroy_process_group()

    def share(self, length: int) -> slice:
        """Return this process's part of `length` things in order."""
        return slice(length * self.rank // self.count, length * (self.rank + 1) // self.count)

    def share_of_batch(self, batch_size: int) -> slice:
        """Return this process's part of a batch, of one size for all. Raises UsageError if it does not divide."""
        if batch_size % self.count:
            raise UsageError(f"a batch of {batch_size} images cannot be shared evenly by {self.count} processes")
        return self.share(batch_size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, in one exchange, in the widest of their types.

        On CUDA it is NCCL's, which does not raise when another process ends: see docs/cuda.md.
        """
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            with exchange():
                dist.all_reduce(flat)
            for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def sum_on_host_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum, by gloo: waits for the device, and raises PeerLost if another process ends."""
        if self.count > 1:
            total = tensor.cpu()
            with exchange():
                dist.all_reduce(total)
            tensor.copy_(total)

    def average_(self, *tensors: Tensor) -> None:
        """Replace each tensor of floats by its mean over all processes, as for running statistics."""
        for tensor in tensors if self.count > 1 else ():
            if tensor.is_floating_point():
                self.sum_on_host_(tensor)
                tensor /= self.count

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts `[..., n]` of all processes, joined in the order of their ranks, on the CPU."""
        return part if self.count == 1 else torch.cat(self._all(part.cpu()), dim=-1)

    def maximum(self, value: int) -> int:
        """Return the largest of the processes' values."""
        largest = torch.tensor(value)
        if self.count > 1:
            with exchange():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def on_all(self, action: Callable[[], T]) -> T:
        """Return the result of `action` in each process, its own. An expected failure in one is raised in all."""
        result, own = _tried(action)
        for failure in [own] if self.count == 1 else self._all(own):
            if failure is not None:
                raise failure
        return result  # type: ignore[return-value]

    def on_main(self, action: Callable[[], T]) -> T:
        """Return the result of `action` in the main process to all. An expected failure is raised in all."""
        outcome = [_tried(action) if self.is_main else None]
        if self.count > 1:
            with exchange():
                dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        assert outcome[0] is not None
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _all(self, own: T) -> list[T]:
        """Return one object of each process, in the order of their ranks, by gloo."""
        objects = [own] * self.count
        with exchange():
            dist.all_gather_object(objects, own)
        return objects


ALONE = "several processes are started by torchrun; for one, unset RANK and WORLD_SIZE"


def _number(name: str, default: int) -> int:
    """Return a whole number of the environment. Raises UsageError for anything else."""
    word = os.environ.get(name, "").strip()
    if word and not (word.isascii() and word.isdecimal()):
        raise UsageError(f"{name} is set to {word!r}, which is no whole number of at least 0: {ALONE}")
    return int(word or default)


def _tried(action: Callable[[], T]) -> tuple[T | None, CvaeError | None]:
    """Return the result of an action, or its expected failure."""
    try:
        return action(), None
    except CvaeError as error:
        return None, error


@contextmanager
def exchange() -> Iterator[None]:
    """Raise PeerLost if another process does not take part in what all do together; other errors pass."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        text = str(error)
        signs = ("gloo/", "pair closure", "Connection ", "onnection reset", "onnection closed")
        if is_out_of_memory(error) or not (isinstance(error, dist.DistError) or any(sign in text for sign in signs)):
            raise
        if "timed out" in text.lower() or "timeout" in text.lower():
            minutes = f"{TIMEOUT.total_seconds() / 60:g}"
            problem = f"another process of this job did not answer within {minutes} minutes"
        else:
            problem = "another process of this job has ended"
        raise PeerLost(f"{problem}, so this one ends too ({first_line(error)})") from None


# Device and precision


def resolve_device(name: str, local_rank: int = 0, local_count: int = 1) -> torch.device:
    """Return the device called `auto`, `cpu`, `cuda` or `cuda:n`.

    Args:
        name: its name; each of several processes on a machine takes a GPU of its own if it is `cuda`.
        local_rank, local_count: the number of this process on its machine, and how many there are.

    Raises:
        UsageError: there is no such device, or there are not enough of them; in all processes alike.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
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
    """Return `fp32`, `bf16` or `fp16`; `auto` is bf16 where it is native, else fp16 on CUDA and fp32 on a CPU.

    A CPU computes bfloat16 products by AVX512-BF16 or AMX, about twice as fast as those of float32.
    """
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in all versions of PyTorch
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute matrix products within the block in `precision`; the parameters stay in float32."""
    return torch.autocast(device.type, HALF[precision]) if precision in HALF else nullcontext()


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
        return autocast(self.precision, self.device)

    def generator(self, *key: object) -> torch.Generator:
        """Return a generator of random numbers on the device, seeded by the key: see `derive_seed`."""
        return generator(self.device, *key)

    def with_precision(self, name: str) -> "Context":
        """Return this context in another precision: `auto`, as the main process resolves it, or a precision's name."""
        return replace(self, precision=self.processes.on_main(partial(resolve_precision, name, self.device)))


@contextmanager
def opened(device: str = "auto", precision: str = "auto") -> Iterator[Context]:
    """Open the context that a script runs in, and put the process back at the end of the block.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.

    Raises:
        UsageError: there is no such device here, or too little memory within the block.
        PeerLost: the processes cannot meet, or one of them is lost within the block.
    """
    processes = Processes()
    with processes.one_voice():
        chosen = resolve_device(device, processes.local_rank, processes.local_count)
        with prepare(chosen), processes.connected(chosen):
            yield Context(chosen, processes=processes).with_precision(precision)


def prepare(device: torch.device) -> ExitStack:
    """Prepare the process, before the first tensor of any size; leaving the returned stack puts all back as it was.

    float32 products are of float32 (TF32 is off, for convolutions too), cuDNN is deterministic, denormal numbers are
    zero, freed memory is kept; the default random generators are put back at the end, for notebooks.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    products = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    with ExitStack() as stack:
        for product in products:
            stack.callback(setattr, product, "fp32_precision", product.fp32_precision)
        with suppress(RuntimeError):  # the older names of the same cannot be read if the user has set the newer ones
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        with suppress(RuntimeError):
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for product in products:
            product.fp32_precision = "ieee"
        for name, value in (("deterministic", True), ("benchmark", False)):
            stack.callback(setattr, cudnn, name, getattr(cudnn, name))
            setattr(cudnn, name, value)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.enable_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        on_gpu = device.type == "cuda" or torch.cuda.is_initialized()
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []))
        stack.callback(keep_freed_memory, False)
        keep_freed_memory(True)
        stack.callback(_flush_denormals, sys.float_info.min / 2 == 0)
        _flush_denormals(True)
        return stack.pop_all()


def keep_freed_memory(keep: bool) -> None:
    """Have glibc keep freed memory for the next step, which else pays for new pages; False: as glibc does it."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        c = ctypes.CDLL(None)
        m_mxfast, m_trim_threshold, m_mmap_threshold = 1, -1, -3
        c.mallopt(m_mmap_threshold, 32 << 20)  # the largest possible; whole data sets stay outside the heap
        c.mallopt(m_trim_threshold, 1 << 30 if keep else 64 << 20)
        c.mallopt(m_mxfast, 0 if keep else 128)  # each allocation of a tensor would merge small blocks again
        if not keep:
            c.malloc_trim(0)


def _flush_denormals(flush: bool) -> None:
    """Let numbers under 1e-38 count as zero, with which arithmetic takes a hundred times as long, or not.

    A thread has this from the one that made it: OpenMP ends its idle threads, so that the next ones have it too.
    """
    torch.set_flush_denormal(flush)
    if sys.platform == "linux":
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).omp_pause_resource_all(2)  # omp_pause_hard


# Seeds


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
    """Seed what draws random numbers without being given a generator, as dropout does, on the CPU and its GPU."""
    seed = derive_seed(*key, "dropout")
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


# Signals


class Interruption:
    """A context in which Ctrl-C and SIGTERM are only remembered, in `signal_number`, for a good moment to leave.

    A second Ctrl-C does what it did before: it ends a script at once, and raises KeyboardInterrupt in a notebook. In
    another thread than the main one, which alone is told of signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._has_seen_ctrl_c = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._remember) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._has_seen_ctrl_c:
            if not callable(self._previous[number]):
                os._exit(128 + number)
            self._previous[number](number, frame)
        self._has_seen_ctrl_c |= number == signal.SIGINT
        self.signal_number = self.signal_number or number


# CUDA graphs


class GraphedStep:
    """A training step, captured whole in a CUDA graph and replayed: one launch for some hundred kernels.

    The first calls run as they are, on the side stream that capture asks for: they are steps like any other, and they
    let the libraries and the optimizer make what they allocate once. If the capture fails, all steps run as they are,
    this one included: a capture executes nothing. Each graph has a stream of its own, which it was warmed up on.

    Args:
        step: free of host synchronisation; keeps its results in tensors that it updates in place; is called with
            inputs of the same shapes each time.
        warn: is told in one line if the capture fails.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., None], warn: Callable[[str], None]):
        self._step, self._warn = step, warn
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        self._calls += 1
        if self._calls <= self.WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._calls == self.WARM_UP + 1:
            self._graph = self._captured(inputs)
        if self._graph is None:
            self._step(*inputs)
            return
        for static, new in zip(self._inputs, inputs, strict=True):
            static.copy_(new)
        self._graph.replay()

    def _captured(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph | None:
        """Return the step as a graph; None if it could not be captured."""
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(*self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture leaves its own as the current one
            torch.cuda.synchronize()
            first: BaseException = error  # the end of the capture fails too, because of it, and says less
            while first.__context__ is not None:
                first = first.__context__
            reason = first_line(first)
            self._warn(f"the training step could not be captured in a CUDA graph and runs without one ({reason})")
            return None
        return graph
