"""Training and evaluation on CUDA: on a real device (`make test-cuda`), and as far as it goes on an emulated one.

The tests marked `cuda` need a GPU; the others of the same names run everywhere, with the CPU in its place.
"""

import json
import math
import signal
import time
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from simulation import CPU, CUDA, on_gpu
from small import (
    BATCH,
    KINDS,
    NAMES,
    PRECISIONS,
    SMALL,
    Training,
    assert_equal,
    left_behind,
    make_training,
    numbers,
    source,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import eval as evaluation
import train
from cvae import context
from cvae.context import GraphedStep
from cvae.data.images import Batch, ImageSet
from cvae.model import likelihood
from cvae.model.likelihood import evaluate
from cvae.model.objectives import maximised
from cvae.run import checkpoint
from cvae.run.load import load
from cvae.settings import Settings

ALL = pytest.mark.parametrize(("network", "objective"), KINDS, ids=map("-".join, KINDS))
NETWORK = pytest.mark.parametrize("network", NAMES)
IN_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


def graphed(training: Training) -> GraphedStep:
    """Its step, to be captured; a failure fails the test."""

    def refuse(line: str) -> None:
        raise AssertionError(line)

    return GraphedStep(training.step, refuse)


# Steps


@ALL
@IN_PRECISION
def test_twenty_graphed_steps_equal_eager_ones(device, network, objective, precision):
    """Weights, buffers, the optimizer's state, the sums of the terms: bit for bit, and the capture succeeds."""
    states = []
    for in_graph in (False, True):
        training = make_training(device, network, objective, precision)
        before = training.optimizer.weights.vector.clone()
        torch.manual_seed(0)  # dropout
        training.take(range(20), graphed(training) if in_graph else None)
        assert not torch.equal(before, training.optimizer.weights.vector)
        states.append(training.state())
    assert all(math.isfinite(mean) for mean in states[0]["totals"].values())
    assert_equal(*states)


@NETWORK
@IN_PRECISION
def test_graph_after_a_restart_goes_on_as_before(device, network, precision):
    """Ten steps, and ten of another training that has taken over the state, are twenty."""
    undisturbed, first, second = (make_training(device, network, "elbo", precision) for _ in range(3))
    torch.manual_seed(0)
    undisturbed.take(range(20), graphed(undisturbed))
    torch.manual_seed(0)
    first.take(range(10), graphed(first))
    state = first.state()
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.step.weights.refresh()
    second.take(range(10, 20), graphed(second))
    for part in ("model", "optimizer"):
        assert_equal(undisturbed.state()[part], second.state()[part])


@ALL
@IN_PRECISION
@on_gpu
def test_step_never_waits_for_the_device(network, objective, precision):
    """PyTorch raises at any copy to the host and any other wait."""
    context.prepare(CUDA)
    training = make_training(CUDA, network, objective, precision)
    inputs = [training.inputs(number) for number in range(3)]
    training.step(*inputs[0])  # what is made once, is made here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(*inputs[1])
        training.optimizer.learning_rate.fill_(1e-3)
        training.step(*inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NETWORK
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_gradient_is_that_of_the_cpu_in_float64(device, network, objective):
    """To 1e-4 of its norm: float32's products, by another order of sums, and no worse ones."""
    training = make_training(device, network, objective)
    plain = make_training(CPU, network, objective)
    plain.step.weights.release()  # plain autograd
    reference = plain.model.double()
    for model in (training.model, reference):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    rows, eps = training.inputs(0)
    batch = Batch(*(part.cpu().double() for part in training.phase.train.batch(rows)))
    terms = training.phase.objective(reference.train(), batch, eps.cpu().double())
    (-maximised(terms).sum() / BATCH).backward()
    training.step(rows, eps)
    wanted = dict(reference.named_parameters())
    assert set(training.optimizer.weights) == {name for name, weight in wanted.items() if weight.requires_grad}
    for name in training.optimizer.weights:
        ours = training.optimizer.weights.view(name, training.optimizer.weights.gradient).cpu().double()
        theirs = wanted[name].grad
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6, name


@on_gpu
@pytest.mark.parametrize("operation", ["product", "convolution"])
def test_fp32_is_without_tf32(operation):
    """Against float64: off by float32's rounding, 2⁻²⁴, times what sums add, and not by TF32's 2⁻¹¹."""
    context.prepare(CUDA)
    torch.manual_seed(0)
    if operation == "product":
        left, right, compute = torch.randn(512, 512), torch.randn(512, 512), torch.matmul
    else:
        left, right, compute = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3), torch.nn.functional.conv2d
    exact = compute(left.double(), right.double())

    def error() -> float:
        return float((compute(left.to(CUDA), right.to(CUDA)).cpu() - exact).norm() / exact.norm())

    assert error() < 1e-5
    if operation == "product" and torch.cuda.get_device_capability() >= (8, 0):  # TF32 would be seen
        try:
            torch.set_float32_matmul_precision("high")
            assert error() > 1e-4
        finally:
            context.prepare(CUDA)


@IN_PRECISION
def test_nan_is_skipped_in_the_graph(device, precision):
    """Nothing stays of a step whose noise is NaN, but its count."""
    training = make_training(device, "tutorial", "elbo", precision)
    take_step = graphed(training)
    training.take(range(10), take_step)
    before = training.state()
    rows, eps = training.inputs(10)
    take_step(rows, eps * math.nan)
    after = training.state()
    assert after["skipped"]["skipped_steps"] == before["skipped"]["skipped_steps"] + 1
    assert_equal(before["model"], after["model"])
    assert_equal(before["totals"], after["totals"])
    for part in ("moments", "squares", "updates"):
        assert_equal(before["optimizer"][part], after["optimizer"][part])
    training.take(range(11, 13), take_step)
    assert training.state()["skipped"]["skipped_steps"] == after["skipped"]["skipped_steps"]
    assert training.optimizer.weights.vector.isfinite().all()


def test_overflow_halves_the_scale_in_the_graph(device):
    """Until it does not overflow; the weights stay as they are meanwhile."""
    training = make_training(device, "tutorial", "elbo", "fp16")
    take_step = graphed(training)
    training.take(range(10), take_step)
    overflows = training.state()["skipped"]["overflow_steps"]
    training.optimizer.scale.fill_(2.0**60)
    before = training.optimizer.weights.vector.clone()
    training.take(range(10, 13), take_step)
    assert float(training.optimizer.scale) == 2.0**57
    assert torch.equal(before, training.optimizer.weights.vector)
    assert training.state()["skipped"]["overflow_steps"] == overflows + 3
    assert training.state()["skipped"]["skipped_steps"] == 0


# Whole runs


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C comes after so many graphed steps."""
    call, count = GraphedStep.__call__, iter(range(calls + 1))

    def counted(self: GraphedStep, *inputs: Tensor) -> None:
        call(self, *inputs)
        if next(count, None) == calls:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GraphedStep, "__call__", counted)


@NETWORK
@pytest.mark.parametrize("calls", [13, 47], ids=["in the baseline's second epoch", "in the CVAE's third"])
def test_interrupted_and_resumed_equals_undisturbed(device, run_training, monkeypatch, capsys, network, calls):
    undisturbed = run_training("undisturbed", "--network", network, "--device", "cuda")
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        run = run_training("interrupted", "--network", network, "--device", "cuda", code=130)
    run_training("interrupted", "--resume", "interrupted", "--quiet")
    assert "could not be captured" not in capsys.readouterr().err
    assert (run / "summary.json").exists()
    assert_equal(left_behind(undisturbed), left_behind(run))


@pytest.mark.parametrize("begun_on_cuda", [True, False])
def test_checkpoints_open_on_the_other_device(device, run_training, monkeypatch, begun_on_cuda):
    """A run that was begun on the one goes on on the other, and its optimizer with it."""

    def on_cuda(patch: pytest.MonkeyPatch, wanted: bool) -> None:
        if not wanted:
            patch.setattr(torch.cuda, "is_available", lambda: False)

    with monkeypatch.context() as patch:
        on_cuda(patch, begun_on_cuda)
        run = run_training("run", "--device", "auto")
    first = checkpoint.load(run / "last.pt")
    with monkeypatch.context() as patch:
        on_cuda(patch, not begun_on_cuda)
        run_training("run", "--resume", "run", "--epochs", "6", "--quiet")
    last = checkpoint.load(run / "last.pt")
    assert first["progress"]["epoch"] == 4
    assert last["progress"]["epoch"] == 6
    assert last["optimizer"]["updates"] == first["optimizer"]["updates"] + 20
    for stored in (first, last):
        assert all(leaf.device == CPU for leaf in tree_leaves(stored) if isinstance(leaf, Tensor))
    seconds = [json.loads(line)["images_per_second"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(seconds) == 2 + 6


def test_evaluation_is_that_of_the_cpu(device, run_training, monkeypatch):
    """With the same noise, per image to 1e-4 of it: the table does not depend on the device."""
    run = run_training("run", "--device", "cuda")
    draw = likelihood.noise
    monkeypatch.setattr(context, "generator", runtime_generator_on_cpu)
    found = []
    for where in (CPU, CUDA):
        monkeypatch.setattr(likelihood, "noise", lambda *arguments, where=where: draw(*arguments).to(where))
        model = load(run, where)
        images = ImageSet(evaluation.load_test().images, model.split, where)
        portions = evaluate(model, images, [70], 0)
        found.append([torch.cat(values, dim=-1).cpu() for values in zip(*portions, strict=True)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def runtime_generator_on_cpu(device: torch.device, *key: object) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(context.derive_seed(*key))


def test_table_and_figure(device, run_training, tmp_path, capsys):
    """`eval.py` on the device; what it prints is what the CPU has it print, but for the noise: to 2%."""
    run_training("run", "--device", "cuda")
    columns = []
    for where in ("cpu", "cuda"):
        words = ["--runs", tmp_path, "--device", where, "--format", "json", "--figure", tmp_path / f"{where}.png"]
        assert evaluation.main(list(map(str, words))) == 0
        columns.append(json.loads(capsys.readouterr().out))
        assert (tmp_path / f"{where}.png").read_bytes().startswith(b"\x89PNG")
    on_cpu, on_cuda = (numbers(column) for column in columns)
    assert len(on_cpu) == len(on_cuda)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert b == pytest.approx(a, rel=0.02, abs=0.05)


@on_gpu
def test_memory_is_flat_over_epochs(monkeypatch, tmp_path):
    """After the second epoch of each phase, not a byte more is allocated or reserved."""
    images = torch.randint(256, (400, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr("cvae.run.plan.load_train", lambda *_: source(images[:300], images[300:]))
    allocated: dict[str, list[tuple[int, int]]] = {}
    train_epoch = train.train_epoch

    def watched(phase: Any, *arguments: Any) -> None:
        train_epoch(phase, *arguments)
        torch.cuda.synchronize()
        allocated.setdefault(phase.name, []).append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(train, "train_epoch", watched)
    words = [*SMALL, "--baseline-epochs", "6", "--epochs", "8", "--device", "cuda", "--runs", str(tmp_path)]
    assert train.main(words) == 0
    assert {name: len(sizes) for name, sizes in allocated.items()} == {"baseline": 6, "cvae": 8}
    for name, sizes in allocated.items():
        assert len(set(sizes[2:])) == 1, (name, sizes)


@on_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_images_per_second(capsys, precision):
    """Printed, for `docs/cuda.md`, of the default sizes; nothing is asserted of it but that it is a number."""
    context.prepare(CUDA)
    default = {each.name: each.default for each in fields(Settings)}
    sizes = {name: default[name] for name in ("hidden", "latent_dim", "particles", "batch_size")}
    for objective in ("log_likelihood", "elbo"):
        for in_graph in (False, True):
            training = make_training(CUDA, "tutorial", objective, precision, size=28, count=10_000, **sizes)
            take_step = graphed(training) if in_graph else training.step
            training.take(range(50), take_step)
            inputs = training.inputs(50)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(1000):
                take_step(*inputs)
            torch.cuda.synchronize()
            speed = 1000 * sizes["batch_size"] / (time.perf_counter() - started)
            assert math.isfinite(speed)
            with capsys.disabled():
                how = f"{objective}, {precision}, {'graphed' if in_graph else 'eager'}"
                print(f"\n{torch.cuda.get_device_name()}, {how}: {speed:,.0f} images/s", end="")
