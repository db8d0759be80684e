"""The objectives against Pyro's: same weights, same noise, float64, values and gradients."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference.pyro_reference import Reference, assert_gradients_agree

from cvae.model.objectives import elbo, gsnn, log_likelihood

TOLERANCE = 1e-9  # sums of 800 numbers in float64, each off by 1e-16, through four layers
CASES = [(1, 28, 28), (2, 7, 5), (3, 5, 8)]


def analytic(reference, images, noise):
    """Return TraceMeanField_ELBO's loss, with the KL in closed form: the mean over the samples of z."""
    loss = TraceMeanField_ELBO().differentiable_loss
    return sum(loss(reference.model, reference.guide, images, eps) for eps in noise) / len(noise)


def sampled(reference, images, noise):
    """Return Trace_ELBO's loss, with the KL sampled too."""
    return Trace_ELBO().differentiable_loss(reference.model, reference.guide, images, noise[0])


def of_prior(reference, images, noise):
    """Return the loss of a guide that draws z from the prior network."""
    reference.recognition = reference.prior
    return analytic(reference, images, noise)


def of_baseline(reference, images, noise):
    """Return the loss of a model without latent variables."""
    return Trace_ELBO().differentiable_loss(reference.baseline_model, reference.baseline_guide, images)


OURS = {
    analytic: lambda toy: elbo(toy.cvae, toy.batch, toy.eps)["elbo"],
    sampled: lambda toy: toy.cvae.from_posterior(toy.batch, toy.eps[:1]).log_weights(toy.batch),
    of_prior: lambda toy: gsnn(toy.cvae, toy.batch, toy.eps)["gsnn"],
    of_baseline: lambda toy: log_likelihood(toy.model("baseline"), toy.batch)["log_likelihood"],
}


@pytest.mark.parametrize("case", CASES, ids="{0[0]} of {0[1]}x{0[2]}".format)
@pytest.mark.parametrize("network", ["tutorial", "paper"])
@pytest.mark.parametrize("loss", OURS, ids=lambda loss: loss.__name__)
def test_objectives(make_toy, case, network, loss):
    """Minus Pyro's losses; and completions are pixel means at z ~ p(z|x), one noise for all images included."""
    pyro.enable_validation(True)
    toy = make_toy(*case, hidden=(7, 8, 9), particles=3, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    ours, theirs = -OURS[loss](toy).sum(), loss(reference, images, toy.eps)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, TOLERANCE)
    loc, scale = reference.prior(images)
    for eps in (toy.eps, toy.eps[:, :1]):
        plain = torch.where(reference.observed, images, reference.generation(loc + scale * eps, images).sigmoid())
        completed = toy.task.compose(toy.x, toy.cvae.completions(toy.x, eps)).flatten(2)
        torch.testing.assert_close(completed, plain, rtol=TOLERANCE, atol=TOLERANCE)
