"""The conditional log-likelihood over a set of images: right values and errors, and none that depends on shares."""

import math

import numpy as np
import pytest
import torch
from reference.networks import TEST_NETWORKS
from reference.quadrature import integrate, log_evidence

from cvae.data.images import ImageSet
from cvae.model.likelihood import IMAGES_AT_ONCE, SAMPLES_AT_ONCE, Likelihoods, estimate, evaluate
from cvae.model.objectives import log_mean_exp

COUNT = 3 * IMAGES_AT_ONCE + 10
CHANGED = COUNT - 5


@pytest.fixture
def toy(make_toy):
    return make_toy(latent_dim=1, count=COUNT, gain=1.3, dtype=torch.float32)


def levels(images):
    return images.mul(255).round().to(torch.uint8)


def likelihoods(toy, images=None, samples=7, seed=3, **more):
    """`evaluate` in one piece."""
    image_set = ImageSet(levels(toy.images if images is None else images), toy.split)
    chunks = evaluate(toy.cvae, image_set, samples, seed, **more)
    return Likelihoods(*(torch.cat(values) for values in zip(*chunks, strict=True)))


def assert_equal(ours, theirs):
    for name in Likelihoods._fields:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("network", ["tutorial", "paper"])
def test_values_match_quadrature(make_toy, network):
    """Both estimates of −log p(y|x), image by image, within five of their exact standard errors and their bias."""
    toy = make_toy(latent_dim=1, count=COUNT, gain=1.3, dtype=torch.float32, network=network)
    samples = 40 * SAMPLES_AT_ONCE + 7
    found, exact = likelihoods(toy, samples=samples), integrate(toy.cvae, toy.x, toy.y)
    for name, variance in (("cvae_is_nll", exact.is_variance), ("cvae_mc_nll", exact.mc_variance)):
        stderr = (variance / samples).sqrt()
        error = getattr(found, name) + exact.log_evidence - 0.5 * variance / samples
        assert (error.abs() < 5 * stderr + 1e-5).all(), name
        assert stderr.mean() < 0.05
    assert found.cvae_neg_elbo.mean().item() == pytest.approx(-exact.elbo.mean().item(), abs=0.1)
    assert found.cvae_neg_elbo.mean() > found.cvae_is_nll.mean()


def test_several_levels_match_quadrature(make_toy):
    """Both estimates of −log p(y|x) agree with an integral over two levels of z."""
    network = TEST_NETWORKS["two smooth levels"]
    toy = make_toy(3, latent_dim=2, count=COUNT, gain=1.0, dtype=torch.float32, network=network)
    found, exact = likelihoods(toy, samples=4000), log_evidence(toy.cvae, toy.x, toy.y, 61)
    torch.testing.assert_close(log_evidence(toy.cvae, toy.x, toy.y, 41), exact, rtol=1e-5, atol=0)
    for values in (found.cvae_is_nll, found.cvae_mc_nll):
        error = values + exact
        assert error.abs().max() < 0.1
        assert error.mean().abs() < 0.003
    assert (found.cvae_neg_elbo + exact).mean() > 0.1  # a bound, which is not tight here


def test_one_sample_is_the_elbo_in_expectation(toy):
    """S = 1: over the images, the estimate by importance sampling deviates from the exact −ELBO by chance alone."""
    exact = integrate(toy.cvae, toy.x, toy.y)
    deviations = torch.cat([likelihoods(toy, samples=1, seed=seed).cvae_is_nll + exact.elbo for seed in range(24)])
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
    assert all((values > found.floor).all() for values in found[:2])
    assert all(values.dtype == torch.float64 and values.shape == (COUNT,) for values in found)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shares_joined_are_the_whole(toy, ranks):
    """Any number of processes, even more than there are portions."""
    whole = likelihoods(toy)
    parts = []
    image_set = ImageSet(levels(toy.images), toy.split)
    for rank in range(ranks):
        share = lambda length, rank=rank: slice(length * rank // ranks, length * (rank + 1) // ranks)  # noqa: E731
        parts += list(evaluate(toy.cvae, image_set, 7, 3, share))
    assert_equal(Likelihoods(*(torch.cat(values) for values in zip(*parts, strict=True))), whole)


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
        assert (before != after).nonzero().flatten().tolist() in ([CHANGED], [])  # the floor is symmetric in y
    assert changed.cvae_is_nll[CHANGED] != whole.cvae_is_nll[CHANGED]


def test_every_image_has_noise_of_its_own(toy):
    """The same picture all over gets the same ŷ everywhere, and another estimate at each place."""
    found = likelihoods(toy, toy.images[:1].expand(COUNT, -1, -1))
    assert found.nn_nll.unique().numel() <= 2  # a last, smaller batch may be summed in another order
    assert found.cvae_is_nll.unique().numel() == found.cvae_mc_nll.unique().numel() == COUNT


def test_first_images_evaluate_as_they_do_in_the_whole_set(toy):
    first = likelihoods(toy, toy.images[: 2 * IMAGES_AT_ONCE])
    assert_equal(first, Likelihoods(*(values[: 2 * IMAGES_AT_ONCE] for values in likelihoods(toy))))


def test_more_samples_change_only_what_is_estimated_with_them(toy):
    few, many = likelihoods(toy, samples=1), likelihoods(toy, samples=SAMPLES_AT_ONCE + 1)
    for name in ("nn_nll", "cvae_neg_elbo", "floor"):
        assert torch.equal(getattr(few, name), getattr(many, name))
    assert many.cvae_is_nll.mean() < few.cvae_is_nll.mean()
    assert many.cvae_mc_nll.mean() < few.cvae_mc_nll.mean()


def test_guess_of_the_image_set_is_not_used(toy):
    """It may be in half precision; the baseline is computed anew, in that of its weights."""
    image_set = ImageSet(levels(toy.images), toy.split)
    image_set.set_guesses(lambda x: torch.zeros(len(x), toy.split.num_hidden), torch.bfloat16)
    found = Likelihoods(*(torch.cat(values) for values in zip(*evaluate(toy.cvae, image_set, 7, 3), strict=True)))
    assert_equal(found, likelihoods(toy))


def test_estimates_are_means_with_standard_errors(toy):
    found = likelihoods(toy)
    estimates = found.estimates()
    assert list(estimates) == list(Likelihoods._fields)
    for name, values in found._asdict().items():
        array = values.numpy()
        assert estimates[name].mean == pytest.approx(array.sum() / COUNT, rel=1e-14)
        assert estimates[name].stderr == pytest.approx(array.std(ddof=1) / math.sqrt(COUNT), rel=1e-12)


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
