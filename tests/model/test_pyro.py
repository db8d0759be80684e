"""The objectives against Pyro's: same weights, same noise, float64."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference.pyro_reference import Reference, assert_gradients_agree

from cvae.model.objectives import elbo, gsnn, log_likelihood

TOLERANCE = 1e-9  # sums of 800 numbers in float64, each off by 1e-16, through four layers
CASES = [(1, 28, 28), (2, 7, 5), (3, 5, 8)]


@pytest.fixture(autouse=True)
def _validation():
    pyro.enable_validation(True)


@pytest.fixture(params=CASES, ids="{0[0]} of {0[1]}x{0[2]}".format)
def case(request):
    return request.param


@pytest.fixture(params=["tutorial", "paper"])
def toy(make_toy, case, request):
    return make_toy(*case, hidden=(7, 8, 9), particles=3, network=request.param)


def compare(toy, ours, theirs, reference):
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, TOLERANCE)


@pytest.mark.parametrize("known", [False, True], ids=["", "guess is known"])
def test_elbo(toy, known):
    """−elbo is the mean of TraceMeanField_ELBO's losses at each of the samples."""
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    loss = TraceMeanField_ELBO().differentiable_loss
    theirs = sum(loss(reference.model, reference.guide, images, eps) for eps in toy.eps) / len(toy.eps)
    batch = toy.batch._replace(guess=toy.cvae.baseline_net(toy.x).detach()) if known else toy.batch
    compare(toy, -elbo(toy.cvae, batch, toy.eps)["elbo"].sum(), theirs, reference)


def test_sampled_kl(toy):
    """The log of the importance weights, log p(y|x,z) + log p(z|x) − log q(z|x,y), is minus Trace_ELBO's loss."""
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.model, reference.guide, images, toy.eps[0])
    ours = -toy.cvae.from_posterior(toy.batch, toy.eps[:1]).log_weights(toy.batch).sum()
    compare(toy, ours, theirs, reference)


def test_prior_sampling(toy):
    """gsnn is the loss of a guide that draws z from the prior network; the recognition network has no gradient."""
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    reference.recognition = reference.prior
    loss = TraceMeanField_ELBO().differentiable_loss
    theirs = sum(loss(reference.model, reference.guide, images, eps) for eps in toy.eps) / len(toy.eps)
    compare(toy, -gsnn(toy.cvae, toy.batch, toy.eps)["gsnn"].sum(), theirs, reference)


def test_baseline(toy):
    """The baseline's negative log-likelihood is the loss of a Pyro model without latent variables."""
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.baseline_model, reference.baseline_guide, images)
    compare(toy, -log_likelihood(toy.model("baseline"), toy.batch)["log_likelihood"].sum(), theirs, reference)


def test_completions(toy):
    """Pixel means at z ~ p(z|x), put together with what is given; one noise for all images broadcasts."""
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    loc, scale = reference.prior(images)
    for eps in (toy.eps, toy.eps[:, :1]):
        plain = torch.where(reference.observed, images, reference.generation(loc + scale * eps, images).sigmoid())
        ours = toy.task.compose(toy.x, toy.cvae.completions(toy.x, eps)).flatten(2)
        torch.testing.assert_close(ours, plain, rtol=TOLERANCE, atol=TOLERANCE)
