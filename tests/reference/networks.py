"""Networks that the package does not have, each a builder as those of `cvae.model.networks.NETWORKS` are."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cvae.data.tasks import Batch, Task
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian
from cvae.model.networks import Encoded, OneLevel
from cvae.settings import Settings


def layers(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of PyTorch, with an activation between each two."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*modules[:-1])


class Levels(CVAE):
    """Levels of z of the same size, one below another: q and p of each see the image and all that was drawn above."""

    def __init__(self, task: Task, s: Settings, levels: int = 2, activation: type[nn.Module] = nn.ReLU):
        net = partial(layers, activation=activation)
        super().__init__(task, net(task.x_dim, *s.hidden, task.y_dim), s.latent_dim)
        self.size = s.latent_dim // levels
        sizes = [(task.x_dim + task.y_dim + i * self.size, *s.hidden, 2 * self.size) for i in range(levels)]
        self.prior_nets, self.recognition_nets = (nn.ModuleList(net(*each) for each in sizes) for _ in range(2))
        self.generation_net = net(s.latent_dim, *s.hidden, task.y_dim)

    def encode(self, batch: Batch, guess: Tensor, recognise: bool) -> tuple[Tensor, Tensor]:
        guessed = torch.cat([batch.x, guess.sigmoid().to(batch.x.dtype)], dim=-1)
        return guessed, torch.cat([batch.x, batch.y], dim=-1) if recognise else guessed

    def draw(self, encoded: tuple[Tensor, Tensor], eps: Tensor, recognise: bool, detach_z: bool = False) -> Draw:
        latents: list[Latent] = []
        for i, noise in enumerate(eps.split(self.size, dim=-1)):
            above = [latent.z for latent in latents]
            p = q = self.gaussian(self.prior_nets[i], above, encoded[0])
            if recognise:
                q = self.gaussian(self.recognition_nets[i], above, encoded[1])
            latents.append(Latent(q.sample(noise, detach_z), noise, q, p))
        return Draw(self.generation_net(torch.cat([latent.z for latent in latents], dim=-1)), tuple(latents))

    def gaussian(self, net: nn.Module, above: list[Tensor], pixels: Tensor) -> Gaussian:
        if above:
            pixels = pixels.expand(*above[0].shape[:-1], -1)
        return Gaussian(*net(torch.cat([*above, pixels], dim=-1)).chunk(2, dim=-1))


class Regularised(OneLevel):
    """One level of z, with dropout and batch normalisation in all four networks; of `hidden`, the first size."""

    def __init__(self, task: Task, s: Settings):
        super().__init__(task, s)
        size, pixels = s.hidden[0], task.x_dim + task.y_dim
        self.baseline_net = self.net(task.x_dim, size, task.y_dim).requires_grad_(False)
        self.prior_net, self.recognition_net = (self.net(pixels, size, 2 * s.latent_dim) for _ in range(2))
        self.generation_net = self.net(s.latent_dim, size, task.y_dim)

    def net(self, inputs: int, size: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(0.2), nn.Linear(size, outputs)
        )

    def generation(self, z: Tensor, encoded: Encoded) -> Tensor:
        logits: Tensor = self.generation_net(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        return logits + encoded.guess


TEST_NETWORKS: dict[str, Callable[[Task, Settings], CVAE]] = {
    "two levels": Levels,
    "regularised": Regularised,
    "smooth": partial(Levels, levels=1, activation=nn.Tanh),  # integrals over z converge fast
    "two smooth levels": partial(Levels, activation=nn.Tanh),
}
