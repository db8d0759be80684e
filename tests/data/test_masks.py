"""Which pixels are given, and the order in which the networks see them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae.data.images import ImageSet
from cvae.data.masks import Quadrants, observed_quadrants

PICTURES = {  # x: given, by hand
    (1, 4, 4): "....|....|xx..|xx..",
    (2, 4, 4): "xx..|xx..|xx..|xx..",
    (3, 4, 4): "xxxx|xxxx|xx..|xx..",
    (1, 5, 3): "...|...|x..|x..|x..",
    (2, 5, 3): "x..|x..|x..|x..|x..",
    (3, 5, 3): "xxx|xxx|x..|x..|x..",
    (1, 2, 2): "..|x.",
    (3, 3, 2): "xx|x.|x.",
}


@pytest.mark.parametrize("case", PICTURES, ids=str)
def test_observed_pixels(case):
    expected = [[pixel == "x" for pixel in row] for row in PICTURES[case].split("|")]
    assert observed_quadrants(*case).tolist() == expected


def test_tutorial_quadrants_of_mnist():
    """1: the bottom left quadrant; 2: the left half; 3: all but the bottom right one."""
    one, two, three = (observed_quadrants(k) for k in (1, 2, 3))
    assert one[14:, :14].all()
    assert two[:, :14].all()
    assert not three[14:, 14:].any()
    assert [int(mask.sum()) for mask in (one, two, three)] == [196, 392, 588]
    assert not (one & ~two).any()
    assert not (two & ~three).any()


@pytest.mark.parametrize("k", [0, 4, -1])
def test_other_numbers_of_quadrants_are_refused(k):
    with pytest.raises(ValueError, match=f"not {k}"):
        Quadrants(k)


@pytest.mark.parametrize(("height", "width"), [(1, 8), (8, 1), (0, 0)])
def test_images_without_quadrants_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}"):
        Quadrants(1, height, width)


@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9))
def test_split_is_masking_and_compose_its_inverse(k, height, width):
    quadrants = Quadrants(k, height, width)
    images = torch.randint(256, (3, height, width), dtype=torch.uint8)
    x, y = quadrants.split(images)
    assert torch.equal(x, torch.stack([image[quadrants.observed] for image in images]))
    assert torch.equal(y, torch.stack([image[~quadrants.observed] for image in images]))
    assert torch.equal(quadrants.compose(x, y), images)
    assert torch.equal(quadrants.vectors(images), torch.cat([x, y], dim=1))
    assert (x.shape[1], y.shape[1]) == (quadrants.num_observed, quadrants.num_hidden)
    assert quadrants.num_observed + quadrants.num_hidden == quadrants.num_pixels == height * width
    assert sorted(quadrants.order.tolist()) == list(range(height * width))


def test_compose_broadcasts():
    """Several completions `[S, B]` of the same observed pixels `[B]`."""
    quadrants = Quadrants(2, 5, 4)
    x, y = torch.rand(3, quadrants.num_observed), torch.rand(6, 3, quadrants.num_hidden)
    images = quadrants.compose(x, y)
    assert images.shape == (6, 3, 5, 4)
    for sample, completion in zip(y, images, strict=True):
        assert torch.equal(completion, quadrants.compose(x, sample))


def test_batches_are_the_images_scaled():
    """A batch of an image set is the split of its images in [0, 1]: every grey level, by rows and by slices."""
    quadrants = Quadrants(3, 4, 8)
    images = torch.arange(256, dtype=torch.uint8).reshape(8, 4, 8)
    image_set = ImageSet(images, quadrants)
    expected_x, expected_y = quadrants.split(images.float() / 255)
    rows = torch.tensor([6, 0, 3, 3])
    for choice in (rows, slice(2, 5)):
        x, y, y_hat = image_set.batch(choice)
        assert torch.equal(x, expected_x[choice])
        assert torch.equal(y, expected_y[choice])
        assert y_hat is None
    assert [len(batch.x) for batch in image_set.batches(3)] == [3, 3, 2]
    assert torch.equal(torch.cat([batch.y for batch in image_set.batches(3)]), expected_y)
    image_set.y_hat = torch.rand(8, quadrants.num_hidden)
    assert torch.equal(image_set.batch(rows).y_hat, image_set.y_hat[rows])
