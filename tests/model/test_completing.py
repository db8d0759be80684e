"""A model takes pictures as people have them, and completes them or says how likely they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference.quadrature import integrate
from torch import Tensor

import cvae
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.likelihood import IMAGES_AT_ONCE, noise

NUMBERS = torch.arange(36).view(6, 6)


@pytest.fixture
def toy(make_toy: Callable[..., Any]) -> Any:
    toy = make_toy(dtype=torch.float32)
    toy.cvae.eval()
    return toy


@pytest.mark.parametrize("network", ["tutorial", "paper", "deep"])
def test_observed_pixels_stay_in_place(make_toy: Callable[..., Any], network: str) -> None:
    """Exactly; the hidden ones differ from sample to sample, and from image to image."""
    toy = make_toy(dtype=torch.float32, network=network)
    found = toy.cvae.eval().complete(toy.images, samples=4)
    observed = toy.split.observed
    assert (found.shape, found.dtype) == ((4, 5, 6, 6), torch.float32)
    assert torch.equal(found[..., observed], toy.images[:, observed].expand(4, -1, -1))
    hidden = found[..., ~observed]
    assert ((hidden >= 0) & (hidden <= 1)).all()
    assert len(hidden.flatten(0, 1).unique(dim=0)) == 20


def test_one_picture_in_all_its_forms(toy: Any, tmp_path: Path) -> None:
    """The same completions, bit for bit."""
    levels = toy.images[0].mul(255).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "picture.png")
    forms = [
        levels,
        levels / 255,
        (levels / 255).double(),
        levels[None],
        levels.numpy(),
        (levels / 255).numpy(),
        (levels / 255).numpy().astype(">f4"),
        np.flipud(np.flipud(levels.numpy())),
        Image.fromarray(levels.numpy()),
        Image.fromarray(levels.numpy()).convert("RGB"),
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
    ]
    first, *others = (toy.cvae.complete(form, samples=2, seed=7) for form in forms)
    assert first.shape == (2, 1, 6, 6)
    assert all(torch.equal(other, first) for other in others)
    black_or_white = levels > 127
    found = [toy.cvae.complete(form, seed=7) for form in (black_or_white, black_or_white.numpy(), black_or_white * 1.0)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -3.0, 255.0])
def test_hidden_pixels_may_hold_anything(toy: Any, junk: float) -> None:
    spoilt = torch.where(toy.split.observed, toy.images, junk)
    found = toy.cvae.complete(spoilt, samples=3, seed=1)
    assert torch.equal(found, toy.cvae.complete(toy.images, samples=3, seed=1))
    with pytest.raises(ValueError, match=r"^a picture has to be uint8, or floats in \[0, 1\]"):
        toy.cvae.log_likelihood(spoilt)


def test_seeds(toy: Any) -> None:
    """A number gives the same samples each time, a generator goes on, and without one the default generator does."""
    complete: Callable[..., Tensor] = toy.cvae.complete
    picture = toy.images[0]
    assert torch.equal(complete(picture, seed=3), complete(picture, seed=np.int64(3)))
    assert not torch.equal(complete(picture, seed=3), complete(picture, seed=4))
    random = torch.Generator().manual_seed(0)
    assert not torch.equal(complete(picture, seed=random), complete(picture, seed=random))
    torch.manual_seed(5)
    first, second = complete(picture), complete(picture)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(complete(picture), first)


def test_temperature_scales_the_noise(toy: Any) -> None:
    """The completions are those of the low-level method at noise that is scaled; at 0 all are alike."""
    eps = noise(3, 5, toy.cvae, torch.Generator().manual_seed(0))
    for temperature in (0.0, 0.5, 1.0, 2.0):
        found = toy.cvae.complete(toy.images, 3, torch.Generator().manual_seed(0), temperature)
        wanted = toy.split.compose(toy.x, toy.cvae.completions(toy.x, temperature * eps))
        assert torch.equal(found, wanted)
        assert torch.allclose(found[0], found[1], atol=1e-5) == (temperature == 0)


def test_log_likelihood_matches_quadrature(make_toy: Callable[..., Any]) -> None:
    """log p(y|x), image by image, of more images than are computed at once, within five standard errors."""
    toy = make_toy(latent_dim=1, count=IMAGES_AT_ONCE + 3, gain=1.3, dtype=torch.float32)
    samples = 1000
    found, exact = toy.cvae.eval().log_likelihood(toy.images, samples), integrate(toy.cvae, toy.x, toy.y)
    assert (found.shape, found.dtype) == ((IMAGES_AT_ONCE + 3,), torch.float64)
    error = found - exact.log_evidence + 0.5 * exact.is_variance / samples
    assert (error.abs() < 5 * (exact.is_variance / samples).sqrt() + 1e-5).all()


def test_nothing_is_kept_for_a_gradient(toy: Any) -> None:
    """The weights may be trained ones; what comes back can be used in a gradient of one's own."""
    assert any(parameter.requires_grad for parameter in toy.cvae.parameters())
    found = toy.cvae.complete(toy.images)
    assert not found.requires_grad
    (found * torch.ones((), requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        (torch.rand(6, 5), "pictures for this model are [6, 6] or [B, 6, 6], uint8 or floats in [0, 1], not float32"),
        (torch.rand(2, 2, 6, 6), "not float32 [2, 2, 6, 6] from 0."),
        (NUMBERS, "not int64 [6, 6] from 0 to 35"),
        (NUMBERS.to(torch.uint16), "not uint16 [6, 6]"),
        (NUMBERS.numpy(), "not int64 [6, 6] from 0 to 35"),
        (NUMBERS.float(), "the observed part of a picture has to be uint8, or floats in [0, 1], not float32 [1, 9]"),
        (torch.full((6, 6), float("nan")), "not float32 [1, 9] from nan to nan"),
        (NUMBERS.to(torch.complex64), "not complex64 [6, 6]"),
        (np.array([["a"]]), "not: <U1 array"),
        ([[0.5]], "a picture is a tensor, a numpy array, a Pillow image or the path of a file, not: list"),
        (None, "not: NoneType"),
        (Image.new("L", (5, 6)), "not uint8 [6, 5] from 0 to 0; cvae.as_digit finds the digit in a photograph"),
    ],
)  # fmt: skip
def test_what_is_no_picture_for_the_model(toy: Any, picture: Any, line: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the line is looked at below
        toy.cvae.complete(picture)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_other_mistakes(toy: Any, tmp_path: Path) -> None:
    model: CVAE = toy.cvae
    picture = toy.images[0]
    for wrong, line in (
        ({"samples": 0}, "samples has to be a number from 1 on, not 0"),
        ({"temperature": -1.0}, "temperature has to be a number from 0 on, not -1.0"),
        ({"temperature": float("nan")}, "temperature has to be a number from 0 on, not nan"),
    ):
        with pytest.raises(ValueError, match=f"^{line}$"):
            model.complete(picture, **wrong)
    with pytest.raises(DataError, match=r"none.png: there is no such file"):
        model.complete(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png: cannot be read as a picture"):
        model.log_likelihood(tmp_path / "text.png")


def test_showing(toy: Any) -> None:
    """A row for each picture, a column for each sample, each pixel a block of its own grey."""
    completions = toy.cvae.complete(toy.images, samples=3)
    shown = cvae.show(completions)
    sizes = [cvae.show(each).size for each in (completions, completions[0], completions[0, 0])]
    assert sizes[0][0] < sizes[1][0]  # three in a row, five in a row, one
    assert sizes[0][1] > sizes[1][1] == sizes[2][1]
    grey = np.asarray(shown.convert("L")).astype(float)
    zoom, left, top = 9, 8, 4  # 54 screen pixels; gaps of four between images
    for b in range(5):
        for s in range(3):
            y, x = top + b * (6 * zoom + 4), left + s * (6 * zoom + 4)
            found = grey[y : y + 6 * zoom : zoom, x : x + 6 * zoom : zoom]
            assert abs(found - completions[s, b].numpy() * 255).max() <= 0.51
    levels = (completions * 255).round().to(torch.uint8)
    assert cvae.show(levels).tobytes() == shown.tobytes()
    for wrong in (completions * 2, completions[None], torch.rand(3), torch.zeros(0, 6, 6), NUMBERS):
        with pytest.raises(ValueError, match=r"^pictures to be shown are uint8 or floats"):
            cvae.show(wrong)
