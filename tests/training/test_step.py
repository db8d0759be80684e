"""A training step: what it may ask of the device, and what mixed precision changes."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_gradients import gradients_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cvae import runtime
from cvae.data.images import Batch, ImageSet
from cvae.distributed import Processes
from cvae.training.gradients import by_autograd, by_hand
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


@pytest.mark.parametrize(
    "forbidden",
    [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool(t.any()), lambda t: int(t[0]),
     lambda t: t.masked_fill(t > 0, 0)[t > 0].sum(), lambda t: t.index_put_((t > 0,), torch.zeros(()))],
)  # fmt: skip
def test_watch_notices(forbidden):
    with pytest.raises(AssertionError), Watch():
        forbidden(torch.ones(3))


@MODELS
@pytest.mark.parametrize("way", [by_hand, by_autograd])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_step_never_waits_for_the_device(make_toy, which, way, precision, cached):
    """From the rows of a batch to the new weights and totals: no number read, no shape that hangs on data."""
    toy = make_toy(count=20, particles=2, dtype=torch.float32)
    model = toy.model(which)
    images = ImageSet(toy.images.mul(255).to(torch.uint8), toy.quadrants)
    if cached:
        images.set_guesses(toy.cvae.baseline_net.guess, runtime.HALF.get(precision))
    gradients, optimizer = gradients_of(way, model, precision)
    totals = torch.zeros(3, dtype=torch.float64)
    permutation = torch.randperm(20)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with Watch() as watch:
        for i in range(2):
            rows = permutation[8 * i : 8 * (i + 1)]
            eps = torch.randn(2, 8, model.latent_dim)
            optimizer.learning_rate.fill_(1e-3)
            training_step(gradients, images, optimizer, totals, 8, Processes(), rows, eps)
    products = {"baddbmm", "bmm"} if way is by_hand else {"addmm", "mm"}  # forward and backward
    assert products | {"index_select", "_fused_adamw_"} <= watch.seen
    skipped = optimizer.skipped()
    assert totals[2] == 8 * (optimizer.steps - sum(skipped.values()))
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
        model, batch = toy.model(which), Batch(toy.x, toy.y, None)
        gradients, optimizer = gradients_of(by_hand, model, name)
        eps, accepted = toy.eps[..., : model.latent_dim], False
        while not accepted:  # a scale that overflows is halved, and the weights stay as they were
            scale = optimizer.loss_scale / 64
            terms = gradients(batch, eps, scale)
            found = [optimizer.weights.view(weight, optimizer.gradient).float() / scale for weight in optimizer.weights]
            accepted = bool(optimizer.step(loss := -terms.elbo.mean()))
            optimizer.check("here")
        after = -gradients(batch, eps, 1.0).elbo.mean()
        assert all(value.dtype == torch.float32 for value in terms)
        results[name] = (terms, found, loss.item(), after.item())
    (wide, wide_gradients, wide_loss, wide_after), (half, half_gradients, _, half_after) = results.values()
    assert not torch.equal(half.elbo, wide.elbo)  # it was in half precision
    torch.testing.assert_close(half.log_likelihood, wide.log_likelihood, rtol=epsilon / 2, atol=0)
    torch.testing.assert_close(half.kl, wide.kl, rtol=2 * epsilon, atol=0)
    for ours, theirs in zip(half_gradients, wide_gradients, strict=True):
        assert (ours - theirs).norm() <= 8 * epsilon * theirs.norm()
    gain = wide_loss - wide_after
    assert gain > 1
    assert half_after == pytest.approx(wide_after, abs=gain / 100)


@pytest.mark.parametrize("capable", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, capable):
    """And what is asked for by name stays, whatever the processor has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, capable: True}, raising=False)
    assert runtime.resolve_precision("auto", CPU) == ("bf16" if capable else "fp32")
    assert [runtime.resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in versions of PyTorch that have it not
    assert runtime.resolve_precision("auto", CPU) == "fp32"
