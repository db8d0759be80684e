"""Measures of realism and diversity, against prdc, scoringrules, SciPy, and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
from prdc import compute_prdc
from torch import Tensor

from cvae.report import measures

SAMPLES, IMAGES, PIXELS, CLASSES = 7, 5, 11, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_logits() -> Tensor:
    return torch.randn(SAMPLES, IMAGES, CLASSES)


def completions() -> tuple[Tensor, Tensor]:
    return torch.rand(SAMPLES, IMAGES, PIXELS, dtype=torch.float64), torch.rand(IMAGES, PIXELS, dtype=torch.float64)


def predicting(*words: str) -> Tensor:
    """Logits of completions that are predicted to be of these classes, an image a word."""
    digits = torch.tensor([[int(letter) for letter in word] for word in words])
    return 3 * torch.nn.functional.one_hot(digits.T, CLASSES).float()


def test_by_hand() -> None:
    """Two images of four completions each, of classes 0 and 3."""
    logits, classes = predicting("0012", "1111"), torch.tensor([0, 3])
    assert measures.validity(logits, classes).tolist() == [0.5, 0]
    frequency = measures.frequencies(logits)
    assert frequency.tolist() == [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0]]
    scores = measures.log_score(frequency, classes, 4)
    assert scores.tolist() == pytest.approx([-math.log(2.25 / 5), -math.log(0.25 / 5)], rel=1e-12)
    assert measures.entropy(frequency).tolist() == pytest.approx([1.5 * math.log(2), 0], rel=1e-12)
    most = math.exp(3) / (math.exp(3) + 3)
    assert measures.confidence(logits).tolist() == pytest.approx([most, most], rel=1e-6)


def test_class_frequencies_against_scipy() -> None:
    logits, classes = random_logits(), torch.randint(CLASSES, (IMAGES,))
    frequency = measures.frequencies(logits)
    for i, found in enumerate(frequency):
        counts = np.bincount(logits[:, i].argmax(-1).numpy(), minlength=CLASSES)
        np.testing.assert_allclose(found * SAMPLES, counts, rtol=1e-12)
        assert measures.entropy(frequency)[i] == pytest.approx(scipy.stats.entropy(counts), rel=1e-12)
        assert measures.validity(logits, classes)[i] == pytest.approx(counts[classes[i]] / SAMPLES)


def test_log_score_is_proper_and_bounded() -> None:
    """What is told of each class is a distribution; a class that never came costs no more than log K (S + 1)."""
    frequency = measures.frequencies(random_logits())
    each = torch.stack([measures.log_score(frequency, torch.full((IMAGES,), k), SAMPLES) for k in range(CLASSES)])
    np.testing.assert_allclose((-each).exp().sum(0), 1, rtol=1e-12)
    assert each.max() <= math.log(CLASSES * (SAMPLES + 1)) + 1e-12


def test_energy_score_against_scoringrules() -> None:
    samples, y = completions()
    expected = scoringrules.es_ensemble(y.numpy(), samples.transpose(0, 1).numpy(), estimator="fair")
    np.testing.assert_allclose(measures.energy_score(samples, y), expected, rtol=1e-10)


def test_energy_score_of_one_pixel_is_the_crps() -> None:
    samples, y = torch.randn(SAMPLES, IMAGES, 1, dtype=torch.float64), torch.randn(IMAGES, 1, dtype=torch.float64)
    expected = scoringrules.crps_ensemble(y[:, 0].numpy(), samples[..., 0].T.numpy(), estimator="fair")
    np.testing.assert_allclose(measures.energy_score(samples, y), expected, rtol=1e-9)


def test_point_prediction_is_as_many_equal_completions() -> None:
    samples, y = completions()
    once, often = samples[:1], samples[:1].expand(SAMPLES, -1, -1)
    np.testing.assert_allclose(measures.energy_score(once, y), measures.energy_score(often, y), rtol=1e-6)
    np.testing.assert_allclose(measures.energy_score(once, y), (once[0] - y).norm(dim=-1), rtol=1e-12)
    logits = random_logits()[:1]
    assert torch.equal(measures.frequencies(logits), measures.frequencies(logits.expand(SAMPLES, -1, -1)))


def test_energy_score_is_least_for_the_true_distribution() -> None:
    """Not for one that is too narrow, too wide or shifted."""
    y, noise = torch.randn(20_000, 2), torch.randn(20, 20_000, 2)
    scores = [
        measures.energy_score(spread * noise + shift, y).mean() for spread, shift in ((1, 0), (0.5, 0), (2, 0), (1, 1))
    ]
    assert min(scores[1:]) > scores[0] + 0.02


def test_squared_errors_by_hand() -> None:
    errors = measures.squared_errors(torch.tensor([[[0.0, 1.0]], [[1.0, 0.5]]]), torch.tensor([[1.0, 1.0]]))
    assert errors.tolist() == [[0.5], [0.125]]


@pytest.mark.parametrize(("real", "fake"), [(40, 40), (1203, 70), (30, 90)])
@pytest.mark.parametrize("neighbours", [1, 5])
def test_density_and_coverage_against_prdc(real: int, fake: int, neighbours: int) -> None:
    one, other = torch.randn(real, 3), 0.7 * torch.randn(fake, 3) + 0.3
    expected = compute_prdc(one.numpy(), other.numpy(), neighbours)
    density, coverage = measures.density_and_coverage(one, other, neighbours)
    assert (density.shape, coverage.shape) == ((fake,), (real,))
    assert float(density.mean()) == pytest.approx(expected["density"], rel=1e-9)
    assert float(coverage.mean()) == pytest.approx(expected["coverage"], rel=1e-9)


@pytest.mark.parametrize(("count", "neighbours"), [(6, 5), (12, 3), (200, 5)])
def test_density_and_coverage_of_the_truth(count: int, neighbours: int) -> None:
    """In expectation, for fakes from the distribution of the real images."""
    rounds = 3000 if count < 100 else 200
    means = torch.tensor([
        [part.mean() for part in measures.density_and_coverage(*torch.randn(2, count, 2), neighbours)]
        for _ in range(rounds)
    ])  # fmt: skip
    error = means.std(0) / rounds**0.5
    expected = torch.tensor([1, measures.coverage_of_the_truth(count, neighbours)])
    assert ((means.mean(0) - expected).abs() < 4 * error).all()
