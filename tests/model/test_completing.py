"""A model takes pictures as people have them, and completes them or says how likely they are; slips are refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from reference.quadrature import integrate

from cvae.data.tasks import ImageSet
from cvae.errors import DataError
from cvae.model.cvae import NOISE_IMAGES, SAMPLES_AT_ONCE, noise
from cvae.model.densities import log_mean_exp
from cvae.model.networks import NETWORKS

NUMBERS = torch.arange(36).view(6, 6)


@pytest.fixture
def toy(make_toy):
    toy = make_toy(dtype=torch.float32)
    toy.cvae.eval()
    return toy


@pytest.mark.parametrize("network", NETWORKS)
def test_observed_pixels_stay_in_place(make_toy, network):
    """Exactly; the hidden ones differ from sample to sample, and from image to image."""
    toy = make_toy(dtype=torch.float32, network=network)
    found = toy.cvae.eval().complete(toy.images, samples=4, seed=0)
    observed = toy.task.observed
    assert (found.shape, found.dtype, found.requires_grad) == ((4, 5, 6, 6), torch.float32, False)
    assert torch.equal(found[..., observed], toy.images[:, observed].expand(4, -1, -1))
    hidden = found[..., ~observed]
    assert ((hidden >= 0) & (hidden <= 1)).all()
    assert len(hidden.flatten(0, 1).unique(dim=0)) == 20


def test_one_picture_in_all_its_forms(toy, tmp_path):
    """The same completions, bit for bit."""
    levels = toy.images[0].mul(255).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "picture.png")
    forms = [
        levels, levels / 255, (levels / 255).double(), levels[None], levels.numpy(), (levels / 255).numpy(),
        (levels / 255).numpy().astype(">f4"), np.flipud(np.flipud(levels.numpy())), Image.fromarray(levels.numpy()),
        Image.fromarray(levels.numpy()).convert("RGB"), tmp_path / "picture.png", str(tmp_path / "picture.png"),
    ]  # fmt: skip
    first, *others = (toy.cvae.complete(form, samples=2, seed=7) for form in forms)
    assert first.shape == (2, 1, 6, 6)
    assert all(torch.equal(other, first) for other in others)
    white = levels > 127
    first, *others = (toy.cvae.complete(form, seed=7) for form in (white, white.numpy(), white * 1.0))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -3.0, 255.0])
def test_hidden_pixels_may_hold_anything(toy, junk):
    spoilt = torch.where(toy.task.observed, toy.images, junk)
    found = toy.cvae.complete(spoilt, samples=3, seed=1)
    assert torch.equal(found, toy.cvae.complete(toy.images, samples=3, seed=1))
    with pytest.raises(ValueError, match=r"^a picture has to be uint8, or floats in \[0, 1\]"):
        toy.cvae.log_likelihood(spoilt)


def test_seeds(toy):
    """A number gives the same samples each time, a generator goes on, and without one the default generator does."""
    for call in (toy.cvae.complete, toy.cvae.log_likelihood):
        assert torch.equal(call(toy.images, 3, seed=3), call(toy.images, 3, seed=np.int64(3)))
        assert not torch.equal(call(toy.images, 3, seed=3), call(toy.images, 3, seed=4))
        random = torch.Generator().manual_seed(0)
        assert not torch.equal(call(toy.images, 3, seed=random), call(toy.images, 3, seed=random))
        torch.manual_seed(5)
        first, second = call(toy.images, 3), call(toy.images, 3)
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(call(toy.images, 3), first)


def test_temperature_scales_the_noise(toy):
    """The completions are those of the low-level method at noise that is scaled; at 0 all are alike."""
    eps = noise(3, 5, toy.cvae, torch.Generator().manual_seed(0))
    for temperature in (0.0, 0.5, 1.0, 2.0):
        found = toy.cvae.complete(toy.images, 3, torch.Generator().manual_seed(0), temperature)
        assert torch.equal(found, toy.task.compose(toy.x, toy.cvae.completions(toy.x, temperature * eps)))
        assert torch.allclose(found[0], found[1], atol=1e-5) == (temperature == 0)


def test_log_likelihood_matches_quadrature(make_toy):
    """log p(y|x), image by image, of more images than are computed at once, within five standard errors."""
    toy = make_toy(latent_dim=1, count=NOISE_IMAGES + 3, gain=1.0, dtype=torch.float32)
    samples = 730
    found, exact = toy.cvae.eval().log_likelihood(toy.images, samples, seed=0), integrate(toy.cvae, toy.batch)
    assert (found.shape, found.dtype) == ((NOISE_IMAGES + 3,), torch.float64)
    assert (exact.is_variance < 1).all()
    error = found - exact.log_evidence + 0.5 * exact.is_variance / samples
    assert (error.abs() < 5 * (exact.is_variance / samples).sqrt() + 1e-4).all()
    few, random = toy.batch._replace(x=toy.x[:5], y=toy.y[:5]), torch.Generator().manual_seed(0)
    eps = torch.cat([noise(SAMPLES_AT_ONCE, 5, toy.cvae, random) for _ in range(2)])[: SAMPLES_AT_ONCE + 3]
    draw = toy.cvae.from_posterior(few, eps)  # the first of the draws
    found = toy.cvae.log_likelihood(toy.images[:5], len(eps), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, log_mean_exp(draw.log_weights(few)).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        (torch.full((6, 5), 0.5), "are [6, 6] or [B, 6, 6], uint8 or floats in [0, 1], not float32 [6, 5] from 0.5"),
        (NUMBERS.numpy(), "not int64 [6, 6] from 0 to 35"),
        (NUMBERS.float(), "the observed part of a picture has to be uint8, or floats in [0, 1], not float32 [1, 9]"),
        ([[0.5]], "a picture is a tensor, an array, a Pillow image or a file's path, not: list"),
        (Image.new("L", (5, 6)), "not uint8 [6, 5] from 0 to 0; cvae.as_digit finds the digit in a photograph"),
    ],
)  # fmt: skip
def test_what_is_no_picture_for_the_model(toy, picture, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the line is looked at below
        toy.cvae.complete(picture)
    assert line in str(error.value)


def test_other_mistakes(toy, tmp_path):
    with pytest.raises(ValueError, match=r"^samples has to be a number from 1 on, not 0$"):
        toy.cvae.log_likelihood(toy.images, 0)
    for call in (toy.cvae.complete, toy.cvae.log_likelihood):
        with pytest.raises(DataError, match=r"none.png: cannot be read as a picture"):
            call(tmp_path / "none.png")


def test_shapes_that_would_broadcast_are_refused(toy):
    """They would be wrong without a word; a model's methods say which tensor has which shape."""
    x, y, eps = toy.x, toy.y, toy.eps
    wrong = {
        "x has to be floats [5, 9], not float32 [5, 1]": {"x": x[:, :1]},
        "x has to be floats [5, 9], not uint8 [5, 9]": {"x": (x * 255).byte()},
        "y has to be floats [5, 27], not float32 [1, 27]": {"y": y[:1]},
        "y has to be floats [5, 27], not float32 [27]": {"y": y[0]},
        "weight has to be floats [5, 27], not float32 [5, 1]": {"weight": y[:, :1]},
        "guess has to be floats [5, 27], not float32 [5, 9]": {"guess": y[:, :9]},
        "eps has to be floats [1, 5, 4], not float32 [1, 5, 1]": {"eps": eps[..., :1]},
        "eps has to be floats [5, 5, 4], not float32 [5, 4]": {"eps": eps[0]},
    }
    for line, change in wrong.items():
        noise, batch = change.pop("eps", eps), toy.batch._replace(**change)
        for call in (toy.cvae.from_posterior, toy.cvae.from_prior):
            with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
                call(batch, noise)
    with pytest.raises(ValueError, match=r"are uint8 \[N, height, width\], 0 to 255, not float32"):
        ImageSet(toy.images, toy.task)
