"""The bounds and estimators against quadrature over a one-dimensional z."""

import math

import pytest
import scipy.integrate
import torch
from reference.quadrature import integrate, log_density, log_likelihood
from torch.distributions import Normal

from cvae.model.densities import bernoulli_log_prob
from cvae.model.likelihood import log_mean_exp
from cvae.model.objectives import Terms, log_importance_weights, means


@pytest.fixture
def toy(make_toy):
    return make_toy(latent_dim=1, count=4, particles=100_000, gain=1.3)  # weights w of moderate variance


@pytest.fixture
def log_weights(toy):
    """log w at z ~ q(z|x,y), `[S, B]`."""
    with torch.no_grad():
        p, q = toy.cvae.prior(toy.x), toy.cvae.recognition(toy.x, toy.y)
        z = q.sample(toy.eps)
        return log_importance_weights(toy.y, toy.cvae.generation(z), z, q, p)


def assert_mean_is(values, expected, variance=None):
    """The mean of independent values `[S, B]` is what is expected, within four standard errors, which are small."""
    stderr = ((values.var(0) if variance is None else variance) / len(values)).sqrt()
    assert ((values.mean(0) - expected).abs() < 4 * stderr).all()
    assert (stderr < 0.02).all()


def test_quadrature_itself(toy):
    """The grid agrees with SciPy's adaptive integration."""
    x, y = toy.x[:1], toy.y[:1]
    p = toy.cvae.prior(x)

    @torch.no_grad()
    def joint(value):
        z = torch.tensor([[value]], dtype=torch.float64)
        return (log_likelihood(toy.cvae, y, z) + log_density(p, z[0])).exp().item()

    centre, reach = p.loc.item(), 9 * p.log_scale.exp().item()
    found, _ = scipy.integrate.quad(joint, centre - reach, centre + reach, limit=200, epsabs=0, epsrel=1e-4)
    assert math.log(found) == pytest.approx(integrate(toy.cvae, x, y).log_evidence.item(), abs=1e-5)


def test_importance_weights_are_unbiased(toy, log_weights):
    """E_q[w] = p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    assert (exact.is_variance > 0.01).all()  # a recognition network equal to the posterior would prove nothing
    assert_mean_is((log_weights - exact.log_evidence).exp(), 1.0, exact.is_variance)


def test_prior_sampling_is_unbiased(toy):
    """E_p[p(y|x,z)] = p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        z = toy.cvae.prior(toy.x).sample(toy.eps)
        log_probs = bernoulli_log_prob(toy.y, toy.cvae.generation(z))
    assert_mean_is((log_probs - exact.log_evidence).exp(), 1.0, exact.mc_variance)


def test_both_elbos_have_the_same_expectation(toy, log_weights):
    """E_q[log w], with the KL sampled, is E_q[log p(y|x,z)] − KL in closed form."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        terms = toy.cvae(toy.x, toy.y, eps=toy.eps)
    torch.testing.assert_close(exact.log_likelihood - terms.kl, exact.elbo, rtol=1e-7, atol=0)
    assert_mean_is(log_weights, exact.elbo)
    samples = bernoulli_log_prob(
        toy.y, toy.cvae.generation(toy.cvae.recognition(toy.x, toy.y).sample(toy.eps))
    ).detach()
    assert_mean_is(samples, exact.log_likelihood)
    torch.testing.assert_close(terms.log_likelihood, samples.mean(0), rtol=1e-12, atol=0)
    assert torch.equal(terms.elbo, terms.log_likelihood - terms.kl)


def test_one_importance_sample_is_the_single_sample_elbo(make_toy):
    """With the same noise, exactly, however many dimensions z has."""
    toy = make_toy(latent_dim=3)
    p, q = toy.cvae.prior(toy.x), toy.cvae.recognition(toy.x, toy.y)
    z = q.sample(toy.eps)
    log_w = log_importance_weights(toy.y, toy.cvae.generation(z), z, q, p)
    assert torch.equal(log_mean_exp(log_w), log_w[0])
    log_p, log_q = (Normal(g.loc, g.log_scale.exp()).log_prob(z).sum(-1) for g in (p, q))
    single = log_likelihood(toy.cvae, toy.y, z) + log_p - log_q
    torch.testing.assert_close(log_mean_exp(log_w), single[0], rtol=1e-12, atol=0)


def test_bounds_are_ordered_exactly(toy):
    """ELBO = IS(1) < IS(2) < log p(y|x), in expectation, by integration over the noise of one and of two samples."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    eps = torch.linspace(-8, 8, 1201, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(eps).exp() * (eps[1] - eps[0])
    with torch.no_grad():
        p, q = toy.cvae.prior(toy.x), toy.cvae.recognition(toy.x, toy.y)
        z = q.sample(eps[:, None, None])
        log_w = log_importance_weights(toy.y, toy.cvae.generation(z), z, q, p)
    bounds_of_one = density @ log_w
    torch.testing.assert_close(bounds_of_one, exact.elbo, rtol=1e-5, atol=0)
    for i in range(len(toy.x)):
        pairs = torch.logaddexp(log_w[:, i, None], log_w[None, :, i]) - math.log(2)
        bound_of_two = density @ pairs @ density
        assert bounds_of_one[i] + 1e-3 < bound_of_two < exact.log_evidence[i] - 1e-3


def test_importance_sampling_tightens_with_samples(toy, log_weights):
    """Four times the samples raise the mean bound, by more than five standard errors, towards log p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    for size in (1, 4, 16):
        groups = log_weights[: len(log_weights) // 64 * 64].reshape(-1, 4, size, len(toy.x))
        loose = (groups.logsumexp(2) - math.log(size)).mean(1)
        tight = groups.flatten(1, 2).logsumexp(1) - math.log(4 * size)
        gain = tight - loose
        assert (gain > -1e-12).all()  # Jensen's inequality, group by group
        assert (gain.mean(0) > 5 * gain.std(0) / math.sqrt(len(gain))).all()
        assert (tight.mean(0) < exact.log_evidence + 4 * tight.std(0) / math.sqrt(len(tight))).all()
    assert (exact.log_evidence - tight.mean(0) < 0.2 * (exact.log_evidence - exact.elbo)).all()


def test_sums_are_divided_once():
    """Uneven batches give the mean over all images, not the mean of batch means; signs as they are printed."""
    random = torch.Generator().manual_seed(0)
    log_likelihood, kl = -100 * torch.rand(1000, generator=random), 20 * torch.rand(1000, generator=random)
    batches = zip(log_likelihood.split(384), kl.split(384), strict=True)
    total = sum(Terms(*batch).sums() for batch in batches)
    assert total.dtype == torch.float64
    assert total[2] == 1000
    reported = means(total)
    assert reported["reconstruction"] == pytest.approx(-log_likelihood.double().mean().item(), rel=1e-14)
    assert reported["kl"] == pytest.approx(kl.double().mean().item(), rel=1e-14)
    assert reported["neg_elbo"] == pytest.approx(reported["reconstruction"] + reported["kl"], rel=1e-14)
    assert all(math.isnan(value) for value in means(torch.zeros(3)).values())
