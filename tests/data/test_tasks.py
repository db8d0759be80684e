"""Masks, and the task of one: what is given, what is asked, and the order in which the networks see it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae.data.masks import MASKS, make_task, mask_name, quadrants
from cvae.data.tasks import FixedMask, ImageSet, binarized
from cvae.errors import DataError
from cvae.settings import Settings

PICTURES = {  # x: given, by hand
    (1, 4, 4): "....|....|xx..|xx..", (2, 4, 4): "xx..|xx..|xx..|xx..", (3, 4, 4): "xxxx|xxxx|xx..|xx..",
    (1, 5, 3): "...|...|x..|x..|x..", (2, 5, 3): "x..|x..|x..|x..|x..", (3, 5, 3): "xxx|xxx|x..|x..|x..",
    (1, 2, 2): "..|x.", (3, 3, 2): "xx|x.|x.",
    ("left", 4, 5): "xx...|xx...|xx...|xx...", ("right", 4, 5): "..xxx|..xxx|..xxx|..xxx",
    ("top", 5, 3): "xxx|xxx|...|...|...", ("bottom", 5, 3): "...|...|xxx|xxx|xxx",
    ("center", 4, 5): ".....|.xxx.|.xxx.|.....", ("center", 3, 7): ".......|..xxx..|.......",
    ("border", 4, 5): "xxxxx|x...x|x...x|xxxxx", ("border", 6, 3): "xxx|x.x|x.x|x.x|x.x|xxx",
    ("checkerboard", 3, 5): "x.x.x|.x.x.|x.x.x", ("checkerboard", 2, 4): "x.x.|.x.x",
    ("every-second-row", 5, 2): "xx|..|xx|..|xx", ("every-second-row", 4, 3): "xxx|...|xxx|...",
}  # fmt: skip


@pytest.mark.parametrize("case", PICTURES, ids=str)
def test_observed_pixels(case):
    which, height, width = case
    settings = Settings(quadrants=which) if isinstance(which, int) else Settings(observed=which, quadrants=2)
    expected = [[pixel == "x" for pixel in row] for row in PICTURES[case].split("|")]
    task = make_task(settings, height, width)
    assert task.observed.tolist() == expected
    assert task.name == mask_name(settings)


def test_masks_that_do_not_suit_the_images(monkeypatch):
    for settings, size, line in (
        (Settings(observed="center"), (2, 2), "images of 2×2 pixels cannot be split: 4 of 4"),
        (Settings(observed="border"), (2, 2), "images of 2×2 pixels cannot be split: 0 of 4"),
        (Settings(), (1, 8), "1×8 pixels has no four quadrants"),
        (Settings(), (8, 1), "8×1 pixels has no four quadrants"),
        (Settings(observed="middle"), (5, 6), f"observed has to be one of {', '.join(MASKS)}, not 'middle'"),
    ):
        with pytest.raises(DataError, match=line):
            make_task(settings, *size)
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match=f"not {k}"):
            quadrants(k)
    board = torch.arange(30).view(5, 6) % 2 == 0  # a new mask is a maker and a name
    monkeypatch.setitem(MASKS, "board", lambda height, width: board)
    assert torch.equal(make_task(Settings(observed="board"), 5, 6).observed, board)


def test_names_of_masks():
    """A line, for a table and a picture, on whatever system the run was begun."""
    names = {
        "/masks/a disc.v2.png": "a disc.v2",
        "C:\\masks\\disc.png": "disc",
        "/masks/a\nb.png": r"a\nb",
        "top": "top",
    }
    for observed, name in names.items():
        assert mask_name(Settings(observed=observed)) == name
    assert [mask_name(Settings(quadrants=k)) for k in (1, 3)] == ["1 quadrant", "3 quadrants"]


@pytest.mark.parametrize(
    ("slip", "said"),
    [
        (lambda t: FixedMask(torch.zeros(5, 6).bool()), "0 of 30 pixels are observed"),
        (lambda t: FixedMask(torch.ones(5, 6).bool()), "30 of 30 pixels are observed"),
        (lambda t: FixedMask(torch.eye(5, dtype=torch.uint8)), "a mask is bool"),
        (lambda t: t.rows(torch.zeros(3, 32, 32)), r"of images \[\.\.\., 28, 28\], not of float32 \[3, 32, 32\]"),
        (lambda t: t.compose(torch.zeros(2, 588), torch.zeros(2, 196)), r"x \[\.\.\., 196\] and y .*588.*\[2, 588\]"),
        (lambda t: ImageSet(torch.full((2, 28, 28), 255.0), t), r"are uint8 .* not float32 \[2, 28, 28\] from 255 to"),
        (lambda t: ImageSet(torch.full((28, 28), 7, dtype=torch.uint8), t), r"not uint8 \[28, 28\] from 7 to 7"),
        (lambda t: ImageSet(torch.zeros(2, 32, 32, dtype=torch.uint8), t), r"not of uint8 \[2, 32, 32\] from 0 to 0"),
        (lambda t: binarized(torch.tensor([-0.5, 255])), r"uint8, 0 to 255, not float32 \[2\] from -0\.5 to 255"),
    ],
)
def test_what_does_not_fit_is_named_with_shapes_and_ranges(slip, said):
    with pytest.raises(ValueError, match=said):
        slip(FixedMask(quadrants(1)))


@st.composite
def tasks(draw):
    """Draw any mask, of any size."""
    height, width = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    pixels = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width).filter(is_mixed))
    return FixedMask(torch.tensor(pixels).view(height, width))


def is_mixed(pixels):
    return any(pixels) and not all(pixels)


@given(tasks())
def test_task_is_masking_and_compose_its_inverse(task):
    height, width = task.observed.shape
    images = (torch.arange(3 * height * width) % 251).to(torch.uint8).view(3, height, width)
    x, y, weight, guess = task.batch(task.rows(images))
    assert (weight, guess) == (None, None)
    assert torch.equal(x, torch.stack([image[task.observed] for image in images]) / 255)
    assert torch.equal(y, torch.stack([image[~task.observed] for image in images]) / 255)
    assert (x.shape[1], y.shape[1], task.height, task.width) == (task.x_dim, task.y_dim, height, width)
    assert torch.equal(task.compose(x, y), images / 255)
    several = task.compose(x, torch.stack([y, 1 - y]))  # completions of the same pixels
    assert torch.equal(several, torch.stack([task.compose(x, y), task.compose(x, 1 - y)]))
    assert torch.equal(task.asked(images / 255), y)
    picture = task.picture(x, y)
    assert picture.shape == (3, task.planes, height, width)
    assert torch.equal(picture[:, 0], images / 255)
    assert torch.equal(picture[:, 1], task.observed.float().expand(3, -1, -1))
