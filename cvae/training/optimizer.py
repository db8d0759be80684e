"""One step of AdamW that no NaN and no infinity gets past, with loss scaling for float16, and without a host sync."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # AdamW's step as a function: an optimizer object per part costs more time

from cvae.errors import NonFiniteError
from cvae.training.weights import ALIGNMENT, Weights

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Kingma and Ba 2015

MAX_STREAK = 10
"""So many bad steps in a row end a training."""

MAX_UNSEEN = 1000
"""So many steps may pass between two looks at their outcomes."""

AT_ONCE = 800_000
"""A CPU takes so many weights through a step at once, if their gradient is in half precision: from its conversion to
their copy, they stay in its caches."""

BAD, OVERFLOW = 1, 2  # outcomes of a step; 0: it was taken
INITIAL_SCALE, MIN_SCALE, GROWTH_INTERVAL = 2.0**16, 2.0**-14, 2000


class Part(NamedTuple):
    """Some weights of one decay, which one call of Adam updates: views."""

    decay: float
    updates: Tensor  # steps taken, a number
    gradient: Tensor  # of the weights' type: what it was converted to, if that was needed
    weights: Tensor
    moments: Tensor
    squares: Tensor


class Portion(NamedTuple):
    """Weights that are taken through a step at once, by views, and the parts that they consist of.

    widened: where the gradient is converted to the weights' type. None: it is of their type, and `working` is the
    weights themselves.
    """

    widened: Tensor | None
    gradient: Tensor
    weights: Tensor
    working: Tensor
    parts: list[Part]


class GuardedAdam:
    """Adam whose step is skipped, and counted, when the loss or the gradient's squared norm is not finite.

    Before each step it takes `learning_rate` · `weight_decay` of every weight off it, whatever the gradient, but for
    biases and other vectors: the decoupled decay of AdamW. Source: Loshchilov and Hutter 2019.

    The gradient is that of `weights`, times the loss scale; their `working` copy follows each step.

    All that decides is computed on the device: a step never waits for the host, and can be captured in a CUDA graph.
    `check` looks at the outcome, whenever the host has the time; the weights are safe until then.

    With `clip`, a gradient whose Euclidean norm is larger is scaled down to it. Source: Pascanu et al. 2013.

    With `loss_scaling` (float16), the loss is multiplied by a scale before the backward pass, and the gradients are
    divided by it after. Where gradients overflow and the loss is finite, the scale is too large: such a step is
    skipped too, counted apart, and halves the scale, which doubles again after 2,000 good steps. Source: Micikevicius
    et al. 2018.
    """

    def __init__(
        self, weights: Weights[Any], learning_rate: float, weight_decay: float = 0.0, *,
        loss_scaling: bool = False, clip: float | None = None,
    ):  # fmt: skip
        self.weights, self.clip = weights, clip
        self.device = weights.vector.device
        self.learning_rate = torch.tensor(learning_rate, device=self.device)
        self.moments, self.squares = torch.zeros_like(weights.vector), torch.zeros_like(weights.vector)
        self._portions = self._portioned(weight_decay)
        self._parts = [part for portion in self._portions for part in portion.parts]
        self.scale = torch.tensor(INITIAL_SCALE, device=self.device) if loss_scaling else None
        self.good_steps = self._zero()  # since the scale last changed
        self._outcomes = torch.zeros(MAX_UNSEEN, device=self.device)  # of the steps since the last look
        self._unseen = torch.zeros(1, dtype=torch.int64, device=self.device)  # how many they are
        self.bad_streak = 0
        self.steps = self.bad = self.overflows = self.failed_at = 0  # of this epoch

    def scaled(self, loss: Tensor) -> Tensor:
        """What the gradient is to be taken of: the loss, times the scale if there is one."""
        return loss if self.scale is None else loss * self.scale

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def _portioned(self, weight_decay: float) -> list[Portion]:
        """The weights in portions, the last ones first: the norm, taken before, has read the gradient to its end."""
        weights, length = self.weights, len(self.weights.vector)
        size = min(AT_ONCE, length) if weights.half is not None and self.device.type == "cpu" else length
        room = None if weights.half is None else weights.vector.new_empty(size)  # of one portion after the other
        portions = []
        for start in reversed(range(0, length, size)):
            rows, undecayed = slice(start, min(start + size, length)), max(0, weights.decayed - start)
            gradient = weights.gradient[rows]
            widened = None if room is None else room[: len(gradient)]
            of_type = gradient if widened is None else widened
            vectors = (of_type, weights.vector[rows], self.moments[rows], self.squares[rows])
            divided = zip(*(vector.tensor_split((undecayed,)) for vector in vectors), strict=True)
            parts = [
                Part(decay, self._zero(), *views)
                for decay, views in zip((0.0, weight_decay), divided, strict=True)
                if len(views[0])
            ]
            portions.append(Portion(widened, gradient, weights.vector[rows], weights.working[rows], parts))
        return portions

    @torch.inference_mode()
    def step(self, loss: Tensor) -> Tensor:
        """Update the weights by their `gradient`, unless its squared norm or the loss is not finite.

        Returns whether the step was skipped, a bool scalar.
        """
        norm = self._norm()
        # No NaN and no infinity is lost on the way. v − v is 0 where v is finite, and NaN elsewhere.
        unscaled = norm if self.scale is None else norm / self.scale
        checksum = torch.addcmul(loss, unscaled, unscaled)
        skipped = checksum - checksum != 0
        skip = skipped.float()
        self._update(skip, self._divisor(norm))
        outcome = skip  # BAD or 0
        if self.scale is not None:
            overflow = skip * (loss - loss == 0)
            outcome = skip + overflow * (OVERFLOW - BAD)
            self._adjust_scale(skip, overflow)
        self._outcomes.index_copy_(0, self._unseen, outcome.view(1))
        self._unseen += 1
        return skipped

    def _norm(self) -> Tensor:
        """The gradient's Euclidean norm, in the weights' type: that of the norms of its rows, which is twice as fast.

        In bfloat16, which has float32's range, the rows' norms are rounded to it: the whole one's error is 0.2% at the
        most, and some 1e-5 for millions of weights.
        """
        weights, gradient = self.weights, self.weights.gradient
        dtype = None if gradient.dtype is torch.bfloat16 else weights.vector.dtype
        rows = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT), dim=1, dtype=dtype)
        norm: Tensor = torch.linalg.vector_norm(rows.to(weights.vector.dtype))
        return norm

    def _update(self, skip: Tensor, divisor: Tensor | None) -> None:
        """Adam's step itself, which leaves everything as it is where `skip` is 1. divisor: of the gradient."""
        for portion in self._portions:
            if portion.widened is not None:
                portion.widened.copy_(portion.gradient)
            for part in portion.parts:
                adamw(
                    [part.weights], [part.gradient], [part.moments], [part.squares], [], [part.updates],
                    fused=True, capturable=self.device.type == "cuda", grad_scale=divisor, found_inf=skip,
                    lr=self.learning_rate, beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=part.decay,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
            if portion.widened is not None:
                portion.working.copy_(portion.weights)

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """What a gradient of this norm is to be divided by: the loss scale, and what its norm is above `clip`."""
        if self.clip is None:
            return self.scale
        divisor = torch.maximum(norm / self.clip, torch.ones_like(norm) if self.scale is None else self.scale)
        return divisor.float()  # which the fused update wants for weights of any type

    def _adjust_scale(self, skip: Tensor, overflow: Tensor) -> None:
        assert self.scale is not None
        self.good_steps.add_(1).mul_(1 - skip)
        grow = (self.good_steps >= GROWTH_INTERVAL).float()
        self.scale.mul_(1 - 0.5 * overflow).mul_(1 + grow)
        self.good_steps.mul_(1 - grow)

    def _look(self) -> None:
        """Count the outcomes of the steps since the last look. The only place here that waits for the device."""
        for outcome in self._outcomes[: int(self._unseen)].tolist():
            self.steps += 1
            self.bad += outcome == BAD
            self.overflows += outcome == OVERFLOW
            self.bad_streak = self.bad_streak + 1 if outcome == BAD else 0
            if self.bad_streak >= MAX_STREAK and not self.failed_at:
                self.failed_at = self.steps
        self._unseen.zero_()

    def start_epoch(self) -> None:
        """Count steps and skips from zero; a streak of bad steps goes on."""
        self._look()
        self.steps = self.bad = self.overflows = self.failed_at = 0

    def check(self, where: str) -> None:
        """Raises NonFiniteError, naming `where` and the step, after MAX_STREAK bad steps in a row or a collapsed scale.

        To be called after MAX_UNSEEN steps at the latest.
        """
        self._look()
        if self.failed_at:
            raise NonFiniteError(
                f"{where}, step {self.failed_at}: the loss or its gradient was NaN, infinite or too large {MAX_STREAK} "
                "steps in a row; the weights have not taken it. Try a lower --learning-rate, or look at the data"
            )
        if self.scale is not None and float(self.scale) < MIN_SCALE:
            raise NonFiniteError(
                f"{where}, step {self.steps}: gradients overflow float16 whatever the loss scale "
                f"(now under {MIN_SCALE:g}); use --precision fp32 or bf16"
            )

    def skipped(self) -> dict[str, int]:
        """The steps skipped in this epoch, and apart from them those that only overflowed the loss scale."""
        self._look()
        skipped = {"skipped_steps": self.bad}
        return skipped if self.scale is None else skipped | {"overflow_steps": self.overflows}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and plain values."""
        self._look()
        return {
            "moments": [self.weights.view(name, self.moments) for name in self.weights],
            "squares": [self.weights.view(name, self.squares) for name in self.weights],
            "updates": self._parts[0].updates,
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
            for held, source in zip(own, new, strict=True):
                if type(source) is not type(held):
                    raise TypeError(f"{name} is not of the type that is expected")
                if isinstance(held, Tensor):
                    if source.shape != held.shape or source.dtype != held.dtype:
                        raise ValueError(f"{name} is not a tensor of the shape and type that is expected")
                    held.copy_(source)
        for part in self._parts:
            part.updates.copy_(state["updates"])
        self.bad_streak = state["bad_streak"]
