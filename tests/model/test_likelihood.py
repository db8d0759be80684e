"""The conditional log-likelihood over a set of images: right values and errors, and none that depends on shares."""

import math

import numpy as np
import pytest
import torch
from reference.networks import TEST_NETWORKS
from reference.quadrature import integrate, log_evidence

from cvae.data.images import ImageSet
from cvae.model.likelihood import (
    IMAGES_AT_ONCE,
    SAMPLES_AT_ONCE,
    Likelihoods,
    effective_sample_size,
    estimate,
    evaluate,
    joined,
)
from cvae.model.objectives import log_mean_exp

COUNT = 3 * IMAGES_AT_ONCE + 10
CHANGED = COUNT - 5


@pytest.fixture
def toy(make_toy):
    return make_toy(latent_dim=1, count=COUNT, gain=1.3, dtype=torch.float32)


def levels(images):
    return images.mul(255).round().to(torch.uint8)


def likelihoods(toy, images=None, samples=(7,), seed=3, **more):
    """`evaluate` in one piece."""
    image_set = ImageSet(levels(toy.images if images is None else images), toy.split)
    return joined(evaluate(toy.cvae, image_set, samples, seed, **more))


def assert_equal(ours, theirs):
    for name in Likelihoods._fields:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("network", ["tutorial", "paper"])
def test_values_match_quadrature(make_toy, network):
    """Both estimates of −log p(y|x), image by image, within five of their exact standard errors and their bias."""
    toy = make_toy(latent_dim=1, count=COUNT, gain=1.3, dtype=torch.float32, network=network)
    samples = 20 * SAMPLES_AT_ONCE + 7
    found, exact = likelihoods(toy, samples=[samples]), integrate(toy.cvae, toy.x, toy.y)
    for name, variance in (("cvae_is_nll", exact.is_variance), ("cvae_mc_nll", exact.mc_variance)):
        stderr = (variance / samples).sqrt()
        error = getattr(found, name)[0] + exact.log_evidence - 0.5 * variance / samples
        assert (error.abs() < 5 * stderr + 1e-5).all(), name
        assert stderr.mean() < 0.05
    assert found.cvae_neg_elbo.mean().item() == pytest.approx(-exact.elbo.mean().item(), abs=0.1)
    assert found.cvae_neg_elbo.mean() > found.cvae_is_nll.mean()


def test_several_levels_match_quadrature(make_toy):
    """Both estimates of −log p(y|x) agree with an integral over two levels of z."""
    network = TEST_NETWORKS["two smooth levels"]
    toy = make_toy(3, latent_dim=2, count=COUNT, gain=1.0, dtype=torch.float32, network=network)
    found, exact = likelihoods(toy, samples=[4000]), log_evidence(toy.cvae, toy.x, toy.y, 61)
    torch.testing.assert_close(log_evidence(toy.cvae, toy.x, toy.y, 41), exact, rtol=1e-5, atol=0)
    for values in (found.cvae_is_nll, found.cvae_mc_nll):
        error = values[0] + exact
        assert error.abs().max() < 0.1
        assert error.mean().abs() < 0.003
    assert (found.cvae_neg_elbo + exact).mean() > 0.1  # a bound, which is not tight here


def test_one_sample_is_the_elbo_in_expectation(toy):
    """S = 1: over the images, the estimate by importance sampling deviates from the exact −ELBO by chance alone."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    deviations = torch.cat([likelihoods(toy, samples=[1], seed=seed).cvae_is_nll[0] + exact.elbo for seed in range(24)])
    stderr = deviations.std() / math.sqrt(len(deviations))
    assert deviations.mean().abs() < 4 * stderr
    assert 8 * stderr < (exact.log_evidence - exact.elbo).mean()  # what twenty samples would all but close


def test_baseline_and_floor_match_their_formulas(toy):
    found, y = likelihoods(toy), toy.y.double()
    guess = torch.sigmoid(toy.cvae.baseline_net(toy.x).detach().double())
    expected = -(y * guess.log() + (1 - y) * (1 - guess).log()).sum(1)
    torch.testing.assert_close(found.nn_nll, expected, rtol=1e-6, atol=0)
    entropy = torch.distributions.Bernoulli(y).entropy().sum(1)
    torch.testing.assert_close(found.floor, entropy, rtol=1e-6, atol=1e-6)
    assert all((values > found.floor).all() for values in (found.nn_nll, found.cvae_neg_elbo))
    assert all(values.dtype == torch.float64 and values.shape[-1] == COUNT for values in found)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shares_joined_are_the_whole(toy, ranks):
    """Any number of processes, even more than there are portions."""
    whole = likelihoods(toy)
    parts = []
    image_set = ImageSet(levels(toy.images), toy.split)
    for rank in range(ranks):
        share = lambda length, rank=rank: slice(length * rank // ranks, length * (rank + 1) // ranks)  # noqa: E731
        parts += list(evaluate(toy.cvae, image_set, [7], 3, share))
    assert_equal(joined(parts), whole)


def test_depends_on_the_seed_and_the_own_image_alone(toy):
    whole = likelihoods(toy)
    assert_equal(likelihoods(toy), whole)
    other = likelihoods(toy, seed=4)
    assert torch.equal(other.nn_nll, whole.nn_nll)
    assert not torch.isclose(other.cvae_is_nll, whole.cvae_is_nll, rtol=1e-9).any()
    images = toy.images.clone()
    images[CHANGED] = 1 - images[CHANGED]
    changed = likelihoods(toy, images)
    for before, after in zip(whole, changed, strict=True):
        assert {place[-1] for place in (before != after).nonzero().tolist()} <= {CHANGED}
    assert changed.cvae_is_nll[0, CHANGED] != whole.cvae_is_nll[0, CHANGED]


def test_every_image_has_noise_of_its_own(toy):
    """The same picture all over gets the same ŷ everywhere, and another estimate at each place."""
    found = likelihoods(toy, toy.images[:1].expand(COUNT, -1, -1))
    assert found.nn_nll.unique().numel() <= 2  # a last, smaller batch may be summed in another order
    assert found.cvae_is_nll.unique().numel() == found.cvae_mc_nll.unique().numel() == COUNT


def test_first_images_evaluate_as_they_do_in_the_whole_set(toy):
    first = likelihoods(toy, toy.images[: 2 * IMAGES_AT_ONCE])
    assert_equal(first, Likelihoods(*(values[..., : 2 * IMAGES_AT_ONCE] for values in likelihoods(toy))))


def test_more_samples_change_only_what_is_estimated_with_them(toy):
    few, many = likelihoods(toy, samples=[1]), likelihoods(toy, samples=[SAMPLES_AT_ONCE + 1])
    for name in ("nn_nll", "cvae_neg_elbo", "floor", "kl"):
        assert torch.equal(getattr(few, name), getattr(many, name))
    assert many.cvae_is_nll.mean() < few.cvae_is_nll.mean()
    assert many.cvae_mc_nll.mean() < few.cvae_mc_nll.mean()


def test_each_number_of_samples_takes_the_first_draws(toy):
    """An estimate is the same whatever others are made beside it."""
    numbers = [2, SAMPLES_AT_ONCE, 2 * SAMPLES_AT_ONCE + 3]
    together = likelihoods(toy, samples=numbers)
    for i, number in enumerate(numbers):
        alone = likelihoods(toy, samples=[number])
        for name in ("cvae_mc_nll", "cvae_is_nll", "ess"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-6, atol=0)


def test_effective_sample_size():
    """The size of an unweighted sample with the same variance: S for equal weights, 1 for a single one."""
    columns = [0.0, 0.0, 0.0], [-3e4, -3e4 - 800, -4e4], [5.0, 5 + math.log(3), 5.0], [0.0, 1.0, 2.0]
    found = effective_sample_size(torch.tensor(columns, dtype=torch.float64).T)
    last = [math.exp(k) for k in range(3)]
    expected = [3, 1, 25 / 11, sum(last) ** 2 / sum(weight**2 for weight in last)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_effective_samples_tell_the_variance_of_the_weights(toy):
    """ESS / S is E[w]² / E[w²] for many samples: 1 / (1 + variance of w / p(y|x)), which an integral gives."""
    samples = 3000
    found, exact = likelihoods(toy, samples=[samples]), integrate(toy.cvae, toy.x, toy.y)
    tame = exact.is_variance < 1  # for others, the mean of w² is made by weights that are rarely drawn
    assert tame.sum() > COUNT / 3
    torch.testing.assert_close(found.ess[0][tame] / samples, 1 / (1 + exact.is_variance[tame]), rtol=0.1, atol=0)
    assert ((found.ess >= 1) & (found.ess <= samples)).all()


@pytest.mark.parametrize("network", ["tutorial", "two levels"])
def test_kl_is_that_of_each_level(make_toy, network):
    toy = make_toy(latent_dim=4, count=COUNT, dtype=torch.float32, network=TEST_NETWORKS.get(network, network))
    found = likelihoods(toy)
    draw = toy.cvae.from_posterior(toy.x, toy.y, None, torch.randn(2000, COUNT, 4))
    assert found.kl.shape == (len(draw.latents), COUNT)
    for level, (_, _, q, p) in zip(found.kl, draw.latents, strict=True):
        normal, other = (torch.distributions.Normal(g.loc, g.log_scale.exp()) for g in (q, p))
        kl = torch.distributions.kl_divergence(normal, other).sum(-1)
        exact = kl if kl.dim() == 1 else kl.mean(0)
        assert level.mean().item() == pytest.approx(exact.mean().item(), rel=1e-6 if kl.dim() == 1 else 0.03)


def test_guess_of_the_image_set_is_not_used(toy):
    """It may be in half precision; the baseline is computed anew, in that of its weights."""
    image_set = ImageSet(levels(toy.images), toy.split)
    image_set.set_guesses(lambda x: torch.zeros(len(x), toy.split.num_hidden), torch.bfloat16)
    assert_equal(joined(evaluate(toy.cvae, image_set, [7], 3)), likelihoods(toy))


def test_estimates_are_means_with_standard_errors(toy):
    for values in likelihoods(toy).cvae_is_nll:
        found, array = estimate(values), values.numpy()
        assert found.mean == pytest.approx(array.sum() / COUNT, rel=1e-14)
        assert found.stderr == pytest.approx(array.std(ddof=1) / math.sqrt(COUNT), rel=1e-12)


def test_estimate_of_one_value_has_no_error():
    single = estimate(torch.tensor([2.5], dtype=torch.float64))
    assert single.mean == 2.5
    assert math.isnan(single.stderr)


def test_log_mean_exp_of_extreme_weights():
    log_weights = torch.tensor([[-1e5, 3.0], [-1e5 + 1, -1e4], [-1e5 - 2, 3.0]], dtype=torch.float64)
    expected = [-1e5 + math.log((1 + math.e + math.exp(-2)) / 3), 3 + math.log(2 / 3)]
    found = log_mean_exp(log_weights)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
