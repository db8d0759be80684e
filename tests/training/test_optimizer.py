"""GuardedAdam: Adam where all is finite, and nothing at all where it is not."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from cvae.errors import NonFiniteError
from cvae.model.layers import MLP
from cvae.training import optimizer as optimizers
from cvae.training.optimizer import (
    BETA1,
    BETA2,
    EPSILON,
    GROWTH_INTERVAL,
    INITIAL_SCALE,
    MAX_STREAK,
    MAX_UNSEEN,
    MIN_SCALE,
    GuardedAdam,
)  # fmt: skip
from cvae.training.weights import Weights


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_loss(net, step):
    data = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return net(data).square().sum() / 16


def backward(optimizer, loss):
    """The gradient of the loss, scaled as the optimizer wants it."""
    with optimizer.weights.collecting_gradients():
        optimizer.scaled(loss).backward()


def scale_of(optimizer):
    return 1.0 if optimizer.scale is None else float(optimizer.scale)


def advance(net, optimizer, steps):
    """Steps on finite losses; whether each was done."""
    accepted = []
    for step in steps:
        loss = batch_loss(net, step)
        backward(optimizer, loss)
        accepted.append(not optimizer.step(loss))
    return accepted


def bad_step(net, optimizer, poison, place):
    """A step whose loss or whose gradient of one weight is `poison`; whether it was skipped."""
    loss = batch_loss(net, 0)
    backward(optimizer, loss)
    if place == "loss":
        loss = loss.detach() * poison
    else:
        optimizer.weights.view("2.weight", optimizer.weights.gradient)[1, 2] = poison
    return optimizer.step(loss)


def snapshot(net, optimizer):
    """Copies of all weights and of Adam's state."""
    tensors = {f"weights.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    state = optimizer.state_dict()
    for name in ("moments", "squares"):
        tensors |= {f"{name}.{i}": tensor.clone() for i, tensor in enumerate(state[name])}
    return tensors | {"updates": state["updates"].clone()}


def assert_identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("loss_scaling", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_is_adam_bit_for_bit_on_finite_gradients(loss_scaling, weight_decay):
    """On the two parts of the vector, biases and others; a scale, being a power of two, changes no bit either."""
    net = network()
    weights = Weights(net)
    optimizer = GuardedAdam(weights, 1e-2, weight_decay, loss_scaling=loss_scaling)
    parts = slice(0, weights.decayed), slice(weights.decayed, None)
    theirs = [nn.Parameter(weights.vector[part].clone()) for part in parts]
    assert [part.ne(0).sum() for part in theirs] == [8 + 3, 6 * 8 + 8 * 3]
    groups = [{"params": [theirs[0]], "weight_decay": 0.0}, {"params": [theirs[1]], "weight_decay": weight_decay}]
    adam = torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True)
    for step in range(20):
        loss = batch_loss(net, step)
        backward(optimizer, loss)
        for part, parameter in zip(parts, theirs, strict=True):
            parameter.grad = weights.gradient[part] / scale_of(optimizer)
        assert not optimizer.step(loss)  # not skipped
        adam.step()
        assert torch.equal(weights.vector, torch.cat([parameter.detach() for parameter in theirs]))
    assert optimizer.skipped()["skipped_steps"] == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_is_adam_by_its_formula(weight_decay):
    """Kingma and Ba 2015, algorithm 1, with the decay of Loshchilov and Hutter 2019, algorithm 2, in float64.

    Biases are spared the decay, those of networks side by side too.
    """
    net = nn.Sequential(network(), MLP((3, 4, 2), copies=1)).double()
    optimizer = GuardedAdam(Weights(net), 1e-2, weight_decay)
    rate, beta_1, beta_2 = float(torch.tensor(1e-2)), 0.9, 0.999
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    assert sum(name.endswith("bias") for name in weights) == 4
    m = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    v = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    data = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in range(1, 11):
        loss = net(data).square().mean()
        backward(optimizer, loss)
        for name in weights:
            g = optimizer.weights.view(name, optimizer.weights.gradient)
            assert g.ne(0).any()
            m[name] = beta_1 * m[name] + (1 - beta_1) * g
            v[name] = beta_2 * v[name] + (1 - beta_2) * g**2
            m_hat, v_hat = m[name] / (1 - beta_1**t), v[name] / (1 - beta_2**t)
            decay = 0.0 if name.endswith("bias") else weight_decay
            weights[name] = weights[name] * (1 - rate * decay) - rate * m_hat / (v_hat.sqrt() + 1e-8)
        optimizer.step(loss)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_scaling", [True, False])
def test_clipped_as_pytorch_clips(loss_scaling):
    """Gradients below the norm are as they were; larger ones have it. AdamW's update is the same as after the clipping
    of `torch.nn.utils`, whatever the loss scale."""
    norms = []
    for clip in (0.5, 2.0, 1e6):
        net, reference = network(), network()
        optimizer = GuardedAdam(Weights(net), 0.01, 0.1, loss_scaling=loss_scaling, clip=clip)
        weights = [p for p in reference.parameters() if p.dim() > 1]
        biases = [p for p in reference.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        plain = torch.optim.AdamW(groups, lr=0.01, betas=(BETA1, BETA2), eps=EPSILON)
        for step in range(5):
            advance(net, optimizer, [step])
            plain.zero_grad()
            batch_loss(reference, step).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)) / clip)
            plain.step()
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert min(norms) < 1 < max(norms)


def test_clip_counts_no_infinity():
    """A gradient that is not finite is skipped, clipped or not."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 0.01, clip=1.0)
    advance(net, optimizer, range(2))
    before = snapshot(net, optimizer)
    assert bad_step(net, optimizer, math.inf, "gradient")
    after = snapshot(net, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scaled_is_the_loss_times_the_scale():
    loss = torch.tensor(3.0)
    plain, scaling = (GuardedAdam(Weights(network()), 1e-2, loss_scaling=scaling) for scaling in (False, True))
    assert plain.scaled(loss) is loss
    assert plain.scale is None
    assert scaling.scaled(loss) == 3 * INITIAL_SCALE
    scaling.scale.fill_(0.25)
    assert scaling.scaled(loss) == 0.75


HALVES = pytest.mark.parametrize(("half", "loss_scaling"), [(torch.bfloat16, False), (torch.float16, True)])


@HALVES
@pytest.mark.parametrize("at_once", [512, 1 << 20])
def test_half_gradient_is_widened_and_the_copy_follows(half, loss_scaling, at_once, monkeypatch):
    """Bit for bit the step on the same gradient in float32, in several portions or one."""
    monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
    weights, plain = (Weights(MLP((30, 33)), kind) for kind in (half, None))
    start = torch.randn(len(weights.vector), generator=torch.Generator().manual_seed(0))
    for one in (weights, plain):
        one.vector.copy_(start)
        one.refresh()
    optimizer, reference = (GuardedAdam(one, 1e-2, 0.2, loss_scaling=loss_scaling) for one in (weights, plain))
    assert (weights.gradient.dtype, plain.gradient.dtype) == (half, torch.float32)
    for step in range(20):
        torch.randn(len(plain.gradient), generator=torch.Generator().manual_seed(step), out=plain.gradient)
        weights.gradient.copy_(plain.gradient.mul_(scale_of(reference) / 100))
        plain.gradient.copy_(weights.gradient)
        loss = torch.tensor(1.0)
        assert not optimizer.step(loss)  # not skipped
        assert not reference.step(loss)
        assert torch.equal(weights.vector, plain.vector)
        assert torch.equal(weights.working, weights.vector.to(half))
    assert (weights.vector - start).abs().min() > 0


@pytest.mark.parametrize(
    ("dtype", "half"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float32, None), (torch.float64, None)],
)
def test_clipped_gradient_has_the_norm(dtype, half, monkeypatch):
    """By the moments after a first step, which are 1 − β₁ times the gradient."""
    monkeypatch.setattr(optimizers, "AT_ONCE", 3072)
    weights = Weights(MLP((70, 90, 80)).to(dtype), half)
    optimizer = GuardedAdam(weights, 1e-2, clip=7.0)
    torch.manual_seed(0)
    weights.gradient.copy_(torch.randn(len(weights.vector)))
    assert weights.gradient.double().norm() > 100
    assert not optimizer.step(torch.tensor(1.0))  # not skipped
    tolerance = 2**-9 if half is torch.bfloat16 else 1e-6  # bfloat16's half unit in the last place
    expected = weights.gradient.double() * 7 * (1 - BETA1) / weights.gradient.double().norm()
    torch.testing.assert_close(optimizer.moments.double(), expected, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e19])
def test_bad_number_is_seen_wherever_it_is(half, poison):
    """Or one whose square is not finite: in a vector large enough for several threads."""
    weights = Weights(MLP((400, 500)), half)
    optimizer = GuardedAdam(weights, 1e-2)
    size = len(weights.vector)
    assert size > 200_000
    assert weights.gradient.dtype == (half or torch.float32)
    weights.vector.fill_(1.0)
    weights.refresh()
    for place in (0, 1, 31, size // 2 - 1, size // 2, size - 32, size - 1):
        weights.gradient.copy_(torch.linspace(-1, 1, size))
        weights.gradient[place] = poison
        assert optimizer.step(torch.tensor(1.0))  # skipped
    weights.gradient.zero_()
    weights.gradient[:2] = 1.5e19  # each square is finite, their sum is not; float16 has no such number
    assert optimizer.step(torch.tensor(1.0))  # skipped
    for vector, value in ((weights.vector, 1), (weights.working, 1), (optimizer.moments, 0), (optimizer.squares, 0)):
        assert vector.eq(value).all()
    weights.gradient.copy_(torch.linspace(-1, 1, size)).mul_(1e4)
    assert not optimizer.step(torch.tensor(1.0))  # not skipped
    assert weights.vector.isfinite().all()
    assert weights.vector.ne(1).sum() >= size - 1


@pytest.mark.parametrize("loss_scaling", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("good_steps", [0, 3])
def test_bad_step_leaves_everything_as_it_was(loss_scaling, poison, place, good_steps):
    """Weights, moments and step counts keep every bit; the step after goes on as if nothing had been."""
    net, spared = network(), network()
    optimizer, undisturbed = (GuardedAdam(Weights(n), 1e-2, 0.2, loss_scaling=loss_scaling) for n in (net, spared))
    advance(net, optimizer, range(good_steps))
    advance(spared, undisturbed, range(good_steps))
    before = snapshot(net, optimizer)
    assert bad_step(net, optimizer, poison, place)
    assert_identical(snapshot(net, optimizer), before)
    is_overflow = loss_scaling and place == "gradient"  # a finite loss: the scale's doing, for all one knows
    assert optimizer.skipped()["skipped_steps"] == (not is_overflow)
    if loss_scaling:
        assert optimizer.skipped()["overflow_steps"] == is_overflow
        assert float(optimizer.scale) == INITIAL_SCALE * (0.5 if is_overflow else 1)
    assert advance(net, optimizer, [7]) == advance(spared, undisturbed, [7]) == [True]
    assert_identical(snapshot(net, optimizer), snapshot(spared, undisturbed))


def test_streak_of_bad_steps_ends_the_training():
    """Ten in a row, named by the step of the tenth; nine and a good one are forgiven, and an epoch is no excuse."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 1e-2)
    advance(net, optimizer, range(2))
    for _ in range(MAX_STREAK - 1):
        bad_step(net, optimizer, math.nan, "loss")
    optimizer.check("here")
    advance(net, optimizer, [2])
    for _ in range(MAX_STREAK - 4):
        bad_step(net, optimizer, math.inf, "gradient")
    assert optimizer.skipped() == {"skipped_steps": 2 * MAX_STREAK - 5}
    optimizer.check("here")
    optimizer.start_epoch()
    assert optimizer.skipped() == {"skipped_steps": 0}
    before = snapshot(net, optimizer)
    for _ in range(6):  # the tenth is the fourth of this epoch
        bad_step(net, optimizer, math.nan, "loss")
    with pytest.raises(NonFiniteError, match=r"^cvae, epoch 2/9, step 4: .*10 steps in a row"):
        optimizer.check("cvae, epoch 2/9")
    assert NonFiniteError.exit_code == 4
    assert_identical(snapshot(net, optimizer), before)


class OneWeight(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))


def test_float16_overflow_halves_the_scale_until_it_fits():
    """A real overflow: the gradient of 1000 · w in float16 is 1000 times the scale, and float16 ends at 65,504."""
    net = OneWeight(0.01)
    weight, optimizer = net.weight, GuardedAdam(Weights(net), 1e-2, loss_scaling=True)
    optimizer.check("start")
    accepted = []
    for _ in range(12):
        loss = (weight.half() * 1000).float().sum()
        backward(optimizer, loss)
        accepted.append(not optimizer.step(loss))
        optimizer.check("somewhere")  # no streak of bad steps: the scale is being found
    assert float(optimizer.scale) == 2.0**6  # 64,000
    assert accepted == [False] * 10 + [True] * 2
    assert optimizer.skipped() == {"skipped_steps": 0, "overflow_steps": 10}
    assert weight.item() == pytest.approx(0.01 - 2 * 1e-2, abs=1e-6)  # Adam's first steps are of the learning rate


def test_gradient_is_looked_at_without_the_scale():
    """1e17 by a scale of 2⁻¹⁰ is 1e20, whose square no float32 holds."""
    weights = Weights(OneWeight(1.0))
    optimizer = GuardedAdam(weights, 1e-2, loss_scaling=True)
    optimizer.scale.fill_(2.0**-10)
    for gradient, is_good in ((1e17, False), (1e10, True)):
        weights.gradient.fill_(gradient)
        assert bool(optimizer.step(torch.tensor(1.0))) != is_good
    assert optimizer.squares.isfinite().all()


def test_scale_doubles_after_enough_good_steps():
    net = OneWeight(1.0)
    weight, optimizer = net.weight, GuardedAdam(Weights(net), 1e-6, loss_scaling=True)

    def steps(count, poison=1.0):
        for _ in range(count):
            loss = weight.square().sum()
            backward(optimizer, loss)
            optimizer.weights.gradient[0] *= poison
            optimizer.step(loss)
            optimizer.check("here")
        return float(optimizer.scale)

    assert steps(GROWTH_INTERVAL - 1) == INITIAL_SCALE
    assert steps(1, math.inf) == INITIAL_SCALE / 2  # and the count begins again
    assert steps(GROWTH_INTERVAL - 1) == INITIAL_SCALE / 2
    assert steps(1) == INITIAL_SCALE
    assert steps(GROWTH_INTERVAL) == INITIAL_SCALE * 2


def test_skipped_steps_are_no_good_steps():
    """A loss that is not finite says nothing for a larger scale."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 1e-6, loss_scaling=True)
    optimizer.good_steps.fill_(GROWTH_INTERVAL - 1)
    bad_step(net, optimizer, math.nan, "loss")
    assert float(optimizer.scale) == INITIAL_SCALE


def test_collapsed_scale_ends_the_training():
    """A gradient that is infinite at any scale."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 1e-2, loss_scaling=True)
    halvings = int(math.log2(INITIAL_SCALE / MIN_SCALE))
    for _ in range(halvings):
        bad_step(net, optimizer, math.inf, "gradient")
    optimizer.check("here")
    bad_step(net, optimizer, math.inf, "gradient")
    with pytest.raises(NonFiniteError, match=rf"^here, step {halvings + 1}: .*float16"):
        optimizer.check("here")


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_restored_optimizer_goes_on_bit_for_bit(loss_scaling):
    """Through a file, into a fresh optimizer, in the middle of a streak and with a scale that has moved."""
    net, twin = network(), network(seed=1)
    optimizer = GuardedAdam(Weights(net), 1e-2, loss_scaling=loss_scaling)
    advance(net, optimizer, range(5))
    bad_step(net, optimizer, math.inf, "gradient")
    for _ in range(MAX_STREAK - 2):
        bad_step(net, optimizer, math.nan, "loss")
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin.load_state_dict(state["model"])
    restored = GuardedAdam(Weights(twin), 0.5, loss_scaling=loss_scaling)
    restored.load_state_dict(state["optimizer"])
    optimizer.start_epoch()
    for n, o in ((net, optimizer), (twin, restored)):
        o.learning_rate.fill_(3e-3)  # as a schedule does, before each step
        bad_step(n, o, math.nan, "loss")
        if not loss_scaling:  # with it, the first of the streak was an overflow
            with pytest.raises(NonFiniteError, match="step 1:"):
                o.check("epoch 2")
        advance(n, o, range(5, 10))
    assert_identical(snapshot(net, optimizer), snapshot(twin, restored))
    assert torch.equal(optimizer.good_steps, restored.good_steps)
    if loss_scaling:
        assert float(optimizer.scale) == float(restored.scale) == INITIAL_SCALE / 2


@pytest.mark.parametrize("loss_scaling", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("moments"),
        lambda state: state.pop("bad_streak"),
        lambda state: state["squares"].pop(),
        lambda state: state["squares"].append(torch.zeros(1)),
        lambda state: state["moments"].__setitem__(0, torch.zeros(9)),
        lambda state: state["moments"].__setitem__(0, state["moments"][0].double()),
        lambda state: state.update(updates=torch.zeros(1)),
        lambda state: state.update(updates=3),
        lambda state: state.update(bad_streak=1.0),
        lambda state: state.update(scale=2.0),
        lambda state: state.update(scale=torch.ones(()) if state["scale"] is None else None),
    ],
)
def test_state_of_another_kind_is_refused(loss_scaling, spoil):
    optimizer = GuardedAdam(Weights(network()), 1e-2, loss_scaling=loss_scaling)
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    spoil(state)
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        optimizer.load_state_dict(state)


def test_every_part_goes_on_with_its_count_of_updates():
    """Adam corrects its averages by how many steps there were: a part that began anew would go too far."""
    states = []
    for restored in (False, True):
        torch.manual_seed(0)
        net = MLP((6, 8))
        optimizer = GuardedAdam(Weights(net, torch.bfloat16), 1e-2)
        for step in range(6):
            if restored and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = GuardedAdam(optimizer.weights, 1e-2)
                optimizer.load_state_dict(state)
            optimizer.weights.gradient.copy_(torch.linspace(-1, step, len(optimizer.weights.gradient)))
            assert not optimizer.step(torch.tensor(1.0))  # not skipped
        states.append(snapshot(net, optimizer))
    assert_identical(*states)


def test_looks_often_enough():
    """So many steps may go unseen, and no more: it is an error, not a miscount."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 1e-6)
    advance(net, optimizer, range(MAX_UNSEEN))
    assert optimizer.skipped() == {"skipped_steps": 0}
    assert optimizer.steps == MAX_UNSEEN
    with pytest.raises(IndexError):
        advance(net, optimizer, range(MAX_UNSEEN + 1))


def test_learning_rate_tensor_is_the_one_in_use():
    """What a schedule fills in holds for the next step; zero moves nothing."""
    net = network()
    optimizer = GuardedAdam(Weights(net), 1e-2)
    advance(net, optimizer, range(3))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer.learning_rate.fill_(0.0)
    assert advance(net, optimizer, [3]) == [True]
    assert_identical(net.state_dict(), before)
