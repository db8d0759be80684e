"""What needs a GPU: `make test-cuda`. Steps in a graph on it are in `test_graphs.py`."""

import json
import signal
from typing import Any

import pytest
import torch
from support.inprocess import call, call_train, make_tiny_data, results
from support.steps import BATCH, CPU, cases, make_training
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import eval as evaluation
import train
from cvae import context
from cvae.context import Context
from cvae.model import likelihood
from cvae.model.likelihood import evaluate
from cvae.model.objectives import maximised
from cvae.run import checkpoint
from cvae.training.graphed import GraphedStep

pytestmark = pytest.mark.cuda
TINY = [
    "--hidden", "16", "16", "--latent-dim", "4", "--batch-size", "20", "--schedule", "constant", "--patience", "100",
    "--baseline-epochs", "4", "--epochs", "4", "--quiet",
]  # fmt: skip
"""Three steps an epoch."""


@pytest.fixture
def run_training(tmp_path):
    """`train.py` in this process, on tiny images; returns the run's folder."""
    data = make_tiny_data(tmp_path / "data")

    def run(name: str, *words: str, code: int = 0):
        begin = [*TINY, "--data", data, "--name", name] if "--resume" not in words else []
        ended = call_train(*begin, *words, "--runs", tmp_path)
        assert ended.code == code, ended
        assert "could not be captured" not in ended.err
        return tmp_path / name

    return run


@cases
def test_gradient_is_that_of_the_cpu_in_float64(cuda, network, objective):
    """To 1e-4 of its norm: float32's products, in another order of sums, and no worse ones."""
    training, plain = (make_training(network, objective, device=device, clip=1e9) for device in (cuda, CPU))
    for module in (*training.phase.model.modules(), *plain.phase.model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    eps = plain.phase.noise(BATCH, context.generator(CPU, 0))
    reference = plain.phase.model.double().train()
    batch = plain.phase.train.batch(slice(0, BATCH))._replace(guess=None)
    batch = batch._replace(x=batch.x.double(), y=batch.y.double())
    terms = plain.phase.objective(reference, batch, *(each.double() for each in eps))
    (-maximised(terms).sum() / BATCH).backward()
    trained = sorted((p for p in reference.parameters() if p.requires_grad), key=lambda p: p.dim() > 1)
    wanted = torch.cat([torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in trained])
    training.step.free_nats = None
    training.step.model.train()
    training.step(torch.arange(BATCH, device=cuda), *(each.to(cuda) for each in eps))
    moments = training.step.optimizer.moments
    found = 10 * torch.cat([moment.flatten() for moment in moments]).cpu().double()  # of the first step
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("compute", "shapes"),
    [(torch.matmul, [(512, 512)] * 2), (torch.nn.functional.conv2d, [(8, 64, 32, 32), (64, 64, 3, 3)])],
    ids=["product", "convolution"],
)
def test_fp32_is_without_tf32(cuda, compute, shapes):
    """Against float64: off by float32's rounding, 2⁻²⁴, times what sums add, and not by TF32's 2⁻¹¹."""
    torch.manual_seed(0)
    left, right = map(torch.randn, shapes)
    exact = compute(left.double(), right.double())
    found = compute(left.to(cuda), right.to(cuda)).cpu()
    assert (found - exact).norm() < 1e-5 * exact.norm()


# Whole runs


@pytest.mark.parametrize("network", ["tutorial", "paper", "deep"])
@pytest.mark.parametrize("calls", [7, 19], ids=["in the baseline's third epoch", "in the CVAE's third"])
def test_interrupted_and_resumed_equals_undisturbed(cuda, run_training, monkeypatch, network, calls):
    """Ctrl-C comes after so many steps, most of which are replays of a graph."""
    undisturbed = run_training("undisturbed", "--network", network, "--device", "cuda")
    call_step, count = GraphedStep.__call__, iter(range(calls + 1))

    def counted(self: GraphedStep, *inputs: Tensor) -> None:
        call_step(self, *inputs)
        if next(count, None) == calls:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(GraphedStep, "__call__", counted)
        run = run_training("interrupted", "--network", network, "--device", "cuda", code=130)
    run_training("interrupted", "--resume", "interrupted", "--quiet")
    assert results(run) == results(undisturbed)


@pytest.mark.parametrize("begun_on_cuda", [True, False])
def test_checkpoints_open_on_the_other_device(cuda, run_training, monkeypatch, begun_on_cuda):
    """A run that was begun on one device goes on on the other; checkpoints hold tensors of the CPU."""
    stored = []
    for on_cuda, words in ((begun_on_cuda, ["--device", "auto"]), (not begun_on_cuda, ["--resume", "run"])):
        with monkeypatch.context() as patch:
            if not on_cuda:
                patch.setattr(torch.cuda, "is_available", lambda: False)
            run = run_training("run", *words, "--epochs", str(4 + 2 * len(stored)), "--quiet")
        stored.append(checkpoint.load(run / "last.pt"))
    first, last = stored
    assert (first["progress"]["epoch"], last["progress"]["epoch"]) == (4, 6)
    assert last["optimizer"]["updates"][0] == first["optimizer"]["updates"][0] + 2 * 3
    assert all(leaf.device == CPU for leaf in tree_leaves(stored) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("network", ["tutorial", "paper", "deep"])
def test_estimates_are_those_of_the_cpu(cuda, monkeypatch, network):
    """With the same noise, per image to 1e-4 of it: the table does not depend on the device."""
    draw, generator = likelihood.noise, context.generator
    found = []
    for where in (CPU, cuda):
        monkeypatch.setattr(context, "generator", lambda device, *key: generator(CPU, *key))
        monkeypatch.setattr(likelihood, "noise", lambda *arguments, where=where: draw(*arguments).to(where))
        training = make_training(network, device=where)
        portions = list(evaluate(training.model.eval(), training.phase.train, [70], 0, Context(where)))
        found.append([torch.cat(values, dim=-1).cpu() for values in zip(*portions, strict=True)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_table_and_figure(cuda, run_training, tmp_path):
    """What `eval.py` prints is what it prints on the CPU, but for the noise: to 2%."""
    run = run_training("run", "--device", "cuda", "--precision", "fp32")
    columns = []
    for where in ("cpu", "cuda"):
        words = ["--runs", run, "--device", where, "--format", "json", "--figure", tmp_path / f"{where}.png"]
        ended = call(evaluation, *words, "--samples", "100")
        assert ended.code == 0, ended
        columns.append([leaf for leaf in tree_leaves(json.loads(ended.out)) if isinstance(leaf, int | float)])
        assert (tmp_path / f"{where}.png").read_bytes().startswith(b"\x89PNG")
    assert columns[0] == pytest.approx(columns[1], rel=0.02, abs=0.05)


def test_memory_is_flat_over_epochs(cuda, run_training, monkeypatch):
    """After the second epoch of each phase, not a byte more is allocated or reserved."""
    allocated: dict[str, list[tuple[int, int]]] = {}
    train_epoch = train.train_epoch

    def watched(phase: Any, *arguments: Any) -> None:
        train_epoch(phase, *arguments)
        torch.cuda.synchronize()
        allocated.setdefault(phase.name, []).append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(train, "train_epoch", watched)
    run_training("run", "--baseline-epochs", "6", "--epochs", "8", "--device", "cuda")
    assert {name: len(sizes) for name, sizes in allocated.items()} == {"baseline": 6, "cvae": 8}
    for name, sizes in allocated.items():
        assert len(set(sizes[2:])) == 1, (name, sizes)
