"""One step of Adam that no NaN and no infinity gets past, with loss scaling for float16, and without a host sync."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cvae.errors import NonFiniteError

MAX_STREAK = 10
"""So many bad steps in a row end a training."""

INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000


class GuardedAdam:
    """Adam whose step is skipped, and counted, when the loss or a gradient is not finite.

    All that decides is computed on the device: a step never waits for the host, and can be captured in a CUDA graph.
    `check` looks at the outcome, whenever the host has the time; the weights are safe until then.

    With `loss_scaling` (float16), the loss is multiplied by a scale before the backward pass, and the gradients divided
    by it after. Gradients that overflow are the scale's doing as long as the loss is finite: such a step is skipped too,
    counted apart, and halves the scale, which doubles again after 2,000 good steps (Micikevicius et al. 2018).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, loss_scaling: bool = False):
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.learning_rate = torch.tensor(learning_rate, device=device)
        self.adam = torch.optim.Adam(
            self.parameters, lr=self.learning_rate, fused=True, capturable=device.type == "cuda"
        )
        self.scale = torch.tensor(INITIAL_SCALE, device=device) if loss_scaling else None
        zero = torch.zeros((), device=device)
        self.good_steps = zero.clone()  # since the scale last changed
        self.bad_streak = zero.clone()
        self.steps, self.bad, self.overflows, self.failed_at = (zero.clone() for _ in range(4))  # of this epoch

    def backward(self, loss: Tensor) -> None:
        """The gradients of the loss, in the place of earlier ones."""
        self.adam.zero_grad()
        (loss if self.scale is None else loss * self.scale).backward()

    def step(self, loss: Tensor) -> Tensor:
        """Update the parameters unless something is not finite; whether it was done, a bool scalar."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # One number per tensor is enough: neither a NaN nor an infinity can leave a sum again.
        checksum = torch.stack([gradient.sum() for gradient in gradients]).sum()
        bad_loss = (~loss.detach().isfinite()).float()
        skip = torch.maximum((~checksum.isfinite()).float(), bad_loss)
        # The protocol between torch.amp.GradScaler and the fused optimizers.
        self.adam.grad_scale, self.adam.found_inf = self.scale, skip  # type: ignore[attr-defined]
        self.adam.step()
        bad = skip if self.scale is None else bad_loss
        self._count(bad, skip - bad)
        if self.scale is not None:
            self._adjust_scale(skip - bad)
        return skip == 0

    def _count(self, bad: Tensor, overflow: Tensor) -> None:
        self.steps += 1
        self.bad += bad
        self.overflows += overflow
        self.bad_streak.add_(1).mul_(bad)
        failed_now = (self.bad_streak >= MAX_STREAK) & (self.failed_at == 0)
        self.failed_at.copy_(torch.where(failed_now, self.steps, self.failed_at))

    def _adjust_scale(self, overflow: Tensor) -> None:
        assert self.scale is not None
        self.good_steps.add_(1).mul_(1 - overflow)
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
        own = {"good_steps": self.good_steps, "bad_streak": self.bad_streak}
        return {"adam": self.adam.state_dict(), "scale": self.scale, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, into an optimizer of the same parameters."""
        self.adam.load_state_dict(state["adam"])
        self.adam.param_groups[0]["lr"] = self.learning_rate  # the tensor that the schedule fills, not a copy
        self.good_steps.copy_(state["good_steps"])
        self.bad_streak.copy_(state["bad_streak"])
        if self.scale is not None:
            self.scale.copy_(state["scale"])
