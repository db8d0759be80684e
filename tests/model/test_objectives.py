"""The objectives against quadrature over z or over its noise, their gradients included; their limits; their sums."""

import copy
import math
from collections.abc import Callable

import pytest
import scipy.integrate
import torch
from reference.networks import TEST_NETWORKS
from reference.quadrature import encoded, integrate, log_density, log_evidence, log_likelihood, noise_grid
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from cvae.data.images import Batch
from cvae.data.masks import Split
from cvae.model import objectives
from cvae.model.cvae import CVAE, Draw, Latent
from cvae.model.densities import Gaussian, bernoulli_log_prob
from cvae.model.objectives import (
    OBJECTIVES,
    Totals,
    elbo,
    gsnn,
    hybrid,
    iwae,
    log_mean_exp,
    maximised,
    multisample,
    objective,
)
from cvae.settings import Settings

OURS = pytest.mark.parametrize("network", ["tutorial", "paper"])
SMOOTH = pytest.mark.parametrize("network", ["smooth", "two smooth levels"])


@pytest.fixture
def toy(make_toy):
    return make_toy(latent_dim=1, count=4, particles=100_000, gain=1.3, seed=2)  # weights w of moderate variance


@pytest.fixture
def log_weights(toy):
    """log w at z ~ q(z|x,y), `[S, B]`."""
    with torch.no_grad():
        draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
        return draw.log_likelihood(toy.y) + draw.log_ratio


def assert_mean_is(values, expected, variance=None):
    """The mean of independent values `[S, B]` is what is expected, within four standard errors, which are small."""
    stderr = ((values.var(0) if variance is None else variance) / len(values)).sqrt()
    assert ((values.mean(0) - expected).abs() < 4 * stderr).all()
    assert (stderr < 0.02).all()


# Samples against the integral over z


def test_quadrature_itself(toy):
    """The grid agrees with SciPy's adaptive integration, and with a grid over the noise."""
    x, y = toy.x[:1], toy.y[:1]
    p, _ = encoded(toy.cvae, x, y)

    @torch.no_grad()
    def joint(value):
        z = torch.tensor([[value]], dtype=torch.float64)
        return (log_likelihood(toy.cvae, x, y, z[..., None]) + log_density(p, z)).exp().item()

    centre, reach = p.loc.item(), 9 * p.log_scale.exp().item()
    found, _ = scipy.integrate.quad(joint, centre - reach, centre + reach, limit=200, epsabs=0, epsrel=1e-4)
    exact = integrate(toy.cvae, x, y).log_evidence
    assert math.log(found) == pytest.approx(exact.item(), abs=1e-5)
    torch.testing.assert_close(log_evidence(toy.cvae, x, y, 2001), exact, rtol=1e-5, atol=0)


def test_importance_weights_are_unbiased(toy, log_weights):
    """E_q[w] = p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    assert (exact.is_variance > 0.01).all()  # a recognition network equal to the posterior would prove nothing
    assert_mean_is((log_weights - exact.log_evidence).exp(), 1.0, exact.is_variance)


def test_prior_sampling_is_unbiased(toy):
    """E_p[p(y|x,z)] = p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        log_probs = toy.cvae.from_prior(toy.x, None, toy.eps).log_likelihood(toy.y)
    assert_mean_is((log_probs - exact.log_evidence).exp(), 1.0, exact.mc_variance)


def test_both_elbos_have_the_same_expectation(toy, log_weights):
    """E_q[log w], with the KL sampled, is E_q[log p(y|x,z)] − KL in closed form."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        terms = elbo(toy.cvae, toy.batch, toy.eps)
    torch.testing.assert_close(exact.log_likelihood - terms["kl"], exact.elbo, rtol=1e-6, atol=0)
    assert_mean_is(log_weights, exact.elbo)
    _, q = encoded(toy.cvae, toy.x, toy.y)
    samples = log_likelihood(toy.cvae, toy.x, toy.y, q.sample(toy.eps)).detach()
    assert_mean_is(samples, exact.log_likelihood)
    torch.testing.assert_close(terms["log_likelihood"], samples.mean(0), rtol=1e-10, atol=0)
    assert torch.equal(terms["elbo"], terms["log_likelihood"] - terms["kl"])


def test_one_importance_sample_is_the_single_sample_elbo(make_toy):
    """With the same noise, however many dimensions z has."""
    toy = make_toy(latent_dim=3)
    draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
    ((z, _, q, p),) = draw.latents
    log_p, log_q = (Normal(g.loc, g.log_scale.exp()).log_prob(z).sum(-1) for g in (p, q))
    single = log_likelihood(toy.cvae, toy.x, toy.y, z) + log_p - log_q
    torch.testing.assert_close(iwae(toy.cvae, toy.batch, toy.eps)["iwae"], single[0], rtol=1e-10, atol=0)


def test_importance_sampling_tightens_with_samples(toy):
    """Four times the samples raise the mean bound, by more than five standard errors, towards log p(y|x)."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        for size in (1, 4, 16):
            eps = toy.eps[: 640 * 64].view(-1, size, len(toy.x), 1)
            rows = [part.repeat(len(eps), 1) for part in toy.batch[:2]]
            bounds = iwae(toy.cvae, Batch(*rows), eps.transpose(0, 1).flatten(1, 2))["iwae"]
            loose = bounds.view(-1, 4, len(toy.x)).mean(1)
            eps = eps.view(-1, 4 * size, len(toy.x), 1)
            rows = [part.repeat(len(eps), 1) for part in toy.batch[:2]]
            tight = iwae(toy.cvae, Batch(*rows), eps.transpose(0, 1).flatten(1, 2))["iwae"].view(-1, len(toy.x))
            gain = tight - loose
            assert (gain > -1e-12).all()  # Jensen's inequality, group by group
            assert (gain.mean(0) > 5 * gain.std(0) / math.sqrt(len(gain))).all()
            assert (tight.mean(0) < exact.log_evidence + 4 * tight.std(0) / math.sqrt(len(tight))).all()
    assert (exact.log_evidence - tight.mean(0) < 0.2 * (exact.log_evidence - exact.elbo)).all()


# Expectations over a grid of noise


def expectation(
    function: Callable[..., dict[str, Tensor]], toy, particles: int, points: int, reach: float = 7.0
) -> dict[str, Tensor]:
    """The expected terms of an objective with so many samples of z, `[B]` each: images repeated, noise on a grid."""
    noise, weights = noise_grid(particles * toy.cvae.latent_dim, points, reach)
    eps = noise.view(-1, particles, toy.cvae.latent_dim).transpose(0, 1).repeat_interleave(len(toy.x), 1)
    rows = Batch(*(part.repeat(len(noise), 1) for part in (toy.x, toy.y)))
    terms = function(toy.cvae, rows, eps)
    return {name: weights @ term.view(len(noise), len(toy.x)) for name, term in terms.items()}


@OURS
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("elbo", lambda exact, _: exact.elbo),
        ("iwae", lambda exact, _: exact.elbo),  # of one sample
        ("gsnn", lambda exact, _: exact.gsnn),
        ("multisample", lambda exact, _: exact.gsnn),  # of one sample
        ("hybrid", lambda exact, alpha: alpha * exact.elbo + (1 - alpha) * exact.gsnn),
    ],
)
def test_objectives_are_their_integrals_in_expectation(make_toy, network, name, expected):
    """With the one-dimensional z of ReLU networks, which a fine grid takes."""
    toy = make_toy(latent_dim=1, count=4, gain=1.3, seed=2, network=network)
    exact, alpha = integrate(toy.cvae, toy.x, toy.y), 0.3
    with torch.no_grad():
        found = expectation(objective(Settings(objective=name, alpha=alpha)), toy, 1, 2001)
    assert next(iter(found)) == name
    torch.testing.assert_close(maximised(found), expected(exact, alpha), rtol=1e-5, atol=0)
    for term in ("elbo", "log_likelihood", "gsnn"):
        if term in found:
            torch.testing.assert_close(found[term], getattr(exact, term), rtol=1e-5, atol=0)
    if "kl" in found:
        torch.testing.assert_close(found["kl"], exact.log_likelihood - exact.elbo, rtol=1e-5, atol=0)
    assert ((exact.elbo - exact.gsnn).abs() > 0.02).all()  # else this would not tell one from the other


@OURS
@pytest.mark.parametrize(("function", "lowest"), [(iwae, "elbo"), (multisample, "gsnn")])
def test_bounds_are_ordered_exactly(make_toy, network, function, lowest):
    """The bound of one sample, which is another objective, < that of two < log p(y|x), in expectation."""
    toy = make_toy(latent_dim=1, count=3, gain=1.3, seed=2, network=network)
    exact = integrate(toy.cvae, toy.x, toy.y)
    with torch.no_grad():
        one, two = (maximised(expectation(function, toy, particles, 151)) for particles in (1, 2))
    torch.testing.assert_close(one, getattr(exact, lowest), rtol=1e-4, atol=0)
    assert (one + 1e-3 < two).all()
    assert (two < exact.log_evidence - 1e-3).all()


@OURS
def test_very_many_samples_of_the_prior_network_give_the_evidence(make_toy, network):
    toy = make_toy(latent_dim=1, count=3, gain=1.3, seed=2, network=network)
    eps = torch.randn(200_000, 3, 1, generator=torch.Generator().manual_seed(0), dtype=toy.x.dtype)
    with torch.no_grad():
        found = multisample(toy.cvae, toy.batch, eps)["multisample"]
    torch.testing.assert_close(found, integrate(toy.cvae, toy.x, toy.y).log_evidence, rtol=1e-3, atol=0)


def test_iwae_of_several_levels(make_toy):
    """One sample: the elbo, in expectation; two: between it and log p(y|x)."""
    toy = make_toy(2, 2, 2, hidden=(4,), latent_dim=2, count=2, gain=1.0, network=TEST_NETWORKS["two smooth levels"])
    evidence = log_evidence(toy.cvae, toy.x, toy.y, 61)
    with torch.no_grad():
        bounds = expectation(elbo, toy, 1, 41)["elbo"]
        one, two = (expectation(iwae, toy, particles, points)["iwae"] for particles, points in ((1, 41), (2, 21)))
    torch.testing.assert_close(one, bounds, rtol=1e-8, atol=0)
    assert (one + 1e-3 < two).all()
    assert (two < evidence - 1e-3).all()


# Gradients in expectation


def plain_iwae(model: CVAE, batch: Batch, eps: Tensor) -> dict[str, Tensor]:
    """The bound with its own gradient, through densities of PyTorch."""
    draw = model.from_posterior(*batch, eps)
    log_weights = Bernoulli(logits=draw.logits, validate_args=False).log_prob(batch.y).sum(-1)
    for z, _, q, p in draw.latents:
        log_p, log_q = (Normal(gaussian.loc, gaussian.log_scale.exp()).log_prob(z) for gaussian in (p, q))
        log_weights = log_weights + (log_p - log_q).sum(-1)
    return {"iwae": torch.logsumexp(log_weights, 0) - math.log(len(eps))}


def expected_gradient(function, toy, particles: int, points: int, reach: float = 6.0) -> dict[str, Tensor]:
    """By each weight that is trained, of the sum over images."""
    model = copy.deepcopy(toy.cvae)
    maximised(expectation(function, toy._replace(cvae=model), particles, points, reach)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor], part: str) -> float:
    """Relative to the largest entry of each weight's gradient, over the networks of this name."""
    assert any(name.startswith(part) for name in expected)
    return max(
        ((found[name] - gradient).abs().max() / gradient.abs().max()).item()
        for name, gradient in expected.items()
        if name.startswith(part)
    )


PARTS = ("prior", "recognition", "generation")


def small_toy(make_toy, network: str):
    """Whose integrals over all noise converge on a coarse grid."""
    latent_dim, builder = (1, TEST_NETWORKS[network]) if network == "smooth" else (2, TEST_NETWORKS[network])
    return make_toy(1, 2, 2, hidden=(3,), latent_dim=latent_dim, count=1, gain=1.0, seed=4, network=builder)


def gradients_in_expectation(toy, particles: int, *functions) -> list[dict[str, Tensor]]:
    points = 21 if particles * toy.cvae.latent_dim == 4 else 61
    return [expected_gradient(function, toy, particles, points) for function in functions]


@SMOOTH
def test_gradient_of_iwae_of_one_sample_is_that_of_the_elbo(make_toy, network):
    """In expectation, for all networks: what is estimated in another way is the same."""
    found, expected = gradients_in_expectation(small_toy(make_toy, network), 1, iwae, elbo)
    for part in PARTS:
        assert largest_difference(found, expected, part) < 1e-6, part


@SMOOTH
@pytest.mark.parametrize("particles", [1, 2])
def test_doubly_reparameterized_gradient_is_that_of_the_bound(make_toy, network, particles):
    """In expectation, for all networks, by integration over all noise of all levels and samples."""
    found, expected = gradients_in_expectation(small_toy(make_toy, network), particles, iwae, plain_iwae)
    for part in PARTS:
        assert largest_difference(found, expected, part) < 1e-5, part


def variant(
    draw: Draw, log_likelihood: Tensor, log_weights: Tensor, *, power=2, scores=1, rest=1, levels=True
) -> Tensor:  # fmt: skip
    """The doubly reparameterized gradient as its formula stands, or one of its terms wrong."""
    weights = log_weights.detach().softmax(0)[..., None]
    found = (weights[..., 0] * log_likelihood).sum(0)
    total = log_weights.sum()
    for z, eps, q, p in reversed(draw.latents):
        (by_z,) = torch.autograd.grad(total, z, retain_graph=True)
        if levels:
            total = total + (by_z * (q.loc + q.log_scale.exp() * eps)).sum()
        constant = z.detach().requires_grad_()
        log_q, log_p = (Normal(g.loc.detach(), g.log_scale.detach().exp()).log_prob(constant).sum() for g in (q, p))
        (by_ratio,) = torch.autograd.grad(scores * (log_q - log_p), constant)
        noise = (z.detach() - p.loc.detach()) / p.log_scale.detach().exp()
        as_q, as_p = q.loc + q.log_scale.exp() * eps, p.loc + p.log_scale.exp() * noise
        found = found + (weights**power * by_z * as_q).sum((0, 2))
        found = found + (weights * (by_ratio + rest * (1 - weights) * by_z) * as_p).sum((0, 2))
    return found


@pytest.mark.parametrize(
    ("network", "changes", "wrong"),
    [
        pytest.param("smooth", {}, (), id="right"),
        pytest.param("two smooth levels", {}, (), id="right, two levels"),
        pytest.param("smooth", {"power": 1}, ("recognition",), id="weights not squared"),
        pytest.param("smooth", {"power": 3}, ("recognition",), id="weights cubed"),
        pytest.param("smooth", {"scores": 0}, ("prior",), id="no scores"),
        pytest.param("smooth", {"scores": -1}, ("prior",), id="scores of the wrong sign"),
        pytest.param("smooth", {"rest": 0}, ("prior",), id="the weights' own derivative left out"),
        pytest.param("two smooth levels", {"levels": False}, PARTS[:2], id="what follows on the level below left out"),
    ],
)
def test_wrong_variants_of_the_gradient_would_be_noticed(make_toy, monkeypatch, network, changes, wrong):
    """The comparison above is one that they fail, by more than a hundred times its tolerance."""
    toy = small_toy(make_toy, network)
    (expected,) = gradients_in_expectation(toy, 2, plain_iwae)
    monkeypatch.setattr(objectives, "doubly_reparameterized", lambda *draw: variant(*draw, **changes))
    (found,) = gradients_in_expectation(toy, 2, iwae)
    for part in PARTS:
        difference = largest_difference(found, expected, part)
        assert difference > 1e-3 if part in wrong else difference < 1e-5, part


@pytest.mark.parametrize("network", ["tutorial", "two levels"])
def test_gradient_of_iwae_is_the_formulas(make_toy, monkeypatch, network):
    """Sample by sample, for networks of any size and noise of any number of samples."""
    toy = make_toy(particles=5, network=TEST_NETWORKS.get(network, network))
    gradients = []
    for function in (objectives.doubly_reparameterized, variant):
        monkeypatch.setattr(objectives, "doubly_reparameterized", function)
        model = copy.deepcopy(toy.cvae)
        iwae(model, toy.batch, toy.eps)["iwae"].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-10, msg=name)


def test_generation_networks_gradient_is_the_plain_one(make_toy):
    """Sample by sample: only what z depends on is estimated in another way."""
    toy = make_toy(particles=5)
    gradients = []
    for function in (iwae, plain_iwae):
        model = copy.deepcopy(toy.cvae)
        maximised(function(model, toy.batch, toy.eps)).sum().backward()
        gradients.append([parameter.grad for parameter in model.generation_net.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", ["tutorial", "two levels"])
def test_gradient_of_iwae_varies_less_than_the_plain_one(make_toy, network):
    """The recognition network's, the more so the more samples."""
    ratios = []
    for particles in (4, 64):
        toy = make_toy(hidden=(7,), count=1, particles=particles, gain=1.0, network=TEST_NETWORKS.get(network, network))
        parameters = list(
            toy.cvae.encoders.parameters() if network == "tutorial" else toy.cvae.recognition_nets.parameters()
        )
        variances = []
        for function in (iwae, plain_iwae):
            random = torch.Generator().manual_seed(1)
            gradients = []
            for _ in range(100):
                eps = torch.randn(toy.eps.shape, generator=random, dtype=torch.float64)
                found = torch.autograd.grad(maximised(function(toy.cvae, toy.batch, eps)).sum(), parameters)
                gradients.append(torch.cat([g[-1].flatten() if network == "tutorial" else g.flatten() for g in found]))
            variances.append(torch.stack(gradients).var(0).sum())
        ratios.append((variances[0] / variances[1]).item())
    assert ratios[0] < 0.8
    assert ratios[1] < 0.5 * ratios[0]


class GaussianDraw(Draw):
    """log p(y|x,z) is a Gaussian's around `logits`."""

    SCALE = 0.7

    def log_likelihood(self, y: Tensor) -> Tensor:
        return Normal(self.logits, self.SCALE).log_prob(y).sum(-1)


class LinearGaussian(CVAE):
    """z ~ N(ax, 1) and y ~ N(bz, σ²), whose posterior is the recognition network: what it says is exact."""

    def __init__(self, split: Split):
        super().__init__(split, nn.Linear(1, 1), 1)
        self.a, self.b = nn.Parameter(torch.tensor(0.8).double()), nn.Parameter(torch.tensor(-1.3).double())
        noise = GaussianDraw.SCALE**2
        precision = 1 + self.b.detach() ** 2 / noise
        self.loc = nn.Parameter(torch.stack([self.a.detach(), self.b.detach() / noise]) / precision)
        self.log_scale = nn.Parameter(-0.5 * precision.log())

    def from_posterior(self, x, y, guess, eps, detach_z=False):
        p = Gaussian(self.a * x, torch.zeros_like(x))
        q = Gaussian(self.loc[0] * x + self.loc[1] * y, self.log_scale.expand_as(x))
        z = q.sample(eps)
        if detach_z:
            z = z.detach().requires_grad_()
        return GaussianDraw(self.b * z, (Latent(z, eps, q, p),))

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        scale = (GaussianDraw.SCALE**2 + self.b**2).sqrt()
        return Normal(self.a * self.b * x, scale).log_prob(y).sum(-1)


@pytest.fixture
def exact() -> tuple[LinearGaussian, Batch]:
    x, y = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return LinearGaussian(Split(torch.tensor([[True, False]]))), Batch(x, y)


@pytest.mark.parametrize("particles", [1, 5])
def test_at_the_exact_posterior_the_bound_is_exact(exact, particles):
    """Every sample gives log p(y|x) itself, and the recognition network no gradient, where the plain one is noise."""
    model, batch = exact
    eps = torch.randn(particles, 6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bound = iwae(model, batch, eps)["iwae"]
    torch.testing.assert_close(bound, model.log_evidence(*batch[:2]), rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(bound[0], [model.loc, model.log_scale]):
        assert gradient.abs().max() < 1e-12
    draw = model.from_posterior(*batch, eps)
    plain = log_mean_exp(draw.log_likelihood(batch.y) + draw.log_ratio)
    for gradient in torch.autograd.grad(plain[0], [model.loc, model.log_scale]):
        assert gradient.abs().max() > 0.01


def test_at_the_exact_posterior_the_other_gradients_are_the_evidences(exact):
    """In expectation, image by image."""
    model, batch = exact
    noise, weights = noise_grid(1, 61)
    for i in range(len(batch.x)):
        rows = Batch(batch.x[i].expand(61, 1), batch.y[i].expand(61, 1))
        found = torch.autograd.grad(weights @ iwae(model, rows, noise[None])["iwae"], [model.a, model.b])
        expected = torch.autograd.grad(model.log_evidence(batch.x[i], batch.y[i]), [model.a, model.b])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# Terms and limits


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms(make_toy, name):
    """Per image, by name, that of the objective first; bounds of several samples report what has no gradient."""
    toy = make_toy(particles=3)
    terms = objective(Settings(objective=name))(toy.cvae, toy.batch, toy.eps)
    assert next(iter(terms)) == name
    assert maximised(terms) is terms[name]
    assert all(term.shape == (len(toy.x),) and term.isfinite().all() for term in terms.values())
    assert terms[name].requires_grad
    if {"elbo", "kl"} <= terms.keys():
        assert (terms["kl"] > 0).all()
        torch.testing.assert_close(terms["elbo"], terms["log_likelihood"] - terms["kl"], rtol=1e-12, atol=1e-12)
    if name in ("iwae", "multisample"):
        assert not any(term.requires_grad for other, term in terms.items() if other != name)


@pytest.mark.parametrize("name", ["elbo", "iwae", "hybrid"])
def test_kl_of_each_level(make_toy, name):
    """The levels' sum is the KL that the bound has, and each is that of its own distributions."""
    toy = make_toy(particles=3, network=TEST_NETWORKS["two levels"])
    terms = objective(Settings(objective=name))(toy.cvae, toy.batch, toy.eps)
    torch.testing.assert_close(terms["kl"], terms["kl_1"] + terms["kl_2"], rtol=1e-12, atol=0)
    for i, (_, _, q, p) in enumerate(toy.cvae.from_posterior(*toy.batch, toy.eps).latents, start=1):
        normal, other = (torch.distributions.Normal(loc, log_scale.exp()) for loc, log_scale in (q, p))
        kl = torch.distributions.kl_divergence(normal, other).sum(-1)
        torch.testing.assert_close(terms[f"kl_{i}"], kl if i == 1 else kl.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", ["tutorial", "two levels"])
def test_iwae_has_the_same_value_with_and_without_a_gradient(make_toy, network):
    toy = make_toy(particles=3, network=TEST_NETWORKS.get(network, network))
    terms = iwae(toy.cvae, toy.batch, toy.eps)
    with torch.no_grad():
        without = iwae(toy.cvae, toy.batch, toy.eps)
        draw = toy.cvae.from_posterior(*toy.batch, toy.eps)
        expected = (draw.log_likelihood(toy.y) + draw.log_ratio).exp().mean(0).log()
    for name, term in terms.items():
        torch.testing.assert_close(term, without[name], rtol=1e-13, atol=0, msg=name)
        assert not without[name].requires_grad
    torch.testing.assert_close(without["iwae"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(without["elbo"], elbo(toy.cvae, toy.batch, toy.eps)["elbo"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("network", ["tutorial", "paper", "two levels"])
def test_limits_of_the_hybrid_objective(make_toy, network, particles):
    """alpha = 1 is the elbo, alpha = 0 is gsnn, exactly: values and gradients, from the same noise."""
    toy = make_toy(particles=particles, network=TEST_NETWORKS.get(network, network))
    trained = [parameter for parameter in toy.cvae.parameters() if parameter.requires_grad]
    for alpha, other in ((1.0, elbo), (0.0, gsnn)):
        of_hybrid = hybrid(toy.cvae, toy.batch, toy.eps, alpha=alpha)
        expected = maximised(other(toy.cvae, toy.batch, toy.eps))
        assert torch.equal(of_hybrid["hybrid"], expected)
        found, wanted = (
            torch.autograd.grad(value.sum(), trained, allow_unused=True) for value in (of_hybrid["hybrid"], expected)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    terms = hybrid(toy.cvae, toy.batch, toy.eps, alpha=0.3)
    of_levels = ["kl_1", "kl_2"] if network == "two levels" else []
    assert list(terms) == ["hybrid", "elbo", "log_likelihood", "kl", *of_levels, "gsnn"]
    torch.testing.assert_close(terms["hybrid"], 0.3 * terms["elbo"] + 0.7 * terms["gsnn"], rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [gsnn, multisample])
@pytest.mark.parametrize("network", ["tutorial", "paper", "convolutional", "two levels"])
def test_the_prior_networks_objectives_do_not_touch_the_recognition_network(make_toy, network, function):
    """Neither is it used, nor trained; the other networks are."""
    toy = make_toy(particles=2, network=TEST_NETWORKS.get(network, network))
    before = maximised(function(toy.cvae, toy.batch, toy.eps))
    before.sum().backward()
    recognition = []
    for name, parameter in toy.cvae.named_parameters():
        if name.startswith("encoders"):
            assert parameter.grad[toy.cvae.PRIOR].ne(0).any()
            assert parameter.grad[toy.cvae.RECOGNITION].eq(0).all()
            recognition.append(parameter.data[toy.cvae.RECOGNITION])
        elif name.startswith("recognition"):
            assert parameter.grad is None
            recognition.append(parameter.data)
        elif parameter.requires_grad:
            assert parameter.grad.ne(0).any()
    assert recognition
    for weights in recognition:
        weights.fill_(float("nan"))
    assert torch.equal(maximised(function(toy.cvae, toy.batch, toy.eps)), before)
    assert maximised(elbo(toy.cvae, toy.batch, toy.eps)).isnan().all()


def test_settings_of_an_objective_are_filled_in(make_toy):
    """Its keyword-only parameters, from the settings of the same name."""
    toy = make_toy()
    for alpha in (0.0, 0.25, 1.0):
        terms = objective(Settings(objective="hybrid", alpha=alpha))(toy.cvae, toy.batch, toy.eps)
        expected = hybrid(toy.cvae, toy.batch, toy.eps, alpha=alpha)
        assert torch.equal(terms["hybrid"], expected["hybrid"])
    for name in OBJECTIVES.keys() - {"hybrid"}:
        terms = objective(Settings(objective=name))(toy.cvae, toy.batch, toy.eps)
        assert torch.equal(terms[name], OBJECTIVES[name](toy.cvae, toy.batch, toy.eps)[name])


@pytest.mark.parametrize("name", ["", "ELBO", "vae", "log_likelihood"])
def test_objectives_that_there_are_not(name):
    with pytest.raises(ValueError, match=f"objective has to be one of {', '.join(OBJECTIVES)}, not"):
        objective(Settings(objective=name))


def test_new_objective_is_a_function_and_a_name(make_toy, monkeypatch):
    def tempered(model: CVAE, batch: Batch, eps: Tensor, *, weight_decay: float, seed: int) -> dict[str, Tensor]:
        draw = model.from_posterior(*batch, eps)
        return {"tempered": draw.log_likelihood(batch.y).mean(0) - weight_decay * draw.kl + seed}

    monkeypatch.setitem(OBJECTIVES, "tempered", tempered)
    toy = make_toy(particles=2)
    terms = objective(Settings(objective="tempered", weight_decay=0.5, seed=7))(toy.cvae, toy.batch, toy.eps)
    usual = elbo(toy.cvae, toy.batch, toy.eps)
    torch.testing.assert_close(terms["tempered"], usual["log_likelihood"] - 0.5 * usual["kl"] + 7, rtol=1e-12, atol=0)


# Sums


def some_terms(count: int = 1000) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    values = {"elbo": -100 * torch.rand(count, generator=random), "kl": 20 * torch.rand(count, generator=random)}
    return {name: value.requires_grad_() for name, value in values.items()}


def test_sums_are_divided_once():
    """Uneven batches give the mean over all images, not the mean of batch means."""
    terms, totals = some_terms(), Totals()
    for elbos, kls in zip(*(term.split(384) for term in terms.values()), strict=True):
        totals.add({"elbo": elbos, "kl": kls})
    assert totals.sums.dtype == torch.float64
    assert not totals.sums.requires_grad
    assert totals.sums[-1] == 1000
    means = totals.means()
    assert list(means) == ["elbo", "kl"]
    for name, term in terms.items():
        assert means[name] == pytest.approx(term.double().mean().item(), rel=1e-14)
    assert maximised(means) == means["elbo"]


def test_sums_are_taken_in_double_precision():
    """With numbers that float32 would no longer add."""
    totals = Totals()
    totals.add({"elbo": torch.tensor([2.0**25])})
    for _ in range(10):
        totals.add({"elbo": torch.ones(3)})
    assert totals.sums.tolist() == [2.0**25 + 30, 31]
    totals = Totals()
    totals.add({"elbo": torch.cat([torch.tensor([2.0**25]), torch.ones(3)])})
    assert totals.sums.tolist() == [2.0**25 + 3, 4]


def test_steps_that_were_not_taken_do_not_count():
    """Whatever their terms are."""
    terms, totals = some_terms(10), Totals()
    bad = {name: torch.full_like(term, float("nan")) for name, term in terms.items()}
    totals.add(bad, skipped=torch.tensor(True))
    assert all(math.isnan(mean) for mean in totals.means().values())
    totals.add(terms, skipped=torch.tensor(False))
    expected = totals.means()
    totals.add(bad, skipped=torch.tensor(True))
    totals.add({name: 5 * term for name, term in terms.items()}, skipped=torch.tensor(True))
    assert totals.means() == expected
    assert totals.sums[-1] == 10
    assert expected["elbo"] == pytest.approx(terms["elbo"].double().mean().item(), rel=1e-14)


def test_portion_without_images_has_names_all_the_same():
    """As a process has one that gets no share of the validation images."""
    totals = Totals()
    totals.add({"elbo": torch.zeros(0), "kl": torch.zeros(0)})
    assert list(totals.means()) == ["elbo", "kl"]
    assert all(math.isnan(mean) for mean in totals.means().values())
    assert totals.sums.tolist() == [0, 0, 0]
    totals.add(some_terms(4))
    assert totals.sums[-1] == 4


def test_sums_stay_where_they_are():
    """What was captured or is to be exchanged is this tensor, in every epoch."""
    totals = Totals()
    assert totals.means() == {}
    totals.add(some_terms(4))
    sums = totals.sums
    totals.add(some_terms(5))
    assert totals.sums is sums
    totals.zero()
    assert totals.sums is sums
    assert sums.tolist() == [0, 0, 0]
    assert list(totals.means()) == ["elbo", "kl"]
    totals.add(some_terms(6))
    assert totals.sums is sums
    assert sums[-1] == 6


def test_every_objective_on_a_portion_without_images(make_toy):
    toy = make_toy(particles=2)
    for name in OBJECTIVES:
        terms = objective(Settings(objective=name))(toy.cvae, Batch(toy.x[:0], toy.y[:0]), toy.eps[:, :0])
        assert all(term.shape == (0,) for term in terms.values()), name
    terms = objectives.log_likelihood(toy.cvae.baseline_net, Batch(toy.x[:0], toy.y[:0]))
    assert terms["log_likelihood"].shape == (0,)


def test_baselines_objective(make_toy):
    toy = make_toy()
    guess = toy.cvae.baseline_net(toy.x)
    terms = objectives.log_likelihood(toy.cvae.baseline_net, toy.batch)
    assert list(terms) == ["log_likelihood"]
    assert torch.equal(terms["log_likelihood"], bernoulli_log_prob(toy.y, guess))
