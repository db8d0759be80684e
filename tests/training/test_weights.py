"""The vector of weights: the parameters themselves, their working copy, their gradient, and their average."""

import copy
import math

import pytest
import torch
from torch import nn

from cvae.model.layers import MLP
from cvae.training.weights import ALIGNMENT, WeightAverage, Weights

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    net[1].requires_grad_(False)
    return net


class Normalised(nn.Module):
    """Networks side by side, one that is not trained, and a batch normalisation, which has buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = MLP((5, 6, 7), copies=2)
        self.fixed = MLP((7, 4)).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.last = MLP((4, 3))

    def forward(self, x):
        return self.last(self.norm(self.fixed(self.first(x.expand(2, *x.shape)).sum(0))))


def layers_only():
    """The same without what the layers here know nothing of."""
    net = Normalised()
    net.norm.requires_grad_(False)
    return net


# The vector


def test_parameters_keep_their_values_and_are_views():
    net, plain = network(), network()
    weights = Weights(net)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for (name, parameter), original in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, original), name
    assert weights.vector.ne(0).sum() == 5 * 7 + 7 + 3 * 2 + 2
    with torch.no_grad():
        weights.vector.mul_(2)
        net[0].bias.add_(1)
    assert torch.equal(net[0].weight, 2 * plain[0].weight)
    assert torch.equal(weights.view("0.bias", weights.vector), 2 * plain[0].bias + 1)
    assert torch.equal(net[1].weight, plain[1].weight)  # frozen, and so not among them


def test_what_is_decayed_comes_after_the_rest():
    """Biases, those of networks side by side too, and the scales of a normalisation; then matrices and kernels."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), MLP((4, 3, 2), copies=5))
    weights = Weights(net)
    numbers = {name: i + 1 for i, name in enumerate(weights)}
    assert numbers.keys() == dict(net.named_parameters()).keys()
    for name, number in numbers.items():
        weights.view(name, weights.vector).fill_(number)
    found = {False: set(), True: set()}
    for is_decayed, part in ((False, weights.vector[: weights.decayed]), (True, weights.vector[weights.decayed :])):
        found[is_decayed] = set(part.unique().tolist()) - {0.0}
    spared = {"0.bias", "1.weight", "1.bias", "3.bias", "4.layers.0.bias", "4.layers.1.bias"}
    assert found[False] == {numbers[name] for name in spared}
    assert found[True] == {numbers[name] for name in numbers.keys() - spared}


def test_parameters_lie_apart_and_aligned():
    weights = Weights(Normalised())
    seen = torch.zeros_like(weights.vector)
    for name in weights:
        view = weights.view(name, weights.vector)
        assert view.storage_offset() % ALIGNMENT == 0
        assert view.is_contiguous()
        weights.view(name, seen).add_(1)
    assert seen.max() == 1
    assert seen.sum() == sum(p.numel() for p in Normalised().parameters() if p.requires_grad)
    assert weights.decayed % ALIGNMENT == len(weights.vector) % ALIGNMENT == 0


def test_wider_weights_stay_wide():
    weights = Weights(network().double())
    assert weights.vector.dtype == weights.gradient.dtype == weights.working.dtype == torch.float64


# The working copy


@HALVES
def test_working_copy(half):
    """Without `half`, it is the weights themselves; with it, their rounding, once it is refreshed."""
    net = layers_only()
    weights = Weights(net)
    assert weights.working is weights.vector
    assert weights.model is net
    weights.refresh()
    weights = Weights(net, half)
    assert torch.equal(weights.working, weights.vector.to(half))
    assert weights.gradient.dtype == half
    weights.vector.mul_(3)
    before = weights.vector.clone()
    weights.refresh()
    assert torch.equal(weights.working, before.to(half))
    assert torch.equal(weights.vector, before)


class Converting(nn.Sequential):
    """Plain layers, to the type of whose weights the inputs are converted."""

    converts_inputs = True

    def forward(self, x):
        return super().forward(x.to(next(self.parameters()).dtype))


@HALVES
def test_working_copy_of_what_converts_its_inputs(half):
    """All that is trained has to: else autocast does it, and the weights stay in their type."""
    torch.manual_seed(0)
    converting = Converting(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    weights = Weights(converting, half)
    x = torch.randn(4, 2, 3, 3)
    with weights.collecting_gradients():
        outputs = weights.model(x)
        outputs.sum().backward()
    assert outputs.dtype == weights.gradient.dtype == half
    assert torch.equal(weights.view("2.bias", weights.gradient), torch.full((2,), 4.0, dtype=half))
    mixed = nn.Sequential(converting, nn.Linear(2, 2))
    assert Weights(mixed, half).working.dtype == torch.float32
    mixed[1].requires_grad_(False)  # no weights of its own that are trained
    assert Weights(mixed, half).working.dtype == half


@HALVES
def test_working_model_is_made_of_the_working_copy(half):
    """It shares what is not trained, buffers among it; the model keeps its own weights, in float32."""
    net = layers_only()
    weights = Weights(net, half)
    assert weights.model is not net
    theirs, ours = dict(net.named_parameters()), dict(weights.model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name in ours:
        if name in set(weights):
            assert ours[name].dtype == half
            assert ours[name].data_ptr() == weights.view(name, weights.working).data_ptr()
            assert theirs[name].data_ptr() == weights.view(name, weights.vector).data_ptr()
            assert theirs[name].dtype == torch.float32
        else:
            assert ours[name] is theirs[name], name
    assert {"fixed.layers.0.weight", "norm.weight"} <= ours.keys() - set(weights)
    buffers = dict(net.named_buffers())
    assert len(buffers) == 3
    for name, buffer in weights.model.named_buffers():
        assert buffer is buffers[name]
    before = net.norm.running_mean.clone()
    weights.model.train()(torch.randn(9, 5))
    assert not torch.equal(net.norm.running_mean, before)  # what the one learns of the data, the other knows


@HALVES
def test_half_only_where_all_that_is_trained_is_of_the_layers_here(half):
    """Any other layer's products are for autocast: its weights stay in float32, and so do all the others."""
    for net in (Normalised(), network(), nn.Sequential(MLP((2, 3)), nn.Linear(3, 2))):
        weights = Weights(net, half)
        assert weights.half is None
        assert weights.working is weights.vector
        assert weights.model is net
        assert weights.gradient.dtype == torch.float32
    assert Weights(layers_only(), half).half == half
    assert Weights(nn.Sequential(MLP((2, 3)), nn.Linear(3, 2).requires_grad_(False)), half).half == half


# The gradient


WAYS = pytest.mark.parametrize(("make", "slots"), [(layers_only, False), (layers_only, True), (Normalised, True)])


def plain_gradient(net, x):
    """By autograd, of a copy that has never been among any weights."""
    net.zero_grad()
    net.train()(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}


@WAYS
def test_gradient_is_where_the_optimizer_reads_it(make, slots):
    net = make().double()
    expected = plain_gradient(copy.deepcopy(net), x := torch.randn(9, 5, dtype=torch.float64))
    weights = Weights(net, slots=slots)
    assert (net.first.trained is not None) == slots
    assert net.fixed.trained is None
    loss = weights.model.train()(x).square().sum()
    with weights.collecting_gradients():
        loss.backward()
    for name in weights:
        found = weights.view(name, weights.gradient)
        assert found.ne(0).any(), name
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is None for parameter in net.parameters())


@WAYS
def test_only_what_is_collected_is_taken_in(make, slots):
    """A gradient that an objective takes on its own way leaves no trace in the weights' one."""
    net = make().double()
    weights, x = Weights(net, slots=slots), torch.randn(9, 5, dtype=torch.float64)
    expected = plain_gradient(copy.deepcopy(net), x)
    weights.gradient.fill_(7.0)
    middle = weights.model.train().first(x.expand(2, *x.shape)).sum(0)
    loss = net.last(net.norm(net.fixed(middle))).square().sum()
    (of_middle,) = torch.autograd.grad(loss, middle, retain_graph=True)
    assert of_middle.ne(0).any()
    assert weights.gradient.eq(7).all()
    with weights.collecting_gradients():
        loss.backward()
    for name in weights:
        torch.testing.assert_close(weights.view(name, weights.gradient), expected[name], rtol=1e-12, atol=1e-14)


@WAYS
def test_what_a_loss_does_not_depend_on_has_no_gradient(make, slots):
    """Nor is the gradient of an earlier loss left there."""
    net = make().double()
    weights, x = Weights(net, slots=slots), torch.randn(9, 5, dtype=torch.float64)
    for _ in range(2):
        with weights.collecting_gradients():
            weights.model.train()(x).square().sum().backward()
        assert all(weights.view(name, weights.gradient).ne(0).any() for name in weights)
        with weights.collecting_gradients():
            weights.model.last(x[:, :4]).sum().backward()
        for name in weights:
            assert weights.view(name, weights.gradient).ne(0).any() == name.startswith("last"), name


def test_same_network_twice_in_a_loss():
    """Its gradients add up: through the slots, through them again, and through one of the networks side by side."""
    net = MLP((5, 6, 7), copies=2).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)

    def loss_of(model):
        return model(x).square().sum() + 3 * model(2 * x).sum() + model(x[0], copy=1).square().sum()

    theirs = copy.deepcopy(net)
    loss_of(theirs).backward()
    weights = Weights(net, slots=True)
    with weights.collecting_gradients():
        loss_of(weights.model).backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(weights.view(name, weights.gradient), parameter.grad, rtol=1e-12, atol=1e-14)


def test_released_model_is_trained_no_more():
    """A backward pass through it is a plain one, and leaves the weights' gradient alone."""
    net = layers_only()
    weights = Weights(net, slots=True)
    weights.release()
    net(torch.randn(9, 5)).sum().backward()
    assert net.last.layers[0].weight.grad.ne(0).any()
    assert weights.gradient.eq(0).all()


def test_copy_of_a_model_that_is_trained_is_not():
    net = layers_only()
    weights = Weights(net, slots=True)
    twin = copy.deepcopy(net)
    with weights.collecting_gradients():
        twin(torch.randn(9, 5)).sum().backward()
    assert weights.gradient.eq(0).all()
    assert twin.last.layers[0].weight.grad.ne(0).any()


# The average


@pytest.mark.parametrize("window", [100, 500])
def test_average_spans_its_window(window):
    """It begins as the weights; one window after a change, 1 − 1/e of it has arrived. What is frozen is shared."""
    net = network()
    weights = Weights(net)
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
    weights = Weights(net)
    average = WeightAverage(net, weights, 1)
    for step in range(200):
        weights.vector.fill_(float(step))
        average.update(step)
        assert average.model[0].bias.eq(step).all()


def test_average_takes_the_last_step_of_an_epoch_in():
    """However few steps an epoch has: what is validated changes with every epoch."""
    net = network()
    weights = Weights(net)
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
    weights = Weights(net)
    average = WeightAverage(net, weights, 0)
    assert average.model is net
    before = weights.vector.clone()
    average.update(0)
    assert torch.equal(weights.vector, before)


@HALVES
def test_average_is_of_the_weights_and_not_of_their_working_copy(half):
    net = layers_only()
    weights = Weights(net, half, slots=True)
    average = WeightAverage(net, weights, 10)
    weights.vector.fill_(1 + 2**-12)
    average.update(0)
    for name, parameter in average.model.named_parameters():
        if name in set(weights):
            assert parameter.eq(1 + 2**-12).all(), name  # which neither half type can tell from 1
    assert all(module.trained is None for module in average.model.modules() if isinstance(module, MLP))


def test_average_takes_buffers_in():
    """Numbers as the weights, whose average is of the same steps; counts are copied."""
    net = Normalised()
    weights = Weights(net)
    average = WeightAverage(net, weights, 50)
    assert average.model.norm.running_mean is not net.norm.running_mean
    for step in range(150):
        weights.vector.fill_(float(step % 7))
        net.norm.running_mean.fill_(float(step % 7))
        net.norm.running_var.fill_(2.0 * (step % 7))
        net.norm.num_batches_tracked.fill_(step)
        average.update(step, last=step % 30 == 29)
        value = average.model.norm.weight[0]
        assert average.model.norm.running_mean.eq(value).all()
        torch.testing.assert_close(average.model.norm.running_var, 2 * value.expand(4))
    assert 0 < value < 6
    assert value != 149 % 7
    assert average.model.norm.num_batches_tracked == 149  # the last step of an epoch
    assert average.model.norm.num_batches_tracked.dtype == torch.int64
    assert net.norm.running_mean.eq(149 % 7).all()
