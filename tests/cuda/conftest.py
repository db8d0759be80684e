"""The device of the tests: a GPU where there is one, and everywhere the CPU with CUDA graphs that are emulated.

A capture records operations and executes none, and a replay executes all on the same memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.steps import CPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cvae import context

aten = torch.ops.aten


class Stream:
    """A stream, which only notes what it waits for."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


class Emulation:
    """What was asked of the emulated device; `fails` says at which operation a capture is to go wrong."""

    def __init__(self) -> None:
        self.default_stream = self.current_stream = Stream()
        self.captured_on: list[Stream] = []
        self.replays = 0
        self.fails: Callable[[Any], bool] = lambda func: False
        self.ends_badly = False  # as does every capture in which an operation failed


class Record(TorchDispatchMode):
    """Records operations and executes none: new tensors are full of NaN, and what would be changed stays as it is."""

    def __init__(self, emulation: Emulation):
        super().__init__()
        self.emulation, self.invalid = emulation, False
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.invalid or waits(func, args) or self.emulation.fails(func):
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more of it")
        schema = func._schema
        written = [
            kwargs[argument.name] if argument.name in kwargs else args[place]
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            self.operations.append((func, args, kwargs, None))
            count = len(schema.returns)
            return None if count == 0 else written[0] if count == 1 else tuple(written[:count])
        if any(each.alias_info is not None for each in schema.returns):
            views = func(*args, **kwargs)
            if tree_leaves(views)[0].untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
                return views
        copies = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
        result = func(*copies[0], **copies[1])
        for tensor in tensors(result):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            if func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like):
                continue
            again = func(*args, **kwargs)
            for tensor, new in zip(tensors(result), tensors(again), strict=True) if result is not None else ():
                tensor.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def waits(func: Any, args: Any) -> bool:
    """Whether an operation waits for the device: it reads a number, or the shape of what it makes hangs on numbers."""
    if func.overloadpacket in (aten.index, aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func.overloadpacket in (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """Put the CPU in the place of the device; what `torch.cuda.graph` does about failures is PyTorch's own."""
    emulation = Emulation()

    class Graph:
        def capture_begin(self, **options: Any) -> None:
            assert emulation.current_stream is not emulation.default_stream
            emulation.captured_on.append(emulation.current_stream)
            self.random_state = torch.get_rng_state()
            self.record = Record(emulation)
            self.record.__enter__()

        def capture_end(self) -> None:
            self.record.__exit__(None, None, None)
            torch.set_rng_state(self.random_state)
            if self.record.invalid or emulation.ends_badly:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def replay(self) -> None:
            emulation.replays += 1
            self.record.replay()

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        before, emulation.current_stream = emulation.current_stream, stream
        yield
        emulation.current_stream = before  # not where the capture failed, as on the device

    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "stream": on_stream, "synchronize": lambda: None,
        "set_stream": lambda stream: setattr(emulation, "current_stream", stream),
        "current_stream": lambda device=None: emulation.current_stream, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return emulation


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
