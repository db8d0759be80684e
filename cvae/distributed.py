"""One training on several processes, as `torchrun` starts them: who does what, and what they tell each other.

With one process everything here is a no-op, and `torch.distributed` is never initialised.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cvae.errors import CvaeError, PeerLost, UsageError, first_line

T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)


class Processes:
    """The processes of this training: this one's `rank`, and how many there are, `count`."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Meet the others: by gloo, which notices when one of them ends; on CUDA by NCCL too, for the gradients."""
        if self.count > 1:
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            except RuntimeError as error:
                raise PeerLost(f"the processes of this job could not meet ({first_line(error)})") from None

    def disconnect(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def share(self, length: int) -> slice:
        """This process's part of `length` things in order."""
        return slice(length * self.rank // self.count, length * (self.rank + 1) // self.count)

    def share_of_batch(self, batch_size: int) -> slice:
        """This process's part of a batch, the same size for all. Raises UsageError where it does not divide."""
        if batch_size % self.count:
            raise UsageError(f"a batch of {batch_size} images cannot be shared evenly by {self.count} processes")
        return self.share(batch_size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, in one exchange, of the widest of their types.

        On CUDA it is NCCL's, which does not raise when another process ends: see docs/cuda.md.
        """
        if self.count > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            with exchange():
                dist.all_reduce(flat)
            for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def sum_on_host_(self, tensor: Tensor) -> None:
        """The same for one tensor, by gloo: it waits for the device, and raises PeerLost when another process ends."""
        if self.count > 1:
            total = tensor.cpu()
            with exchange():
                dist.all_reduce(total)
            tensor.copy_(total)

    def average_(self, *tensors: Tensor) -> None:
        """Replace each tensor of floats by its mean over all processes: running statistics, say."""
        for tensor in tensors if self.count > 1 else ():
            if tensor.is_floating_point():
                self.sum_on_host_(tensor)
                tensor /= self.count

    def gather(self, part: Tensor) -> Tensor:
        """The parts `[..., n]` of all processes, joined in the order of their ranks."""
        if self.count == 1:
            return part
        parts: list[Tensor] = [part] * self.count
        with exchange():
            dist.all_gather_object(parts, part.cpu())  # by gloo, which comes first for objects
        return torch.cat(parts, dim=-1)

    def maximum(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value)
        with exchange():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def on_all(self, action: Callable[[], T]) -> T:
        """What `action` returns in each process, its own. An expected failure in one of them is raised in all."""
        if self.count == 1:
            return action()
        failures: list[CvaeError | None] = [None] * self.count
        own: CvaeError | None = None
        try:
            result = action()
        except CvaeError as error:
            own = error
        with exchange():
            dist.all_gather_object(failures, own)
        for failure in failures:
            if failure is not None:
                raise failure
        return result

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns in the main process, in every one of them. An expected failure is raised in all."""
        if self.count == 1:
            return action()
        outcome: list[T | CvaeError | None] = [None]
        if self.is_main:
            try:
                outcome[0] = action()
            except CvaeError as error:
                outcome[0] = error
        with exchange():
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if isinstance(outcome[0], CvaeError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]


@contextmanager
def exchange() -> Iterator[None]:
    """Raises PeerLost for a failure of what the processes do together."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no more special one
        raise PeerLost(f"another process of this job has ended, so this one ends too ({first_line(error)})") from None
