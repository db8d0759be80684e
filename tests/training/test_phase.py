"""Phases: schedules against formulas of their own, what a validation is a mean of, what an epoch goes through."""

import math
from itertools import combinations, product

import pytest
import torch
from support.steps import BATCH, COUNT, assert_equal, cases, make_training, state

from cvae.settings import Settings
from cvae.training import phase as phases
from train import train_epoch


def phase_of(name, epochs):
    return make_training(name=name).phase._replace(epochs=epochs)


def cosine(share):
    return math.cos(math.pi * share / 2) ** 2  # (1 + cos πs) / 2


@pytest.mark.parametrize("name", ["elbo", "baseline"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(
    ("epochs", "unbent", "warmup"), [(9, 0, 1.0), (9, 2, 1.0), (9, 2, 0.0), (2, 3, 1.0), (3, 0, 5.0)]
)
def test_learning_rate(name, schedule, epochs, unbent, warmup):
    """A linear warm-up, half a cosine to zero; in the CVAE's unbent epochs another, from 0.15 of the highest rate."""
    s = Settings(learning_rate=0.5, schedule=schedule, warmup_epochs=warmup, unbent_epochs=unbent)
    phase = phase_of(name, epochs)
    bent = epochs if name == "baseline" else max(0, epochs - unbent)
    for moment in (i / 8 for i in range(8 * epochs)):
        if moment >= bent:
            expected = 0.5 * 0.15 * cosine((moment - bent) / (epochs - bent))
        elif moment < warmup:
            expected = 0.5 * (moment + 0.01) / (warmup + 0.01)
        else:
            expected = 0.5 if schedule == "constant" else 0.5 * cosine((moment - warmup) / (bent - warmup))
        assert phase.learning_rate(s, moment) == pytest.approx(expected, rel=1e-9), moment


def test_bend_and_free_nats():
    """None for the baseline, nor in the last epochs; 0.4 nats at first, which fall linearly to zero."""
    s = Settings(bend=0.8, unbent_epochs=2, free_epochs=4.0)
    cvae, baseline = phase_of("elbo", 9), phase_of("baseline", 9)
    assert [cvae.bend(s, epoch) for epoch in range(1, 10)] == [0.8] * 7 + [0.0] * 2
    assert [baseline.bend(s, epoch) for epoch in range(1, 10)] == [0.0] * 9
    moments = (0.0, 1.0, 3.5, 4.0, 8.0)
    assert [cvae.free_nats(s, moment) for moment in moments] == pytest.approx([0.4, 0.3, 0.05, 0.0, 0.0])
    assert {baseline.free_nats(s, moment) for moment in moments} == {0.0}
    assert cvae.free_nats(Settings(free_epochs=0.0), 0.0) == 0


def watched(phase):
    """The phase, and a list of what its objective is given: the mode of the model, x, and the noise."""
    seen = []

    def objective(model, batch, *eps):
        modes = {module.training for module in model.modules()} | {torch.is_grad_enabled()}
        seen.append((modes, batch.x, *eps))
        return phase.objective(model, batch, *eps)

    return phase._replace(objective=objective), seen


@pytest.fixture
def small_portions(monkeypatch):
    """Twenty images in portions of 8, 8 and 4."""
    monkeypatch.setattr(phases, "VALIDATION_IMAGES", 8)


@cases
@pytest.mark.usefixtures("small_portions")
def test_validation_is_the_mean_over_all_images(network, objective):
    """Each counts once, those of the short last portion too; to a hundred roundings of float32."""
    training = make_training(network, objective)
    phase, seen = watched(training.phase)
    totals = phase.validate(phase.model, 0, training.run.context)
    assert totals.sums[-1] == COUNT
    eps = [torch.cat(parts, dim=1) for parts in list(zip(*seen, strict=True))[2:]]
    with torch.no_grad():
        terms = training.phase.objective(phase.model.eval(), phase.validation.batch(slice(None)), *eps)
    expected = {name: term.double().mean().item() for name, term in terms.items()}
    assert totals.means() == pytest.approx(expected, rel=100 * 2**-23, abs=100 * 2**-23)
    assert list(totals.means()) == list(terms)


@pytest.mark.usefixtures("small_portions")
def test_validation_has_the_same_noise_in_every_epoch():
    """It depends on the seed and the portion; the model, which learns nothing meanwhile, is in evaluation mode."""
    training = make_training("regularised")
    phase, seen = watched(training.phase)
    before, random_state = state(training), torch.get_rng_state()
    found = [phase.validate(phase.model.train(), seed, training.run.context).means() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(modes == {False} for modes, *_ in seen)
    assert_equal(state(training), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    noises = [eps[:, :4] for *_, eps in seen]
    assert all(torch.equal(*pair) for pair in zip(noises[:3], noises[3:6], strict=True))
    assert not any(torch.equal(*pair) for pair in combinations(noises[:3] + noises[6:], 2))


@pytest.mark.parametrize(("particles", "portion"), [(1, 1000), (20, 1000), (21, 952), (1000, 20), (30_000, 1)])
def test_validation_takes_at_most_20000_rows_at_once(particles, portion):
    """Images times samples of z, and 1,000 images: more particles take more time, and not more memory."""
    count = min(2 * portion + 1, 2001)
    training = make_training(particles=particles, count=count)
    sizes = []
    phase = training.phase._replace(
        objective=lambda model, batch, *eps: sizes.append(len(batch.x)) or {"elbo": batch.x[:, 0]},
        noise=lambda count, random: (torch.empty(0),),
    )
    assert phase.samples == particles
    phase.validate(phase.model, 0, training.run.context)
    assert sizes == [portion, portion, 1]
    assert portion * particles <= max(20_000, particles)


def rows_of(training, number):
    """The images and the noise of an epoch's steps."""
    seen = []

    def take_step(*inputs):
        seen.append(inputs)
        training.step(*inputs)

    train_epoch(training.phase, training.run, training.step, take_step, number)
    return seen


def test_epoch_takes_each_image_at_most_once_in_an_order_of_its_own():
    """Another one in each epoch, of each phase, with each seed, and the same again; so is the noise."""
    orders, noises = set(), []
    for seed, name, number in product((0, 1), ("elbo", "baseline"), (1, 2)):
        seen, again = (rows_of(make_training(name=name, seed=seed), number) for _ in range(2))
        pairs = zip(seen, again, strict=True)
        assert all(torch.equal(*both) for pair in pairs for both in zip(*pair, strict=True))
        rows = torch.cat([rows for rows, *_ in seen])
        assert [len(rows) for rows, *_ in seen] == [BATCH] * 3
        assert len(rows.unique()) == len(rows)
        assert rows.max() < COUNT
        orders.add(tuple(rows.tolist()))
        noises += [eps for _, *more in seen for eps in more]
    assert (len(orders), len(noises)) == (8, 12)
    assert not any(torch.equal(*pair) for pair in combinations(noises, 2))


def test_images_are_drawn_anew_in_each_epoch():
    """Binary ones always; bent ones up to the unbent epochs, in which they are as they were. Guesses follow them."""

    def images(name, **settings):
        training = make_training(name=name, **settings)
        found = [training.phase.train.rows.clone()]
        for number in (1, 2, 8, 9):
            train_epoch(training.phase, training.run, training.step, training.step, number)
            found.append(training.phase.train.rows.clone())
            if name == "elbo":
                batch = training.phase.train.batch(slice(None))
                torch.testing.assert_close(batch.guess, training.model.baseline_net(batch.x))
        return found

    def same(found):
        return [[torch.equal(one, other) for other in found] for one in found]

    everything, nothing = [[True] * 5] * 5, [[i == j for j in range(5)] for i in range(5)]
    assert same(images("elbo")) == everything
    assert same(images("elbo", targets="binary")) == same(images("baseline", targets="binary")) == nothing
    bent = same(images("elbo", bend=1.0, unbent_epochs=2))
    assert bent[0] == [True, False, False, True, True]
    assert not bent[1][2]
    assert same(images("baseline", bend=1.0, unbent_epochs=2)) == everything
