"""Measures of realism and diversity, against prdc, scoringrules, SciPy, and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
from prdc import compute_prdc

from cvae.report import measures

SAMPLES, IMAGES, CLASSES = 7, 5, 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_by_hand() -> None:
    """Two images of classes 0 and 3, with four completions each, predicted to be 0, 0, 1, 2 and 1, 1, 1, 1."""
    predicted, classes = torch.tensor([[0, 1], [0, 1], [1, 1], [2, 1]]), torch.tensor([0, 3])
    logits = 3 * torch.nn.functional.one_hot(predicted, CLASSES).float()
    assert measures.frequencies(logits).tolist() == [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0]]
    found = measures.class_measures(logits, classes, 4)
    assert found["validity"].tolist() == [0.5, 0]
    assert found["log_score"].tolist() == pytest.approx([-math.log(2.25 / 5), -math.log(0.25 / 5)], rel=1e-12)
    most = math.exp(3) / (math.exp(3) + 3)
    assert found["confidence"].tolist() == pytest.approx([most, most], rel=1e-6)
    found = measures.pixel_measures(torch.tensor([[[0.0, 1.0]], [[1.0, 0.5]]]), torch.tensor([[1.0, 1.0]]))
    assert (found["mse"].tolist(), found["best_mse"].tolist()) == ([0.3125], [0.125])


def test_class_frequencies() -> None:
    """Against SciPy's entropy; the scores of all classes are those of a distribution, in which each has a share."""
    logits = torch.randn(SAMPLES, IMAGES, CLASSES)
    frequency = measures.frequencies(logits)
    counts = np.stack([np.bincount(image, minlength=CLASSES) for image in logits.argmax(-1).T.numpy()])
    np.testing.assert_allclose(frequency * SAMPLES, counts, rtol=1e-12)
    found = [measures.class_measures(logits, torch.full((IMAGES,), k), SAMPLES) for k in range(CLASSES)]
    np.testing.assert_allclose(found[0]["entropy"], scipy.stats.entropy(counts, axis=1), rtol=1e-12)
    scores = torch.stack([each["log_score"] for each in found])
    np.testing.assert_allclose((-scores).exp().sum(0), 1, rtol=1e-12)
    assert scores.max() <= math.log(CLASSES * (SAMPLES + 1)) + 1e-12


def test_energy_score() -> None:
    """Against scoringrules; a point prediction is as many equal completions."""
    samples, y = torch.rand(SAMPLES, IMAGES, 11, dtype=torch.float64), torch.rand(IMAGES, 11, dtype=torch.float64)
    expected = scoringrules.es_ensemble(y.numpy(), samples.transpose(0, 1).numpy(), estimator="fair")
    several = samples, samples[:1], samples[:1].expand(SAMPLES, -1, -1)
    score, once, often = (measures.pixel_measures(each, y)["energy_score"] for each in several)
    np.testing.assert_allclose(score, expected, rtol=1e-10)
    np.testing.assert_allclose(once, (samples[0] - y).norm(dim=-1), rtol=1e-12)
    np.testing.assert_allclose(often, once, rtol=1e-6)  # distances of equal points by a product: about √ε


@pytest.mark.parametrize(("real", "fake", "neighbours"), [(40, 40, 5), (1203, 70, 1), (30, 90, 5)])
def test_density_and_coverage_against_prdc(real: int, fake: int, neighbours: int) -> None:
    features = torch.randn(real, 3), 0.7 * torch.randn(fake, 3) + 0.3
    expected = compute_prdc(*(part.numpy() for part in features), neighbours)
    density, coverage = measures.density_and_coverage(*features, neighbours)
    assert (density.shape, coverage.shape) == ((fake,), (real,))
    assert (density.mean(), coverage.mean()) == pytest.approx((expected["density"], expected["coverage"]), rel=1e-9)


@pytest.mark.parametrize(("count", "neighbours", "rounds"), [(6, 5, 1000), (12, 3, 1000), (200, 5, 200)])
def test_density_and_coverage_of_the_truth(count: int, neighbours: int, rounds: int) -> None:
    """In expectation, for fakes from the distribution of the real images, within four standard errors."""
    pairs = (measures.density_and_coverage(*torch.randn(2, count, 2), neighbours) for _ in range(rounds))
    means = torch.tensor([[part.mean() for part in pair] for pair in pairs])
    expected = torch.tensor([1, measures.coverage_of_the_truth(count, neighbours)])
    assert ((means.mean(0) - expected).abs() < 4 * means.std(0) / rounds**0.5).all()
