"""The objectives against Pyro's: same weights, same noise, float64, values and gradients."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from reference.pyro_reference import Reference

from cvae.model.objectives import elbo, gsnn, log_likelihood

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # sums of 800 numbers in float64, each off by 1e-16, through four layers

CASES = {  # ours, and Pyro's loss, model and guide
    "elbo": (lambda t, b: elbo(t.cvae, b, t.eps)["elbo"], TraceMeanField_ELBO, "model", "guide"),
    "sampled KL": (
        lambda t, b: t.cvae.from_posterior(b, t.eps).log_weights(b).mean(0), Trace_ELBO, "model", "guide"
    ),
    "gsnn": (lambda t, b: gsnn(t.cvae, b, t.eps)["gsnn"], TraceMeanField_ELBO, "model", "guide_of_prior"),
    "baseline": (
        lambda t, b: log_likelihood(t.model("baseline"), b)["log_likelihood"], Trace_ELBO, "baseline_model", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 5, 8)], ids="{0[0]} of {0[1]}x{0[2]}".format)
@pytest.mark.parametrize("network", ["tutorial", "paper"])
@pytest.mark.parametrize("case", CASES)
def test_objectives(make_toy, size, network, case):
    """They are minus Pyro's losses, whatever pixels count; a guess that is known changes nothing."""
    pyro.enable_validation(True)
    toy = make_toy(*size, hidden=(7, 8, 9), particles=3, network=network)
    ours, loss, model, guide = CASES[case]
    reference, parameters = Reference(toy.cvae), list(toy.cvae.parameters())
    weight = torch.rand(toy.y.shape, generator=torch.Generator().manual_seed(0)).gt(0.4).double()
    for batch in (toy.batch, toy.batch._replace(weight=weight, guess=toy.cvae.baseline_net(toy.x).detach())):
        value = ours(toy, batch).sum()
        functions = getattr(reference, model), getattr(reference, str(guide), lambda batch, eps: None)
        theirs = -sum(loss().differentiable_loss(*functions, batch, eps) for eps in toy.eps) / 3
        torch.testing.assert_close(value, theirs, **EXACT)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = (
            torch.autograd.grad(total, trained, materialize_grads=True, allow_unused=True) for total in (value, theirs)
        )
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)
