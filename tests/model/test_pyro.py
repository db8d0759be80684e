"""Our objectives against Pyro's: same weights, same noise, float64."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference.pyro_reference import Reference, assert_gradients_agree

from cvae.model.objectives import elbo, iwae, log_likelihood

TOLERANCE = 1e-9
CASES = [(1, 28, 28), (2, 28, 28), (3, 28, 28), (1, 7, 5), (2, 7, 5), (3, 5, 8)]
pytestmark = pytest.mark.parametrize("case", CASES, ids="{0[0]} of {0[1]}x{0[2]}".format)
NETWORKS = pytest.mark.parametrize("network", ["tutorial", "paper"])


@pytest.fixture(autouse=True)
def _validation() -> None:
    pyro.enable_validation(True)


@NETWORKS
def test_sampled_kl(make_toy, case, network):
    """−(log p(y|x,z) + log p(z|x) − log q(z|x,y)) at one z is Trace_ELBO's loss."""
    toy = make_toy(*case, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.model, reference.guide, images, toy.eps[0])
    theirs.backward()

    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
    ours = -(draw.log_likelihood(toy.y) + draw.log_ratio).sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, TOLERANCE)


@NETWORKS
def test_iwae_of_one_sample(make_toy, case, network):
    """Its value is that of Trace_ELBO; its gradient another estimate, but for the generation network's."""
    toy = make_toy(*case, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.model, reference.guide, images, toy.eps[0])
    ours = -iwae(toy.cvae, toy.batch, toy.eps)["iwae"].sum()
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)


@NETWORKS
@pytest.mark.parametrize("particles", [1, 3])
def test_analytic_kl(make_toy, case, particles, network):
    """−elbo is TraceMeanField_ELBO's loss, with several samples of z its mean."""
    toy = make_toy(*case, particles=particles, network=network)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    trace_elbo = TraceMeanField_ELBO()
    losses = [trace_elbo.differentiable_loss(reference.model, reference.guide, images, eps) for eps in toy.eps]
    theirs = sum(losses) / particles
    theirs.backward()

    ours = -elbo(toy.cvae, toy.batch, toy.eps)["elbo"].sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, TOLERANCE)


def test_baseline(make_toy, case):
    """The baseline's negative log-likelihood is the loss of a Pyro model without latent variables."""
    toy = make_toy(*case)
    reference, images = Reference(toy.cvae), toy.images.flatten(1)
    theirs = Trace_ELBO().differentiable_loss(reference.baseline_model, reference.baseline_guide, images)
    theirs.backward()

    ours = -log_likelihood(toy.model("baseline"), toy.batch)["log_likelihood"].sum()
    ours.backward()

    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    assert_gradients_agree(toy.cvae, reference, TOLERANCE)
