"""One step of AdamW that no NaN and no infinity gets past, with loss scaling for float16, and without a host sync."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # AdamW's step as a function

from cvae.errors import NonFiniteError
from cvae.training.weights import Weights

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Kingma and Ba 2015
MAX_STREAK = 10
"""So many bad steps in a row end a training."""
INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000


class GuardedAdam:
    """AdamW whose step is skipped, and counted, where the loss or the gradient is not finite.

    Biases and other vectors have no weight decay. All that decides is computed on the device: a step never waits for
    the host, and can be captured in a CUDA graph. `check` looks at the outcome whenever the host has the time; the
    weights are safe until then. Source: Loshchilov and Hutter 2019; Pascanu et al. 2013 for the clipping.

    With `loss_scaling`, for float16, the loss is multiplied by a scale before the backward pass, and the gradient
    divided by it after. Where the gradient overflows and the loss is finite, the scale is too large: such a step is
    skipped too, counted apart, and halves the scale, which doubles again after 2,000 good steps. Source: Micikevicius
    et al. 2018.

    Args:
        weights: What is trained.
        learning_rate: The rate, which `self.learning_rate`, a scalar tensor, holds from then on.
        weight_decay: The share of the weights, times the rate, that is taken off in each step.
        loss_scaling: Whether the loss is scaled.
        clip: The largest Euclidean norm of the gradient, to which a larger one is scaled down; None: any.
    """

    def __init__(
        self, weights: Weights[Any], learning_rate: float, weight_decay: float = 0.0, *,
        loss_scaling: bool = False, clip: float | None = None,
    ):  # fmt: skip
        device, vector = weights.vector.device, weights.vector
        self.weights, self.clip = weights, clip
        self.learning_rate = torch.tensor(learning_rate, device=device)
        self.moments, self.squares = torch.zeros_like(vector), torch.zeros_like(vector)
        self._parts = [
            (rows, decay, torch.zeros((), device=device))
            for rows, decay in (
                (slice(0, weights.num_undecayed), 0.0),
                (slice(weights.num_undecayed, len(vector)), weight_decay),
            )
            if rows.start < rows.stop
        ]  # with the number of steps taken
        self.scale = torch.full((), INITIAL_SCALE, device=device) if loss_scaling else None
        self._counts = torch.zeros(5, device=device)  # see `_count`

    def scaled(self, loss: Tensor) -> Tensor:
        """Return what the gradient is to be taken of: the loss, times the scale if there is one."""
        return loss if self.scale is None else loss * self.scale

    @torch.no_grad()
    def step(self, loss: Tensor, gradient: Tensor) -> Tensor:
        """Update the weights, unless the loss or the norm of the gradient, that of `scaled(loss)`, is not finite.

        Returns:
            Whether the step was skipped, a bool scalar.
        """
        norm = torch.linalg.vector_norm(gradient)
        skipped = ~torch.isfinite(loss + norm)
        skip = skipped.float()
        divisor = self.scale
        if self.clip is not None:
            divisor = torch.maximum(norm / self.clip, norm.new_ones(()) if self.scale is None else self.scale).float()
        vector = self.weights.vector
        for rows, decay, updates in self._parts:
            adamw(
                [vector[rows]], [gradient[rows]], [self.moments[rows]], [self.squares[rows]], [], [updates],
                fused=True, capturable=gradient.is_cuda, grad_scale=divisor, found_inf=skip, lr=self.learning_rate,
                beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=decay, amsgrad=False, maximize=False,
            )  # fmt: skip
        self.weights.refresh()
        self._count(skip, skip * torch.isfinite(loss) if self.scale is not None else torch.zeros_like(skip))
        return skipped

    def _count(self, skip: Tensor, overflow: Tensor) -> None:
        """Count bad and overflowing steps, bad ones in a row, now and at most, and good ones of this scale."""
        bad_steps, overflows, streak, longest, good = self._counts.unbind()
        bad = skip - overflow
        bad_steps.add_(bad)
        overflows.add_(overflow)
        streak.add_(1).mul_(bad)
        torch.maximum(longest, streak, out=longest)
        good.add_(1).mul_(1 - skip)
        if self.scale is not None:
            grow = (good >= GROWTH_INTERVAL).float()
            self.scale.mul_(1 - 0.5 * overflow).mul_(1 + grow)
            good.mul_(1 - grow)

    def start_epoch(self) -> None:
        """Count skipped steps from zero; a streak of bad steps goes on."""
        self._counts[:2] = 0
        self._counts[3] = self._counts[2]

    def check(self, where: str) -> None:
        """Raise NonFiniteError, naming `where`, after MAX_STREAK bad steps in a row or with a collapsed loss scale."""
        if self._counts[3] >= MAX_STREAK:
            raise NonFiniteError(
                f"{where}: the loss or its gradient was NaN, infinite or too large {MAX_STREAK} steps in a row; the "
                "weights have not taken it. Try a lower --learning-rate, or look at the data"
            )
        if self.scale is not None and self.scale < MIN_SCALE:
            raise NonFiniteError(
                f"{where}: gradients overflow float16 whatever the loss scale (now under {MIN_SCALE:g}); "
                "use --precision fp32 or bf16"
            )

    def skipped(self) -> dict[str, int]:
        """Return the steps skipped in this epoch, and apart from them those that only overflowed the loss scale."""
        bad, overflows = (int(count) for count in self._counts[:2].tolist())
        return {"skipped_steps": bad} if self.scale is None else {"skipped_steps": bad, "overflow_steps": overflows}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on."""
        return {
            "moments": self.moments, "squares": self.squares, "updates": self._parts[0][2], "counts": self._counts,
            "scale": self.scale,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from an optimizer of the same parameters; raise what PyTorch raises if it does not fit."""
        for rows in self._parts:
            rows[2].copy_(state["updates"])
        for name, tensor in self.state_dict().items():
            if tensor is not None:
                if state[name].shape != tensor.shape:
                    raise ValueError(f"{name} has another shape")
                tensor.copy_(state[name])
