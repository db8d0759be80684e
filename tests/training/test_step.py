"""Steps and epochs of training against plain PyTorch: AdamW, clip_grad_norm_, and an average by its definition."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from support.inprocess import TINY, call_train, interrupted_after, make_tiny_data, results
from support.steps import BATCH, COUNT, CPU, Training, assert_equal, cases, make_training, pictures, state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvae import context
from cvae.data.tasks import Batch
from cvae.model.objectives import OF_PRIOR
from train import train_epoch

STEPS = COUNT // BATCH  # of an epoch


@pytest.fixture
def float64():
    """All in float64, so that a comparison shows mistakes and not rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Watch(TorchDispatchMode):
    """Refuses tensors that are not on the device `meta`, on which nothing can wait; it has no fused AdamW."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = None if func.overloadpacket is torch.ops.aten._fused_adamw_ else func(*args, **(kwargs or {}))
        assert all(leaf.is_meta for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)), func
        return result


class Plain:
    """The training of a `Training`, not begun yet, written out with PyTorch's own parts."""

    def __init__(self, training: Training):
        self.phase, self.s, self.context = training.phase, training.run.settings, training.run.context
        self.model = copy.deepcopy(self.phase.model).train()
        self.average = copy.deepcopy(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        flat, others = ([p for p in self.trained if (p.dim() < 2) == is_flat] for is_flat in (True, False))
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": others, "weight_decay": self.s.weight_decay}]
        self.adam = torch.optim.AdamW(groups, lr=1.0)
        task = self.phase.train.task
        self.x, self.y, *_ = task.batch(task.rows(pictures(side=task.height)))
        self.guesses = None if self.context.precision == "fp32" else self.phase.train.guesses  # which are kept in half
        self.steps, self.norms = 0, []
        self.scale = 64.0 if self.context.precision == "fp16" else 1.0

    def epoch(self, number: int) -> dict[str, float]:
        """Take the steps of an epoch; returns the means of the terms."""
        s, seen = self.s, []
        key = s.seed, self.phase.name, number
        random = context.generator(CPU, *key)
        context.seed_dropout(*key, 0)
        for i, rows in enumerate(context.permutation(COUNT, *key)[: STEPS * BATCH].split(BATCH)):
            now = number - 1 + i / STEPS
            seen.append(self.step(rows, self.phase.noise(BATCH, random), rate_of(s, now), nats_of(s, now)))
        return {name: torch.stack([terms[name] for terms in seen]).double().mean().item() for name in seen[0]}

    def step(self, rows: Tensor, eps: tuple[Tensor, ...], rate: float, nats: float) -> dict[str, Tensor]:
        guess = None if self.guesses is None else self.guesses[rows]
        with self.context.autocast():
            terms = self.phase.objective(self.model, Batch(self.x[rows], self.y[rows], guess=guess), *eps)
        gain = next(iter(terms.values()))
        if next(iter(terms)) == "elbo":
            levels = [kl for name, kl in terms.items() if name.startswith("kl_")] or [terms["kl"]]
            gain = terms["log_likelihood"] - sum(torch.where(kl < nats, nats, kl) for kl in levels)
        self.adam.zero_grad()
        (-gain.mean() * self.scale).backward()
        for parameter in self.trained:  # without a gradient it is decayed only
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / self.scale
        self.norms.append(torch.nn.utils.clip_grad_norm_(self.trained, self.s.clip or math.inf).item())
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for mean, value in zip(*(each.state_dict().values() for each in (self.average, self.model)), strict=True):
            mean += ((value - mean) / (1 + self.steps / 9)).to(mean.dtype) if mean.is_floating_point() else value - mean
        self.steps += 1
        return {name: term.detach() for name, term in terms.items()}


def rate_of(s, now: float) -> float:
    """A warm-up of half an epoch, then half a cosine over the other eight and a half."""
    if now < 0.5:
        return s.learning_rate * (now + 0.01) / 0.51
    return s.learning_rate * (1 + math.cos(math.pi * (now - 0.5) / 8.5)) / 2


def nats_of(s, now: float) -> float:
    return 0.4 * (1 - now / 4)


def ours(training: Training, number: int) -> dict[str, float]:
    """Train an epoch, and validate after it, as in `train.fit`; returns the means of the terms."""
    train_epoch(training.phase, training.run, training.step, training.step, number)
    means = training.step.totals.means()
    training.phase.validate(training.step.average.model, 0, training.run.context)
    return means


def set_scale(training: Training, scale: float) -> None:
    if training.step.optimizer.scale is not None:
        training.step.optimizer.scale.fill_(scale)


def by_dimensions(parameters) -> list[torch.nn.Parameter]:
    return sorted(parameters, key=lambda p: p.dim() > 1)


def distances(model: torch.nn.Module, other: torch.nn.Module) -> dict[str, Tensor]:
    theirs = other.state_dict()
    return {name: (tensor - theirs[name]).double() for name, tensor in model.state_dict().items()}


@cases
def test_two_epochs_are_those_of_plain_torch(float64, network, objective):
    """Weights, their average, buffers and means of the terms.

    A gradient g that is off by δ moves a weight by at most rate · δ / (|g| + 1e-8). In float64 δ is 1e-15, and 1e-6 · g
    where the norm is cut to 1, for clip_grad_norm_ adds 1e-6 to it: over six steps, less than 1e-5 of one.
    """
    average = 0 if (network, objective) == ("regularised", "elbo") else 500  # 0: the model itself is validated
    training = make_training(network, objective, weight_decay=0.2, clip=1.0, average=average)
    plain, start = Plain(training), copy.deepcopy(training.phase.model)
    for number in (1, 2):
        found, wanted = ours(training, number), plain.epoch(number)
        assert list(found) == list(wanted)
        assert found == pytest.approx(wanted, rel=1e-7)
    averaged = training.step.average.model, plain.average if average else plain.model
    for ours_, theirs in ((training.phase.model, plain.model), averaged):
        for name, distance in distances(ours_, theirs).items():
            assert distance.abs().max() <= 1e-5 * 1e-2, name
    for name, distance in distances(training.phase.model, start).items():  # the control: all have moved
        unused = objective in OF_PRIOR and "recognition" in name and distance.dim() < 2
        assert distance.ne(0).any() == (not name.startswith("baseline_net.") and not unused), name
    assert max(plain.norms) > 1


@cases
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_autocast(network, objective, precision):
    """Gradients differ by no more than rounding; the weights stay in float32.

    It is ε/2 of a number, in the gradient and in what it is a product of. Where a gradient cancels, Adam makes a step
    of what is left: of a share ε of the weights, which is √ε of the way of all. In float16 both sides scale the loss.
    """
    training = make_training(network, objective, precision, side=14, hidden=(40, 30), weight_decay=0.2)
    plain = Plain(training)
    start, half = copy.deepcopy(plain.model), training.run.context.half
    set_scale(training, plain.scale)
    ours(training, 1)
    plain.epoch(1)
    assert not any(training.step.optimizer.skipped().values())
    theirs = torch.cat([plain.adam.state[p]["exp_avg"].flatten() for p in by_dimensions(plain.trained)])
    epsilon = torch.finfo(half).eps
    moments = torch.cat([moment.flatten() for moment in training.step.optimizer.moments])
    assert (moments - theirs).norm() <= 2 * epsilon * theirs.norm()
    pairs = (start, plain.model), (training.phase.model, plain.model)
    way, error = (torch.cat([each.flatten() for each in distances(*pair).values()]).norm() for pair in pairs)
    assert error <= epsilon**0.5 * way
    assert {tensor.dtype for tensor in training.phase.model.parameters()} == {torch.float32}


@cases
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_is_not_finite_changes_nothing(network, objective, precision):
    """But its count, and running statistics; the next one goes on as if it had not been."""
    both = training, spared = [make_training(network, objective, precision) for _ in range(2)]
    for each in both:
        set_scale(each, 64.0)
        ours(each, 1)
    before, rows = state(training), torch.arange(BATCH)
    if objective == "baseline":
        images, training.step.images.rows = training.step.images.rows, training.step.images.rows.float() * math.nan
        training.step(rows)
        training.step.images.rows = images
    else:
        training.step(rows, training.phase.noise(BATCH, context.generator(CPU, 1))[0] * math.nan)
    assert training.step.optimizer.skipped()["skipped_steps"] == 1
    but = "counts|running_|num_batches"
    assert_equal(state(training), before, but)
    for each in both:
        ours(each, 2)
    assert not any(training.step.optimizer.skipped().values())  # in the new epoch
    assert_equal(state(training), state(spared), but)


@cases
def test_step_stays_on_its_device(network, objective, monkeypatch):
    """No number is read, no shape hangs on data, and no tensor is made elsewhere, as on the CPU for a GPU."""
    device = torch.device("meta")
    monkeypatch.setattr(context, "generator", lambda device, *key: torch.Generator("cpu").manual_seed(0))
    training = make_training(network, objective, device=device, clip=1.0)
    rows, eps = torch.arange(BATCH, device=device), training.phase.noise(BATCH, context.generator(CPU))
    eps = [each.to(device) for each in eps]
    with Watch():
        for number in range(2):
            training.step(rows, *eps)
            training.step.average.update(number, last=True)


def test_average_is_up_to_date_at_the_end_of_each_epoch():
    """After the first 100 steps, when it takes the weights in only every 20 steps."""
    training, seen = make_training(average=500), []
    for number in range(1, 40):
        train_epoch(training.phase, training.run, training.step, training.step, number)
        seen.append(next(training.step.average.model.prior_net.parameters()).clone())
    assert not any(torch.equal(*pair) for pair in pairwise(seen))


@pytest.mark.parametrize(("precision", "phase"), [("bf16", "baseline"), ("fp16", "cvae")])
def test_resumed_training_goes_on_bit_for_bit(tmp_path, precision, phase):
    """Weights, their average and the optimizer's state, from a checkpoint."""
    data = make_tiny_data(tmp_path / "data")
    words = [*TINY, "--data", data, "--network", "deep", "--levels", "2", "--precision", precision]
    words += ["--epochs", "3", "--baseline-epochs", "3", "--runs", tmp_path]
    assert call_train(*words, "--name", "undisturbed").code == 0
    with interrupted_after(phase, 1):
        assert call_train(*words, "--name", "resumed").code == 143
    assert call_train("--resume", "resumed", "--runs", tmp_path).code == 0
    assert results(tmp_path / "resumed") == results(tmp_path / "undisturbed")
