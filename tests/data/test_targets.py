"""Black or white targets: draws whose mean is the grey picture, the same for every run and process that asks."""

import hashlib
import math

import numpy as np
import pytest
import torch
from support.inprocess import make_tiny_data
from torch import Tensor

from cvae.context import derive_seed
from cvae.data.images import ImageSet, as_targets, binarized
from cvae.data.masks import Split, quadrants
from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

LEVELS = torch.arange(256, dtype=torch.uint8).view(4, 8, 8)


def digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_mean_of_many_draws_is_the_grey_level() -> None:
    """Hoeffding's bound for 256 means of n draws each: none is further off, but for one in 10⁹ sets of draws."""
    n = 10_000
    draws = binarized(torch.arange(256, dtype=torch.uint8).expand(n, 256), "a seed")
    assert draws.unique().tolist() == [0, 255]
    bound = math.sqrt(math.log(2 * 256 * 1e9) / (2 * n))
    means = (draws == 255).double().mean(0)
    assert (means - torch.arange(256) / 255).abs().max() < bound
    assert means[[0, 255]].tolist() == [0, 1]
    # Pixels are drawn apart from each other: the number of white ones in a draw has the variance of a sum.
    p = torch.arange(256).double() / 255
    variance = (draws == 255).double().sum(1).var().item() / (p * (1 - p)).sum().item()
    assert abs(variance - 1) < 6 * math.sqrt(2 / n)


def test_draws_depend_on_the_key_alone() -> None:
    first = binarized(LEVELS, 0, "cvae", 1)
    torch.manual_seed(5)
    assert torch.equal(binarized(LEVELS, 0, "cvae", 1), first)
    for key in ((1, "cvae", 1), (0, "baseline", 1), (0, "cvae", 2)):
        assert not torch.equal(binarized(LEVELS, *key), first)
    assert torch.equal(binarized(first, "another"), first)  # black and white pixels stay


def test_fixed_draw_is_the_same_on_every_machine_and_for_every_run() -> None:
    """Numbers of the Mersenne twister, as NumPy has it too; a run records the digest of what they make."""
    drawn = [as_targets(Settings(targets="binary-fixed", seed=seed), "train", LEVELS) for seed in (0, 7)]
    assert torch.equal(*drawn)
    twister = np.random.RandomState(derive_seed("targets", "train") % 2**32)
    numbers = twister.randint(0, 2**32, LEVELS.numel(), dtype=np.uint32) % 255
    assert torch.equal(drawn[0].flatten() == 255, torch.tensor(numbers < np.arange(256)))
    assert digest(drawn[0]) == "62e177c60d926cb8029f99b9fe6602a02759c68afd3601375a9b767fcedf352c"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_data(tmp_path_factory.mktemp("data")))


def test_which_parts_are_drawn(data: str) -> None:
    """Training images of `binary` are grey until they are redrawn; everything else is drawn, once for both."""
    grey, binary, fixed = (load_train(Settings(data=data, targets=t)) for t in ("grey", "binary", "binary-fixed"))
    assert torch.equal(binary.train, grey.train)
    assert fixed.train.unique().tolist() == [0, 255]
    assert torch.equal(binary.validation, fixed.validation)
    assert binary.validation.unique().tolist() == [0, 255]
    tests = [load_test(Settings(data=data, targets=t, seed=3)).images for t in ("grey", "binary", "binary-fixed")]
    assert torch.equal(tests[1], tests[2])
    assert tests[1].unique().tolist() == [0, 255]
    assert len(tests[0].unique()) > 200
    for found, parts in (
        (binary, (grey.train, fixed.validation, tests[1])),
        (fixed, (fixed.train, binary.validation, tests[1])),
    ):
        for part, images in zip(("train", "validation", "test"), parts, strict=True):
            assert found.record[part] == {"count": len(images), "sha256": digest(images)}
    assert len({grey.record[part]["sha256"] for part in ("train", "validation", "test")}) == 3


def test_redrawn_in_place_with_the_guesses_of_what_is_drawn() -> None:
    """From the grey levels each time, not from the draw before; a CUDA graph reads where they are."""
    split = Split(quadrants(3, 8, 8))
    weights = torch.linspace(-2, 2, split.num_observed * split.num_hidden).view(split.num_observed, split.num_hidden)

    def baseline(x: Tensor) -> Tensor:
        return x @ weights.requires_grad_()

    images = ImageSet(LEVELS, split)
    images.redraw(0, "baseline", 1, binary=True)  # there are no guesses yet
    images.set_guesses(baseline, torch.bfloat16, size=3)
    assert images.guesses is not None
    places = images.vectors.data_ptr(), images.guesses.data_ptr()
    seen = []
    for epoch in (1, 2, 1):
        images.redraw(0, "cvae", epoch, binary=True)
        fresh = ImageSet(LEVELS, split)
        fresh.redraw(0, "cvae", epoch, binary=True)
        assert torch.equal(images.vectors, fresh.vectors)
        fresh.set_guesses(baseline, torch.bfloat16, size=3)
        assert fresh.guesses is not None
        assert torch.equal(images.guesses, fresh.guesses)
        seen.append(images.guesses.clone())
        batch = images.batch(slice(0, 4))
        assert batch.guess is not None
        assert torch.equal(batch.guess, (batch.x @ weights).detach().to(torch.bfloat16))
        assert torch.cat([batch.x, batch.y], dim=1).unique().tolist() == [0, 1]
    assert (images.vectors.data_ptr(), images.guesses.data_ptr()) == places
    assert not images.guesses.requires_grad
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
