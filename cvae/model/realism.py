"""Measures of realism and diversity: pure functions of tensors, one value per image unless it says otherwise.

S completions of each of B images come as their hidden pixels, `[S, B, D]` in [0, 1], and as what a classifier of whole
images says of them, logits `[S, B, K]` of K classes. y `[B, D]` are the true hidden pixels, classes int64 `[B]` the
true classes. A point prediction has S = 1; what it says does not depend on how often it is repeated.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

NEIGHBOURS = 5  # k of density and coverage
ROWS_AT_ONCE = 1000  # of a matrix of distances


def validity(logits: Tensor, classes: Tensor) -> Tensor:
    """The share of an image's completions whose predicted class is the true one, `[B]`: mean_s 1[argmax_k = class]."""
    return (logits.argmax(-1) == classes).double().mean(0)


def confidence(logits: Tensor) -> Tensor:
    """The mean over completions of the probability of the predicted class, `[B]`: mean_s max_k p(k | completion s).

    Low where a completed image is like no class. Source: the maximum class probability of Hendrycks and Gimpel 2017.
    """
    return logits.double().softmax(-1).amax(-1).mean(0)


def frequencies(logits: Tensor) -> Tensor:
    """How often each class is predicted for an image's completions, `[B, K]`: f_k = n_k / S, which sum to one."""
    return one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(0)


def log_score(frequency: Tensor, classes: Tensor, samples: int) -> Tensor:
    """Minus the log of the true class's probability under class frequencies `[B, K]` of S completions, nats `[B]`.

    The probability is (n_k + 1/K) / (S + 1): a class that never came has some, and none has all. Lower is better.
    samples: S, also of a point prediction, which counts as S equal ones.
    Source: the logarithmic score of Good 1952; Dirichlet prior of Perks 1947, whose counts sum to one.
    """
    count = frequency.gather(-1, classes[:, None])[:, 0] * samples
    return -((count + 1 / frequency.shape[-1]) / (samples + 1)).log()


def entropy(probabilities: Tensor) -> Tensor:
    """H = −Σ_k p_k log p_k of class probabilities or frequencies `[B, K]`, nats `[B]`: from 0, certain, to log K.

    That of frequencies is too small by about (classes that come − 1) / 2S (Miller 1955).
    """
    each: Tensor = torch.special.entr(probabilities)
    return each.sum(-1)


def energy_score(completions: Tensor, y: Tensor) -> Tensor:
    """mean_s ‖Y_s − y‖ − ½ mean_{s≠t} ‖Y_s − Y_t‖, Euclidean over the hidden pixels, `[B]`; lower is better.

    In expectation least for completions drawn from p(y|x) itself. The second term is zero for a point prediction.
    Source: Gneiting and Raftery 2007, sect. 4.3, with the other sign; its fair estimate, unbiased in S (Ferro 2014).
    """
    samples = len(completions)
    error: Tensor = (completions - y).norm(dim=-1).mean(0)
    if samples == 1:
        return error.double()
    each = completions.transpose(0, 1).contiguous()
    spread: Tensor = torch.cdist(each, each).sum((1, 2)) / (samples * (samples - 1))
    return (error - spread / 2).double()


def squared_errors(completions: Tensor, y: Tensor) -> Tensor:
    """mean_d (Y_sd − y_d)² of each completion, per hidden pixel, `[S, B]`.

    Their mean over s is the mean squared error, their least the best of S, which rewards diversity alone.
    Source: best of S as in Lee et al. 2017 (DESIRE) and Gupta et al. 2018.
    """
    return (completions - y).square().mean(-1).double()


def density_and_coverage(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Density per fake image `[M]` and coverage per real image `[N]` in features real `[N, F]` and fake `[M, F]`.

    The ball about a real image reaches to its k-th nearest other one. density_j = the number of balls that fake j is
    in, / k; coverage_i = 1 if any fake is in the ball of i, else 0. Their means are the measures. Raises ValueError for
    no more than k real images.
    Source: Naeem et al. 2020, k = 5 among it.
    """
    if len(real) <= neighbours:
        raise ValueError(f"more than {neighbours} real images are needed, not {len(real)}")
    density = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    covered = []
    for rows in real.split(ROWS_AT_ONCE):
        radius = torch.cdist(rows, real).kthvalue(neighbours + 1, dim=1).values  # the nearest one is itself
        inside = torch.cdist(rows, fake) < radius[:, None]
        density += inside.sum(0).double() / neighbours
        covered.append(inside.any(1).double())
    return density, torch.cat(covered)


def coverage_of_the_truth(count: int, neighbours: int = NEIGHBOURS) -> float:
    """What coverage is in expectation for as many fakes as real images, N each, from one distribution.

    1 − Π_{i=1…k} (N − i) / (2N − i), about 1 − 2^−k; the expected density is then 1. Source: Naeem et al. 2020.
    """
    missed = 1.0
    for i in range(1, neighbours + 1):
        missed *= (count - i) / (2 * count - i)
    return 1 - missed
