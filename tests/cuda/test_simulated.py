"""What CUDA asks of the code, checked without it: where tensors are, and what capturing a step in a graph means."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from simulation import CPU, CUDA, Emulation, OnDevice, Stream, backward, fake_cuda, grad
from small import KINDS, NAMES, PRECISIONS, SIDE, Training, assert_equal, left_behind, make_training
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

import train
from cvae import context
from cvae.context import GraphedStep, Processes
from cvae.model.likelihood import Likelihoods, evaluate
from cvae.report.figures import completion_rows
from cvae.training.weights import WeightAverage

ALL = pytest.mark.parametrize(("network", "objective"), KINDS, ids=map("-".join, KINDS))
IN_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


# Where the tensors are


def fake_training(network: str, objective: str, precision: str) -> Training:
    return make_training(CUDA, network, objective, precision, move=False)


@ALL
@IN_PRECISION
def test_step_and_validation_stay_on_the_device(monkeypatch, network, objective, precision):
    """Each tensor of each operation, the gradients' and the optimizer's included, and no number is read."""
    with fake_cuda(monkeypatch):
        training = fake_training(network, objective, precision)
        average = WeightAverage(training.phase.model, training.step.weights, 500)
        for number in range(2):
            inputs = training.inputs(number)
            with OnDevice() as watch:
                training.step(*inputs)
                average.update(number, last=True)
        assert watch.adams == 2  # weights with decay and without
        forward = {"convolution"} if network == "convolutional" else {"baddbmm"}
        assert forward | {"index_select", "index_copy_"} <= watch.seen
        with OnDevice():
            totals = training.phase.validate(training.phase.model, 0, precision, Processes())
        assert totals.sums.device == CUDA


@pytest.mark.parametrize("network", NAMES)
def test_evaluation_and_completions_stay_on_the_device(monkeypatch, network):
    with fake_cuda(monkeypatch):
        training = fake_training(network, "elbo", "fp32")
        model = training.model.eval()
        with OnDevice():
            portions = list(evaluate(model, training.phase.train, [60, 110], 0))
            x = training.phase.train.batch(slice(10)).x
            y_hat = model.baseline_net(x).sigmoid()
            # In evaluation mode it looks at the values of x too, of which there are none here.
            samples = model.train().completions(x, torch.randn(5, 1, 4, device=CUDA))
        assert [len(each) for each in portions] == [len(Likelihoods._fields)] * 4
        assert all(values.device == CUDA for each in portions for values in each)
        assert samples.shape == (5, 10, model.split.num_hidden)
        # The picture after an epoch begins and ends on the CPU.
        rows = completion_rows(torch.zeros(10, SIDE, SIDE, dtype=torch.uint8), model.split, y_hat, samples)
        assert [pictures.shape for _, pictures in rows] == [(10, 3, SIDE, SIDE)] * 8
        assert {pictures.device for _, pictures in rows} == {CPU}


@pytest.mark.parametrize("network", NAMES)
@IN_PRECISION
def test_active_units_stay_on_the_device(monkeypatch, network, precision):
    """Up to the count, which is read; there are no numbers here that could be."""
    with fake_cuda(monkeypatch):
        training = fake_training(network, "elbo", precision)
        model = training.model.eval()
        with pytest.raises(DataDependentOutputException), OnDevice() as watch:
            training.phase.active_units(model, 0, precision)
        assert "var" in watch.seen


def test_images_drawn_anew_stay_on_the_device(monkeypatch):
    """And the guesses for them."""
    with fake_cuda(monkeypatch):
        images = fake_training("tutorial", "elbo", "fp32").phase.train
        with OnDevice():
            images.redraw(0, "cvae", 1, binary=True)
        assert images.vectors.device == images.guesses.device == CUDA


def test_only_gradients_go_by_nccl(monkeypatch):
    """All else is on the CPU, for gloo, which raises when another process ends."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    asked, places = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_: places.append(tensor.device))
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, part: places.append(part.device))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, device: places.append(device))
    with fake_cuda(monkeypatch):
        processes, gradient, totals = Processes(), torch.zeros(4, device=CUDA), torch.zeros(3, device=CUDA)
        with processes.connected(CUDA):
            processes.sum_(gradient, torch.zeros((), device=CUDA))
            assert places == [CUDA]
            processes.sum_on_host_(totals)
            processes.average_(torch.zeros(2, device=CUDA))
            processes.gather(totals)
            processes.maximum(1)
            processes.on_main(lambda: None)
            assert places == [CUDA] + [CPU] * 5
        assert gradient.device == totals.device == CUDA
        with processes.connected(CPU):
            pass
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]


def a_constant_on_the_cpu(objective: Callable[..., dict[str, Tensor]], *inputs: Any) -> dict[str, Tensor]:
    return {name: term + torch.tensor(1.0) for name, term in objective(*inputs).items()}


def a_number_read(objective: Callable[..., dict[str, Tensor]], *inputs: Any) -> dict[str, Tensor]:
    return {name: term / float(term.detach().max()) for name, term in objective(*inputs).items()}


@pytest.mark.parametrize("mutant", [a_constant_on_the_cpu, a_number_read])
def test_mutants_are_caught(monkeypatch, mutant):
    """A scalar on the CPU computes the right thing on CUDA too, but cannot be captured."""
    with fake_cuda(monkeypatch):
        training = fake_training("tutorial", "elbo", "fp32")
        training.step.objective = partial(mutant, training.step.objective)
        inputs = training.inputs(0)
        with pytest.raises(Exception, match=r"sees a tensor on cpu|_local_scalar_dense"), OnDevice():
            training.step(*inputs)


@ALL
def test_python_autograd_is_autograd(monkeypatch, network, objective):
    """What differentiates fake tensors, on real ones: the same gradients as PyTorch's own."""
    found = []
    for patched in (False, True):
        training = make_training(CPU, network, objective)
        torch.manual_seed(0)  # dropout
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(Tensor, "backward", backward)
                patch.setattr(torch.autograd, "grad", grad)
            training.step(*training.inputs(0))
        found.append(training.optimizer.weights.gradient)
    assert found[0].ne(0).any()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_tf32_is_off_whatever_it_was():
    """For products and for convolutions, by PyTorch's older settings and by its newer ones, and without a warning."""
    backends = torch.backends
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        backends.cudnn.allow_tf32 = True
        context.prepare(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not backends.cuda.matmul.allow_tf32
        assert not backends.cudnn.allow_tf32
        for newer in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.cudnn, backends):
            assert newer.fp32_precision in ("ieee", "none")
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]


# Capture and replay


class Simple:
    """A step that adds its input to a sum on the device."""

    def __init__(self) -> None:
        self.sum = torch.zeros(3)
        self.calls: list[Stream] = []

    def __call__(self, x: Tensor) -> None:
        self.calls.append(torch.cuda.current_stream())
        self.sum.add_(x * 2)


def test_warm_up_capture_and_replay(emulation: Emulation):
    """Three steps as they are, on the stream of the capture, then replays of one capture with each call's inputs."""
    step, warnings = Simple(), []
    take_step = GraphedStep(step, warnings.append)
    for i in range(10):
        take_step(torch.full((3,), float(i)))
        assert emulation.current_stream is emulation.default_stream
        assert torch.equal(step.sum, torch.full((3,), float(i * (i + 1))))
    (stream,) = emulation.captured_on
    assert step.calls == [stream] * (GraphedStep.WARM_UP + 1)
    assert emulation.replays == 10 - GraphedStep.WARM_UP
    # Each stream waits for the other, so that a warm-up step sees all before it, and is seen by all after it.
    assert stream.waited_for == emulation.default_stream.waited_for[:0] + [emulation.default_stream] * 3
    assert emulation.default_stream.waited_for == [stream] * 3
    assert not warnings


def test_each_graph_has_a_stream_of_its_own(emulation: Emulation):
    """Else the end of one frees what another one's products work in."""
    for _ in range(3):
        step = Simple()
        take_step = GraphedStep(step, print)
        for _ in range(4):
            take_step(torch.ones(3))
        assert step.calls == [emulation.captured_on[-1]] * 4
    assert len({*emulation.captured_on, emulation.default_stream}) == 4


@pytest.mark.parametrize("ends_badly", [False, True], ids=["within", "at its end"])
def test_failed_capture_goes_on_without(emulation: Emulation, ends_badly):
    """On the stream that was the current one, all steps once, the one that was to be captured too; one warning."""
    step, warnings = Simple(), []
    take_step = GraphedStep(step, warnings.append)
    if ends_badly:
        emulation.ends_badly = True
    else:
        emulation.fails = lambda func: func.overloadpacket is torch.ops.aten.add_
    for i in range(10):
        before = emulation.synchronised
        take_step(torch.full((3,), float(i)))
        assert emulation.current_stream is emulation.default_stream
        assert torch.equal(step.sum, torch.full((3,), float(i * (i + 1))))
        # PyTorch itself synchronises before a capture, and the fallback once after it.
        assert emulation.synchronised - before == (2 if i == GraphedStep.WARM_UP else 0)
    assert step.calls[GraphedStep.WARM_UP + 1 :] == [emulation.default_stream] * 7
    assert len(emulation.captured_on) == 1  # it is not tried again
    assert emulation.replays == 0
    (line,) = warnings
    assert "\n" not in line
    cause = "failed due to a previous error" if ends_badly else "not permitted when stream is capturing"
    assert cause in line  # the first of the errors, which says more than those that follow from it


@pytest.mark.parametrize(
    "failing",
    ["convolution", "convolution_backward", "_fused_adamw_", "index_copy_"],
)
def test_failed_capture_of_a_training_changes_nothing(emulation: Emulation, failing):
    """Wherever in the step it fails, halfway through the gradients too: the steps are those of a training without."""
    states = []
    for in_graph in (False, True):
        training, warnings = make_training(CUDA, "convolutional", "elbo"), []
        emulation.fails = lambda func: func.overloadpacket.__name__ == failing
        torch.manual_seed(0)
        training.take(range(10), GraphedStep(training.step, warnings.append) if in_graph else None)
        assert len(warnings) == in_graph
        states.append(training.state())
    assert_equal(*states)


def test_errors_of_another_kind_are_not_hidden(emulation: Emulation):
    """A mistake in the program is no reason to go on without a graph."""

    def step(x: Tensor) -> None:
        if emulation.captured_on:
            raise TypeError("a mistake")

    take_step = GraphedStep(step, print)
    for _ in range(GraphedStep.WARM_UP):
        take_step(torch.ones(3))
    with pytest.raises(TypeError, match="a mistake"):
        take_step(torch.ones(3))


@pytest.mark.parametrize(
    "reads", [lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool(t.any()), lambda t: torch.equal(t, t)]
)
def test_emulated_capture_refuses_what_waits(emulation: Emulation, reads):
    warnings: list[str] = []
    take_step = GraphedStep(reads, warnings.append)
    for _ in range(5):
        take_step(torch.ones(3))
    assert len(warnings) == 1


def test_emulated_graph_computes_on_the_memory_of_its_capture(emulation: Emulation):
    """So that it would show if a step made a new tensor of its result, or kept a number on the host."""
    results: dict[str, Any] = {"new": torch.zeros(3), "host": 0, "in place": torch.zeros(3)}

    def step(x: Tensor) -> None:
        results["new"] = results["new"] + x
        results["host"] += 1
        results["in place"] += x

    take_step = GraphedStep(step, print)
    for _ in range(10):
        take_step(torch.ones(3))
    assert results["in place"].tolist() == [10.0] * 3
    assert results["host"] == 4
    assert results["new"].tolist() == [4.0] * 3  # those of the warm-up and one


@pytest.mark.parametrize(
    "words",
    [
        ["--network", "paper", "--objective", "iwae", "--particles", "3"],
        ["--precision", "fp16"],
        ["--targets", "binary"],
        ["--network", "deep", "--levels", "2", "--bend", "0.5", "--unbent-epochs", "1", "--free-epochs", "2.5"],
    ],
    ids=" ".join,
)
def test_whole_run_is_that_without_graphs(emulation: Emulation, run_training, capsys, words):
    """Both phases, bit for bit: checkpoints, best weights and all that is logged."""
    without = run_training("without", "--device", "cpu", *words)
    assert emulation.captured_on == []
    run = run_training("with", "--device", "cuda", *words)
    assert "could not be captured" not in capsys.readouterr().err
    assert len(set(emulation.captured_on)) == 2  # a stream for each phase
    assert emulation.replays == 6 * 10 - 2 * GraphedStep.WARM_UP
    assert_equal(left_behind(without), left_behind(run))


@pytest.mark.parametrize("kind", ["compile", "two processes", "cpu"])
def test_no_capture_by_hand(emulation: Emulation, run_training, monkeypatch, kind):
    """With `--compile`, of several processes, and on a CPU."""

    class Two(Processes):
        def __init__(self) -> None:
            super().__init__()
            self.rank, self.count = 1, 2  # of one portion of images, the last takes it

        def sum_(self, *tensors: Tensor) -> None:
            """As if the other process had nothing."""

        sum_on_host_ = sum_

        def maximum(self, value: int) -> int:
            return value

        def on_main(self, action: Callable[[], Any]) -> Any:
            return action()

        on_all = on_main

        def connected(self, device: torch.device) -> AbstractContextManager[None]:
            return nullcontext()

    class Refused(nn.Module):
        def __init__(self, *arguments: object):
            raise AssertionError("captured by hand")

    monkeypatch.setattr(context, "GraphedStep", Refused)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    if kind == "two processes":
        monkeypatch.setattr(train, "Processes", Two)
    words = ["--epochs", "1", "--device", "cpu" if kind == "cpu" else "cuda"]
    run_training("run", *words, *(["--compile"] if kind == "compile" else []))
    assert emulation.captured_on == []
