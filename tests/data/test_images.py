"""Images on the device: batches, guesses, and black or white targets, which are the same for every run that asks."""

import hashlib
import math

import numpy as np
import pytest
import torch
from support.images import in_order

from cvae.context import derive_seed
from cvae.data import tasks as image_sets
from cvae.data.bending import bent
from cvae.data.masks import quadrants
from cvae.data.sources import DRAWN_ONCE, load_test, load_train
from cvae.data.tasks import AT_ONCE, FixedMask, ImageSet, binarized
from cvae.settings import Settings

LEVELS = torch.arange(256, dtype=torch.uint8).view(4, 8, 8)
TASK = FixedMask(quadrants(3, 8, 8))


def baseline(x):
    weights = torch.linspace(-2, 2, TASK.x_dim * TASK.y_dim).view(TASK.x_dim, TASK.y_dim)
    return x @ weights.requires_grad_()


def test_batches_are_the_images_scaled():
    """Every grey level, by rows and by slices."""
    images, levels = ImageSet(LEVELS, TASK), LEVELS.float() / 255
    for choice in (torch.tensor([3, 0, 2, 2]), slice(1, 3), slice(3, 6)):
        x, y, weight, guess = images.batch(choice)
        assert torch.equal(x, levels[choice][:, TASK.observed])
        assert torch.equal(y, levels[choice][:, ~TASK.observed])
        assert (weight, guess) == (None, None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_guesses_are_the_baselines_logits_of_the_own_rows(dtype):
    """More images than are guessed at once, without a gradient, and kept in the type that is wanted, or float32."""
    images = ImageSet(torch.arange(1001, dtype=torch.int32).remainder(251).byte()[:, None, None].expand(-1, 8, 8), TASK)
    images.set_guesses(baseline, dtype)
    for rows in (torch.tensor([1000, 0, 3, 3]), slice(998, 1001)):
        x, _, _, guess = images.batch(rows)
        assert guess.dtype == (dtype or torch.float32)
        assert not guess.requires_grad
        torch.testing.assert_close(guess.float(), baseline(x).detach(), rtol=0.01 if dtype else 1e-5, atol=1e-4)


def test_redrawn_in_place_with_the_guesses_of_what_is_drawn():
    """From the grey levels each time, not from the draw before; a CUDA graph reads where they are."""
    images = ImageSet(LEVELS, TASK)
    images.redraw(0, "baseline", 1, binary=True)  # there are no guesses yet
    images.set_guesses(baseline)
    places, seen = (images.rows.data_ptr(), images.guesses.data_ptr()), []
    for epoch in (1, 2, 1):
        images.redraw(0, "cvae", epoch, binary=True)
        fresh = ImageSet(LEVELS, TASK)
        fresh.redraw(0, "cvae", epoch, binary=True)
        assert torch.equal(images.rows, fresh.rows)
        assert images.rows.unique().tolist() == [0, 255]
        batch = images.batch(slice(None))
        torch.testing.assert_close(batch.guess, baseline(batch.x).detach())
        seen.append(images.rows.clone())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    images.redraw(5, 1, binary=False, bend=0.9)
    assert torch.equal(images.rows, TASK.rows(bent(LEVELS, 0.9, 5, 1, 0)))
    images.redraw(0, binary=False)
    assert torch.equal(images.rows, TASK.rows(LEVELS))
    assert (images.rows.data_ptr(), images.guesses.data_ptr()) == places


def test_every_portion_is_redrawn_from_random_numbers_of_its_own(monkeypatch):
    """No two images have the same thresholds or are bent alike, however many there are; labels are split too."""
    keys, counts = [], []

    class Keyed(FixedMask):
        def rows(self, images, labels=None, key=()):
            keys.append((key, None if labels is None else labels.tolist()))
            return super().rows(images, labels, key)

    monkeypatch.setattr(image_sets, "AT_ONCE", 3)
    images = ImageSet(LEVELS[1:2].repeat(8, 1, 1), Keyed(TASK.observed), labels=torch.arange(8), key=("first",))
    images.redraw("k", binary=True, done=counts.append)
    assert len(images.rows.unique(dim=0)) == 8
    assert counts == [3, 3, 2]
    parts = [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert keys == [(("first",), list(range(8))), *((("k", i), part) for i, part in enumerate(parts))]
    images.redraw("k", binary=False, bend=1.0)
    assert len(images.rows.unique(dim=0)) == 8
    assert AT_ONCE == 10_000  # other numbers would draw other pictures from the same seed


def test_draws_have_the_grey_level_as_their_mean():
    """Hoeffding's bound for 256 means of n draws each: none is further off, but for one in 10⁹ sets of draws."""
    n = 10_000
    draws = binarized(torch.arange(256, dtype=torch.uint8).expand(n, 256), "a seed")
    assert draws.unique().tolist() == [0, 255]
    means = (draws == 255).double().mean(0)
    assert (means - torch.arange(256) / 255).abs().max() < math.sqrt(math.log(2 * 256 * 1e9) / (2 * n))
    assert means[[0, 255]].tolist() == [0, 1]  # black and white pixels stay
    # Pixels are drawn apart from each other: the number of white ones in a draw has the variance of a sum.
    p = torch.arange(256).double() / 255
    variance = (draws == 255).double().sum(1).var().item() / (p * (1 - p)).sum().item()
    assert abs(variance - 1) < 6 * math.sqrt(2 / n)


def test_fixed_draw_is_the_same_on_every_machine_and_for_every_run():
    """Numbers of the Mersenne twister, as NumPy has it too; a run records the digest of what they make."""
    drawn = binarized(LEVELS, "targets", "train")
    twister = np.random.RandomState(derive_seed("targets", "train") % 2**32)
    numbers = twister.randint(0, 2**32, LEVELS.numel(), dtype=np.uint32) % 255
    assert torch.equal(drawn.flatten() == 255, torch.tensor(numbers < np.arange(256)))
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    assert digest == "62e177c60d926cb8029f99b9fe6602a02759c68afd3601375a9b767fcedf352c"


def test_which_parts_are_drawn_once(tmp_path):
    """Training images of `binary` stay grey until they are redrawn; the parts are drawn apart from each other."""
    np.savez(tmp_path / "a.npz", **dict.fromkeys(("train", "val", "test"), LEVELS.numpy()))
    drawn = {}
    for targets in DRAWN_ONCE:
        s = Settings(data=str(tmp_path / "a.npz"), targets=targets, seed=7)
        drawn[targets, "train"], drawn[targets, "validation"], _, _ = load_train(s)
        drawn[targets, "test"] = load_test(s).images
    grey = {("grey", "train"), ("grey", "validation"), ("grey", "test"), ("binary", "train")}
    assert {case for case, images in drawn.items() if in_order(images) == in_order(LEVELS)} == grey
    for part in ("validation", "test"):
        for targets in ("binary", "binary-fixed"):
            assert torch.equal(drawn[targets, part], binarized(LEVELS, "targets", part))
    assert len({images.numpy().tobytes() for (targets, _), images in drawn.items() if targets == "binary-fixed"}) == 3
