"""Models and guides of Pyro, which call the networks of the tutorial and the paper as their authors do."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from cvae.data.tasks import Batch
from cvae.model.networks import OneLevel, Paper


class FixedNoise(dist.Normal):
    """A normal distribution whose sample is made of given noise."""

    def __init__(self, loc: Tensor, scale: Tensor, eps: Tensor):
        super().__init__(loc, scale)
        self.eps = eps

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        assert sample_shape == torch.Size()
        return self.loc + self.scale * self.eps

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "FixedNoise":
        assert batch_shape == self.batch_shape  # a plate expands what it holds, if only to the size it has
        return self


class Reference:
    """Models and guides, each a function of a batch and noise `[B, Z]`, with the parameters of a CVAE."""

    def __init__(self, cvae: OneLevel):
        self.cvae = cvae

    def gaussian(self, net: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return loc and scale of z, `[B, Z]`, given a whole image."""
        loc, log_scale = net(torch.cat([x, y], dim=-1)).chunk(2, dim=-1)
        return loc, log_scale.exp()

    def prior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.gaussian(self.cvae.prior_net, batch.x, self.cvae.baseline_net(batch.x).detach().sigmoid())

    def logits(self, batch: Batch, z: Tensor) -> Tensor:
        if not isinstance(self.cvae, Paper):
            return self.cvae.generation_net(z)
        guess = self.cvae.baseline_net(batch.x).detach()
        seen = self.cvae.generation_of_x(torch.cat([batch.x, guess.sigmoid()], dim=-1)) + self.cvae.generation_of_z(z)
        return guess + self.cvae.generation_net(torch.relu(seen))

    def observe(self, batch: Batch, logits: Tensor) -> None:
        counts = True if batch.weight is None else batch.weight > 0
        grey = dist.Bernoulli(logits=logits, validate_args=False)  # whose support has no grey level
        pyro.sample("y", grey.mask(counts).to_event(1), obs=batch.y)

    def model(self, batch: Batch, eps: Tensor) -> None:
        with pyro.plate("images", len(batch.x)):
            z = pyro.sample("z", dist.Normal(*self.prior(batch)).to_event(1))
            self.observe(batch, self.logits(batch, z))

    def guide(self, batch: Batch, eps: Tensor) -> None:
        with pyro.plate("images", len(batch.x)):
            q = self.gaussian(self.cvae.recognition_net, batch.x, batch.y)
            pyro.sample("z", FixedNoise(*q, eps).to_event(1))

    def guide_of_prior(self, batch: Batch, eps: Tensor) -> None:
        with pyro.plate("images", len(batch.x)):
            pyro.sample("z", FixedNoise(*self.prior(batch), eps).to_event(1))

    def baseline_model(self, batch: Batch, eps: Tensor) -> None:
        with pyro.plate("images", len(batch.x)):
            self.observe(batch, self.cvae.baseline_net(batch.x))
