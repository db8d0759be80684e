"""Images that are bent a little: what is seen where, and what does not change."""

import pytest
import torch
from support.images import mnist
from torch import Tensor

from cvae.data import bending
from cvae.data.bending import KNOTS, bent, warped, with_levels_of
from cvae.model.densities import bernoulli_entropy

IMAGES = mnist("train")[:400]
STILL = torch.eye(2).expand(400, 2, 2)
NOWHERE = torch.zeros(400, 2, KNOTS, KNOTS)


def test_warped_turns_and_stretches() -> None:
    """Levels that are a quadratic function of the place are reproduced exactly by cubic interpolation: each pixel shows
    what was at the matrix times its place, and black where that is outside."""
    matrices = torch.eye(2) + 0.1 * torch.randn(20, 2, 2, generator=torch.manual_seed(0))
    down, across = torch.meshgrid(*(torch.linspace(-27 / 28, 27 / 28, 28),) * 2, indexing="ij")

    def levels(at: Tensor) -> Tensor:
        return 120 + 50 * at[..., 0] - 30 * at[..., 1] + 30 * at[..., 0] * at[..., 1]

    place = torch.stack([across, down], dim=-1)
    images = levels(place).round().to(torch.uint8).expand(20, 28, 28)
    for matrix, image in zip(matrices, warped(images, matrices, NOWHERE[:20]), strict=True):
        seen = place @ matrix.T
        inside = seen.abs().amax(-1) < 24 / 28  # the four pixels around are all of the image
        assert inside.sum() > 300
        assert (image - levels(seen))[inside].abs().max() < 1.6  # both rounded, and cubic weights of rounded levels
        assert (image[seen.abs().amax(-1) > 32 / 28] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(28, 112), (60, 24)])
def test_images_that_are_not_square_are_bent_as_part_of_a_square(height: int, width: int) -> None:
    """With black around, they are seen through the same matrix, to a rounded level."""
    side, random = max(height, width), torch.manual_seed(1)
    images = torch.randint(256, (20, height, width), generator=random, dtype=torch.uint8)
    matrices = torch.eye(2) + 0.15 * torch.randn(20, 2, 2, generator=random)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.zeros(20, side, side, dtype=torch.uint8)
    square[:, top : top + height, left : left + width] = images
    expected = warped(square, matrices, NOWHERE[:20])[:, top : top + height, left : left + width]
    assert (warped(images, matrices, NOWHERE[:20]).int() - expected.int()).abs().max() <= 1


def test_warped_pushes() -> None:
    """A push of all alike moves any image, by whole pixels exactly; a push at one knot moves what is near it."""
    for images in (IMAGES, torch.cat([IMAGES, IMAGES], dim=2)):
        pushed = torch.zeros(400, 2, KNOTS, KNOTS)
        pushed[:, 0], pushed[:, 1] = 2 * 3 / 28, -2 * 1 / 28
        moved = torch.zeros_like(images)
        moved[:, 1:, :-3] = images[:, :-1, 3:]
        assert torch.equal(warped(images, STILL, pushed), moved)
    one = torch.zeros(400, 2, KNOTS, KNOTS)
    one[:, :, 1, 1] = 2 * 2 / 28
    changed = (warped(IMAGES, STILL, one) != IMAGES).any(0)
    assert changed[4:12, 4:12].float().mean() > 0.8
    assert not changed[22:].any()
    assert not changed[:, 22:].any()


def test_levels_stay_distributed_as_they_were() -> None:
    """So does their entropy, a Bernoulli's floor, to one per cent; interpolation alone adds a fifth."""

    def entropy(images: Tensor) -> float:
        return float(bernoulli_entropy(images.flatten(1).double() / 255).mean())

    softened = warped(IMAGES, STILL + torch.tensor([[0.0, 0.1], [-0.1, 0.0]]), NOWHERE)
    assert entropy(softened) > 1.15 * entropy(IMAGES)
    assert entropy(with_levels_of(IMAGES, softened)) == pytest.approx(entropy(IMAGES), rel=0.01)


def test_share_key_and_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is bent with this probability, anew by the key, a little: it keeps its ink to a quarter."""
    assert torch.equal(bent(IMAGES, 0.0, 1), IMAGES)
    half, all_of_them = bent(IMAGES, 0.5, 1), bent(IMAGES, 1.0, 3)
    changed = (half != IMAGES).flatten(1).any(1)
    assert abs(changed.sum().item() - 200) < 5 * 10  # five standard deviations of a binomial
    assert torch.equal(half, bent(IMAGES, 0.5, 1))
    assert not torch.equal(half, bent(IMAGES, 0.5, 2))
    assert (all_of_them != IMAGES).flatten(1).any(1).all()
    ratio = all_of_them.flatten(1).double().sum(1) / IMAGES.flatten(1).double().sum(1)
    assert 0.75 < ratio.min() < ratio.max() < 1.25
    for name in ("DEGREES", "STRETCH", "SHEAR", "PUSH"):
        monkeypatch.setattr(bending, name, 0.0)
    assert torch.equal(bent(IMAGES, 1.0, 3), IMAGES)
