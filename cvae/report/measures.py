"""Measures of realism and diversity: pure functions of tensors, one value per image unless it says otherwise.

S completions of each of B images come as their hidden pixels, `[S, B, D]` in [0, 1], and as what a classifier of whole
images says of them, logits `[S, B, K]` of K classes. y `[B, D]` are the true hidden pixels, classes int64 `[B]` the
true classes. A point prediction has S = 1: no measure depends on how often it is repeated.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

NEIGHBOURS = 5  # k of density and coverage
ROWS_AT_ONCE = 1000  # of a matrix of distances


def frequencies(logits: Tensor) -> Tensor:
    """Return how often each class is predicted for an image's completions, `[B, K]`: f_k = n_k / S, which sum to 1."""
    return one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(0)


def class_measures(logits: Tensor, classes: Tensor, samples: int) -> dict[str, Tensor]:
    """Return the measures of the classes that completions are taken for, by name, float64 `[B]`.

    A point prediction counts as `samples` equal ones in the log score: a class that never came has some probability,
    and none has all. The entropy is too small by about (classes that come − 1) / 2S (Miller 1955).
    """
    frequency = frequencies(logits)
    count = samples * frequency.gather(-1, classes[:, None])[:, 0]  # n_k of the true class k
    return {
        # The share of completions whose predicted class is the true one
        "validity": (logits.argmax(-1) == classes).double().mean(0),
        # mean_s max_k p(k | s) (Hendrycks and Gimpel 2017)
        "confidence": logits.double().softmax(-1).amax(-1).mean(0),
        # −log (n_k + 1/K) / (S + 1), nats, lower is better (Good 1952); the prior of 1/K by Perks 1947
        "log_score": -((count + 1 / logits.shape[-1]) / (samples + 1)).log(),
        # −Σ_k f_k log f_k, nats, from 0 to log K
        "entropy": torch.special.entr(frequency).sum(-1),
    }


def pixel_measures(completions: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the measures of the hidden pixels, by name, float64 `[B]`; lower is better."""
    samples, by_image = len(completions), completions.transpose(0, 1).contiguous()
    spread = torch.cdist(by_image, by_image).sum((1, 2)) / max(1, samples * (samples - 1))  # of one completion, 0
    squared = (completions - y).square().mean(-1).double()
    return {
        # mean_s ‖Y_s − y‖ − ½ mean_{s≠t} ‖Y_s − Y_t‖: in expectation least for draws from p(y|x) itself. Gneiting and
        # Raftery 2007, sect. 4.3, with the other sign; the fair estimate, unbiased in S, is of Ferro 2014.
        "energy_score": ((completions - y).norm(dim=-1).mean(0) - spread / 2).double(),
        # The squared error per pixel, and the least of S, which rewards diversity alone (Lee et al. 2017)
        "mse": squared.mean(0),
        "best_mse": squared.amin(0),
    }


def density_and_coverage(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Return density per fake image `[M]` and coverage per real one `[N]`, from features `[M, F]` and `[N, F]`, N > k.

    The ball about a real image reaches to its k-th nearest other one. density_j = the number of balls that fake j is
    in, / k; coverage_i = 1 if any fake is in the ball of i, else 0. Their means are the measures. Source: Naeem et al.
    2020, also of k = 5.
    """
    density, covered = torch.zeros(len(fake), dtype=torch.float64, device=fake.device), []
    for rows in real.split(ROWS_AT_ONCE):
        radius = torch.cdist(rows, real).kthvalue(neighbours + 1, dim=1).values  # the nearest one is itself
        inside = torch.cdist(rows, fake) < radius[:, None]
        density += inside.sum(0).double() / neighbours
        covered.append(inside.any(1).double())
    return density, torch.cat(covered)


def coverage_of_the_truth(count: int, neighbours: int = NEIGHBOURS) -> float:
    """Return the expected coverage of as many fakes as real images, N each, from one distribution.

    1 − Π_{i=1…k} (N − i) / (2N − i), about 1 − 2^−k; the expected density is then 1. Source: Naeem et al. 2020.
    """
    return 1 - math.prod((count - i) / (2 * count - i) for i in range(1, neighbours + 1))
