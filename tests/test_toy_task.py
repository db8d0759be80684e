"""A task that the package does not have goes all the way: a mask drawn for each image, and a label beside the pixels.

No network, objective, training, estimate or completion may assume one mask for all images.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from support.steps import CPU, assert_equal, make_run
from torch import Tensor

from cvae import context
from cvae.data.sources import record
from cvae.data.tasks import Batch, ImageSet, Task
from cvae.model.cvae import CVAE, noise
from cvae.model.likelihood import active_units, evaluate
from cvae.model.networks import build
from cvae.model.objectives import log_likelihood, objective
from cvae.run.folder import RunFolder
from cvae.settings import Settings
from cvae.training.phase import Phase
from train import fit

SIDE, CLASSES = 8, 3
PIXELS = SIDE * SIDE


class Masked(Task):
    """x: the pixels that are given, 0 for the others, then the mask, then the label, one-hot. y: all pixels.

    A row is x and y one after the other. The weight is 1 where a pixel is not given.
    """

    x_dim, y_dim = 2 * PIXELS + CLASSES, PIXELS
    height = width = SIDE
    planes = 2 + CLASSES
    is_random = True

    def rows(self, images, labels=None, key=()):
        random = context.generator(images.device, "mask", *key)
        given = torch.rand(len(images), PIXELS, generator=random, device=images.device) < 0.3
        pixels, white = images.flatten(1), 255 if images.dtype == torch.uint8 else 1
        one_hot = torch.nn.functional.one_hot(labels, CLASSES)
        return torch.cat([pixels.where(given, 0), (given * white).to(pixels), (one_hot * white).to(pixels), pixels], 1)

    def batch(self, rows):
        rows = rows / 255 if rows.dtype == torch.uint8 else rows
        x, y = rows.split([self.x_dim, self.y_dim], dim=-1)
        return Batch(x, y, 1 - mask_of(x))

    def picture(self, x, y):
        label = x[:, 2 * PIXELS :, None].expand(-1, -1, PIXELS)
        planes = torch.cat([self.compose(x, y).flatten(-2)[:, None], mask_of(x)[:, None], label], dim=1)
        return planes.unflatten(-1, (SIDE, SIDE))

    def asked(self, images):
        return images.flatten(-2)

    def compose(self, x, y):
        return torch.where(mask_of(x) == 1, x[..., :PIXELS], y).unflatten(-1, (SIDE, SIDE))


def mask_of(x: Tensor) -> Tensor:  # or of rows
    return x[..., PIXELS : 2 * PIXELS]


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures whose left half, upper half or checkerboard is bright, by their labels."""
    random = torch.Generator().manual_seed(count)
    labels = torch.randint(CLASSES, (count,), generator=random)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    patterns = [columns < SIDE // 2, rows < SIDE // 2, (rows + columns) % 2 == 0]
    bright = torch.stack([pattern.expand(SIDE, SIDE) for pattern in patterns])[labels]
    levels = torch.where(bright, 230, 25) + torch.randint(-25, 26, bright.shape, generator=random)
    return levels.to(torch.uint8), labels


class Trained(NamedTuple):
    model: CVAE
    train: ImageSet
    validation: ImageSet
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="module", params=[("tutorial", "iwae"), ("paper", "elbo"), ("deep", "hybrid")], ids=" ".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model trained in both phases, as `train.train_run` does it; its images; the records of its epochs."""
    (network, name), folder = request.param, tmp_path_factory.mktemp("toy") / "run"
    s = Settings(
        network=network, objective=name, hidden=(24, 16), latent_dim=4, channels=4, levels=1 + (network == "deep"),
        particles=2, batch_size=16, epochs=6, baseline_epochs=4, learning_rate=1e-2, average=10,
    )  # fmt: skip
    images, labels = pictures(96)
    train = ImageSet(images, Masked(), labels=labels, key=("train",))
    images, labels = pictures(40)
    validation = ImageSet(images, Masked(), labels=labels, key=("validation",))
    model = build(train.task, s)
    baseline, nothing = model.baseline_net.requires_grad_(True), torch.zeros(3, 4, 4, dtype=torch.uint8)
    with make_run(s, folder=folder) as run:
        run.open(record(train=train.images, validation=validation.images))
        parts = "baseline", baseline, log_likelihood, s.baseline_epochs, train, validation
        fit(Phase(*parts, samples=0, noise=lambda *_: (), picture=lambda _: nothing), run, {})
        baseline.requires_grad_(False)
        for each in (train, validation):
            each.set_guesses(baseline)
        parts = "cvae", model, objective(s), s.epochs, train, validation
        draw = lambda count, random: (noise(2, count, model, random),)  # noqa: E731
        fit(Phase(*parts, samples=2, noise=draw, picture=lambda _: nothing), run, {})
    return Trained(model.eval(), train, validation, RunFolder(folder).metrics())


def likelihoods(model: CVAE, images: ImageSet, *samples: int) -> dict[str, Tensor]:
    portions = list(evaluate(model, images, samples, 0, context.Context(CPU)))
    return {name: torch.cat([getattr(part, name) for part in portions], -1) for name in portions[0]._fields}


def with_junk(images: ImageSet, where_weight_is: float) -> ImageSet:
    """The same images, but y is noise where its weight is this; x stays."""
    changed = ImageSet(images.images, images.task, labels=images.labels, key=("validation",))
    assert torch.equal(changed.rows, images.rows)
    x, y = changed.rows.split([Masked.x_dim, Masked.y_dim], dim=-1)
    junk = torch.randint(256, y.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y.copy_(junk.where(mask_of(x).eq(0) == (where_weight_is == 1), y))
    changed.guesses = images.guesses
    return changed


def test_training_learns(trained):
    """The validation loss falls by a nat and more in both phases, and each epoch has masks of its own."""
    for phase in ("baseline", "cvae"):
        records = [each for each in trained.metrics if each["phase"] == phase]
        name = next(key for key in records[0] if key.startswith("validation_"))
        assert records[-1][name] > records[0][name] + 1, (name, records)
    again = Masked().rows(trained.train.images, trained.train.labels, ("train",))
    assert torch.equal(again[:, Masked.x_dim :], trained.train.rows[:, Masked.x_dim :])
    assert not torch.equal(mask_of(again), mask_of(trained.train.rows))
    assert len(mask_of(again).unique(dim=0)) == len(again)


def test_pixels_of_no_weight_change_no_estimate(trained):
    """Bit for bit, where the recognition network does not look at y; those that have a weight change all of them."""
    model, images = trained.model, trained.validation
    found = likelihoods(model, images, 20)
    assert all(values.isfinite().all() for values in found.values())
    unweighted, weighted = (likelihoods(model, with_junk(images, weight), 20) for weight in (0, 1))
    for name in ("nn_nll", "cvae_mc_nll", "floor"):
        assert torch.equal(unweighted[name], found[name]), name
        assert not torch.equal(weighted[name], found[name]), name
    if hasattr(model, "recognition_net"):
        blind = copy.deepcopy(model)
        next(blind.recognition_net.parameters()).detach()[:, Masked.x_dim :] = 0
        assert_equal(likelihoods(blind, with_junk(images, 0), 20), likelihoods(blind, images, 20))
    active = active_units(model, images, 0, context.Context(CPU))
    assert sum(count for _, count in active) == 4


def test_completion_keeps_what_is_given_and_looks_at_nothing_else(trained):
    """Each picture by its own mask; the label is given too, and another one makes other completions."""
    images, labels = pictures(24)
    task, model = trained.train.task, trained.model
    given = mask_of(task.rows(images, labels)).view(24, SIDE, SIDE) == 255
    completed = model.complete(images, 5, seed=1, labels=labels)
    assert completed.shape == (5, 24, SIDE, SIDE)
    wanted = (images / 255).expand_as(completed)
    assert torch.equal(completed[:, given], wanted[:, given])
    assert not completed[:, ~given].eq(wanted[:, ~given]).any()
    for unknown in (images.where(given, 77), (images / 255).where(given, torch.nan)):
        assert torch.equal(model.complete(unknown, 5, seed=1, labels=labels), completed)
    assert not torch.equal(model.complete(images, 5, seed=1, labels=(labels + 1) % CLASSES), completed)
    # The mean completion is nearer to the picture than grey is.
    errors = [(guess - wanted).square()[:, ~given].mean() for guess in (completed.mean(0), torch.tensor(0.5))]
    assert errors[0] < 0.8 * errors[1]


def test_log_likelihood_of_whole_pictures_is_the_estimate_of_the_table(trained):
    """Both are of the pixels with a weight; they differ by the noise of 500 samples of z."""
    images, labels = pictures(24)
    found = trained.model.log_likelihood(images, samples=500, seed=1, labels=labels)
    whole = ImageSet(images, trained.train.task, labels=labels)
    assert found.shape == (24,)
    assert (found + likelihoods(trained.model, whole, 500)["cvae_is_nll"][0]).mean().abs() < 0.2
