"""The networks, by name: each a builder, from a task and the settings to a CVAE with its baseline.

A new network is a class with `encode` and `draw`, and a name in `NETWORKS`. It may be made of any modules.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cvae import context
from cvae.data.tasks import Batch, Task
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.deep import Deep
from cvae.model.densities import Gaussian
from cvae.model.layers import mlp, mlps
from cvae.settings import Settings


class Encoded(NamedTuple):
    """What all draws of z for a batch have in common."""

    p: Gaussian  # p(z|x), [B, Z]
    q: Gaussian | None  # q(z|x,y), [B, Z]; None where z is not drawn from it
    guess: Tensor  # the logits of ŷ, [B, y_dim]
    guessed: Tensor  # x completed by ŷ, [B, x_dim + y_dim]


class OneLevel(CVAE):
    """A CVAE of one level of z, whose generation network is left to a subclass: Sohn et al. 2015, figure 1(d).

    The prior network sees x completed by the baseline's guess ŷ, the recognition network x completed by the true y;
    both are: pixels → hidden layers → (loc, log-scale).
    """

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, mlp(task.x_dim, *s.hidden, task.y_dim), s.latent_dim)
        self.prior_net, self.recognition_net = mlps(task.x_dim + task.y_dim, *s.hidden, 2 * s.latent_dim, count=2)

    def encode(self, batch: Batch, guess: Tensor, recognise: bool) -> Encoded:
        guessed = torch.cat([batch.x, guess.sigmoid().to(batch.x.dtype)], dim=-1)
        p, q = Gaussian(*self.prior_net(guessed).chunk(2, dim=-1)), None
        if recognise:
            q = Gaussian(*self.recognition_net(torch.cat([batch.x, batch.y], dim=-1)).chunk(2, dim=-1))
        return Encoded(p, q, guess, guessed)

    def draw(self, encoded: Encoded, eps: Tensor, recognise: bool, detach_z: bool = False) -> Draw:
        source = encoded.q if recognise and encoded.q is not None else encoded.p
        z = source.sample(eps, detach_z)
        return Draw(self.generation(z, encoded), (Latent(z, eps, source, encoded.p),))

    def generation(self, z: Tensor, encoded: Encoded) -> Tensor:
        """Return the logits of p(y|x,z), `[L, B, y_dim]`, for z `[L, B, Z]`."""
        raise NotImplementedError


class Tutorial(OneLevel):
    """The tutorial's networks, whose generation network sees z alone.

    The tutorial shows its baseline −1 in the place of each hidden pixel, which adds a constant to each unit of the
    first layer, as its bias can: these inputs are left out, and so are outputs for observed pixels, which nothing uses.
    """

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, s)
        self.generation_net = mlp(s.latent_dim, *s.hidden, task.y_dim)

    def generation(self, z: Tensor, encoded: Encoded) -> Tensor:
        return self.generation_net(z)


class Paper(OneLevel):
    """The paper's p(y|x,z), which sees z, x and ŷ; its logits are added to those of ŷ, as in its authors' code."""

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, s)
        self.generation_of_x = mlp(task.x_dim + task.y_dim, s.hidden[0])  # once an image, for all samples of it
        self.generation_of_z = mlp(s.latent_dim, s.hidden[0])
        self.generation_net = mlp(*s.hidden, task.y_dim)
        *_, weight, bias = self.recognition_net.parameters()
        with torch.no_grad():  # z tells much of y from the first step: on top of the guess it is not missed otherwise
            weight[: s.latent_dim] *= 3
            bias[s.latent_dim :] -= 2

    def generation(self, z: Tensor, encoded: Encoded) -> Tensor:
        hidden = self.generation_of_z(z) + self.generation_of_x(encoded.guessed)
        return self.generation_net(hidden.relu()) + encoded.guess


NETWORKS: dict[str, Callable[[Task, Settings], CVAE]] = {"tutorial": Tutorial, "paper": Paper, "deep": Deep}


def build(task: Task, s: Settings) -> CVAE:
    """Build the model of these settings, its weights drawn from the seed; ValueError for an unknown network."""
    builder = s.chosen("network", NETWORKS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(context.derive_seed(s.seed, "weights"))
        return builder(task, s)


def upgraded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as version 0.3 named them, layers side by side in one tensor, under the names of today."""
    renamed = {}
    for name, tensor in state.items():
        if ".layers." not in name or tensor.dim() == (2 if name.endswith("weight") else 1):
            renamed[name] = tensor
        else:
            for layer, network in zip(tensor, ("prior_net", "recognition_net"), strict=False):  # one layer, or two
                renamed[name.replace("encoders", network)] = layer.clone()
    return renamed
