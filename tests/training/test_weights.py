"""The vector of weights: the parameters themselves, and their average."""

import math

import pytest
import torch
from torch import nn

from cvae.training.weights import WeightAverage, Weights


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    net[1].requires_grad_(False)
    return net


def test_parameters_keep_their_values_and_are_views():
    net, plain = network(), network()
    weights = Weights(net.parameters())
    assert {id(parameter) for parameter in weights} == {id(own) for i in (0, 2) for own in net[i].parameters()}
    for (name, parameter), original in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, original), name
    assert weights.vector.ne(0).sum() == 5 * 7 + 7 + 3 * 2 + 2
    with torch.no_grad():
        weights.vector.mul_(2)
        net[0].bias.add_(1)
    assert torch.equal(net[0].weight, 2 * plain[0].weight)
    assert torch.equal(weights.view(net[0].bias, weights.vector), 2 * plain[0].bias + 1)
    assert torch.equal(net[1].weight, plain[1].weight)  # frozen, and so not among them


def test_parameters_of_one_shape_are_stacked_in_place():
    """Whatever lies between them, and side by side where nothing does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8))
    weights = Weights(net.parameters())
    squares = [net[0].weight, net[2].weight, net[4].weight]
    for some in (squares, squares[::2], squares[:1], [net[1].weight]):
        stacked = weights.stacked(some, weights.vector)
        assert torch.equal(stacked, torch.stack([parameter.detach() for parameter in some]))
        with torch.no_grad():
            stacked.mul_(2)
        assert torch.equal(stacked, torch.stack([parameter.detach() for parameter in some]))
    assert weights.stacked(squares, weights.vector).is_contiguous()
    with pytest.raises(ValueError, match="of one shape"):
        weights.stacked([net[1].weight, net[3].weight], weights.vector)
    for others in ([squares[0], squares[2], squares[1]], squares[::-1]):
        with pytest.raises(ValueError, match="equally far apart and in order"):
            weights.stacked(others, weights.vector)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_working_copy(half):
    """Without `half`, it is the weights themselves; with it, their rounding, once it is refreshed."""
    weights = Weights(network().parameters())
    assert weights.working is weights.vector
    weights.refresh()
    weights = Weights(network().parameters(), half)
    assert torch.equal(weights.working, weights.vector.to(half))
    weights.vector.mul_(3)
    before = weights.vector.clone()
    weights.refresh()
    assert torch.equal(weights.working, before.to(half))
    assert torch.equal(weights.vector, before)


@pytest.mark.parametrize("window", [100, 500])
def test_average_spans_its_window(window):
    """It begins as the weights; one window after a change, 1 − 1/e of it has arrived. What is frozen is shared."""
    net = network()
    weights = Weights(net.parameters())
    average = WeightAverage(net, weights, window)
    assert average.model[1].weight is net[1].weight
    weights.vector.fill_(5.0)
    average.update(0)
    assert average.model[0].weight.eq(5.0).all()
    weights.vector.fill_(0.0)
    for step in range(1, 20 * window):
        average.update(step)
    assert average.model[0].weight.abs().max() < 1e-3
    weights.vector.fill_(1.0)
    for step in range(20 * window, 21 * window):
        average.update(step)
    value = average.model[0].weight[0, 0].item()
    assert average.model[2].bias.eq(value).all()
    assert value == pytest.approx(1 - math.exp(-1), abs=0.05)
    assert net[0].weight.eq(1.0).all()


def test_average_over_one_step_is_the_last_weights():
    net = network()
    weights = Weights(net.parameters())
    average = WeightAverage(net, weights, 1)
    for step in range(200):
        weights.vector.fill_(float(step))
        average.update(step)
        assert average.model[0].bias.eq(step).all()


def test_average_takes_the_last_step_of_an_epoch_in():
    """However few steps an epoch has: what is validated changes with every epoch."""
    net = network()
    weights = Weights(net.parameters())
    average = WeightAverage(net, weights, 500)
    seen = set()
    for step in range(150):
        weights.vector.fill_(float(step))
        average.update(step, last=step % 3 == 2)
        if step % 3 == 2:
            seen.add(average.model[0].bias[0].item())
    assert len(seen) == 50


def test_no_average_is_the_model_itself():
    net = network()
    weights = Weights(net.parameters())
    average = WeightAverage(net, weights, 0)
    assert average.model is net
    before = weights.vector.clone()
    average.update(0)
    assert torch.equal(weights.vector, before)
