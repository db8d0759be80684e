"""Estimates over a set of images: their values, and that they depend on nothing but the image, seed and S."""

import math

import pytest
import torch
from reference.quadrature import bernoulli, integrate, log_evidence
from torch.distributions import Bernoulli

from cvae.context import Context
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask, ImageSet
from cvae.model import likelihood
from cvae.model.cvae import CVAE, NOISE_IMAGES, SAMPLES_AT_ONCE, Draw, Latent
from cvae.model.densities import Gaussian
from cvae.model.likelihood import (
    ACTIVITY_AT_ONCE,
    Likelihoods,
    active_units,
    effective_sample_size,
    estimate,
    evaluate,
    variance_of_means,
)
from cvae.processes import Processes

COUNT = 3 * NOISE_IMAGES + 4
CONTEXT = Context(torch.device("cpu"))
ROUNDING = 1e-4  # nats: 27 logits of about 1, each a sum of some ten numbers in float32, through three layers


class Weighted(FixedMask):
    """A task in which a third of the pixels asked for do not count, in each image others."""

    def batch(self, rows):
        batch = super().batch(rows)
        return batch._replace(weight=(rows[..., self.x_dim :].int() % 3 > 0).float())


@pytest.fixture
def make(make_toy):
    """Make a model in float32, and an image set of it."""

    def make(network="tutorial", task=FixedMask, latent_dim=1, gain=1.3, **more):
        toy = make_toy(latent_dim=latent_dim, count=COUNT, gain=gain, dtype=torch.float32, network=network, **more)
        toy.cvae.task = task(toy.task.observed)
        return toy.cvae.eval(), ImageSet(toy.images.mul(255).round().to(torch.uint8), toy.cvae.task)

    return make


def joined(portions):
    return Likelihoods(*(torch.cat(values, dim=-1) for values in zip(*portions, strict=True)))


def likelihoods(model, images, samples=(7,), seed=3, context=CONTEXT):
    return joined(evaluate(model, images, samples, seed, context))


def assert_equal(ours, theirs):
    for name in Likelihoods._fields:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("task", [FixedMask, Weighted])
@pytest.mark.parametrize("network", ["tutorial", "paper"])
def test_values_match_quadrature(make, network, task):
    """Both estimates of −log p(y|x), image by image, within five of their exact standard errors and their bias."""
    model, images = make(network, task, seed=1)
    samples, batch = 5 * SAMPLES_AT_ONCE + 7, images.batch(slice(None))
    found, exact = likelihoods(model, images, [samples]), integrate(model, batch)
    tame = (exact.is_variance < 1) & (exact.mc_variance < 1)  # for others, weights that are rarely drawn make the mean
    assert tame.sum() > COUNT / 2
    for values, variance in ((found.cvae_is_nll, exact.is_variance), (found.cvae_mc_nll, exact.mc_variance)):
        error = values[0] + exact.log_evidence - 0.5 * variance / samples
        assert (error.abs() < 5 * (variance / samples).sqrt() + ROUNDING)[tame].all()
    torch.testing.assert_close(found.kl[0], exact.log_likelihood - exact.elbo, rtol=1e-4, atol=1e-4)
    deviations = (found.cvae_neg_elbo + exact.elbo)[tame]
    stderr = deviations.std() / math.sqrt(len(deviations))
    assert deviations.mean().abs() < 4 * stderr < (exact.log_evidence - exact.elbo)[tame].mean()
    torch.testing.assert_close(found.nn_nll, -bernoulli(batch, model.baseline_net(batch.x)), rtol=0, atol=ROUNDING)
    weight = 1 if batch.weight is None else batch.weight.double()
    floor = (Bernoulli(batch.y.double()).entropy() * weight).sum(1)
    torch.testing.assert_close(found.floor, floor, rtol=0, atol=ROUNDING)
    expected = samples / (1 + exact.is_variance)  # (Σw)² / Σw² tells the variance of the weights
    torch.testing.assert_close(found.ess[0][tame], expected[tame], rtol=0.2, atol=0)
    assert all(values.dtype == torch.float64 and values.shape[-1] == COUNT for values in found)


def test_several_levels_match_quadrature(make):
    """Each level has its KL, and its active units, whose numbers depend on the seed alone."""
    model, images = make("two smooth levels", latent_dim=2, gain=1.0)
    found, exact = likelihoods(model, images, [1000]), log_evidence(model, images.batch(slice(None)), 31)
    for values in (found.cvae_is_nll, found.cvae_mc_nll):
        error = values[0] + exact
        assert error.std() < 0.15
        assert error.mean().abs() < 4 * error.std() / math.sqrt(COUNT)
    assert (found.cvae_neg_elbo + exact).mean() > 0.1  # a bound, which is not tight here
    assert found.kl.shape == (2, COUNT)
    active = active_units(model, images, 0, CONTEXT)
    assert [count for _, count in active] == [1, 1]
    assert active_units(model, images, 0, CONTEXT) == active


def test_each_number_of_samples_takes_the_first_draws(make):
    """An estimate is the same whatever others are made beside it, and what needs no samples is not touched by them."""
    model, images = make()
    numbers = [2, SAMPLES_AT_ONCE, 2 * SAMPLES_AT_ONCE + 3]
    together = likelihoods(model, images, numbers)
    for i, number in enumerate(numbers):
        alone = likelihoods(model, images, [number])
        for name in ("cvae_mc_nll", "cvae_is_nll"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(together.ess[i], alone.ess[0], rtol=20 * ROUNDING, atol=0)
        for name in ("nn_nll", "cvae_neg_elbo", "floor", "kl"):
            assert torch.equal(getattr(together, name), getattr(alone, name))
    assert (together.cvae_is_nll[1:].mean(1) < together.cvae_is_nll[0].mean()).all()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_shares_of_processes_are_the_whole(make, monkeypatch, count):
    """Bit for bit, with more processes than there are portions too."""
    model, images = make()
    parts = []
    for rank in range(count):
        job = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        for name, value in {**job, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        parts += evaluate(model, images, [7], 3, Context(torch.device("cpu"), processes=Processes()))
    assert_equal(joined(parts), likelihoods(model, images))


def test_depends_on_the_seed_and_the_own_image_alone(make):
    """Bit for bit; each image has noise of its own, and the first ones are evaluated as they are among more."""
    model, images = make()
    whole = likelihoods(model, images)
    assert_equal(likelihoods(model, images), whole)
    other = likelihoods(model, images, seed=4)
    assert torch.equal(other.nn_nll, whole.nn_nll)
    assert not torch.isclose(other.cvae_is_nll, whole.cvae_is_nll, rtol=1e-9).any()
    changed = images.images.clone()
    changed[13] = 255 - changed[13]
    for before, after in zip(whole, likelihoods(model, ImageSet(changed, model.task)), strict=True):
        assert {place[-1] for place in (before != after).nonzero().tolist()} <= {13}
    few = likelihoods(model, ImageSet(images.images[: 2 * NOISE_IMAGES], model.task))
    assert_equal(few, Likelihoods(*(values[..., : 2 * NOISE_IMAGES] for values in whole)))
    copies = likelihoods(model, ImageSet(images.images[:1].expand(COUNT, -1, -1), model.task))
    assert copies.cvae_is_nll.unique().numel() == copies.cvae_mc_nll.unique().numel() == COUNT


def test_half_precision_takes_the_same_noise(make):
    """In bfloat16 more images are evaluated at once; they differ by rounding, by far less than by other noise."""
    model, images = make(latent_dim=4)
    exact, other = (likelihoods(model, images, [1], seed) for seed in (3, 4))
    half = likelihoods(model, images, [1], context=Context(torch.device("cpu"), "bf16"))
    for name in ("cvae_neg_elbo", "cvae_mc_nll", "cvae_is_nll"):
        rounding, noise = ((getattr(found, name) - getattr(exact, name)).abs().mean() for found in (half, other))
        assert 0 < rounding < 0.1 * noise


def test_effective_sample_size():
    """The size of an unweighted sample with the same variance: S for equal weights, 1 for a single one."""
    columns = [0.0, 0.0, 0.0], [-3e4, -3e4 - 800, -4e4], [5.0, 5 + math.log(3), 5.0], [0.0, 1.0, 2.0]
    found = effective_sample_size(torch.tensor(columns, dtype=torch.float64).T)
    last = [math.exp(k) for k in range(3)]
    expected = [3, 1, 25 / 11, sum(last) ** 2 / sum(weight**2 for weight in last)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_estimates_are_means_with_standard_errors():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, array = estimate(values), values.numpy()
    assert found.mean == pytest.approx(array.sum() / 50, rel=1e-12)
    assert found.stderr == pytest.approx(array.std(ddof=1) / math.sqrt(50), rel=1e-12)
    single = estimate(torch.tensor([2.5], dtype=torch.float64))
    assert single.mean == 2.5
    assert math.isnan(single.stderr)


class Linear(CVAE):
    """Two levels of known posterior means: of z_1 weights · m, m the mean of y; of z_2 weights · m + slope · z_1.

    All scales are 0.1, and the second mean, given the image, is (weights + slope · weights) · m.
    """

    def __init__(self, task, weights, slope):
        super().__init__(task, torch.nn.Linear(task.x_dim, task.y_dim), 2 * len(weights))
        self.weights, self.slope = weights, slope

    def encode(self, batch, guess, recognise):
        return batch.y.mean(-1, keepdim=True) * self.weights

    def draw(self, encoded, eps, recognise, detach_z=False):
        latents, loc = [], encoded
        for noise in eps.chunk(2, dim=-1):
            q = Gaussian(loc, torch.full_like(loc, 0.1).log())
            latents.append(Latent(q.sample(noise), noise, q, q))
            loc = encoded + self.slope * latents[-1].z
        return Draw(loc.new_zeros(*eps.shape[:2], self.task.y_dim), tuple(latents))


def test_active_units_match_the_closed_form(monkeypatch):
    """Weights just below and above the threshold; what varies with z_1 alone is not active, however much it does."""
    monkeypatch.setattr(likelihood, "ACTIVITY_SAMPLES", 400)
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (ACTIVITY_AT_ONCE + 7, 4, 4), generator=random, dtype=torch.uint8)
    images = ImageSet(pictures, FixedMask(quadrants(1, 4, 4)))
    variance = images.batch(slice(None)).y.mean(1).var()
    edge = (0.01 / variance).sqrt()  # the least weight of an active unit, by Burda et al.'s threshold
    weights = edge * torch.tensor([0.0, 0.98, 1.02, -1.5, 3.0, 0.0])
    slope = torch.tensor([9.0, 0.3, -0.3, -1.0, 0.0, 0.0])
    assert active_units(Linear(images.task, weights, slope), images, 0, CONTEXT) == [(3, 6), (2, 6)]
    assert ((weights * (1 + slope)).square() * variance > 0.01).tolist() == [False, True, False, False, True, False]


def test_variance_of_means_is_not_biased_by_few_draws():
    """Two draws or many: on the average, the variance over the images of E[loc | image] alone."""
    random = torch.Generator().manual_seed(0)
    means = torch.tensor([0.0, 0.1, 1.0]) * torch.randn(50, 1, generator=random)
    for draws, trials in ((2, 1500), (20, 800)):
        found = torch.stack(
            [variance_of_means(means + torch.randn(draws, 50, 3, generator=random)) for _ in range(trials)]
        )
        error = found.std(0) / trials**0.5
        assert ((found.mean(0) - means.double().var(0)).abs() < 4 * error).all()
        assert (4 * error < 0.4 / draws).all()  # the draws' own variance, left in, would be 1 / draws
    torch.testing.assert_close(variance_of_means(means), means.double().var(0))
    assert variance_of_means(means[:1]).eq(0).all()
