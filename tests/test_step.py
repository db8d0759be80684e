"""A training step: what it may ask of the device, and what mixed precision changes."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cvae import runtime
from cvae.data import ImageSet
from cvae.distributed import Processes
from cvae.optimizer import GuardedAdam
from train import training_step

CPU = torch.device("cpu")
MODELS = pytest.mark.parametrize("which", ["baseline", "cvae"])


class Watch(TorchDispatchMode):
    """Writes down the operators that run, and refuses those that wait for the device or whose shape hangs on data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.REFUSED), name
        if name.startswith("index") and isinstance(args[1], Iterable) and not isinstance(args[1], Tensor):
            assert all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]), name
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


def model_of(toy, which):
    return toy.cvae if which == "cvae" else toy.cvae.baseline_net.requires_grad_(True)


def optimizer_of(model, precision, learning_rate=1e-3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return GuardedAdam(trained, learning_rate, loss_scaling=precision == "fp16")


def loss_of(model, batch, eps, precision):
    with runtime.autocast(precision, CPU):
        terms = model(*batch, eps)
    return -terms.elbo.sum() / len(batch[0]), terms


@pytest.mark.parametrize(
    "forbidden",
    [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool(t.any()), lambda t: int(t[0]),
     lambda t: t.masked_fill(t > 0, 0)[t > 0].sum(), lambda t: t.index_put_((t > 0,), torch.zeros(()))],
)  # fmt: skip
def test_watch_notices(forbidden):
    with pytest.raises(AssertionError), Watch():
        forbidden(torch.ones(3))


@MODELS
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_step_never_waits_for_the_device(make_toy, which, precision, cached):
    """From the rows of a batch to the new weights and totals: no number read, no shape that hangs on data."""
    toy = make_toy(count=20, particles=2, dtype=torch.float32)
    model = model_of(toy, which)
    images = ImageSet(toy.images.mul(255).to(torch.uint8), toy.quadrants)
    if cached:
        images.y_hat = toy.cvae.baseline_net.guess(toy.x).detach()
    optimizer = optimizer_of(model, precision)
    totals = torch.zeros(3, dtype=torch.float64)
    permutation = torch.randperm(20)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with Watch() as watch:
        for i in range(2):
            rows = permutation[8 * i : 8 * (i + 1)]
            eps = torch.randn(2, 8, model.latent_dim)
            optimizer.learning_rate.fill_(1e-3)
            training_step(model, images, optimizer, totals, 8, precision, Processes(), rows, eps)
    assert {"addmm", "mm", "index_select", "_fused_adam_"} <= watch.seen  # forward, backward, data and optimizer
    assert totals[2] == 8 * int(optimizer.steps - optimizer.bad - optimizer.overflows)
    if precision != "fp16":  # there the first steps may go into finding the scale
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@MODELS
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_agrees_with_float32(make_toy, which, precision):
    """Per image, the log-likelihood to half a machine epsilon of the half type, the KL to two; each gradient to eight.

    The step that follows lowers the loss as much as float32's does, to a hundredth.
    """
    epsilon = torch.finfo(runtime.HALF[precision]).eps
    results = {}
    for name in ("fp32", precision):
        toy = make_toy(1, 28, 28, hidden=(100, 80), latent_dim=20, count=64, dtype=torch.float32)
        model, batch = model_of(toy, which), (toy.x, toy.y, None)
        optimizer, accepted = optimizer_of(model, name), False
        while not accepted:  # a scale that overflows is halved, and the weights stay as they were
            loss, terms = loss_of(model, batch, toy.eps, name)
            optimizer.backward(loss)
            gradients = [parameter.grad / (1 if optimizer.scale is None else optimizer.scale)
                         for parameter in optimizer.parameters]  # fmt: skip
            accepted = bool(optimizer.step(loss))
            optimizer.check("here")
        with torch.no_grad():
            after, _ = loss_of(model, batch, toy.eps, "fp32")
        assert all(value.dtype == torch.float32 for value in (*terms, *gradients))
        results[name] = (terms, gradients, loss.item(), after.item())
    (wide, wide_gradients, wide_loss, wide_after), (half, half_gradients, _, half_after) = results.values()
    assert not torch.equal(half.elbo, wide.elbo)  # it was in half precision
    torch.testing.assert_close(half.log_likelihood, wide.log_likelihood, rtol=epsilon / 2, atol=0)
    torch.testing.assert_close(half.kl, wide.kl, rtol=2 * epsilon, atol=0)
    for ours, theirs in zip(half_gradients, wide_gradients, strict=True):
        assert (ours - theirs).norm() <= 8 * epsilon * theirs.norm()
    gain = wide_loss - wide_after
    assert gain > 1
    assert half_after == pytest.approx(wide_after, abs=gain / 100)
