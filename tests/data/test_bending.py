"""Images that are bent a little: what is seen where, and what does not change."""

import pytest
import torch
from torch import Tensor

from cvae.data import bending
from cvae.data.bending import KNOTS, bent, warped, with_levels_of
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.readers import mnist
from cvae.model.densities import bernoulli_entropy

IMAGES = mnist("train")[:400]
NOWHERE = torch.zeros(400, 2, KNOTS, KNOTS)


def test_warped_turns_and_stretches() -> None:
    """A picture whose levels are a quadratic function of the place, which cubic interpolation reproduces exactly, and
    black outside: each pixel shows what was at the matrix times its place."""
    matrices = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + 0.1 * torch.randn(20, 2, 2, generator=torch.manual_seed(0))
    down, across = torch.meshgrid(*(torch.linspace(-27 / 28, 27 / 28, 28),) * 2, indexing="ij")

    def levels(at: Tensor) -> Tensor:
        return 120 + 50 * at[..., 0] - 30 * at[..., 1] + 30 * at[..., 0] * at[..., 1]

    place = torch.stack([across, down], dim=-1)
    images = levels(place).round().to(torch.uint8).expand(20, 28, 28)
    for matrix, found in zip(matrices, warped(images, matrices, NOWHERE[:20]), strict=True):
        seen = place @ matrix.T
        inside = seen.abs().amax(-1) < 24 / 28  # the four pixels around are all of the image
        assert inside.sum() > 300
        assert (found - levels(seen))[inside].abs().max() < 1.6  # both rounded, and cubic weights of rounded levels
        assert (found[seen.abs().amax(-1) > 32 / 28] == 0).all()


def test_warped_pushes() -> None:
    """What is pushed everywhere alike moves the image: by whole pixels, exactly; at one knot, what is near it alone."""
    still = torch.eye(2).expand(400, 2, 2)
    pushed = torch.zeros(400, 2, KNOTS, KNOTS)
    pushed[:, 0], pushed[:, 1] = 2 * 3 / 28, -2 * 1 / 28
    moved = torch.zeros_like(IMAGES)
    moved[:, 1:, :-3] = IMAGES[:, :-1, 3:]
    assert torch.equal(warped(IMAGES, still, pushed), moved)
    one = torch.zeros(400, 2, KNOTS, KNOTS)
    one[:, :, 1, 1] = 2 * 2 / 28
    changed = (warped(IMAGES, still, one) != IMAGES).any(0)
    assert changed[4:12, 4:12].float().mean() > 0.8
    assert not changed[22:].any()
    assert not changed[:, 22:].any()


def test_levels_stay_distributed_as_they_were() -> None:
    """So does their entropy, a Bernoulli's floor, to one per cent; interpolation alone adds a fifth."""

    def entropy(images: Tensor) -> float:
        return float(bernoulli_entropy(images.flatten(1).double() / 255).mean())

    softened = warped(IMAGES, torch.eye(2).expand(400, 2, 2) + torch.tensor([[0.0, 0.1], [-0.1, 0.0]]), NOWHERE)
    assert entropy(softened) > 1.15 * entropy(IMAGES)
    assert entropy(with_levels_of(IMAGES, softened)) == pytest.approx(entropy(IMAGES), rel=0.01)


def test_higher_levels_stay_higher() -> None:
    """Levels are replaced by a function that never falls; images of the same levels stay as they are."""
    others = torch.randint(256, (5, 9, 9), generator=torch.manual_seed(1), dtype=torch.uint8)
    found = with_levels_of(IMAGES, others)
    by_level = [found[others == level].unique() for level in others.unique()]
    assert all(len(levels) == 1 for levels in by_level)
    assert (torch.cat(by_level).int().diff() >= 0).all()
    shuffled = IMAGES.flatten()[torch.randperm(IMAGES.numel(), generator=torch.manual_seed(2))].view_as(IMAGES)
    assert torch.equal(with_levels_of(IMAGES, shuffled), shuffled)


def test_share_and_key() -> None:
    """Each image is bent with this probability, anew by the key; the others stay as they are."""
    assert torch.equal(bent(IMAGES, 0.0, 1), IMAGES)
    half = bent(IMAGES, 0.5, 1)
    changed = (half != IMAGES).flatten(1).any(1)
    assert abs(changed.sum().item() - 200) < 5 * 10  # five standard deviations of a binomial
    assert torch.equal(half, bent(IMAGES, 0.5, 1))
    assert not torch.equal(half, bent(IMAGES, 0.5, 2))
    assert (bent(IMAGES, 1.0, 1) != IMAGES).flatten(1).any(1).all()


def test_it_is_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digit keeps its ink to a quarter, and with amounts of zero all of it."""
    ink = IMAGES.flatten(1).double().sum(1)
    ratio = bent(IMAGES, 1.0, 3).flatten(1).double().sum(1) / ink
    assert ratio.min() > 0.75
    assert ratio.max() < 1.25
    for name in ("DEGREES", "STRETCH", "SHEAR", "PUSH"):
        monkeypatch.setattr(bending, name, 0.0)
    assert torch.equal(bent(IMAGES, 1.0, 3), IMAGES)


@pytest.mark.parametrize("binary", [False, True])
def test_redrawn_from_the_stored_images(binary: bool) -> None:
    """Whatever the epochs before were; without a share the stored images are back."""
    split = Split(quadrants(1))
    images = ImageSet(IMAGES, split)
    assert torch.equal(split.images(images.vectors), IMAGES)
    for bend in (0.7, 0.3):
        images.redraw(5, 1, binary=binary, bend=bend)
    fresh = ImageSet(IMAGES, split)
    fresh.redraw(5, 1, binary=binary, bend=0.3)
    assert torch.equal(images.vectors, fresh.vectors)
    if not binary:
        assert torch.equal(split.images(images.vectors), bent(IMAGES, 0.3, 5, 1, 0))
        images.redraw(5, 2, binary=False)
        assert torch.equal(split.images(images.vectors), IMAGES)
