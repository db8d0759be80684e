"""GuardedAdam skips what is not finite, and how fast the average follows; `test_step.py` holds both against PyTorch."""

import math

import pytest
import torch
from support.steps import assert_equal
from torch import nn

from cvae.errors import NonFiniteError
from cvae.training.optimizer import GROWTH_INTERVAL, INITIAL_SCALE, MAX_STREAK, GuardedAdam, WeightAverage

LOSS = torch.tensor(1.0)
SCALED = pytest.mark.parametrize("loss_scaling", [False, True])


def make(size=40, rate=1e-2, **options):
    """An optimizer of a linear layer with biases, whose weights are random."""
    torch.manual_seed(0)
    return GuardedAdam(nn.Linear(size, 4), rate, **options)


def gradient_of(optimizer, seed, size=1.0):
    random = torch.Generator().manual_seed(seed)
    scale = 1.0 if optimizer.scale is None else float(optimizer.scale)
    return [torch.randn(p.shape, generator=random) * size * scale for p in optimizer.parameters]


def take(optimizer, times, loss=1.0, poison=1.0):
    """Steps of this loss, and of a gradient that is finite but for the poison."""
    for _ in range(times):
        optimizer.step(LOSS * loss, [each * poison for each in gradient_of(optimizer, 0)])


def everything(optimizer):
    """Copies of the weights and of all that the next steps depend on."""
    parts = {"weights": optimizer.parameters, **optimizer.state_dict()}
    return {f"{name}.{i}": t.detach().clone() for name, tensors in parts.items() for i, t in enumerate(tensors)}


@SCALED
def test_clip_scales_a_larger_gradient_down_and_no_smaller_one(loss_scaling):
    """As clip_grad_norm_ does, to float32's rounding and the 1e-6 that it adds to the norm."""
    optimizer = make(loss_scaling=loss_scaling, clip=7.0)
    expected = [torch.zeros_like(p) for p in optimizer.parameters]
    for step, size in enumerate((0.1, 10.0, 1e-3, 1e3)):
        plain = [nn.Parameter(torch.zeros_like(p)) for p in expected]
        for parameter, gradient in zip(plain, gradient_of(make(), step, size), strict=True):
            parameter.grad = gradient
        assert (torch.nn.utils.clip_grad_norm_(plain, 7.0) > 7.0) == (size > 1)
        assert not optimizer.step(LOSS, gradient_of(optimizer, step, size))
        expected = [0.9 * mean + 0.1 * p.grad for mean, p in zip(expected, plain, strict=True)]
        torch.testing.assert_close(optimizer.moments, expected, rtol=1e-5, atol=1e-6)


@SCALED
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e19])
@pytest.mark.parametrize("place", ["loss", (0, 0), (0, 3), (1, 0), (1, 199_999)])
def test_bad_step_leaves_everything_as_it_was(loss_scaling, poison, place):
    """A number that is not finite, or whose square is not, wherever it is: in biases, in a large matrix, in the loss.

    With a scale, an infinite gradient of a finite loss is the scale's doing, for all one knows, and halves it.
    """
    optimizer = make(50_000, loss_scaling=loss_scaling, clip=1.0)
    assert not optimizer.step(LOSS, gradient_of(optimizer, 0))
    before, gradient, loss = everything(optimizer), gradient_of(optimizer, 1), LOSS
    if place == "loss":
        loss = torch.tensor(math.nan if poison == 3e19 else poison)
    else:
        gradient[place[0]].view(-1)[place[1]] = poison
    assert optimizer.step(loss, gradient)
    assert_equal(everything(optimizer), before, "counts")
    is_overflow = loss_scaling and place != "loss"
    counts = {"skipped_steps": int(not is_overflow)} | ({"overflow_steps": int(is_overflow)} if loss_scaling else {})
    assert optimizer.skipped() == counts
    assert optimizer.scale == (INITIAL_SCALE * (0.5 if is_overflow else 1) if loss_scaling else None)
    assert not optimizer.step(LOSS, gradient_of(optimizer, 2))


def test_streak_of_bad_steps_ends_the_training():
    """Ten in a row; nine and a good one are forgiven, and a new epoch forgives nothing."""
    optimizer = make()
    take(optimizer, MAX_STREAK - 1, loss=math.nan)
    take(optimizer, 1)
    take(optimizer, MAX_STREAK - 1, loss=math.nan)
    optimizer.check("here")
    assert optimizer.skipped() == {"skipped_steps": 2 * MAX_STREAK - 2}
    optimizer.start_epoch()
    assert optimizer.skipped() == {"skipped_steps": 0}
    take(optimizer, 1, loss=math.nan)
    with pytest.raises(NonFiniteError, match=r"^cvae, epoch 2/9: .* 10 steps in a row"):
        optimizer.check("cvae, epoch 2/9")
    take(optimizer, 1)
    with pytest.raises(NonFiniteError):  # nobody has looked meanwhile
        optimizer.check("here")
    optimizer.start_epoch()
    optimizer.check("here")


def test_float16_overflow_halves_the_scale_until_it_fits_or_collapses():
    """The gradient of 1000 · w in float16 is 1000 times the scale; float16 ends at 65,504: the scale falls to 2⁶."""
    weight = nn.Parameter(torch.full((1, 1), 0.01))
    optimizer = GuardedAdam(nn.ParameterList([weight]), 1e-2, loss_scaling=True)
    accepted = []
    for _ in range(12):
        loss = (weight.half() * 1000).float().sum()
        weight.grad = None
        optimizer.scaled(loss).backward()
        accepted.append(not optimizer.step(loss.detach(), optimizer.gradients()))
        optimizer.check("here")  # no streak of bad steps: the scale is being found
    assert optimizer.scale == 2.0**6
    assert accepted == [False] * 10 + [True] * 2
    assert optimizer.skipped() == {"skipped_steps": 0, "overflow_steps": 10}
    assert weight.item() == pytest.approx(0.01 - 2 * 1e-2, abs=1e-6)  # Adam's first steps are of the learning rate
    take(optimizer, 6 + 14, poison=math.inf)  # at any scale: down to 2⁻¹⁴
    optimizer.check("here")
    take(optimizer, 1, poison=math.inf)
    with pytest.raises(NonFiniteError, match=r"^here: .*float16"):
        optimizer.check("here")


def test_scale_doubles_after_enough_good_steps(monkeypatch):
    """In a row; an overflow and a bad loss begin the count anew."""
    assert GROWTH_INTERVAL == 2000
    monkeypatch.setattr("cvae.training.optimizer.GROWTH_INTERVAL", 50)
    assert make(1).scaled(LOSS) is LOSS  # there is no scale
    optimizer, factors = make(1, loss_scaling=True), []
    good, bad, overflow = {}, {"loss": math.nan}, {"poison": math.inf}
    for times, what in (49, good), (1, bad), (49, good), (1, good), (49, good), (1, overflow), (49, good), (1, good):
        take(optimizer, times, **what)
        assert optimizer.scaled(3 * LOSS) == 3 * optimizer.scale
        factors.append(optimizer.scale / INITIAL_SCALE)
    assert factors == [1, 1, 1, 2, 2, 1, 1, 2]


def averaged(window, values, lasts=()):
    """What the average of a single weight, zero at first, is after each step that sets it to one of these values."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = WeightAverage(net, window)
    found = []
    for step, value in enumerate(values):
        nn.init.constant_(net.weight, value)
        average.update(step, last=step in lasts)
        found.append(average.model.weight.item())
    return found


@pytest.mark.parametrize("window", [1, 2, 5, 20, 100, 101, 500])
def test_average_is_exponential(window):
    """N steps after a change from 0 to 1, 1 − (1 − 1/N)^N has arrived: 0.634 for N = 100, near 1 − 1/e = 0.632.

    It is a sum of N/25 steps at least, and of float32's roundings.
    """
    start = max(10 * window, 200)
    values = averaged(window, [0.0] * start + [1.0] * (20 * window))
    assert values[start - 1] == 0
    every = min(20, max(1, window // 25))
    for count in (window, 2 * window, 10 * window):
        done = count // every * every
        assert values[start + done - 1] == pytest.approx(1 - (1 - 1 / window) ** done, abs=1e-5)
    assert values[start + window - 1] == pytest.approx(1 - math.exp(-1), abs=0.05 if window > 5 else 0.4)


def test_average_begins_as_a_mean_of_a_tenth_of_the_steps():
    """The share of a new step is 1 / (1 + t/9) until the window is full: the start is forgotten, as in a mean."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(99, generator=generator).tolist()
    expected, mean = [], 0.0
    for step, value in enumerate(values):
        mean += (value - mean) / min(8, 1 + step / 9)
        expected.append(mean)
    assert averaged(8, values) == pytest.approx(expected, abs=1e-5)
    assert averaged(500, values)[0] == pytest.approx(values[0])


def test_average_takes_the_last_step_of_an_epoch_in():
    """However few steps an epoch has, with the weight of the steps since."""
    steps = averaged(500, [0.0] * 4500 + [1.0] * 14, lasts=[4499, 4506, 4513])
    assert steps[-1] == pytest.approx(1 - (1 - 1 / 500) ** 14, rel=1e-4)
