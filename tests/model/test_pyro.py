"""Our objectives against Pyro's: same weights, same noise, float64."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference.pyro_reference import Reference, assert_gradients_agree

from cvae.model.objectives import log_importance_weights

TOLERANCE = 1e-9
CASES = [(1, 28, 28), (2, 28, 28), (3, 28, 28), (1, 7, 5), (2, 7, 5), (3, 5, 8)]
pytestmark = pytest.mark.parametrize("case", CASES, ids="{0[0]} of {0[1]}x{0[2]}".format)


@pytest.fixture(autouse=True)
def _validation() -> None:
    pyro.enable_validation(True)


def test_sampled_kl(make_toy, case):
    """−(log p(y|z) + log p(z|x) − log q(z|x,y)) at one z is Trace_ELBO's loss."""
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.model, reference.guide, images, toy.eps[0])
    theirs.backward()

    p, q = toy.cvae.prior(toy.x), toy.cvae.recognition(toy.x, toy.y)
    z = q.sample(toy.eps)
    ours = -log_importance_weights(toy.y, toy.cvae.generation(z), z, q, p).sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, TOLERANCE)


@pytest.mark.parametrize("particles", [1, 3])
def test_analytic_kl(make_toy, case, particles):
    """−elbo is TraceMeanField_ELBO's loss, with several samples of z its mean."""
    toy = make_toy(*case, particles=particles)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    elbo = TraceMeanField_ELBO()
    losses = [elbo.differentiable_loss(reference.model, reference.guide, images, eps) for eps in toy.eps]
    theirs = sum(losses) / particles
    theirs.backward()

    ours = -toy.cvae(toy.x, toy.y, eps=toy.eps).elbo.sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, TOLERANCE)


def test_baseline(make_toy, case):
    """The baseline's negative log-likelihood is the loss of a Pyro model without latent variables."""
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae, toy.quadrants), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.baseline_model, reference.baseline_guide, images)
    theirs.backward()

    toy.cvae.baseline_net.requires_grad_(True)
    ours = -toy.cvae.baseline_net(toy.x, toy.y).elbo.sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, toy.quadrants, TOLERANCE)
