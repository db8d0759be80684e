"""One step of Adam that no NaN and no infinity gets past, with loss scaling for float16, and without a host sync."""

import copy
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from cvae.errors import NonFiniteError

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Kingma and Ba 2015

MAX_STREAK = 10
"""So many bad steps in a row end a training."""

INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000


Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """An exponential moving average of a model's weights, in a copy of the model: less noisy than any last weights.

    The average spans about `window` steps, and less at the start. 0: there is none, `model` is the model itself.
    Source: Polyak and Juditsky 1992, with exponential weights.
    """

    def __init__(self, model: Model, window: int):
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model: Model = copy.deepcopy(model, frozen) if window else model  # what is frozen is shared
        self._window = window
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        averages = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._pairs = list(zip(averages, trained, strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in, after the step of this number, counted from 0 over the whole training."""
        every = 1 if step < 100 else 10  # a pass over the weights is not for nothing, and later they change little
        if self._window and step % every == 0:
            weight = min(1.0, every / min(self._window, 1 + step / 9))
            for average, parameter in self._pairs:
                average.lerp_(parameter, weight)


class GuardedAdam:
    """Adam whose step is skipped, and counted, when the loss or a gradient is not finite.

    All that decides is computed on the device: a step never waits for the host, and can be captured in a CUDA graph.
    `check` looks at the outcome, whenever the host has the time; the weights are safe until then.

    With `loss_scaling` (float16), the loss is multiplied by a scale before the backward pass, and the gradients are
    divided by it after. Gradients that overflow are the scale's doing as long as the loss is finite: such a step is
    skipped too, counted apart, and halves the scale, which doubles again after 2,000 good steps. Source: Micikevicius
    et al. 2018.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, loss_scaling: bool = False):
        self.parameters: list[Tensor] = list(parameters)
        self.device = self.parameters[0].device
        self.learning_rate = torch.tensor(learning_rate, device=self.device)
        self.moments = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.updates = [self._zero() for _ in self.parameters]  # one count per tensor, as the library wants it
        self.scale = torch.tensor(INITIAL_SCALE, device=self.device) if loss_scaling else None
        self.good_steps = self._zero()  # since the scale last changed
        self.bad_streak = self._zero()
        self.steps, self.bad, self.overflows, self.failed_at = (self._zero() for _ in range(4))  # of this epoch

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor) -> None:
        """The gradients of the loss, in the place of earlier ones."""
        for parameter in self.parameters:
            parameter.grad = None
        (loss if self.scale is None else loss * self.scale).backward()

    @torch.no_grad()
    def step(self, loss: Tensor) -> Tensor:
        """Update the parameters unless something is not finite; whether it was done, a bool scalar."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # all of them have one
        # One number per tensor is enough: neither a NaN nor an infinity can leave a sum again.
        checksum = torch.stack([gradient.sum() for gradient in gradients]).sum()
        bad_loss = loss.detach().isfinite().logical_not().float()
        skip = torch.maximum(checksum.isfinite().logical_not().float(), bad_loss)
        adam(
            self.parameters, gradients, self.moments, self.squares, [], self.updates,
            lr=self.learning_rate, beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=0.0,
            amsgrad=False, maximize=False, fused=True, capturable=self.device.type == "cuda",
            grad_scale=self.scale, found_inf=skip,
        )  # fmt: skip
        bad = skip if self.scale is None else bad_loss
        self._count(bad, skip - bad)
        if self.scale is not None:
            self._adjust_scale(skip, skip - bad)
        return skip == 0

    def _count(self, bad: Tensor, overflow: Tensor) -> None:
        self.steps += 1
        self.bad += bad
        self.overflows += overflow
        self.bad_streak.add_(1).mul_(bad)
        failed_now = (self.bad_streak >= MAX_STREAK) & (self.failed_at == 0)
        self.failed_at.copy_(torch.where(failed_now, self.steps, self.failed_at))

    def _adjust_scale(self, skip: Tensor, overflow: Tensor) -> None:
        assert self.scale is not None
        self.good_steps.add_(1).mul_(1 - skip)
        grow = (self.good_steps >= GROWTH_INTERVAL).float()
        self.scale.mul_(1 - 0.5 * overflow).mul_(1 + grow)
        self.good_steps.mul_(1 - grow)

    def start_epoch(self) -> None:
        """Count steps and skips from zero; a streak of bad steps goes on."""
        for count in (self.steps, self.bad, self.overflows, self.failed_at):
            count.zero_()

    def check(self, where: str) -> None:
        """Raises NonFiniteError, naming `where` and the step, after MAX_STREAK bad steps in a row or a collapsed scale.

        Reads numbers from the device: the only place here that waits for it.
        """
        if step := int(self.failed_at):
            raise NonFiniteError(
                f"{where}, step {step}: the loss or its gradient was NaN or infinite {MAX_STREAK} steps in a row; "
                "the weights have not taken it. Try a lower --learning-rate, or look at the data"
            )
        if self.scale is not None and float(self.scale) < MIN_SCALE:
            raise NonFiniteError(
                f"{where}, step {int(self.steps)}: gradients overflow float16 whatever the loss scale "
                f"(now under {MIN_SCALE:g}); use --precision fp32 or bf16"
            )

    def skipped(self) -> dict[str, int]:
        """The steps skipped in this epoch, and apart from them those that only overflowed the loss scale."""
        skipped = {"skipped_steps": int(self.bad)}
        return skipped if self.scale is None else skipped | {"overflow_steps": int(self.overflows)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and plain values."""
        return {
            "moments": self.moments,
            "squares": self.squares,
            "updates": self.updates,
            "bad_streak": self.bad_streak,
            "good_steps": self.good_steps,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, into an optimizer of the same parameters.

        Raises KeyError, TypeError, ValueError or RuntimeError if the state is not of this kind.
        """
        for name, value in self.state_dict().items():
            own, new = (value, state[name]) if isinstance(value, list) else ([value], [state[name]])
            for tensor, source in zip(own, new, strict=True):
                if tensor is not None:
                    if not isinstance(source, Tensor) or source.shape != tensor.shape or source.dtype != tensor.dtype:
                        raise ValueError(f"{name} is not a tensor of the shape and type that is expected")
                    tensor.copy_(source)
