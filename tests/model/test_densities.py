"""The densities against quadrature, SciPy and torch.distributions."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence

from cvae.model.densities import (
    Gaussian,
    bernoulli_entropy,
    bernoulli_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_score,
    widen,
)

SCALAR_GAUSSIANS = [(0.0, 0.0), (-1.5, 0.7), (3.0, -2.0), (0.2, 1.9)]  # loc, log_scale


def scalar_gaussian(loc: float, log_scale: float) -> Gaussian:
    return Gaussian(torch.tensor([loc], dtype=torch.float64), torch.tensor([log_scale], dtype=torch.float64))


def random_gaussian(seed: int, *shape: int) -> Gaussian:
    random = torch.Generator().manual_seed(seed)
    return Gaussian(*torch.randn(2, *shape, generator=random, dtype=torch.float64).unbind())


def as_distribution(gaussian: Gaussian) -> Independent:
    return Independent(Normal(gaussian.loc, gaussian.log_scale.exp()), 1)


@pytest.mark.parametrize(("loc", "log_scale"), SCALAR_GAUSSIANS)
def test_gaussian_integrates_to_one(loc, log_scale):
    gaussian, scale = scalar_gaussian(loc, log_scale), math.exp(log_scale)
    z = torch.linspace(loc - 10 * scale, loc + 10 * scale, 2001, dtype=torch.float64)
    density = gaussian_log_prob(z[:, None], gaussian).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-12)


def test_gaussian_log_prob_matches_other_libraries():
    gaussian, z = random_gaussian(0, 7, 5), random_gaussian(1, 3, 7, 5).loc  # z broadcasts
    ours = gaussian_log_prob(z, gaussian)
    assert ours.shape == (3, 7)
    torch.testing.assert_close(ours, as_distribution(gaussian).log_prob(z), rtol=1e-12, atol=1e-12)
    scipys = scipy.stats.norm.logpdf(z.numpy(), gaussian.loc.numpy(), gaussian.log_scale.exp().numpy()).sum(-1)
    np.testing.assert_allclose(ours.numpy(), scipys, rtol=1e-12)


def test_gaussian_of_tiny_scale_at_its_centre():
    """Log-scales, never scales: one that exp would round to zero in float32 is no trouble at the centre."""
    gaussian = Gaussian(torch.ones(1), torch.tensor([-80.0]))
    expected = 80 - 0.5 * math.log(2 * math.pi)
    assert gaussian_log_prob(torch.ones(1), gaussian).item() == pytest.approx(expected, rel=1e-6)


def test_sample_is_reparameterized():
    """z = loc + scale · eps: log N(z) is log N(eps; 0, 1) − Σ log_scale, and its gradients are 1 and scale · eps."""
    gaussian = Gaussian(*(part.requires_grad_() for part in random_gaussian(2, 4)))
    eps = random_gaussian(3, 6, 4).loc
    z = gaussian.sample(eps)
    standard = Normal(0.0, 1.0).log_prob(eps).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(z, gaussian), standard - gaussian.log_scale.sum(), rtol=1e-12, atol=0)
    for_loc, for_log_scale = torch.autograd.grad(z.sum(), tuple(gaussian))
    torch.testing.assert_close(for_loc, torch.full_like(for_loc, 6))
    torch.testing.assert_close(for_log_scale, (gaussian.log_scale.exp() * eps).sum(0))


@pytest.mark.parametrize(("q", "p"), [(q, p) for q in SCALAR_GAUSSIANS for p in SCALAR_GAUSSIANS if q != p])
def test_kl_matches_quadrature(q, p):
    (loc, log_scale), q_ours, p_ours = q, scalar_gaussian(*q), scalar_gaussian(*p)

    def integrand(z: float) -> float:
        log_q, log_p = (scipy.stats.norm.logpdf(z, loc, math.exp(log_scale)) for loc, log_scale in (q, p))
        return math.exp(log_q) * (log_q - log_p)

    reach = 12 * math.exp(log_scale)
    expected, _ = scipy.integrate.quad(integrand, loc - reach, loc + reach, points=[loc], epsabs=1e-11, epsrel=1e-11)
    assert gaussian_kl(q_ours, p_ours).item() == pytest.approx(expected, rel=1e-9)


def test_kl_matches_torch_and_monte_carlo():
    q, p = random_gaussian(4, 6, 3), random_gaussian(5, 6, 3)
    ours = gaussian_kl(q, p)
    torch.testing.assert_close(ours, kl_divergence(as_distribution(q), as_distribution(p)), rtol=1e-12, atol=0)
    z = q.sample(torch.randn(50_000, 6, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    ratios = gaussian_log_prob(z, q) - gaussian_log_prob(z, p)
    stderr = ratios.std(0) / math.sqrt(len(ratios))
    assert ((ratios.mean(0) - ours).abs() < 4 * stderr).all()
    assert (stderr < 0.05 * ours).all()  # else the line above would mean little


def test_kl_is_zero_for_equals_only():
    p = random_gaussian(7, 100, 1)
    assert gaussian_kl(p, p).eq(0).all()
    for step in (-1e-3, 1e-3):
        assert gaussian_kl(Gaussian(p.loc + step, p.log_scale), p).gt(0).all()
        assert gaussian_kl(Gaussian(p.loc, p.log_scale + step), p).gt(0).all()


LOGITS = [0.0, 1e-3, 0.5, 3.0, 17.0, 40.0, 100.0, 1e4]
LOGITS = [*LOGITS, *(-logit for logit in LOGITS)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("with_grad", [False, True])
def test_bernoulli_log_prob_matches_its_formula(dtype, y, with_grad):
    """For each pixel, up to the rounding of 1 or of the logit, whichever is larger: under 1e-7 for black at l ≤ 0."""
    logits = torch.tensor(LOGITS, dtype=dtype)
    pixels = torch.full((len(LOGITS), 1), y, dtype=dtype), logits[:, None].clone().requires_grad_(with_grad)
    ours = bernoulli_log_prob(*pixels).detach()
    assert ours.dtype == dtype
    exact = y * logits.double().numpy() - np.logaddexp(0, logits.double().numpy())
    errors = np.abs(ours.double().numpy() - exact)
    assert (errors <= torch.finfo(dtype).eps * np.maximum(1, np.abs(logits.numpy()))).all()
    if y == 0:
        assert (errors[logits.numpy() <= 0] < 1e-7).all()


def test_bernoulli_is_normalised():
    logits = torch.tensor(LOGITS, dtype=torch.float64)[:, None]
    total = sum(bernoulli_log_prob(torch.full_like(logits, y), logits).exp() for y in (0.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-14, atol=0)


def test_bernoulli_sums_pixels_and_broadcasts():
    random = torch.Generator().manual_seed(8)
    y, logits = torch.rand(4, 9, generator=random).double(), torch.randn(3, 4, 9, generator=random).double()
    pixels = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(y)
    torch.testing.assert_close(bernoulli_log_prob(y, logits), pixels.sum(-1), rtol=1e-12, atol=0)


def plain_bernoulli(y: Tensor, logits: Tensor) -> Tensor:
    return (y * logits - torch.nn.functional.softplus(logits)).sum(-1)


def plain_kl(q: Gaussian, p: Gaussian) -> Tensor:
    shift = (q.loc - p.loc) / p.log_scale.exp()
    kl = p.log_scale - q.log_scale + 0.5 * ((2 * (q.log_scale - p.log_scale)).exp() + shift**2) - 0.5
    return kl.sum(-1)


def random_pixels() -> tuple[Tensor, Tensor]:
    """Grey levels `[4, 5]`, and logits `[3, 4, 5]` against which they broadcast."""
    random = torch.Generator().manual_seed(9)
    y = torch.rand(4, 5, generator=random, dtype=torch.float64)
    return y, (5 * torch.randn(3, 4, 5, generator=random, dtype=torch.float64)).requires_grad_()


def random_pair() -> list[Tensor]:
    """q's loc and log-scale, p's loc and log-scale, `[4, 3]` each."""
    return [
        part.requires_grad_() for gaussian in (random_gaussian(0, 4, 3), random_gaussian(1, 4, 3)) for part in gaussian
    ]


def kl_of(*parameters: Tensor) -> Tensor:
    return gaussian_kl(Gaussian(*parameters[:2]), Gaussian(*parameters[2:]))


def test_bernoulli_gradients():
    y, logits = random_pixels()
    assert gradcheck(lambda logits: bernoulli_log_prob(y, logits), logits)
    extreme = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    bernoulli_log_prob(torch.tensor([1.0, 0.0, 0.25, 1.0]), extreme).backward()
    assert extreme.grad.tolist() == [1.0, 0.0, -0.75, 0.0]


def test_gradient_of_the_bernoulli_is_autograds():
    """That of the plain formula, whatever the sums are multiplied with."""
    y, logits = random_pixels()
    ours, expected = bernoulli_log_prob(y, logits), plain_bernoulli(y, logits)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    factors = random_gaussian(2, 3, 4).loc
    (found,) = torch.autograd.grad(ours, logits, factors)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits, factors)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2, 3), (0, 1)], ids=str)
def test_gradient_of_the_kl_is_autograds(frozen):
    """That of the plain formula, whatever the sums are multiplied with, and if some of its arguments are constants."""
    parameters = random_pair()
    for i in frozen:
        parameters[i].requires_grad_(False)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    ours = kl_of(*parameters)
    expected = plain_kl(Gaussian(*parameters[:2]), Gaussian(*parameters[2:]))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    factors = random_gaussian(2, 4).loc
    for found, theirs in zip(
        torch.autograd.grad(ours, trained, factors), torch.autograd.grad(expected, trained, factors), strict=True
    ):
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)
    if not frozen:
        assert gradcheck(kl_of, parameters)


def test_gradient_of_the_kl_of_one_gaussian_used_twice():
    """q and p may share a parameter: both of its derivatives count."""
    loc, log_scale, other = random_pair()[:3]
    (found,) = torch.autograd.grad(kl_of(loc, log_scale, other, log_scale).sum(), log_scale)
    expected = plain_kl(Gaussian(loc, log_scale), Gaussian(other, log_scale))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), log_scale)[0], rtol=1e-12, atol=1e-12)


def bernoulli_and_arguments() -> tuple[Tensor, list[Tensor]]:
    y, logits = random_pixels()
    return bernoulli_log_prob(y, logits), [logits]


def kl_and_arguments() -> tuple[Tensor, list[Tensor]]:
    parameters = random_pair()
    return kl_of(*parameters), parameters


CASES = pytest.mark.parametrize("case", [bernoulli_and_arguments, kl_and_arguments])


@CASES
def test_derivatives_of_derivatives_are_refused(case):
    """They are not written out: an error, and no wrong number."""
    value, parameters = case()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value.square().sum(), parameters, create_graph=True)


@CASES
def test_derivative_taken_twice_is_the_same(case):
    """What is kept for the backward pass is not changed by it, nor what it gives back by the next."""
    value, parameters = case()
    first = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    (value.sum() * 3).backward(retain_graph=True)
    second = torch.autograd.grad(value.sum(), parameters)
    for gradient, copied, again, parameter in zip(first, kept, second, parameters, strict=True):
        assert torch.equal(gradient, copied)
        assert torch.equal(again, copied)
        torch.testing.assert_close(parameter.grad, 3 * copied, rtol=1e-14, atol=0)


def test_arguments_are_not_changed():
    y, logits = random_pixels()
    parameters = random_pair()
    copies = [tensor.detach().clone() for tensor in (y, logits, *parameters)]
    bernoulli_log_prob(y, logits).sum().backward()
    kl_of(*parameters).sum().backward()
    with torch.no_grad():
        bernoulli_log_prob(y, logits)
        kl_of(*parameters)
    assert all(torch.equal(*pair) for pair in zip((y, logits, *parameters), copies, strict=True))


def test_score_is_the_derivative_of_the_log_prob():
    gaussian, z = random_gaussian(3, 7, 5), random_gaussian(4, 3, 7, 5).loc.requires_grad_()
    (expected,) = torch.autograd.grad(gaussian_log_prob(z, gaussian).sum(), z)
    torch.testing.assert_close(gaussian_score(z, gaussian), expected, rtol=1e-12, atol=0)


def test_detached_gaussian_is_a_constant():
    gaussian = Gaussian(*(part.requires_grad_() for part in random_gaussian(3, 7, 5)))
    constant = gaussian.detach()
    for part, original in zip(constant, gaussian, strict=True):
        assert not part.requires_grad
        assert torch.equal(part, original)


def test_widening_leaves_what_is_wide():
    for dtype in (torch.float32, torch.float64):
        tensor = torch.ones(3, dtype=dtype)
        assert widen(tensor) is tensor
    for dtype in (torch.float16, torch.bfloat16):
        assert widen(torch.ones(3, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_bernoulli_widens_half_precision(half):
    """The same number as in float32, autocast or not, and a gradient of the logits' own precision."""
    random = torch.Generator().manual_seed(10)
    y, logits = torch.rand(4, 300, generator=random), (20 * torch.randn(4, 300, generator=random)).to(half)
    logits.requires_grad_()
    wide = bernoulli_log_prob(y, logits.detach().float())
    with torch.autocast("cpu", half):
        cast = bernoulli_log_prob(y, logits)
    assert wide.dtype == cast.dtype == torch.float32
    assert torch.equal(wide, cast)
    assert torch.equal(wide, bernoulli_log_prob(y, logits))
    cast.sum().backward()
    assert logits.grad.dtype == half
    assert torch.equal(logits.grad, (y - logits.detach().float().sigmoid()).to(half))


def test_entropy_is_the_floor():
    """−log-likelihood of grey levels is their entropy at the prediction equal to them, and above it at any other."""
    y = torch.linspace(0, 1, 256, dtype=torch.float64)[1:-1, None]
    floor = bernoulli_entropy(y)
    torch.testing.assert_close(floor, torch.distributions.Bernoulli(y[:, 0]).entropy(), rtol=1e-12, atol=0)
    torch.testing.assert_close(-bernoulli_log_prob(y, y.logit()), floor, rtol=1e-12, atol=0)
    for step in (-0.01, 0.01, -3.0, 3.0):
        assert (-bernoulli_log_prob(y, y.logit() + step) > floor).all()
    assert bernoulli_entropy(torch.tensor([0.0, 1.0, 1.0])).item() == 0
