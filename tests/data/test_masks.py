"""Which pixels are given, and the order in which the networks see them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae.data.images import ImageSet
from cvae.data.masks import MASKS, Split, mask, quadrants
from cvae.settings import Settings

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
    assert quadrants(*case).tolist() == expected


def test_tutorial_quadrants_of_mnist():
    """1: the bottom left quadrant; 2: the left half; 3: all but the bottom right one."""
    one, two, three = (quadrants(k) for k in (1, 2, 3))
    assert one[14:, :14].all()
    assert two[:, :14].all()
    assert not three[14:, 14:].any()
    assert [int(mask.sum()) for mask in (one, two, three)] == [196, 392, 588]
    assert not (one & ~two).any()
    assert not (two & ~three).any()


@pytest.mark.parametrize("k", [0, 4, -1])
def test_other_numbers_of_quadrants_are_refused(k):
    with pytest.raises(ValueError, match=f"not {k}"):
        quadrants(k)


@pytest.mark.parametrize(("height", "width"), [(1, 8), (8, 1), (0, 0)])
def test_images_without_quadrants_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}"):
        quadrants(1, height, width)


HALVES = {
    ("left", 4, 5): "xx...|xx...|xx...|xx...",
    ("right", 4, 5): "..xxx|..xxx|..xxx|..xxx",
    ("top", 5, 3): "xxx|xxx|...|...|...",
    ("bottom", 5, 3): "...|...|xxx|xxx|xxx",
}


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_halves(case):
    name, height, width = case
    found = MASKS[name](height, width)
    assert found.tolist() == [[pixel == "x" for pixel in row] for row in HALVES[case].split("|")]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 8), (28, 28)])
def test_all_named_masks_can_be_split_by(name, height, width):
    found = MASKS[name](height, width)
    assert (found.dtype, found.shape) == (torch.bool, (height, width))
    assert Split(found).num_pixels == height * width


def test_mask_of_the_settings():
    """The number of quadrants, unless a mask is named."""
    for k in (1, 2, 3):
        assert torch.equal(mask(Settings(quadrants=k), 5, 6), quadrants(k, 5, 6))
        assert torch.equal(mask(Settings(quadrants=k, observed="top"), 5, 6), MASKS["top"](5, 6))
    with pytest.raises(ValueError, match=f"one of {', '.join(MASKS)}, not 'middle'"):
        mask(Settings(observed="middle"), 5, 6)


def test_new_mask_is_a_maker_and_a_name(monkeypatch):
    board = torch.arange(30).view(5, 6) % 2 == 0
    monkeypatch.setitem(MASKS, "board", lambda height, width: board)
    assert torch.equal(Split(mask(Settings(observed="board"), 5, 6)).observed, board)


@pytest.mark.parametrize("given_pixels", [0, 30], ids=["nothing", "everything"])
def test_all_or_nothing_given_is_refused(given_pixels):
    observed = torch.arange(30).view(5, 6) < given_pixels
    with pytest.raises(ValueError, match=f"{given_pixels} of 30 pixels are observed"):
        Split(observed)


@pytest.mark.parametrize(
    "observed",
    [
        pytest.param(torch.eye(5, dtype=torch.uint8), id="bytes"),
        pytest.param(torch.eye(5), id="floats"),
        pytest.param(torch.eye(5).bool()[None], id="three dimensions"),
        pytest.param(torch.eye(5).bool().flatten(), id="one dimension"),
    ],
)
def test_what_is_no_mask_is_refused(observed):
    with pytest.raises(ValueError, match="a mask is bool"):
        Split(observed)


@st.composite
def splits(draw):
    """Quadrants, and any other mask."""
    height, width = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    if draw(st.booleans()):
        return Split(quadrants(draw(st.integers(1, 3)), height, width))
    pixels = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width).filter(is_mixed))
    return Split(torch.tensor(pixels).view(height, width))


def is_mixed(pixels):
    return any(pixels) and not all(pixels)


@given(splits())
def test_split_is_masking_and_compose_its_inverse(split):
    height, width = split.observed.shape
    images = (torch.arange(3 * height * width) % 251).to(torch.uint8).view(3, height, width)
    x, y = split.split(images)
    assert torch.equal(x, torch.stack([image[split.observed] for image in images]))
    assert torch.equal(y, torch.stack([image[~split.observed] for image in images]))
    assert torch.equal(split.compose(x, y), images)
    assert torch.equal(split.vectors(images), torch.cat([x, y], dim=1))
    assert (x.shape[1], y.shape[1]) == (split.num_observed, split.num_hidden)
    assert (split.height, split.width) == (height, width)
    assert split.num_observed + split.num_hidden == split.num_pixels == height * width
    assert sorted(split.order.tolist()) == list(range(height * width))
    assert split.order[split.raster].tolist() == list(range(height * width))


def test_compose_broadcasts():
    """Several completions `[S, B]` of the same observed pixels `[B]`."""
    split = Split(quadrants(2, 5, 4))
    x, y = torch.rand(3, split.num_observed), torch.rand(6, 3, split.num_hidden)
    images = split.compose(x, y)
    assert images.shape == (6, 3, 5, 4)
    for sample, completion in zip(y, images, strict=True):
        assert torch.equal(completion, split.compose(x, sample))


def test_batches_are_the_images_scaled():
    """A batch of an image set is the split of its images in [0, 1]: every grey level, by rows and by slices."""
    split = Split(quadrants(3, 4, 8))
    images = torch.arange(256, dtype=torch.uint8).reshape(8, 4, 8)
    image_set = ImageSet(images, split)
    expected_x, expected_y = split.split(images.float() / 255)
    rows = torch.tensor([6, 0, 3, 3])
    for choice in (rows, slice(2, 5)):
        x, y, guess = image_set.batch(choice)
        assert torch.equal(x, expected_x[choice])
        assert torch.equal(y, expected_y[choice])
        assert guess is None
    assert [len(batch.x) for batch in image_set.batches(3)] == [3, 3, 2]
    assert torch.equal(torch.cat([batch.y for batch in image_set.batches(3)]), expected_y)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_guesses_are_the_baselines_logits_of_the_own_rows(dtype):
    """Computed some at a time, without a gradient, and kept in the type that is wanted, or float32."""
    split = Split(quadrants(3, 4, 8))
    image_set = ImageSet(torch.arange(256, dtype=torch.uint8).reshape(8, 4, 8), split)
    weights = torch.linspace(-2, 2, split.num_observed * split.num_hidden).view(split.num_observed, split.num_hidden)
    sizes = []

    def baseline(x):
        sizes.append(len(x))
        return x @ weights.requires_grad_()

    image_set.set_guesses(baseline, dtype, size=3)
    assert sizes == [3, 3, 2]
    expected = torch.cat([batch.x @ weights for batch in image_set.batches(3)]).detach().to(dtype or torch.float32)
    assert image_set.guesses.dtype == expected.dtype
    assert not image_set.guesses.requires_grad
    for rows in (torch.tensor([6, 0, 3, 3]), slice(2, 5)):
        assert torch.equal(image_set.batch(rows).guess, expected[rows])
