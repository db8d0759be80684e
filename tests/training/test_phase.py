"""Epochs and validations: what they draw, whom they ask, and in which mode the model is."""

import copy
from dataclasses import replace

import pytest
import torch
from support.steps import CPU, Case, cases, make_phase, make_run
from torch import nn

import train
from cvae import context
from cvae.settings import Settings
from cvae.training import phase as phase_module

RANDOM = Case("regularised", "elbo")  # with dropout and batch normalisation


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch):
    """Validation sets of 20 images in portions of 8, 8 and 4."""
    monkeypatch.setattr(phase_module, "VALIDATION_BATCH", 8)


def toy_phase(make_toy, case, **more):
    return make_phase(case, case.make(make_toy, count=20, gain=1.0, dtype=torch.float32), **more)


def processes(rank=0, count=1):
    """One of several, who exchange nothing."""
    alone = make_run(Settings(), rank=rank, count=count).processes
    alone.sum_on_host_ = lambda tensor: None
    return alone


def equal(totals, others):
    return totals.names == others.names and torch.equal(totals.sums, others.sums)


# Validation


@cases()
def test_means_are_over_all_images(make_toy, case):
    """Each counts once, those of the short last portion too."""
    phase = toy_phase(make_toy, case)
    used = []
    phase = phase._replace(noise=lambda count, random, own=phase.noise: used.append(own(count, random)) or used[-1])
    found = phase.validate(phase.model, 0, "fp32", processes())
    assert found.sums[-1] == 20
    eps = [torch.cat(parts, dim=1) for parts in zip(*used, strict=True)]
    model = copy.deepcopy(phase.model).eval()
    with torch.no_grad():
        terms = phase.objective(model, phase.validation.batch(slice(None)), *eps)
    assert found.means().keys() == terms.keys()
    for name, mean in found.means().items():
        assert mean == pytest.approx(terms[name].double().mean().item(), rel=1e-5), name


def test_noise_is_the_same_in_every_epoch(make_toy):
    """And depends on the seed; no two portions have the same."""
    phase = toy_phase(make_toy, Case("tutorial", "elbo"))
    used = []
    watched = phase._replace(noise=lambda count, random: used.append(phase.noise(count, random)[0]) or (used[-1],))
    first = watched.validate(phase.model, 0, "fp32", processes())
    torch.rand(7)
    assert equal(watched.validate(phase.model, 0, "fp32", processes()), first)
    assert not equal(watched.validate(phase.model, 1, "fp32", processes()), first)
    assert [eps.shape[1] for eps in used] == 3 * [8, 8, 4]
    assert all(torch.equal(*pair) for pair in zip(used[:3], used[3:6], strict=True))
    portions = [used[i][:, :4] for i in (0, 1, 2, 6, 7, 8)]
    assert not any(torch.equal(portions[i], portions[j]) for i in range(6) for j in range(i))


@cases()
@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_several_processes_add_up(make_toy, case, count):
    """With three portions: one process may have none, and has zeros of the same names."""
    phase = toy_phase(make_toy, case)
    whole = phase.validate(phase.model, 0, "fp32", processes())
    parts = [phase.validate(phase.model, 0, "fp32", processes(rank, count)) for rank in range(count)]
    assert all(part.names == whole.names for part in parts)
    assert all(part.sums.isfinite().all() for part in parts)
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-12, atol=0)
    assert sum(part.sums.eq(0).all().item() for part in parts) == max(0, count - 3)


def test_sums_are_exchanged(make_toy):
    """Those of all processes together are what each of them has in the end."""
    phase = toy_phase(make_toy, RANDOM)
    two = processes(0, 2)
    two.sum_on_host_ = lambda tensor: tensor.mul_(3)
    alone = phase.validate(phase.model, 0, "fp32", processes(0, 2))
    assert torch.equal(phase.validate(phase.model, 0, "fp32", two).sums, 3 * alone.sums)


def test_model_is_in_evaluation_mode(make_toy):
    """Dropout draws nothing, batch normalisation learns nothing, and no gradient is kept."""
    phase = toy_phase(make_toy, RANDOM)
    model = phase.model.train()
    state = copy.deepcopy(model.state_dict())
    modes, inner = [], phase.objective

    def objective(model, *inputs):
        modes.append({module.training for module in model.modules()} | {torch.is_grad_enabled()})
        return inner(model, *inputs)

    phase = phase._replace(objective=objective)
    random_state = torch.get_rng_state()
    found = [phase.validate(model.train(), 0, "fp32", processes()) for _ in range(2)]
    assert equal(*found)
    assert modes == 6 * [{False}]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    terms = inner(model, phase.validation.batch(slice(8)), *phase.noise(8, context.generator(CPU, 0)))
    assert terms["elbo"].sum() != found[0].sums[0]  # the control: in the other mode it is another number


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_the_run_s(make_toy, precision):
    phase = toy_phase(make_toy, Case("paper", "elbo"))
    wide, half = (phase.validate(phase.model, 0, name, processes()).means() for name in ("fp32", precision))
    assert wide["elbo"] != half["elbo"]
    assert half["elbo"] == pytest.approx(wide["elbo"], rel=torch.finfo(context.HALF[precision]).eps)


# An epoch


def epoch(phase, run, number, step=None):
    """One epoch of training; the step that took it, and what it was called with."""
    step = train.Step(phase, run) if step is None else step
    seen = []

    def take_step(rows, *eps):
        seen.append((rows.clone(), *(each.clone() for each in eps)))
        step(rows, *eps)

    train.train_epoch(phase, step, take_step, number)
    return step, seen


SMALL = Settings(batch_size=6, average=3, warmup_epochs=0.0, learning_rate=1e-2, weight_decay=0.0)


def test_each_image_is_seen_at_most_once(make_toy):
    """20 images make three full batches of 6; in another order in each epoch, of each phase, with each seed."""
    orders = {}
    for seed in (0, 1):
        for objective in ("baseline", "elbo"):
            for number in (1, 2):
                phase = toy_phase(make_toy, Case("tutorial", objective))
                step, seen = epoch(phase, make_run(Settings(batch_size=6, seed=seed)), number)
                assert step.count == len(seen) == 3
                assert step.totals.sums[-1] == 18
                rows = torch.cat([each[0] for each in seen])
                assert len(rows.unique()) == 18
                assert rows.max() < 20
                orders[seed, objective, number] = tuple(rows.tolist())
    assert len(set(orders.values())) == len(orders) == 8


def test_noise_is_another_in_each_step_and_epoch_and_the_same_again(make_toy):
    phase = toy_phase(make_toy, Case("tutorial", "elbo"))
    noises = []
    for seed, number in ((0, 1), (0, 2), (1, 1)):
        _, seen = epoch(phase, make_run(Settings(batch_size=6, seed=seed)), number)
        _, again = epoch(phase, make_run(Settings(batch_size=6, seed=seed)), number)
        assert all(
            torch.equal(a, b) for one, other in zip(seen, again, strict=True) for a, b in zip(one, other, strict=True)
        )
        noises += [eps for _, eps in seen]
    assert not any(torch.equal(noises[i], noises[j]) for i in range(9) for j in range(i))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch_and_its_noise(make_toy, count):
    """Together they see what one process sees."""
    phase = toy_phase(make_toy, Case("tutorial", "elbo"))
    _, whole = epoch(phase, make_run(SMALL), 1)
    parts = []
    for rank in range(count):
        run = make_run(SMALL, rank=rank, count=count)
        run.processes.sum_ = lambda *tensors: None
        run.processes.maximum = lambda value: value
        parts.append(epoch(phase, run, 1)[1])
    for i, (rows, eps) in enumerate(whole):
        assert torch.equal(torch.cat([part[i][0] for part in parts]), rows)
        assert torch.equal(torch.cat([part[i][1] for part in parts], dim=1), eps)


def test_trained_model_is_put_back_into_train_mode(make_toy):
    """After a validation, whose model it may be, and the baseline within it stays as in evaluation."""
    for average in (0, 3):
        for precision in ("fp32", "bf16"):
            phase = toy_phase(make_toy, RANDOM, precision=precision)
            modes, inner = [], phase.objective

            def objective(model, *inputs, modes=modes, inner=inner):
                modes.append((model.training, model.prior_net[1].training, model.baseline_net[1].training))
                return inner(model, *inputs)

            phase = phase._replace(objective=objective)
            run = make_run(Settings(batch_size=6, average=average), precision)
            step, _ = epoch(phase, run, 1)
            phase.validate(phase.model, 0, precision, processes())
            epoch(phase, run, 2, step)
            train_mode, evaluation_mode = (True, True, False), (False, False, False)
            assert modes == [*3 * [train_mode], *3 * [evaluation_mode], *3 * [train_mode]]


def test_dropout_is_the_same_again(make_toy):
    """Whatever was drawn before an epoch: by seed, phase, epoch and process, each of which makes another."""
    trained = {}
    for key in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):
        for attempt in range(2):
            seed, number, rank = key
            phase = toy_phase(make_toy, RANDOM)
            draws, dropout = [], nn.functional.dropout

            def watched(input, *more, draws=draws, dropout=dropout, **words):
                draws.append(dropout(torch.ones(4, 8), 0.5, True).tolist())
                return dropout(input, *more, **words)

            torch.manual_seed(attempt)
            run = make_run(Settings(batch_size=6, seed=seed), rank=rank, count=rank + 1)
            run.processes.sum_ = lambda *tensors: None
            run.processes.maximum = lambda value: value
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nn.functional, "dropout", watched)
                epoch(phase, run, number)
            assert len(draws) == 9  # three networks, three steps
            state = phase.model.state_dict()
            if attempt:
                before, first_draws = trained[key]
                assert draws == first_draws
                assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
            trained[key] = copy.deepcopy(state), draws
    firsts = [draws[0] for _, draws in trained.values()]
    assert not any(firsts[i] == firsts[j] for i in range(4) for j in range(i))


def test_averages_take_batch_normalisation_in(make_toy):
    """What is validated and kept has statistics of the data, and not those that it was made with."""
    phase = toy_phase(make_toy, RANDOM)
    step = train.Step(phase, make_run(SMALL))
    train.train_epoch(phase, step, step, 1)
    for name, buffer in step.average.model.named_buffers():
        if not name.startswith("baseline_net"):
            own = dict(phase.model.named_buffers())[name]
            assert not torch.equal(buffer, torch.zeros_like(buffer)), name
            assert not torch.equal(buffer, torch.ones_like(buffer)), name
            assert torch.equal(buffer, own) == (not buffer.is_floating_point()), name


# Images and the learning rate, epoch by epoch


def test_images_of_the_last_epochs_are_not_bent(make_toy):
    """Those of the epochs before are; the baseline's never are."""
    for objective, bent_in in (("elbo", [1, 2, 7]), ("baseline", [])):
        phase = toy_phase(make_toy, Case("tutorial", objective))
        stored, step, changed = phase.train.vectors.clone(), None, []
        for number in (1, 2, 7, 8, 9):
            run = make_run(Settings(batch_size=6, epochs=9, bend=0.8, unbent_epochs=2))
            step, _ = epoch(phase, run, number, step)
            if not torch.equal(phase.train.vectors, stored):
                changed.append(number)
        assert changed == bent_in


def test_learning_rate(make_toy):
    """Warm-up, half a cosine, and in the last epochs another one, which begins at 0.15 of the highest rate."""
    s = Settings(epochs=9, warmup_epochs=1.0, learning_rate=0.5, unbent_epochs=2)
    whole, baseline = (toy_phase(make_toy, Case("tutorial", objective)) for objective in ("elbo", "baseline"))
    shorter, never = whole._replace(epochs=7), replace(s, unbent_epochs=0)
    moments = [i / 10 for i in range(70)]
    rates = [whole.learning_rate(s, moment) for moment in moments]
    assert rates == [shorter.learning_rate(never, moment) for moment in moments]
    assert rates[:11] == pytest.approx([0.5 * (i / 10 + 0.01) / 1.01 for i in range(10)] + [0.5])
    assert whole.learning_rate(s, 4.0) == pytest.approx(0.25)  # the middle of 1 and 7
    assert sorted(rates[10:], reverse=True) == rates[10:]
    found = [whole.learning_rate(s, moment) for moment in (7.0, 8.0, 9.0)]
    assert found == pytest.approx([0.075, 0.0375, 0.0])
    assert baseline.learning_rate(s, 8.0) == whole.learning_rate(never, 8.0) == pytest.approx(0.25 * (1 - 0.9238795))
    few = whole._replace(epochs=2)
    rates = [few.learning_rate(replace(s, unbent_epochs=3), moment) for moment in (0.0, 1.0, 2.0)]
    assert rates == pytest.approx([0.075, 0.0375, 0.0])  # no warm-up then
    assert whole.learning_rate(never, 9.0) == pytest.approx(0.0)
    assert [whole.free_nats(replace(s, free_epochs=4.0), moment) for moment in (0.0, 1.0, 4.0, 5.0)] == pytest.approx(
        [0.4, 0.3, 0.0, 0.0]
    )
    whole.schedule(replace(s, free_epochs=4.0), 1.0, rate := torch.zeros(()), nats := torch.zeros(()))
    assert (rate.item(), nats.item()) == pytest.approx((0.5, 0.3))
    assert baseline.free_nats(replace(s, free_epochs=4.0), 0.0) == whole.free_nats(s, 0.0) == 0
    constant = replace(s, schedule="constant")
    assert [whole.learning_rate(constant, moment) for moment in (1.0, 6.9, 8.0)] == pytest.approx([0.5, 0.5, 0.0375])
