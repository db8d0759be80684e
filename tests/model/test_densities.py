"""The densities against torch.distributions, and their derivatives against autograd's."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from cvae.model.densities import (
    Gaussian,
    bernoulli_entropy,
    bernoulli_log_prob,
    gaussian_kl,
    log_mean_exp,
    widen,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # sums of a few float64 numbers of moderate size


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gaussian(seed, *shape):
    return Gaussian(*randn(seed, 2, *shape).unbind())


def as_distribution(gaussian):
    return Independent(Normal(gaussian.loc, gaussian.log_scale.exp()), 1)


@pytest.fixture
def pixels():
    """Grey levels `[4, 5]`, and logits `[3, 4, 5]` and weights `[3, 4, 5]` that broadcast against them."""
    weight = (randn(3, 3, 4, 5) > 0).double()
    return randn(1, 4, 5).sigmoid(), (5 * randn(2, 3, 4, 5)).requires_grad_(), weight


def test_gaussian_log_prob_matches_other_libraries():
    """With its derivative by z, where z broadcasts; and at the centre of a scale that is no number of float32."""
    gaussian, z = random_gaussian(0, 7, 5), randn(1, 3, 7, 5).requires_grad_()
    ours = gaussian.log_prob(z)
    (score,) = torch.autograd.grad(ours.sum(), z)
    torch.testing.assert_close(gaussian.score(z), score, **EXACT)
    torch.testing.assert_close(ours, as_distribution(gaussian).log_prob(z), **EXACT)
    tiny = Gaussian(torch.ones(1), torch.tensor([-80.0])).log_prob(torch.ones(1))
    assert tiny.item() == pytest.approx(80 - 0.5 * math.log(2 * math.pi), rel=1e-6)


def test_sample_is_reparameterized():
    """z = loc + scale · eps, with the gradients 1 and scale · eps."""
    gaussian, eps = Gaussian(*(part.requires_grad_() for part in random_gaussian(2, 4))), randn(3, 6, 4)
    z = gaussian.sample(eps)
    torch.testing.assert_close(z, gaussian.loc + gaussian.log_scale.exp() * eps, **EXACT)
    for_loc, for_log_scale = torch.autograd.grad(z.sum(), tuple(gaussian))
    torch.testing.assert_close(for_loc, torch.full_like(for_loc, 6))
    torch.testing.assert_close(for_log_scale, (gaussian.log_scale.exp() * eps).sum(0), **EXACT)


def test_kl_and_its_gradient_match_torch():
    """Whatever the sums are multiplied with; zero for equals."""
    parameters = [part.requires_grad_() for seed in (4, 5) for part in random_gaussian(seed, 6, 3)]
    q, p = Gaussian(*parameters[:2]), Gaussian(*parameters[2:])
    ours, expected, factors = gaussian_kl(q, p), kl_divergence(as_distribution(q), as_distribution(p)), randn(6, 6)
    torch.testing.assert_close(ours, expected, **EXACT)
    gradients = (torch.autograd.grad(value, parameters, factors) for value in (ours, expected))
    for found, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-11, atol=1e-11)
    assert gaussian_kl(p, p).eq(0).all()


LOGITS = [sign * logit for logit in (0.0, 1e-3, 0.5, 3.0, 17.0, 40.0, 100.0, 1e4) for sign in (1, -1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("with_grad", [False, True])
def test_bernoulli_log_prob_matches_its_formula(dtype, y, with_grad):
    """For each pixel, up to the rounding of 1 or of the logit, whichever is larger."""
    logits = torch.tensor(LOGITS, dtype=dtype)[:, None].requires_grad_(with_grad)
    ours = bernoulli_log_prob(torch.full_like(logits, y), logits).detach()
    assert ours.dtype == dtype
    wide = logits.detach().double().numpy()[:, 0]
    errors = np.abs(ours.double().numpy() - (y * wide - np.logaddexp(0, wide)))
    assert (errors <= torch.finfo(dtype).eps * np.maximum(1, np.abs(wide))).all()
    if with_grad:
        bernoulli_log_prob(torch.full_like(logits, y), logits).sum().backward()
        torch.testing.assert_close(logits.grad, y - logits.detach().sigmoid(), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_bernoulli_and_its_own_derivative_match_torch(pixels, weighted):
    """Whatever the sums are multiplied with, and however often it is taken."""
    y, logits, weight = pixels
    ours = bernoulli_log_prob(y, logits, weight if weighted else None)
    theirs = Bernoulli(logits=logits, validate_args=False).log_prob(y)
    expected = (theirs * weight if weighted else theirs).sum(-1)
    torch.testing.assert_close(ours, expected, **EXACT)
    factors = randn(4, 3, 4)
    (wanted,) = torch.autograd.grad(expected, logits, factors)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(ours, logits, factors, True)[0], wanted, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(bernoulli_log_prob(y, logits, weight if weighted else None), expected, **EXACT)


def test_derivative_of_the_derivative_is_refused(pixels):
    """An error, and no wrong number: it is not written out. The arguments stay as they are."""
    y, logits, weight = pixels
    copies = [tensor.detach().clone() for tensor in pixels]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(bernoulli_log_prob(y, logits, weight).sum(), logits, create_graph=True)
    bernoulli_log_prob(y, logits.detach(), weight)
    assert all(torch.equal(*pair) for pair in zip(pixels, copies, strict=True))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(half):
    """The same number as in float32, autocast or not, and a gradient of the logits' own precision."""
    y, logits = randn(9, 4, 300).sigmoid().float(), (20 * randn(10, 4, 300)).to(half).requires_grad_()
    wide = bernoulli_log_prob(y, logits.detach().float())
    with torch.autocast("cpu", half):
        found = bernoulli_log_prob(y, logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide, rtol=1e-6, atol=0)  # one takes the way with a derivative
    found.sum().backward()
    assert torch.equal(logits.grad, (y - logits.detach().float().sigmoid()).to(half))
    q, p = (Gaussian(*(part.to(half) for part in random_gaussian(seed, 6, 3))) for seed in (4, 5))
    wide_q, wide_p = (Gaussian(*map(widen, gaussian)) for gaussian in (q, p))
    z = randn(6, 2, 6, 3).float()
    assert torch.equal(gaussian_kl(q, p), gaussian_kl(wide_q, wide_p))
    for ours, theirs in ((q.sample, wide_q.sample), (q.log_prob, wide_q.log_prob), (q.score, wide_q.score)):
        assert torch.equal(ours(z), theirs(z))


def test_entropy_is_the_floor():
    """−log-likelihood of grey levels is their entropy at the prediction equal to them, and above it at any other."""
    y = torch.linspace(0, 1, 256, dtype=torch.float64)[1:-1, None]
    floor = bernoulli_entropy(y)
    torch.testing.assert_close(floor, Bernoulli(y[:, 0]).entropy(), **EXACT)
    torch.testing.assert_close(-bernoulli_log_prob(y, y.logit()), floor, **EXACT)
    assert all((-bernoulli_log_prob(y, y.logit() + step) > floor).all() for step in (-0.01, 0.01))
    ends, weight = torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert bernoulli_entropy(ends, weight).item() == pytest.approx(math.log(2), rel=1e-6)


def test_log_mean_exp_of_extreme_weights():
    log_weights = torch.tensor([[-1e5, 3.0], [-1e5 + 1, -1e4], [-1e5 - 2, 3.0]], dtype=torch.float64)
    expected = [-1e5 + math.log((1 + math.e + math.exp(-2)) / 3), 3 + math.log(2 / 3)]
    np.testing.assert_allclose(log_mean_exp(log_weights).numpy(), expected, rtol=1e-12)
