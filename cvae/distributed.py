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

from cvae.errors import CvaeError, PeerLost, UsageError, first_line, telling_of_memory

T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)


ALONE = "several processes are started by torchrun; for one, unset RANK and WORLD_SIZE"


class Processes:
    """The processes of this training: this one's `rank`, and how many there are, `count`.

    Raises UsageError where the environment, in which torchrun says so, contradicts itself.
    """

    def __init__(self) -> None:
        rank, count = _number("RANK"), _number("WORLD_SIZE")
        if (rank is None and count not in (None, 1)) or (rank is not None and count is None):
            given, missing = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
            raise UsageError(f"{given} is set to {os.environ[given]} and {missing} is not set: {ALONE}")
        self.rank, self.count = rank or 0, 1 if count is None else count
        self.local_rank, local_count = _number("LOCAL_RANK") or 0, _number("LOCAL_WORLD_SIZE")
        self.local_count = local_count or 1
        for prefix, number, limit in (("", self.rank, self.count), ("LOCAL_", self.local_rank, local_count)):
            if limit is not None and number >= limit:
                values = f"{prefix}RANK is {number}, and {prefix}WORLD_SIZE {limit}"
                raise UsageError(f"{values}: ranks are counted from 0; {ALONE}")
        if self.count > 1 and not (os.environ.get("MASTER_ADDR") and _number("MASTER_PORT")):
            raise UsageError(f"MASTER_ADDR and MASTER_PORT do not say where the {self.count} processes meet: {ALONE}")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """An error within it is told once on each machine, but each process tells that it has lost another one."""
        try:
            with telling_of_memory():
                yield
        except CvaeError as error:
            error.is_told_elsewhere = self.local_rank > 0 and not isinstance(error, PeerLost)
            raise

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Within it they reach each other: by gloo, which notices when one ends; on CUDA by NCCL too, for gradients."""
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


def _number(name: str) -> int | None:
    """A whole number from the environment; None where it is not set, or empty. Raises UsageError for anything else."""
    word = os.environ.get(name, "").strip()
    if word and not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise UsageError(f"{name} is set to {word!r}, which is no whole number of at least 0: {ALONE}")
    return int(word) if word else None


@contextmanager
def exchange() -> Iterator[None]:
    """Raises PeerLost for a failure of what the processes do together."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no more special one
        raise PeerLost(f"another process of this job has ended, so this one ends too ({first_line(error)})") from None
