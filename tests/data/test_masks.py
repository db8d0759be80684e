"""Which pixels are given, and the order in which the networks see them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae.data.images import ImageSet, binarized
from cvae.data.masks import MASKS, Split, make_split, mask, mask_name, quadrants
from cvae.errors import DataError
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


NAMED = {
    ("left", 4, 5): "xx...|xx...|xx...|xx...",
    ("right", 4, 5): "..xxx|..xxx|..xxx|..xxx",
    ("top", 5, 3): "xxx|xxx|...|...|...",
    ("bottom", 5, 3): "...|...|xxx|xxx|xxx",
    ("center", 4, 5): ".....|.xxx.|.xxx.|.....",
    ("center", 3, 7): ".......|..xxx..|.......",
    ("border", 4, 5): "xxxxx|x...x|x...x|xxxxx",
    ("border", 6, 3): "xxx|x.x|x.x|x.x|x.x|xxx",
    ("checkerboard", 3, 5): "x.x.x|.x.x.|x.x.x",
    ("checkerboard", 2, 4): "x.x.|.x.x",
    ("every-second-row", 5, 2): "xx|..|xx|..|xx",
    ("every-second-row", 4, 3): "xxx|...|xxx|...",
}


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_named_masks(case):
    name, height, width = case
    found = MASKS[name](height, width)
    assert found.tolist() == [[pixel == "x" for pixel in row] for row in NAMED[case].split("|")]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("height", "width"), [(3, 3), (5, 8), (28, 28)])
def test_all_named_masks_can_be_split_by(name, height, width):
    found = MASKS[name](height, width)
    assert (found.dtype, found.shape) == (torch.bool, (height, width))
    assert Split(found).num_pixels == height * width


@given(st.integers(1, 40), st.integers(1, 40))
def test_counts_and_symmetries_of_named_masks(height, width):
    """Pairs that divide the image; half of the sides in the middle; and what is turned round stays as it is."""
    found = {name: make(height, width) for name, make in MASKS.items()}
    for one, other in (("left", "right"), ("top", "bottom"), ("center", "border")):
        assert torch.equal(found[one], ~found[other])
    assert [int(found[name].sum()) for name in ("checkerboard", "every-second-row")] == [
        -(-height * width // 2), -(-height // 2) * width
    ]  # fmt: skip
    sides = [found["center"].any(1).sum(), found["center"].any(0).sum()]
    assert found["center"].sum() == sides[0] * sides[1]
    for side, middle in zip((height, width), sides, strict=True):
        assert abs(middle - side / 2) <= 1
    for name in ("center", "border"):
        for side in (0, 1):
            assert torch.equal(found[name].flip(side), found[name])
    assert torch.equal(MASKS["checkerboard"](width, height).T, found["checkerboard"])
    if height % 2:
        assert torch.equal(found["every-second-row"].flip(0), found["every-second-row"])


@pytest.mark.parametrize("name", ["center", "border"])
def test_images_without_a_center_are_refused(name):
    with pytest.raises(DataError, match=r"images of 2×2 pixels cannot be split: [04] of 4"):
        make_split(Settings(observed=name), 2, 2)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Settings(), "1 quadrant"),
        (Settings(quadrants=3), "3 quadrants"),
        (Settings(observed="every-second-row"), "every-second-row"),
        (Settings(observed="/masks/a disc.v2.png"), "a disc.v2"),
        (Settings(observed="C:\\masks\\disc.png"), "disc"),
        (Settings(observed="/masks/a\nb\udcff.png"), r"a\nb\udcff"),
    ],
    ids=str,
)
def test_names_of_masks(settings, name):
    """A line, for a table and a picture, on whatever system the run was begun."""
    assert mask_name(settings) == name


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


@pytest.mark.parametrize(
    ("slip", "said"),
    [
        (lambda s: s.split(torch.zeros(3, 32, 32)), r"of images \[\.\.\., 28, 28\], not of float32 \[3, 32, 32\]"),
        (lambda s: s.vectors(torch.zeros(3, 784)), r"not of float32 \[3, 784\]"),
        (lambda s: s.vectors(torch.zeros(28)), r"not of float32 \[28\]"),
        (lambda s: s.compose(torch.zeros(2, 588), torch.zeros(2, 196)), r"x \[\.\.\., 196\] and y .*588.*\[2, 588\]"),
        (lambda s: s.compose(torch.zeros(196), torch.tensor(0.5)), r"not \[196\] and \[\]"),
        (
            lambda s: ImageSet(torch.full((2, 28, 28), 255.0), s),
            r"are uint8 .* not float32 \[2, 28, 28\] from 255 to 255",
        ),
        (lambda s: ImageSet(torch.full((28, 28), 7, dtype=torch.uint8), s), r"not uint8 \[28, 28\] from 7 to 7"),
        (lambda s: ImageSet(torch.zeros(2, 32, 32, dtype=torch.uint8), s), r"not of uint8 \[2, 32, 32\] from 0 to 0"),
        (lambda s: binarized(torch.tensor([-0.5, 255])), r"uint8, 0 to 255, not float32 \[2\] from -0\.5 to 255"),
    ],
)
def test_what_does_not_fit_is_named_with_shapes_and_ranges(slip, said):
    with pytest.raises(ValueError, match=said):
        slip(Split(quadrants(1)))


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
