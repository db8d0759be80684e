"""A training step: what it may ask of the device, what it adds up, and what mixed precision changes."""

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.steps import CPU, Case, cases, make_phase, make_run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cvae import context
from cvae.model.convolutions import Convolution
from cvae.model.layers import Linear
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OF_PRIOR, maximised
from cvae.settings import Settings
from train import Step, train_epoch

PLAIN = Settings(batch_size=8, learning_rate=1e-3, weight_decay=0.0)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


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


@cases()
@PRECISIONS
@pytest.mark.parametrize("cached", [False, True], ids=["guess", "cached guess"])
def test_step_never_waits_for_the_device(make_toy, case, precision, cached):
    """From the rows of a batch to the new weights and totals: no number read, no shape that hangs on data."""
    toy = case.make(make_toy, count=20, gain=1.0, dtype=torch.float32)
    phase = make_phase(case, toy, cached=cached, precision=precision)
    step = Step(phase, make_run(PLAIN, precision))
    weights, optimizer = step.weights, step.optimizer
    trained = [
        layer for layer in phase.model.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))
    ]
    ours = all(isinstance(layer, Linear | Convolution) for layer in trained)
    assert (weights.half is not None) == (ours and precision != "fp32")
    permutation = torch.randperm(20)
    random = context.generator(CPU, 0)
    before = {name: parameter.clone() for name, parameter in phase.model.named_parameters()}
    has_gradient = {name: torch.zeros(()) for name in weights}
    step.weights.model.train()
    with Watch() as watch:
        for i in range(2):
            optimizer.learning_rate.fill_(1e-3)
            step(permutation[8 * i : 8 * (i + 1)], *phase.noise(8, random))
            for name in weights:
                has_gradient[name] += weights.view(name, weights.gradient).abs().sum()
    if case.network in NETWORKS:
        assert {"baddbmm", "bmm"} <= watch.seen  # forward and backward
    assert {"index_select", "_fused_adamw_"} <= watch.seen
    skipped = optimizer.skipped()
    assert step.totals.sums[-1] == 8 * (optimizer.steps - sum(skipped.values()))
    assert optimizer.steps == 2
    if precision != "fp16":  # there the first steps may go into finding the scale
        assert sum(skipped.values()) == 0
        for name, parameter in phase.model.named_parameters():
            changed = parameter.requires_grad and bool(has_gradient[name].ne(0))
            assert torch.equal(parameter, before[name]) != changed, name
        assert all(has_gradient.values()) or case.objective in OF_PRIOR or case.network == "regularised"


@cases()
def test_terms_are_added_to_the_totals(make_toy, case):
    """Each step that was taken, whole: sums over its images, and their number."""
    toy = case.make(make_toy, count=20, gain=1.0, dtype=torch.float32)
    phase = make_phase(case, toy)
    step = Step(phase, make_run(PLAIN))
    model, random = step.weights.model.train(), context.generator(CPU, 0)
    rows, expected = torch.randperm(20), {}
    for i in range(4):
        taken, eps = i != 2, phase.noise(8, random)
        chosen = rows[4 * i : 4 * i + 8]
        context.seed_dropout(i)
        terms = phase.objective(copy.deepcopy(model), phase.train.batch(chosen), *eps)
        context.seed_dropout(i)
        if not taken:  # a step whose loss is NaN
            step.images.vectors, whole = step.images.vectors.float().fill_(math.nan), step.images.vectors
        step(chosen, *eps)
        if taken:
            for name, term in terms.items():
                expected[name] = expected.get(name, 0.0) + term.detach().double().sum().item()
        else:
            step.images.vectors = whole
            for module in model.modules():  # which the bad batch has spoilt; in training the run would end
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.reset_running_stats()
    assert step.totals.names == list(expected)
    assert step.totals.sums[-1] == 3 * 8
    for name, mean in step.totals.means().items():
        assert mean == pytest.approx(expected[name] / 24, rel=1e-6), name
    assert step.optimizer.skipped() == {"skipped_steps": 1}


@cases(networks=NETWORKS)
@pytest.mark.parametrize("shares", [[8], [3, 5], [0, 8]], ids=str)
@pytest.mark.parametrize("free", [False, True], ids=["", "free nats"])
def test_loss_is_minus_the_objective_per_image(make_toy, case, shares, free):
    """Its gradient is that of the mean over a batch, to which each process adds that of its share. With free nats, the
    ELBO has them in the place of a KL that is smaller."""
    toy = case.make(make_toy, count=20, gain=1.0, dtype=torch.float32)
    phase = make_phase(case, toy)
    plain = copy.deepcopy(phase.model)
    step = Step(phase, make_run(replace(PLAIN, free_epochs=4.0 if free else 0.0)))
    assert (step.free_nats is not None) == (free and case.which == "cvae")
    step.optimizer.learning_rate.zero_()  # the weights stay
    rows, eps = torch.randperm(20)[:8], phase.noise(8, context.generator(CPU, 0))
    terms = phase.objective(plain, phase.train.batch(rows), *eps)
    gain = maximised(terms)
    if free and case.objective == "elbo":
        levels = [kl for name, kl in terms.items() if re.fullmatch("kl_[0-9]", name)] or [terms["kl"]]
        nats = torch.cat(levels).detach().quantile(0.5)  # between two of them
        step.free_nats.copy_(nats)
        gain = terms["log_likelihood"] - sum(torch.where(kl < nats, nats, kl) for kl in levels)
    (-gain.mean()).backward()

    total, losses = torch.zeros_like(step.weights.gradient), []
    step.run.processes.sum_ = lambda gradient, loss: losses.append(loss.item())  # what is exchanged
    for part in torch.arange(8).split(shares):
        step(rows[part], *(each[:, part] for each in eps))
        total += step.weights.gradient
    assert sum(losses) == pytest.approx(-gain.mean().item(), rel=1e-5)
    assert step.totals.means()[next(iter(terms))] == pytest.approx(maximised(terms).mean().item(), rel=1e-5)
    trained = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    assert set(expected) == set(step.weights)
    for name, gradient in expected.items():
        found = step.weights.view(name, total)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)
    assert step.totals.sums[-1] == 8


@cases(networks=NETWORKS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_agrees_with_float32(make_toy, case, precision):
    """Per image, the log-likelihood to half a machine epsilon of the half type, the KL to two; each gradient to eight.

    The step that follows lowers the loss as much as float32's does, to a hundredth. The toys have few units so close to
    the edge of their ReLU that rounding brings them to its other side, which costs a gradient some epsilons each.
    """
    epsilon = torch.finfo(context.HALF[precision]).eps
    results = {}
    for name in ("fp32", precision):
        toy = case.make(
            make_toy, height=28, width=28, hidden=(100, 80), latent_dim=20, count=64, dtype=torch.float32,
            seed={"tutorial": 0, "paper": 2}.get(case.network, 0),
        )  # fmt: skip
        step = Step(make_phase(case, toy), make_run(Settings(), name))
        weights, optimizer, eps, skipped = step.weights, step.optimizer, case.noise(toy), True
        while skipped:  # a scale that overflows is halved, and the weights stay as they were
            with context.autocast(step.precision, CPU):
                terms = case.function()(weights.model, toy.batch, *eps)
            loss = -maximised(terms).mean()
            scale = 1.0 if optimizer.scale is None else float(optimizer.scale)
            with weights.collecting_gradients():
                optimizer.scaled(loss).backward()
            found = [weights.view(weight, weights.gradient).float() / scale for weight in weights]
            skipped = bool(optimizer.step(loss.detach()))
            optimizer.check("here")
        with context.autocast(step.precision, CPU):
            after = -maximised(case.function()(weights.model, toy.batch, *eps)).mean()
        assert all(value.dtype == torch.float32 for value in terms.values())
        results[name] = ({name: value.detach() for name, value in terms.items()}, found, loss.item(), after.item())
    (wide, wide_gradients, wide_loss, wide_after), (half, half_gradients, _, half_after) = results.values()
    assert not torch.equal(maximised(half), maximised(wide))  # it was in half precision
    for name, value in wide.items():
        torch.testing.assert_close(half[name], value, rtol=2 * epsilon if name == "kl" else epsilon / 2, atol=0)
    for ours, theirs in zip(half_gradients, wide_gradients, strict=True):
        assert (ours - theirs).norm() <= 8 * epsilon * theirs.norm()
    gain = wide_loss - wide_after
    assert gain > 1
    assert half_after == pytest.approx(wide_after, abs=gain / 100)


@pytest.mark.parametrize("capable", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, capable):
    """And what is asked for by name stays, whatever the processor has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, capable: True}, raising=False)
    assert context.resolve_precision("auto", CPU) == ("bf16" if capable else "fp32")
    assert [context.resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in versions of PyTorch that have it not
    assert context.resolve_precision("auto", CPU) == "fp32"


def test_average_spans_epochs(make_toy):
    """It is the recursion over the weights after each step, as if there were no epochs."""
    case = Case("tutorial", "elbo")
    phase = make_phase(case, case.make(make_toy, count=24))
    step = Step(phase, make_run(replace(PLAIN, average=500)))
    seen: list[Tensor] = []

    def take_step(*inputs: Tensor) -> None:
        step(*inputs)
        seen.append(step.weights.vector.double().clone())

    for epoch in (1, 2, 3):
        train_epoch(phase, step, take_step, epoch)
    assert len(seen) == 9
    expected = torch.zeros_like(seen[0])
    for i, weights in enumerate(seen):
        expected.lerp_(weights, 1 / (1 + i / 9))
    assert (expected - seen[-1]).abs().max() > 1e-4  # the control: the last weights are others
    for name, parameter in step.average.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.double(), step.weights.view(name, expected), rtol=1e-6, atol=1e-7)
