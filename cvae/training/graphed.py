"""A training step as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from cvae.errors import first_line


class GraphedStep:
    """A training step, captured whole in a CUDA graph and replayed: one launch for some hundred kernels.

    The first calls run as they are, on the side stream that capture asks for: they are steps like any other, and they
    let the libraries and the optimizer make what they allocate once. If the capture fails, all steps run as they are,
    this one included: a capture executes nothing. Each graph has a stream of its own, which it was warmed up on.

    Args:
        step: Keeps its results in tensors that it updates in place, without host synchronisation, from inputs of the
            same shapes each time.
        warn: Called with one line if the capture fails.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[..., None], warn: Callable[[str], None]):
        self._step, self._warn, self._calls, self._stream = step, warn, 0, torch.cuda.Stream()
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
            problem = "the training step could not be captured in a CUDA graph and runs without one"
            self._warn(f"{problem} ({first_line(first)})")
            return None
        return graph
