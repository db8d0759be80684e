"""The objectives, per image and in nats, and what is reported of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from cvae.model.densities import Gaussian, bernoulli_log_prob, gaussian_kl, gaussian_log_prob


class Terms(NamedTuple):
    """The two terms of the lower bound on log p(y|x), each `[B]`, in nats.

    For the baseline, which has no z, `kl` is zero and `elbo` is log p(y|x) itself.
    """

    log_likelihood: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """E_q[log p(y|x,z)] − KL(q(z|x,y) ‖ p(z|x)), nats `[B]`; higher is better."""
        return self.log_likelihood - self.kl

    def sums(self) -> Tensor:
        """Both terms summed over the images, and the number of images: float64 `[3]`, to be divided once (`means`)."""
        count = torch.ones_like(self.kl)
        return torch.stack([self.log_likelihood, self.kl, count]).sum(1, dtype=torch.float64)


def elbo_terms(y: Tensor, logits: Tensor, q: Gaussian, p: Gaussian) -> Terms:
    """The empirical lower bound with L samples of z and the KL in closed form.

    y: hidden pixels in [0, 1], `[B, D]`. logits: of p(y|x,z) at z ~ q, `[L, B, D]`. q, p: `[B, Z]`.
    Source: Sohn et al. 2015, equation 4 (the empirical lower bound). The tutorial samples its KL too, at the same z;
    the closed form has the same expectation and less variance.
    """
    return Terms(log_likelihood=bernoulli_log_prob(y, logits).mean(0), kl=gaussian_kl(q, p))


def log_importance_weights(y: Tensor, logits: Tensor, z: Tensor, q: Gaussian, p: Gaussian) -> Tensor:
    """log w = log p(y|x,z) + log p(z|x) − log q(z|x,y) at z ~ q(z|x,y), nats `[S, B]`.

    E_q[w] = p(y|x), so that the log of a mean of weights estimates log p(y|x), from below in expectation and ever
    more tightly as S grows. z: `[S, B, Z]`; the rest as in `elbo_terms`, with S for L.
    Source: Burda et al. 2016, with the conditional prior in the place of theirs; Sohn et al. 2015.
    """
    return bernoulli_log_prob(y, logits) + gaussian_log_prob(z, p) - gaussian_log_prob(z, q)


def means(sums: Tensor) -> dict[str, float]:
    """What is reported of `Terms.sums`, added up over batches and processes: means in nats per image.

    `neg_elbo` = `reconstruction` + `kl`, lower is better. NaN where there were no images.
    """
    log_likelihood, kl, count = sums.tolist()
    if count == 0:
        return dict.fromkeys(("neg_elbo", "reconstruction", "kl"), float("nan"))
    return {"neg_elbo": (kl - log_likelihood) / count, "reconstruction": -log_likelihood / count, "kl": kl / count}
