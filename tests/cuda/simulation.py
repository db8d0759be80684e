"""CUDA without a GPU, in two ways: tensors that only say that they are on one, and CPU tensors that stand in for its.

`fake_cuda`: fake tensors on cuda:0, which have no numbers; each operation is checked for where its tensors are.
`emulated_cuda`: "cuda" is the CPU, and a CUDA graph is a record of operations: its capture executes none of them, and
its replay all of them, on the memory that was there at the capture.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.cuda.amp.common
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cvae import context
from cvae.data.masks import Split

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a real device."""
    return pytest.mark.cuda(NO_GPU(test))


def waits(func: Any, args: Any) -> bool:
    """Whether an operation waits for the device: it reads a number, or the shape of what it makes hangs on numbers."""
    if func.overloadpacket in (aten.index, aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func.overloadpacket in (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select)


# Fake tensors


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, also with `device=CUDA`, and what PyTorch lacks to differentiate and to copy models of them."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    monkeypatch.setattr(Split, "__deepcopy__", lambda split, memo: split, raising=False)  # its tensors are real ones
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(context, "generator", lambda device, *key: FakeGenerator(device))
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    for name in ("randn", "randint"):
        monkeypatch.setattr(torch, name, partial(_random, getattr(torch, name)))
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # does copy.deepcopy
        yield


class FakeGenerator:
    """What stands for a random number generator on a device."""

    def __init__(self, device: torch.device):
        self.device = device


def _random(
    draw: Callable[..., Tensor], *size: Any, generator: FakeGenerator | torch.Generator | None = None, **options: Any
) -> Tensor:  # fmt: skip
    if isinstance(generator, FakeGenerator):
        assert torch.device(options["device"]) == generator.device
        generator = None
    return draw(*size, generator=generator, **options)


class OnDevice(TorchDispatchMode):
    """Refuses every tensor that is not on cuda:0, and stands in for the fused Adam, which has no fake form."""

    def __init__(self) -> None:
        super().__init__()
        self.adams = 0
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen.add(func.overloadpacket.__name__)
        if func.overloadpacket is aten._fused_adamw_:
            self.adams += 1
            check_fused_adam(*args, **kwargs)
            result = None
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.device == CUDA, f"{func} sees a tensor on {tensor.device}, {list(tensor.shape)}"
        return result


def check_fused_adam(
    weights: list[Tensor], gradients: list[Tensor], moments: list[Tensor], squares: list[Tensor],
    largest_squares: list[Tensor], updates: list[Tensor], *, lr: Tensor, found_inf: Tensor,
    grad_scale: Tensor | None = None, weight_decay: float, **numbers: Any,
) -> None:  # fmt: skip
    """That CUDA's kernel would take these: float32, contiguous, of one shape; numbers as tensors of one element."""
    assert not largest_squares
    for several in zip(weights, gradients, moments, squares, strict=True):
        for tensor in several:
            assert tensor.dtype == torch.float32
            assert tensor.dim() == 1
            assert tensor.is_contiguous()
            assert tensor.shape == several[0].shape
    assert len(updates) == len(weights) > 0
    for number in (*updates, lr, found_inf, *([] if grad_scale is None else [grad_scale])):
        assert number.dtype == torch.float32
        assert number.numel() == 1
    assert type(weight_decay) is float


def backward(root: Tensor) -> None:
    """`Tensor.backward` in Python: PyTorch's own asks the driver for the device's streams."""
    for leaf, gradient in _gradients(root):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def grad(root: Tensor, wanted: Tensor, retain_graph: bool = False) -> tuple[Tensor]:
    """`torch.autograd.grad` by one leaf."""
    (found,) = (gradient for leaf, gradient in _gradients(root, wanted) if leaf is wanted)
    return (found,)


@torch.no_grad()
def _gradients(root: Tensor, wanted: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    first = root.grad_fn
    waiting: Counter[Any] = Counter()  # for so many gradients
    found, seen = [first], {first}
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    found.append(node)
    gradients: dict[Any, dict[int, Tensor]] = {first: {root.output_nr: torch.ones_like(root)}}
    leaves, ready = [], [first]
    while ready:
        node = ready.pop()
        outputs = gradients.pop(node, {})
        if hasattr(node, "variable"):
            leaves.extend((node.variable, gradient) for gradient in outputs.values())
            continue
        for (after, place), gradient in zip(*_inputs(node, outputs), strict=True):
            if gradient is not None:
                like = after._input_metadata[place]
                gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                sums = gradients.setdefault(after, {})
                sums[place] = gradient if place not in sums else sums[place] + gradient
            waiting[after] -= 1
            if waiting[after] == 0:
                ready.append(after)
    return leaves


def _inputs(node: Any, outputs: dict[int, Tensor]) -> tuple[list[Any], list[Tensor | None]]:
    """Where the gradients of an operation's inputs go, and the gradients."""
    wanted = [after for after in node.next_functions if after[0] is not None]
    if not outputs:
        return wanted, [None] * len(wanted)
    arguments = [outputs.get(i) for i in range(len(node._input_metadata))]
    if isinstance(node, BackwardCFunction):  # written in Python
        found, needed = node.apply(*arguments), node.needs_input_grad
    else:
        found, needed = node(*arguments), [after[0] is not None for after in node.next_functions]
    found = found if isinstance(found, tuple) else (found,)
    return wanted, [gradient for gradient, is_needed in zip(found, needed, strict=True) if is_needed]


# The CPU in the place of the device


class Stream:
    """A stream, which only notes what it waits for."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


class Emulation:
    """What the emulated device was asked for; `fails` says when a capture is to go wrong."""

    def __init__(self) -> None:
        self.default_stream = self.current_stream = Stream()
        self.captured_on: list[Stream] = []
        self.synchronised = self.replays = 0
        self.fails: Callable[[Any], bool] = lambda func: False  # at this operation
        self.ends_badly = False  # as does every capture in which an operation failed


class Record(TorchDispatchMode):
    """Records operations and executes none: new tensors are full of NaN, and what would be changed stays as it is."""

    def __init__(self, emulation: Emulation):
        super().__init__()
        self.emulation = emulation
        self.invalid = False
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.invalid or waits(func, args) or self.emulation.fails(func):
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more of it")
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
            self.operations.append((func, args, kwargs, None))
            written = [
                kwargs[argument.name] if argument.name in kwargs else args[place]
                for place, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            count = len(func._schema.returns)
            return None if count == 0 else written[0] if count == 1 else tuple(written[:count])
        if any(each.alias_info is not None for each in func._schema.returns):
            views = func(*args, **kwargs)
            if tree_leaves(views)[0].untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
                return views
        copies = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
        result = func(*copies[0], **copies[1])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            if func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like):
                continue
            again = func(*args, **kwargs)
            if result is not None:
                for tensor, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(tensor, Tensor):
                        tensor.copy_(new)


@contextmanager
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """A machine with one "GPU". What `torch.cuda.graph` does about streams and failures is PyTorch's own."""
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

    def set_stream(stream: Stream) -> None:
        emulation.current_stream = stream

    class StreamContext:
        def __init__(self, stream: Stream):
            self.stream = stream

        def __enter__(self) -> None:
            self.before = emulation.current_stream
            set_stream(self.stream)

        def __exit__(self, *exception: object) -> None:
            set_stream(self.before)

    def synchronize() -> None:
        emulation.synchronised += 1

    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "stream": StreamContext, "set_stream": set_stream,
        "current_stream": lambda device=None: emulation.current_stream, "synchronize": synchronize,
        "empty_cache": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "device": lambda device: nullcontext(), "current_device": lambda: 0,
        "get_rng_state": lambda device: torch.get_rng_state(), "set_rng_state": lambda state, device: None,
        "get_device_name": lambda device=None: "emulated",
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 31),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    generator, autocast = context.generator, context.autocast
    monkeypatch.setattr(context, "generator", lambda device, *key: generator(CPU, *key))
    monkeypatch.setattr(context, "autocast", lambda precision, device: autocast(precision, CPU))
    with _OnCPU():
        yield emulation


class _OnCPU(TorchFunctionMode):
    """Has whatever is asked for on the device be on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(value: Any) -> Any:
            return CPU if isinstance(value, torch.device) and value.type == "cuda" else value

        return func(*map(moved, args), **{name: moved(value) for name, value in (kwargs or {}).items()})
