"""AdamW that no NaN and no infinity gets past, with loss scaling for float16, and the average of the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw  # AdamW's step as a function

from cvae.errors import NonFiniteError

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Kingma and Ba 2015
MAX_STREAK = 10  # bad steps in a row that end a training
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
        model: What is trained: its parameters that require a gradient, in float32 or wider.
        learning_rate: The rate, which `self.learning_rate`, a scalar tensor, holds from then on.
        weight_decay: The share of the weights, times the rate, that is taken off in each step.
        loss_scaling: Whether the loss is scaled.
        clip: The largest Euclidean norm of the gradient, to which a larger one is scaled down; None: any.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float = 0.0, *,
        loss_scaling: bool = False, clip: float | None = None,
    ):  # fmt: skip
        self.parameters: list[Tensor] = sorted(
            (p for p in model.parameters() if p.requires_grad), key=lambda p: p.dim() > 1
        )
        device, vectors = self.parameters[0].device, sum(p.dim() < 2 for p in self.parameters)
        self.clip, self.learning_rate = clip, torch.tensor(learning_rate, device=device)
        self.moments, self.squares = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self._updates = [torch.zeros((), device=device) for _ in self.parameters]  # steps taken
        self._groups = (slice(vectors), 0.0), (slice(vectors, None), weight_decay)
        self.scale = torch.full((), INITIAL_SCALE, device=device) if loss_scaling else None
        self._counts = torch.zeros(5, device=device)  # see `_count`

    def scaled(self, loss: Tensor) -> Tensor:
        """Return what the gradient is to be taken of: the loss, times the scale if there is one."""
        return loss if self.scale is None else loss * self.scale

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each parameter; zeros where the loss does not depend on it."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    @torch.no_grad()
    def step(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        """Update the weights, unless the loss or the norm of the gradient, that of `scaled(loss)`, is not finite.

        Returns:
            Whether the step was skipped, a bool scalar.
        """
        norm = torch.stack([g.flatten().dot(g.flatten()) for g in gradients]).sum().sqrt()  # faster than by the library
        skipped = ~torch.isfinite(loss + norm)
        skip = skipped.float()
        divisor = self.scale
        if self.clip is not None:
            divisor = torch.maximum(norm / self.clip, norm.new_ones(()) if self.scale is None else self.scale).float()
        for group, decay in self._groups:
            adamw(
                self.parameters[group], gradients[group], self.moments[group], self.squares[group], [],
                self._updates[group], fused=True, capturable=norm.is_cuda, grad_scale=divisor, found_inf=skip,
                lr=self.learning_rate, beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=decay, amsgrad=False,
                maximize=False,
            )  # fmt: skip
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
        self._counts[:2] = self._counts[3] = 0

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

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return everything that the next steps depend on."""
        rest = [self._counts] + ([] if self.scale is None else [self.scale])
        return {"moments": self.moments, "squares": self.squares, "updates": self._updates, "counts": rest}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take over a state from an optimizer of the same parameters; raise what PyTorch raises if it does not fit."""
        for name, tensors in self.state_dict().items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                if tensor.shape != saved.shape:
                    raise ValueError(f"{name} has another shape")
                tensor.copy_(saved)


class WeightAverage:
    """An exponential moving average of a model's weights, in a copy of the model: less noisy than any last weights.

    Buffers of floats, as of batch normalisation, are averaged with the weights, others are copied.
    Source: Polyak and Juditsky 1992, with exponential weights.

    Args:
        model: The model that is trained.
        window: The steps that the average spans, fewer at the start; 0: none, `self.model` is the model itself.
    """

    def __init__(self, model: nn.Module, window: int):
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model: Any = copy.deepcopy(model, frozen) if window else model  # what is frozen is shared
        tensors = ((*each.parameters(), *each.buffers()) for each in (self.model, model))
        self._pairs = [(mean, now) for mean, now in zip(*tensors, strict=True) if mean is not now]
        self._window, self._since = window, 0  # steps since the weights were last taken in

    @torch.no_grad()
    def update(self, step: int, last: bool = False) -> None:
        """Take the weights in, after the step of this number, counted from 0 over the whole training.

        A pass over all weights takes time, and later they change little: then they are taken in every so many steps,
        with the weight of these steps, and after the `last` step of an epoch.
        """
        self._since += 1
        every = 1 if step < 100 else min(20, max(1, self._window // 25))
        if self._window and (last or self._since >= every):
            span = min(self._window, 1 + step / 9)
            share = 1 - (1 - 1 / span) ** self._since
            for mean, now in self._pairs:
                mean.lerp_(now, share) if mean.is_floating_point() else mean.copy_(now)
            self._since = 0
