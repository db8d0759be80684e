"""How fast the average of weights follows them; what it averages, `test_step.py` shows."""

import math

import pytest
import torch
from torch import nn

from cvae.training.weights import WeightAverage, Weights


def averaged(window, values, lasts=()):
    """What the average of a single weight, zero at first, is after each step that sets it to one of these values."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    weights = Weights(net)
    average = WeightAverage(net, weights, window)
    found = []
    for step, value in enumerate(values):
        weights.vector.fill_(value)
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
