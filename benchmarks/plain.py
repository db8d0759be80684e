"""The plain way of doing the same training in PyTorch: what a good script does without any machinery of ours.

The networks are ours, and so is the data path; the step is autocast, `binary_cross_entropy_with_logits`, `AdamW` with
`fused=True`, `clip_grad_norm_` and an exponential average of the weights in each step. Nothing guards it, and
threads wait as the system has them.
"""

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cvae.context import HALF
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask, ImageSet
from cvae.model.densities import gaussian_kl
from cvae.model.networks import build
from cvae.settings import Settings


class PlainTraining:
    """The training of one phase, `baseline` or `cvae`, on images uint8 `[N, height, width]`."""

    def __init__(self, phase: str, s: Settings, precision: str, images: Tensor):
        self.images = ImageSet(images, FixedMask(quadrants(s.quadrants, *images.shape[1:])))
        model = build(self.images.task, s)
        if phase == "cvae":
            self.images.set_guesses(model.baseline_net)
        self.s, self.phase, self.half = s, phase, HALF.get(precision)
        self.model: nn.Module = model if phase == "cvae" else model.baseline_net.requires_grad_(True)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, s.learning_rate, weight_decay=s.weight_decay, fused=True)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(2, s.average)))

    def loss(self, rows: Tensor) -> Tensor:
        """Return minus the objective per image."""
        x, y, _, guess = self.images.batch(rows)
        if self.phase == "baseline":
            return bce(self.model(x), y).mean()
        features = torch.cat([x, guess.sigmoid().to(x.dtype)], dim=-1)
        p, q = self.model.prior_net(features), self.model.recognition_net(torch.cat([x, y], dim=-1))
        (p_loc, p_log_scale), (q_loc, q_log_scale) = p.float().chunk(2, -1), q.float().chunk(2, -1)
        z = q_loc + q_log_scale.exp() * torch.randn_like(q_loc)
        kl = gaussian_kl((q_loc, q_log_scale), (p_loc, p_log_scale))  # type: ignore[arg-type]
        return (bce(self.model.generation_net(z), y) + kl).mean()

    def run(self, steps: int) -> float:
        """Return the seconds that so many steps take."""
        started = time.perf_counter()
        rows = torch.randperm(len(self.images))
        for i in range(steps):
            first = i * self.s.batch_size % (len(rows) - self.s.batch_size + 1)
            with torch.autocast("cpu", self.half) if self.half else nullcontext():
                loss = self.loss(rows[first : first + self.s.batch_size])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1e4)
            self.optimizer.step()
            self.average.update_parameters(self.model)
        return time.perf_counter() - started


def bce(logits: Tensor, y: Tensor) -> Tensor:
    """Return minus the Bernoulli log-likelihood, nats `[B]`."""
    return binary_cross_entropy_with_logits(logits.float(), y, reduction="none").sum(-1)
