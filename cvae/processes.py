"""The processes of one job, as torchrun starts them, and what they tell each other; with one, nothing is exchanged."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cvae.errors import CvaeError, PeerLost, UsageError, first_line, is_out_of_memory, telling_of_memory

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # after which a process that does not answer is given up


class Processes:
    """The processes of this job: this one's `rank`, and how many there are, `count`; on this machine, with `local_`."""

    def __init__(self) -> None:
        self.rank, self.local_rank = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))
        self.count, self.local_count = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.is_main = self.rank == 0  # the one that writes and prints

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connect the processes: by gloo, which notices when one ends; on CUDA by NCCL too, for gradients."""
        if self.count == 1:
            yield
            return
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:  # ValueError: a variable of torchrun's is missing
            raise PeerLost(f"the processes of this job could not meet ({first_line(error)})") from None
        try:
            yield
        finally:
            dist.destroy_process_group()

    def share(self, length: int) -> slice:
        """Return this process's part of `length` things in order."""
        return slice(length * self.rank // self.count, length * (self.rank + 1) // self.count)

    def portions(self, length: int, size: int) -> Sequence[int]:
        """Return the first places of this process's portions of `length` things; of an empty one if it has none."""
        starts = range(0, length, size)
        return starts[self.share(len(starts))] or [length]

    def share_of_batch(self, batch_size: int) -> slice:
        """Return this process's part of a batch, of one size for all. Raises UsageError if it does not divide."""
        if batch_size % self.count:
            raise UsageError(f"a batch of {batch_size} images cannot be shared evenly by {self.count} processes")
        return self.share(batch_size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes; NCCL's does not notice a lost one (docs/cuda.md)."""
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            with exchange():
                dist.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def sum_on_host_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum, by gloo: waits for the device, and raises PeerLost if another process ends."""
        if self.count > 1:
            total = tensor.cpu()
            self.sum_(total)
            tensor.copy_(total)

    def average_(self, *tensors: Tensor) -> None:
        """Replace each tensor of floats by its mean over all processes, as for running statistics."""
        for tensor in filter(torch.is_floating_point, tensors):
            self.sum_on_host_(tensor)
            tensor /= self.count

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts `[..., n]` of all processes, joined in the order of their ranks, on the CPU."""
        return part if self.count == 1 else torch.cat(self._all(part.cpu()), dim=-1)

    def maximum(self, value: int) -> int:
        """Return the largest of the processes' values."""
        return max(self._all(value))

    def in_step(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield this process's parts of a long work, in step with the others: they wait for each other part by part."""
        rest = iter(parts)
        while self.maximum((part := next(rest, None)) is not None):
            if part is not None:
                yield part

    def on_all(self, action: Callable[[], T]) -> T:
        """Return the result of `action` in each process, its own. An expected failure in one is raised in all."""
        failure = None
        try:
            with telling_of_memory():
                result = action()
        except CvaeError as error:
            failure = error
        for first in filter(None, self._all(failure)):
            raise first
        return result

    def on_main(self, action: Callable[[], T]) -> T:
        """Return the result of `action` in the main process to all. An expected failure is raised in all."""
        result = self.on_all(action if self.is_main else lambda: None)
        return self._all(result)[0]  # type: ignore[return-value]

    def _all(self, value: T) -> list[T]:
        """Return one object of each process, in the order of their ranks, by gloo."""
        objects = [value] * self.count
        if self.count > 1:
            with exchange():
                dist.all_gather_object(objects, value)
        return objects


@contextmanager
def exchange() -> Iterator[None]:
    """Raise PeerLost if another process does not take part in what all do together; other errors pass."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        text = str(error).lower()
        is_network = isinstance(error, dist.DistError) or any(s in text for s in ("gloo/", "pair closure", "connect"))
        if is_out_of_memory(error) or not is_network:
            raise
        is_late = "timed out" in text or "timeout" in text
        end = f"did not answer within {TIMEOUT.seconds // 60} minutes" if is_late else "has ended"
        raise PeerLost(f"another process of this job {end}, so this one ends too ({first_line(error)})") from None
