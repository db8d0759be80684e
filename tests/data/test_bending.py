"""Images that are bent a little: against SciPy, and what does not change."""

import pytest
import torch
from scipy.ndimage import affine_transform

from cvae.data import bending
from cvae.data.bending import bent, warped
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.names import mnist

IMAGES = mnist("train")[:400]


def test_warped_is_scipy_s() -> None:
    """About the middle of the pixels, by linear interpolation, black outside."""
    matrices = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + 0.2 * torch.randn(20, 2, 2, generator=torch.manual_seed(0))
    for image, matrix, found in zip(IMAGES[:20], matrices, warped(IMAGES[:20], matrices), strict=True):
        down_across = matrix.flip(0, 1).double().numpy()  # SciPy's rows come first
        offset = 13.5 - down_across @ [13.5, 13.5]
        expected = affine_transform(image.double().numpy(), down_across, offset, order=1)
        assert (found.double() - torch.from_numpy(expected)).abs().max() <= 0.51  # rounding


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
    for name in ("DEGREES", "STRETCH", "SHEAR"):
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
