"""Steps and epochs of training against plain PyTorch: AdamW, clip_grad_norm_, and an average by its definition."""

import copy
import io
import math
import re
from collections import Counter

import pytest
import torch
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
        task, guesses = self.phase.train.task, self.phase.train.guesses
        self.x, self.y = task.split(pictures(side=task.height) / 255)
        self.guesses = (
            None if guesses is None or self.context.precision == "fp32" else guesses
        )  # which are kept in half
        self.steps, self.norms = 0, []

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
        (-gain.mean()).backward()
        for parameter in self.trained:  # without a gradient it is decayed only
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.s.clip is not None:
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.trained, self.s.clip).item())
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        pairs = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True)
        for mean, value in pairs:
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


def ours(training: Training, epochs: range) -> list[dict[str, float]]:
    """Train; each epoch is validated after it, as in `train.fit`."""
    phase, run, step = training.phase, training.run, training.step
    means = []
    for number in epochs:
        train_epoch(phase, run, step, step, number)
        means.append(step.totals.means())
        phase.validate(step.average.model, 0, run.context)
    return means


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
    training = make_training(network, objective, weight_decay=0.2, clip=1.0)
    plain, start = Plain(training), copy.deepcopy(training.phase.model)
    means = ours(training, range(1, 3))
    expected = [plain.epoch(number) for number in (1, 2)]
    for found, wanted in zip(means, expected, strict=True):
        assert list(found) == list(wanted)
        assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-7)
    for ours_, theirs in ((training.phase.model, plain.model), (training.step.average.model, plain.average)):
        for name, distance in distances(ours_, theirs).items():
            assert distance.abs().max() <= 1e-5 * 1e-2, name
    for name, distance in distances(training.phase.model, start).items():  # the control: all have moved
        unused = objective in OF_PRIOR and "recognition" in name and distance.dim() < 2
        assert distance.ne(0).any() == (not name.startswith("baseline_net.") and not unused), name
    assert max(plain.norms) > 1


@cases
def test_bf16_is_that_of_autocast(network, objective):
    """The weights in half precision are those that autocast would make: the gradients differ by no more than rounding.

    It is 2⁻⁸ of a number in bfloat16, once in the gradient and once in what it is a product of.
    """
    training = make_training(network, objective, "bf16", side=14, hidden=(40, 30), weight_decay=0.2)
    plain = Plain(training)
    start = copy.deepcopy(plain.model)
    ours(training, range(1, 2))
    plain.epoch(1)
    theirs = torch.cat([plain.adam.state[p]["exp_avg"].flatten() for p in by_dimensions(plain.trained)])
    assert (training.step.optimizer.moments - theirs).norm() <= 2**-7 * theirs.norm()
    way, errors = distances(plain.model, start), distances(training.phase.model, plain.model)
    assert all(error.norm() <= 2**-7 * way[name].norm() for name, error in errors.items())
    weights = training.step.weights
    models = weights.model, training.phase.model
    for half, full in zip(*(by_dimensions(model.parameters()) for model in models), strict=True):
        assert half.dtype == (torch.float32 if half.dim() < 2 or not half.requires_grad else torch.bfloat16)
        assert torch.equal(half, full.to(half.dtype))  # the copy has followed
        assert full.dtype == torch.float32


@cases
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_with_float32(network, objective, precision):
    """A gradient, without the scale of its loss, to √ε of its norm: a share ε of units is rounded over a ReLU's edge.

    The first step of a fresh Adam leaves a tenth of the gradient in the moments.
    """
    moments = []
    for each in ("fp32", precision):
        training = make_training(network, objective, each, side=14, hidden=(40, 30), count=64, batch_size=64)
        step, random = training.step, context.generator(CPU, 1)
        eps = training.phase.noise(64, random)
        for _ in range(20):  # a scale that overflows is halved, and the weights stay as they were
            context.seed_dropout(0)
            step.weights.model.train()
            step(torch.arange(64), *eps)
            if step.optimizer.moments.any():
                break
        assert sum(step.optimizer.skipped().values()) == (0 if precision == "bf16" or each == "fp32" else _)
        moments.append(step.optimizer.moments)
    assert not torch.equal(*moments)  # the products were of half precision
    assert (moments[1] - moments[0]).norm() <= torch.finfo(context.HALF[precision]).eps ** 0.5 * moments[0].norm()


@cases
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_is_not_finite_changes_nothing(network, objective, precision):
    """But its count, and running statistics; the next one goes on as if it had not been."""
    training, spared = (make_training(network, objective, precision) for _ in range(2))
    for each in (training, spared):
        each.step.optimizer.load_state_dict({**each.step.optimizer.state_dict(), "scale": torch.tensor(64.0)})
        ours(each, range(1, 2))
    before, rows = state(training), torch.arange(BATCH)
    if objective == "baseline":
        images, training.step.images.rows = training.step.images.rows, training.step.images.rows.float() * math.nan
        training.step(rows)
        training.step.images.rows = images
    else:
        training.step(rows, training.phase.noise(BATCH, context.generator(CPU, 1))[0] * math.nan)
    after = state(training)
    assert training.step.optimizer.skipped()["skipped_steps"] == 1
    kept = [name for name in before if not re.search("counts|running_|num_batches", name)]
    assert_equal({name: before[name] for name in kept}, {name: after[name] for name in kept})
    ours(training, range(2, 3))
    ours(spared, range(2, 3))
    after, expected = state(training), state(spared)
    assert_equal({name: after[name] for name in kept}, {name: expected[name] for name in kept})


def test_model_is_trained_in_train_mode_though_it_is_validated_itself():
    """Without an average, the model that is validated after each epoch, and so put into evaluation mode, is trained."""
    training = make_training("regularised", average=0)
    plain = Plain(training)
    ours(training, range(1, 3))
    for number in (1, 2):
        plain.epoch(number)
    assert training.step.average.model is training.phase.model
    for name, error in distances(training.phase.model, plain.model).items():
        assert error.norm() <= 1e-3, name


@pytest.mark.parametrize("network", ["deep", "regularised"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_training_goes_on_bit_for_bit(network, precision):
    """Weights, average and optimizer through a file, into a training that began otherwise: as `train.fit` resumes."""
    training, resumed = (make_training(network, "elbo", precision, clip=1.0) for _ in range(2))
    ours(training, range(1, 3))
    step = training.step
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (training.model, step.average.model, step.optimizer)], file)
    file.seek(0)
    ours(training, range(3, 5))
    with torch.no_grad():
        resumed.step.weights.vector.add_(1.0)
    parts = resumed.model, resumed.step.average.model, resumed.step.optimizer
    for part, values in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(values)
    resumed.step.weights.refresh()
    ours(resumed, range(3, 5))
    assert_equal(state(resumed), state(training))


class Watch(TorchDispatchMode):
    """Refuses operators that wait for the device or whose shape hangs on numbers, and tensors elsewhere than on it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.seen = device, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert not name.startswith(self.REFUSED), name
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), name
        self.seen[name] += 1
        result = None if name == "_fused_adamw_" and self.device.type == "meta" else func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.device.type == self.device.type, (name, tensor.shape)
        return result


@cases
@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), ("fp16", "cpu"), ("fp32", "meta")])
def test_step_never_waits_for_the_device_and_stays_on_it(network, objective, precision, device, monkeypatch):
    """No number is read, no shape hangs on data, and no tensor is made elsewhere, as on the CPU for a GPU."""
    device = torch.device(device)
    monkeypatch.setattr(context, "generator", lambda device, *key: torch.Generator("cpu").manual_seed(0))
    training = make_training(network, objective, precision, device=device, clip=1.0)
    rows, random = torch.arange(BATCH, device=device), torch.Generator().manual_seed(0)
    eps = [each.to(device) for each in training.phase.noise(BATCH, random)]
    with Watch(device) as watch:
        for number in range(2):
            training.step(rows, *eps)
            training.step.average.update(number, last=True)
    assert watch.seen["_fused_adamw_"] == 2 * 2  # weights with decay and without


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool(t.any()),
        lambda t: t.index_put_((t > 0,), torch.zeros(())), lambda t: t.to("meta"),
    ],
)  # fmt: skip
def test_watch_notices(forbidden):
    with pytest.raises(AssertionError), Watch(CPU):
        forbidden(torch.ones(3))
