"""Digits in photographs are read as MNIST's pictures: MNIST's own digits, on paper in bad light, are the judge."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from support.images import mnist
from torch import Tensor

from cvae.data.pictures import as_digit
from cvae.errors import DataError

PAPER, INK = 225, 40
SIDE = 28 * 12  # of a digit on a photograph, in its pixels


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Thirty training digits."""
    return mnist("train")[50_000:50_030].clone()


def error(found: Tensor, true: Tensor) -> float:
    """The mean difference in grey levels."""
    return float((found.float() - true.float()).abs().mean())


def photograph(digit: Tensor, light: str = "even", noise: float = 5) -> Image.Image:
    """A digit of MNIST in ink on a larger sheet of paper, below its middle and to the left."""
    ink = Image.fromarray(digit.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    sheet = Image.new("L", (600, 800))
    sheet.paste(ink.filter(ImageFilter.GaussianBlur(2)), (80, 340))
    down, across = np.mgrid[-1:1:800j, -1:1:600j]
    lights = {
        "even": np.ones((800, 600)),
        "gradient": 0.65 + 0.3 * across - 0.1 * down,
        "vignette": 1 - 0.25 * (across**2 + down**2),
        "shadow": np.where(across + 0.3 * down < -0.2, 0.6, 1.0),
    }
    levels = (PAPER + (INK - PAPER) * (np.asarray(sheet) / 255.0)) * lights[light]
    levels += np.random.default_rng(0).normal(0, noise, levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def test_digits_of_mnist_stay_as_they_are(digits: Tensor) -> None:
    """To half a level, dark on light too; moved by a pixel they would differ by seventeen."""
    assert error(torch.stack([as_digit(digit) for digit in digits]), digits) < 0.5
    assert error(torch.stack([as_digit(255 - digit) for digit in digits]), digits) < 0.5
    assert error(digits.roll(1, 2), digits) > 15


@pytest.mark.parametrize("light", ["even", "gradient", "vignette", "shadow"])
def test_photographs(digits: Tensor, light: str) -> None:
    """The digit itself comes back, to a pixel and to half its mean level, which is about 30; others differ by more."""
    for i, digit in enumerate(digits[:6]):
        found = as_digit(photograph(digit, light))
        moved = [found.roll((down, across), (0, 1)) for down in (-1, 0, 1) for across in (-1, 0, 1)]
        errors = [min(error(each, other) for each in moved) for other in digits]
        assert errors[i] < 15
        assert sum(errors) / len(errors) > 25


def test_what_else_is_on_the_paper_is_left_out(digits: Tensor) -> None:
    """Specks, and the table beside the paper: the digit is as without them."""
    clean = as_digit(photograph(digits[3]))
    spoilt = np.array(photograph(digits[3]))
    spoilt[720:] = 60
    for y, x in ((100, 100), (130, 500), (300, 40), (690, 550)):
        spoilt[y : y + 8, x : x + 8] = 50
    assert error(as_digit(Image.fromarray(spoilt)), clean) < 1


def test_thin_lines_become_as_thick_as_those_of_mnist() -> None:
    """A ring drawn by a line of one hundredth of its size, and one drawn by a tenth, come out alike."""
    down, across = np.mgrid[-1:1:400j, -1:1:400j]
    radius = np.hypot(down, across)
    rings = [np.where(abs(radius - 0.6) < width, 0, 255).astype(np.uint8) for width in (0.006, 0.06)]
    thin, thick = (as_digit(Image.fromarray(ring)).float() for ring in rings)
    assert thick.sum() * 0.7 < thin.sum() < thick.sum() * 1.3
    line = torch.full((200, 300), 240, dtype=torch.uint8)
    line[20:120, 150:152] = 10
    assert (as_digit(line) > 127).any(0).sum() == 2


def test_proportions_and_place_of_other_sizes() -> None:
    """A bar of 3:1 in 56 × 40 pixels: five sevenths of the side that is full first, in the middle, not distorted."""
    levels = torch.full((200, 300), 240, dtype=torch.uint8)
    levels[20:110, 50:80] = 10
    found = as_digit(levels, 56, 40) > 127
    rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
    assert (len(rows), len(columns)) == (40, 13)
    assert abs(float(rows.float().mean()) - 28) <= 1
    assert abs(float(columns.float().mean()) - 20) <= 1


def test_what_has_no_digit_is_refused(digits: Tensor) -> None:
    """Pictures of noise and of odd sizes end somehow: in a picture of the wanted size, or refused."""
    for size in ((1, 1), (1, 500), (40, 40)):
        with pytest.raises(DataError, match=r"^the picture: no digit is seen in it"):
            as_digit(torch.full(size, 77, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"are uint8 \[height, width\], not float32 \[28, 28\]"):
        as_digit(digits[0] / 255)
    random = torch.manual_seed(0)
    for size in ((2, 2), (1, 300), (3, 5), (28, 28), (700, 9), (300, 300)):
        with contextlib.suppress(DataError):
            digit = as_digit(torch.randint(256, size, generator=random, dtype=torch.uint8))
            assert (digit.shape, digit.dtype) == ((28, 28), torch.uint8)
