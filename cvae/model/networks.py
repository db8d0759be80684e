"""The networks: the deterministic baseline, and the CVAE built on it.

Images are vectors with their observed pixels first (`Quadrants.vectors`): x `[B, num_observed]` and y
`[B, num_hidden]`, both in [0, 1].
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cvae.model.densities import Gaussian, bernoulli_log_prob, widen
from cvae.model.objectives import Terms, elbo_terms


def mlp(sizes: Sequence[int]) -> list[nn.Module]:
    """Fully connected layers of these sizes, each followed by a ReLU, initialised as in He et al. 2015."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True)]
    return layers


class Baseline(nn.Module):
    """The deterministic guess ŷ of the hidden pixels: pixels → hidden layers → pixels, ReLU.

    The tutorial shows it whole images with −1 in the place of each hidden pixel. Those inputs add a constant to each
    unit of the first layer, which its bias can hold as well: they are left out, and so are the outputs for observed
    pixels, which nobody looks at.
    """

    latent_dim = 0  # it takes no noise

    def __init__(self, num_observed: int, num_pixels: int, hidden: Sequence[int] = (500, 500)):
        super().__init__()
        self.layers = nn.Sequential(*mlp((num_observed, *hidden)), nn.Linear(hidden[-1], num_pixels - num_observed))

    def logits(self, x: Tensor) -> Tensor:
        """The logits of ŷ, `[B, num_hidden]`."""
        return widen(self.layers(x))

    def guess(self, x: Tensor) -> Tensor:
        """ŷ itself, in [0, 1], `[B, num_hidden]`."""
        return self.logits(x).sigmoid()

    def forward(self, x: Tensor, y: Tensor, y_hat: Tensor | None = None, eps: Tensor | None = None) -> Terms:
        """log p(y|x) per image. There is no latent variable: y_hat and eps are there for the shared training loop."""
        log_likelihood = bernoulli_log_prob(y, self.logits(x))
        return Terms(log_likelihood, kl=torch.zeros_like(log_likelihood))


class Encoder(nn.Module):
    """A network from a whole image to a diagonal Gaussian over z: pixels → hidden layers → (loc, log-scale)."""

    def __init__(self, num_pixels: int, hidden: Sequence[int], latent_dim: int):
        super().__init__()
        self.layers = nn.Sequential(*mlp((num_pixels, *hidden)), nn.Linear(hidden[-1], 2 * latent_dim))

    def forward(self, x: Tensor, y: Tensor) -> Gaussian:
        loc, log_scale = widen(self.layers(torch.cat([x, y], dim=-1))).chunk(2, dim=-1)
        return Gaussian(loc, log_scale)


class Decoder(nn.Module):
    """A network from z to the logits of the hidden pixels: z → hidden layers → pixels."""

    def __init__(self, latent_dim: int, hidden: Sequence[int], num_hidden: int):
        super().__init__()
        self.layers = nn.Sequential(*mlp((latent_dim, *hidden)), nn.Linear(hidden[-1], num_hidden))

    def forward(self, z: Tensor) -> Tensor:
        return widen(self.layers(z))


class CVAE(nn.Module):
    """The conditional VAE of Sohn et al. 2015, figure 1(d), on top of a trained baseline, which stays as it is.

    p(y|x) = ∫ p(y|z) p(z|x) dz: the prior network sees x completed by the baseline's guess ŷ, the recognition network x
    completed by the true y, and the generation network z alone, as in the tutorial.
    """

    def __init__(
        self,
        baseline: Baseline,
        num_observed: int,
        num_pixels: int,
        hidden: Sequence[int] = (500, 500),
        latent_dim: int = 200,
    ):
        super().__init__()
        self.latent_dim = latent_dim
        self.baseline_net: Baseline = baseline.requires_grad_(False)
        self.prior_net = Encoder(num_pixels, hidden, latent_dim)
        self.recognition_net = Encoder(num_pixels, hidden, latent_dim)
        self.generation_net = Decoder(latent_dim, hidden, num_pixels - num_observed)

    def prior(self, x: Tensor, y_hat: Tensor | None = None) -> Gaussian:
        """p(z|x), `[B, Z]`. y_hat: the baseline's guess for x where it is known already, `[B, num_hidden]`."""
        if y_hat is None:
            with torch.no_grad():
                y_hat = self.baseline_net.guess(x)
        gaussian: Gaussian = self.prior_net(x, y_hat)
        return gaussian

    def recognition(self, x: Tensor, y: Tensor) -> Gaussian:
        """q(z|x,y), `[B, Z]`."""
        gaussian: Gaussian = self.recognition_net(x, y)
        return gaussian

    def generation(self, z: Tensor) -> Tensor:
        """The logits of p(y|x,z), `[..., num_hidden]`, for z `[..., Z]`."""
        logits: Tensor = self.generation_net(z)
        return logits

    def complete(self, x: Tensor, eps: Tensor) -> Tensor:
        """Completions of x: the pixel means of p(y|x,z) at z ~ p(z|x), in [0, 1], `[S, B, num_hidden]`.

        eps: the noise, `[S, B, Z]`, or `[S, 1, Z]` to use the same for all images.
        """
        return self.generation(self.prior(x).sample(eps)).sigmoid()

    def forward(self, x: Tensor, y: Tensor, y_hat: Tensor | None = None, eps: Tensor | None = None) -> Terms:
        """The terms of the ELBO per image, with L samples of z.

        x `[B, num_observed]`, y `[B, num_hidden]`, y_hat as in `prior`; eps: the noise, `[L, B, Z]`, drawn where it is
        not given (L = 1).
        """
        if eps is None:
            eps = torch.randn(1, len(x), self.latent_dim, dtype=x.dtype, device=x.device)
        p = self.prior(x, y_hat)
        q = self.recognition(x, y)
        return elbo_terms(y, self.generation(q.sample(eps)), q, p)
