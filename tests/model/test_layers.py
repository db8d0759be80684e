"""The fully connected layers: against those of PyTorch, and with the gradients in their slots against autograd."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cvae.model.layers import MLP, Linear
from cvae.training.weights import Weights

SIZES = [(6, 3), (6, 7, 3), (6, 7, 8, 3), (8, 16, 16, 8)]
COPIES = pytest.mark.parametrize("copies", [1, 2, 3])
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def make_mlp(sizes=(6, 7, 8, 3), copies: int = 2, dtype: torch.dtype = torch.float64) -> MLP:
    """With weights of the seed 0, and biases that are not zero."""
    torch.manual_seed(0)
    mlp = MLP(sizes, copies).to(dtype)
    for layer in mlp.layers:
        nn.init.normal_(layer.bias, std=0.3)
    return mlp


def plain(mlp: MLP) -> list[nn.Sequential]:
    """The same networks, each of nn.Linear and nn.ReLU."""
    networks = []
    for i in range(len(mlp.layers[0].weight)):
        modules: list[nn.Module] = []
        for layer in mlp.layers:
            linear = nn.Linear(layer.weight.shape[2], layer.weight.shape[1]).to(layer.weight.dtype)
            linear.weight.data.copy_(layer.weight[i])
            linear.bias.data.copy_(layer.bias[i])
            modules += [linear, nn.ReLU()]
        networks.append(nn.Sequential(*modules[:-1]))
    return networks


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients_of(mlp: MLP) -> list[Tensor]:
    return [parameter.grad for parameter in mlp.parameters()]


def plain_gradients(networks: list[nn.Sequential]) -> list[Tensor]:
    """The gradients of all copies side by side; zeros where there is none."""
    parameters = zip(*(network.parameters() for network in networks), strict=True)
    return [torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in copies]) for copies in parameters]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# Plain


@COPIES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_pytorchs_layers(sizes, copies):
    mlp, x = make_mlp(sizes, copies), random(copies, 5, sizes[0]).requires_grad_()
    networks, factors = plain(mlp), random(copies, 5, sizes[-1], seed=2)
    outputs = mlp(x if copies > 1 else x[0])
    expected = torch.stack([network(rows) for network, rows in zip(networks, x, strict=True)])
    assert outputs.shape == (expected.shape if copies > 1 else expected.shape[1:])
    torch.testing.assert_close(outputs, expected if copies > 1 else expected[0], rtol=1e-12, atol=1e-12)
    (for_x,) = torch.autograd.grad((outputs * (factors if copies > 1 else factors[0])).sum(), x, retain_graph=True)
    torch.testing.assert_close(for_x, torch.autograd.grad((expected * factors).sum(), x, retain_graph=True)[0])
    (outputs * (factors if copies > 1 else factors[0])).sum().backward()
    (expected * factors).sum().backward()
    assert_all_close(gradients_of(mlp), plain_gradients(networks))


@COPIES
@pytest.mark.parametrize("leading", [(4,), (2, 4), (3, 2, 4)], ids=str)
def test_one_copy_takes_any_leading_dimensions(copies, leading):
    mlp, x = make_mlp(copies=copies), random(*leading, 6)
    for i, network in enumerate(plain(mlp)):
        outputs = mlp(x, copy=i)
        assert outputs.shape == (*leading, 3)
        torch.testing.assert_close(outputs, network(x), rtol=1e-12, atol=1e-12)
    if copies == 1:
        torch.testing.assert_close(mlp(x), plain(mlp)[0](x), rtol=1e-12, atol=1e-12)


def test_gradient_of_one_copy_leaves_the_others():
    mlp, x = make_mlp(copies=3), random(5, 6)
    networks = plain(mlp)
    mlp(x, copy=1).square().sum().backward()
    networks[1](x).square().sum().backward()
    found = gradients_of(mlp)
    assert_all_close(found, plain_gradients(networks))
    assert all(gradient[[0, 2]].eq(0).all() and gradient[1].ne(0).any() for gradient in found)


def test_initial_weights():
    """He et al. before a ReLU, with biases of zero; nn.Linear's before an output; each copy has its own."""
    torch.manual_seed(3)
    mlp = MLP((400, 300, 200), copies=2)
    first, last = mlp.layers
    assert (first.relu, last.relu) == (True, False)
    assert first.bias.eq(0).all()
    assert first.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    for parameter in (last.weight, last.bias):
        assert parameter.abs().max() <= 300**-0.5
        assert parameter.std().item() == pytest.approx((300 * 3) ** -0.5, rel=0.1)
    for layer in mlp.layers:
        assert layer.weight[0].ne(layer.weight[1]).all()


# With slots


Loss = Callable[[MLP, Tensor], Tensor]


def collected(mlp: MLP, loss: Loss, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradients that end in the vector, and that for x."""
    weights = Weights(mlp, slots=True)
    weights.gradient.fill_(float("nan"))  # nothing of an earlier step counts
    assert mlp.trained is not None
    x = x.clone().requires_grad_()
    value = loss(mlp, x)
    with weights.collecting_gradients():
        value.backward()
    assert all(parameter.grad is None for parameter in mlp.parameters())
    found = [weights.view(name, weights.gradient).clone() for name, _ in mlp.named_parameters()]
    return found, torch.zeros_like(x) if x.grad is None else x.grad


def by_autograd(mlp: MLP, loss: Loss, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same from a copy of plain operations."""
    mlp, x = copy.deepcopy(mlp), x.clone().requires_grad_()
    assert mlp.trained is None
    loss(mlp, x).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in mlp.parameters()]
    return found, torch.zeros_like(x) if x.grad is None else x.grad


LOSSES: dict[str, Loss] = {
    "once": lambda mlp, x: mlp(x).square().sum(),
    "twice": lambda mlp, x: mlp(x).square().sum() + 0.3 * mlp(2 * x + 1).sum(),
    "three times, one after another": lambda mlp, x: mlp(
        nn.functional.pad(mlp(nn.functional.pad(mlp(x), (0, 3))), (3, 0))
    ).square().sum(),
    "not at all": lambda mlp, x: x.square().sum(),
    "one copy by itself": lambda mlp, x: mlp(x[0], copy=1).square().sum(),
    "all copies, and one by itself": lambda mlp, x: mlp(x).square().sum() + mlp(x[0], copy=1).sum(),
    "one by itself, and all copies": lambda mlp, x: mlp(x[0], copy=0).square().sum() * mlp(x).square().sum(),
    "one output of one copy": lambda mlp, x: mlp(x)[0, 0, 0],
    "weights tied into a plain operation": lambda mlp, x: (
        mlp(x).square().sum() + nn.functional.linear(x, mlp.layers[0].weight[0]).square().sum()
    ),
    "weights in a plain operation alone": lambda mlp, x: (x @ mlp.layers[0].weight[0].mT).square().sum(),
    "a penalty on the weights": lambda mlp, x: mlp(x).sum() + mlp.layers[1].weight.square().sum(),
    "all of it without a gradient of x": lambda mlp, x: mlp(x.detach()).square().sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_collected_gradient_is_autograds(name):
    """However the network is used, to 1e-10 in float64."""
    mlp, x = make_mlp(), random(2, 5, 6)
    expected, expected_x = by_autograd(mlp, LOSSES[name], x)
    found, found_x = collected(mlp, LOSSES[name], x)
    assert_all_close(found, expected)
    torch.testing.assert_close(found_x, expected_x, rtol=1e-10, atol=1e-12)
    assert name == "not at all" or any(gradient.ne(0).any() for gradient in found)


@COPIES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_collected_gradient_of_any_sizes(sizes, copies):
    mlp, x = make_mlp(sizes, copies), random(copies, 5, sizes[0])
    loss = lambda mlp, x: mlp(x if copies > 1 else x[0]).square().sum()  # noqa: E731
    expected, expected_x = by_autograd(mlp, loss, x)
    found, found_x = collected(mlp, loss, x)
    assert_all_close([*found, found_x], [*expected, expected_x])


@pytest.mark.parametrize("leading", [(4,), (3, 2, 4)], ids=str)
def test_collected_gradient_of_any_leading_dimensions(leading):
    mlp, x = make_mlp(copies=1), random(*leading, 6)
    expected, expected_x = by_autograd(mlp, LOSSES["once"], x)
    found, found_x = collected(mlp, LOSSES["once"], x)
    assert_all_close([*found, found_x], [*expected, expected_x])


def test_each_collection_starts_anew():
    """Nothing of an earlier backward pass is in it, be it of the same layers or of none of them."""
    mlp, x = make_mlp(), random(2, 5, 6)
    weights = Weights(mlp, slots=True)
    found = []
    for name in ("twice", "once", "weights in a plain operation alone", "once", "not at all"):
        with weights.collecting_gradients():
            LOSSES[name](mlp, x.clone().requires_grad_()).backward()
        found.append(weights.gradient.clone())
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert found[4].eq(0).all()
    expected, _ = by_autograd(mlp, LOSSES["once"], x)
    assert_all_close([weights.view(name, found[3]) for name, _ in mlp.named_parameters()], expected)


def test_collection_of_several_backward_passes_is_their_sum():
    mlp, x = make_mlp(), random(2, 5, 6)
    weights = Weights(mlp, slots=True)
    with weights.collecting_gradients():
        mlp(x).square().sum().backward()
        (3 * mlp(x + 1)).sum().backward()
    expected, _ = by_autograd(mlp, lambda mlp, x: mlp(x).square().sum() + (3 * mlp(x + 1)).sum(), x)
    assert_all_close([weights.view(name, weights.gradient) for name, _ in mlp.named_parameters()], expected)


def test_gradient_taken_outside_of_a_collection_writes_nothing():
    """Such as an objective's own, by z: it is right, and the slots stay as they are."""
    mlp, x = make_mlp(), random(2, 5, 6).requires_grad_()
    _, expected = by_autograd(mlp, LOSSES["once"], x.detach())
    weights = Weights(mlp, slots=True)
    weights.gradient.fill_(7)
    value = LOSSES["once"](mlp, x)
    (by_x,) = torch.autograd.grad(value, x, retain_graph=True)
    torch.testing.assert_close(by_x, expected, rtol=1e-10, atol=1e-12)
    assert weights.gradient.eq(7).all()
    assert all(parameter.grad is None for parameter in mlp.parameters())
    with weights.collecting_gradients():  # and it is not in the sum afterwards
        (value + by_x.sum()).backward()
    found = [weights.view(name, weights.gradient) for name, _ in mlp.named_parameters()]
    assert_all_close(found, by_autograd(mlp, LOSSES["once"], x.detach())[0])


def test_gradient_by_the_weights_taken_in_another_way_is_refused():
    """It is in the slots or nowhere: an error, and no zeros."""
    mlp, x = make_mlp(), random(2, 5, 6)
    Weights(mlp, slots=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(mlp(x).sum(), list(mlp.parameters()))


def test_derivative_of_a_gradient_is_refused():
    """An error, and no wrong number: the backward pass is written out."""
    mlp, x = make_mlp(), random(2, 5, 6).requires_grad_()
    Weights(mlp, slots=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)


def test_failed_backward_pass_ends_the_collection():
    mlp, x = make_mlp(), random(2, 5, 6).requires_grad_()
    weights = Weights(mlp, slots=True)
    with pytest.raises(KeyboardInterrupt), weights.collecting_gradients():
        raise KeyboardInterrupt
    weights.gradient.fill_(7)
    torch.autograd.grad(mlp(x).sum(), x)
    assert weights.gradient.eq(7).all()


def test_weights_changed_between_the_passes_are_noticed():
    """An error, as autograd's own, and no wrong gradient."""
    mlp, x = make_mlp(), random(2, 5, 6)
    weights = Weights(mlp, slots=True)
    value = mlp(x).square().sum()
    with torch.no_grad():
        mlp.layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), weights.collecting_gradients():
        value.backward()


def test_inputs_are_not_changed():
    mlp, x = make_mlp(), random(2, 5, 6).requires_grad_()
    weights, kept = Weights(mlp, slots=True), x.detach().clone()
    outputs = mlp(x)
    kept_outputs, factors = outputs.detach().clone(), random(2, 5, 3)
    kept_factors = factors.clone()
    with weights.collecting_gradients():
        outputs.backward(factors)
    for tensor, before in ((x, kept), (outputs, kept_outputs), (factors, kept_factors)):
        assert torch.equal(tensor, before)


def test_nothing_is_recorded_where_no_gradient_is_wanted():
    mlp, x = make_mlp(), random(2, 5, 6)
    expected = mlp(x).detach()
    Weights(mlp, slots=True)
    with torch.no_grad():
        found = mlp(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_copy_of_what_is_trained_has_no_slots():
    """Its gradient is its own, and the original's vector is left alone."""
    mlp, x = make_mlp(), random(2, 5, 6)
    weights = Weights(mlp, slots=True)
    weights.gradient.fill_(7)
    copied = copy.deepcopy(mlp)
    assert copied.trained is None
    assert mlp.trained is not None
    copied(x).sum().backward()
    assert all(parameter.grad.ne(0).any() for parameter in copied.parameters())
    assert weights.gradient.eq(7).all()


def test_released_layers_are_plain_again():
    mlp, x = make_mlp(), random(2, 5, 6)
    weights = Weights(mlp, slots=True)
    expected, _ = by_autograd(mlp, LOSSES["once"], x)
    weights.release()
    LOSSES["once"](mlp, x).backward()
    assert_all_close(gradients_of(mlp), expected)


def test_memory_of_a_step_is_given_back():
    """What a forward pass keeps goes with its outputs, with no help of the garbage collector."""
    mlp = make_mlp()
    weights = Weights(mlp, slots=True)
    gc.disable()
    try:
        x = random(2, 5, 6).requires_grad_()
        kept = weakref.ref(x)
        with weights.collecting_gradients():
            mlp(x).sum().backward()
        del x
        assert kept() is None
    finally:
        gc.enable()


# Half precision


@HALF
@COPIES
def test_half_precision_is_that_of_autocast(half, copies):
    """Layers of half-precision weights: as plain ones of float32 weights under autocast, within two roundings."""
    sizes = (60, 50, 40, 30)
    wide = make_mlp(sizes, copies, torch.float32)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(half).float()  # the same numbers in both
    networks, narrow = plain(wide), copy.deepcopy(wide).to(half)
    weights = Weights(narrow, slots=True)
    x, factors = random(copies, 64, 60, dtype=torch.float32), random(copies, 64, 30, seed=2, dtype=torch.float32)
    x.requires_grad_()
    squeezed = (x, factors) if copies > 1 else (x[0], factors[0])
    outputs = narrow(squeezed[0])
    assert outputs.dtype == torch.float32
    with weights.collecting_gradients():
        (outputs * squeezed[1]).sum().backward()
    found = [outputs.view(copies, 64, 30), x.grad, *(weights.view(name, weights.gradient) for name in names(narrow))]
    assert weights.gradient.dtype == half

    theirs = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", half):
        expected = torch.stack([network(rows).float() for network, rows in zip(networks, theirs, strict=True)])
    (expected * factors).sum().backward()
    eps = torch.finfo(half).eps
    for ours, other in zip(found, [expected, theirs.grad, *plain_gradients(networks)], strict=True):
        assert other.norm() > 0
        assert (ours.float() - other).norm() <= 2 * eps * other.norm()


def names(mlp: MLP) -> list[str]:
    return [name for name, _ in mlp.named_parameters()]


@HALF
def test_plain_path_in_half_precision_is_that_with_slots(half):
    mlp, x = make_mlp(dtype=torch.float32).to(half), random(2, 5, 6, dtype=torch.float32)
    without = mlp(x)
    assert without.dtype == torch.float32
    Weights(mlp, slots=True)
    torch.testing.assert_close(mlp(x), without, rtol=2 * torch.finfo(half).eps, atol=2 * torch.finfo(half).eps)


def test_linear_of_one_copy():
    layer = Linear(4, 3, copies=2, relu=True).double()
    x = random(1, 5, 4)
    expected = nn.functional.linear(x[0], layer.weight[1], layer.bias[1]).relu()
    torch.testing.assert_close(layer(x, copy=1), expected[None], rtol=1e-12, atol=1e-14)
