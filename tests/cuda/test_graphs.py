"""A training step as one CUDA graph: on a GPU, and on the CPU with a graph that is emulated."""

import math
from collections.abc import Callable
from itertools import count

import pytest
import torch
from support.steps import BATCH, Training, assert_equal, cases, make_training, state
from torch import Tensor

from cvae.context import generator
from cvae.training.graphed import GraphedStep
from train import train_epoch

IN_PRECISION = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def graphed(training: Training) -> GraphedStep:
    """Its step, to be captured; a failure fails the test."""
    return GraphedStep(training.step, pytest.fail)


def trained(training: Training, take_step: Callable[..., None]) -> dict[str, Tensor]:
    """What three epochs leave."""
    for number in (1, 2, 3):
        train_epoch(training.phase, training.run, training.step, take_step, number)
    return state(training)


@cases
@IN_PRECISION
def test_graphed_epochs_equal_eager_ones(device, network, objective, precision):
    """Bit for bit: the images are drawn anew in each epoch, the rate and the free nats change in each step."""
    eager, in_graph = [
        make_training(
            network, objective, precision, device=device, targets="binary", bend=0.5, unbent_epochs=6, clip=1.0
        )
        for _ in range(2)
    ]
    before = eager.step.optimizer.parameters[0].clone()
    assert_equal(trained(eager, eager.step), trained(in_graph, graphed(in_graph)))
    assert not torch.equal(before, eager.step.optimizer.parameters[0])


@IN_PRECISION
def test_bad_steps_are_skipped_in_the_graph(device, precision):
    """Nothing but their count stays of them; float16's overflows are among the steps of the test above."""
    training = make_training("tutorial", "elbo", precision, device=device)
    take_step, rows = graphed(training), torch.arange(BATCH, device=device)
    eps = training.phase.noise(BATCH, generator(training.run.context.device, 0))[0]
    for _ in range(20):
        take_step(rows, eps)
    before, skipped = state(training), training.step.optimizer.skipped()
    take_step(rows, eps * math.nan)
    assert training.step.optimizer.skipped() == skipped | {"skipped_steps": 1}
    assert_equal(state(training), before, "counts")
    take_step(rows, eps)
    assert not torch.equal(state(training)["optimizer.moments.0"], before["optimizer.moments.0"])


# What a capture means, by the emulation


class Sum:
    """A step that adds its input to a sum on the device."""

    def __init__(self) -> None:
        self.sum = torch.zeros(3)
        self.streams: list[object] = []

    def __call__(self, x: Tensor) -> None:
        self.streams.append(torch.cuda.current_stream())
        self.sum.add_(x * 2)


def test_warm_up_capture_and_replay(emulation):
    """Three steps as they are, on the stream of the capture; then replays of one capture, with each call's inputs.

    Each graph has a stream of its own, and the inputs may be freed after each call.
    """
    for _ in range(2):
        step, warnings = Sum(), []
        take_step = GraphedStep(step, warnings.append)
        inputs = torch.arange(10.0)[:, None].repeat(1, 3)
        for i, x in enumerate(inputs):
            take_step(x)
            assert emulation.current_stream is emulation.default_stream
            assert torch.equal(step.sum, torch.full((3,), float(i * (i + 1))))
        assert torch.equal(inputs[:, 0], torch.arange(10.0))  # the caller's tensors are its own
        stream = emulation.captured_on[-1]
        assert step.streams == [stream] * (GraphedStep.WARM_UP + 1)
        assert stream.waited_for == [emulation.default_stream] * 3
        assert emulation.default_stream.waited_for[-3:] == [stream] * 3
        assert not warnings
    assert emulation.replays == 2 * (10 - GraphedStep.WARM_UP)
    assert len({*emulation.captured_on, emulation.default_stream}) == 3


FAILURES = [
    ("convolution", 2), ("convolution_backward", 3), ("sigmoid", 0), ("_fused_adamw_", 1), ("copy_", 1), ("its end", 0),
]  # fmt: skip


@pytest.mark.parametrize(("failing", "before"), FAILURES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_failed_capture_goes_on_without(emulation, failing, before, precision):
    """Wherever in the step it fails, halfway through the gradients too: the steps are those of a training without.

    They are taken on the stream that was the current one; one warning names the first of the errors.
    """
    eager, in_graph = (make_training("deep", "elbo", precision) for _ in range(2))
    warnings, calls = [], count()
    emulation.ends_badly = failing == "its end"
    emulation.fails = lambda func: func.overloadpacket.__name__ == failing and next(calls) == before
    assert_equal(trained(eager, eager.step), trained(in_graph, GraphedStep(in_graph.step, warnings.append)))
    assert emulation.current_stream is emulation.default_stream
    assert (len(emulation.captured_on), emulation.replays) == (1, 0)  # it is not tried again
    (line,) = warnings
    assert "\n" not in line
    reason = "failed due to a previous error" if emulation.ends_badly else "not permitted when stream is capturing"
    assert reason in line


def test_errors_of_another_kind_are_not_hidden(emulation):
    """A mistake in the program is no reason to go on without a graph."""
    calls = count(1)

    def step(x: Tensor) -> None:
        if next(calls) == GraphedStep.WARM_UP + 1:  # the capture
            raise TypeError("a mistake")

    take_step = GraphedStep(step, print)
    for _ in range(GraphedStep.WARM_UP):
        take_step(torch.ones(3))
    with pytest.raises(TypeError, match="a mistake"):
        take_step(torch.ones(3))
