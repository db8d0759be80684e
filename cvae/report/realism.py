"""Realism and diversity of a run's completions of the test images, as its two classifiers judge them.

Means and draws are told apart: a completion by the CVAE is the pixel means of p(y|x,z) at a z ~ p(z|x), and from these
means each pixel can be drawn, black or white. The same of the baseline's ŷ, which has no z.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cvae import context
from cvae.console import Bar
from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.data.sources import load_labels
from cvae.data.tasks import Batch
from cvae.errors import DataError
from cvae.model import realism
from cvae.model.classifier import FEATURES
from cvae.model.cvae import CVAE, noise
from cvae.model.cvae import NOISE_IMAGES as IMAGES_AT_ONCE
from cvae.model.likelihood import Estimate, estimate
from cvae.report.judges import Judges, open_judges
from cvae.report.selection import Subject

COMPLETIONS = 50  # of each image, S

COMPLETED = ("nn", "nn_drawn", "cvae", "cvae_drawn", "truth")
"""Whose completions are judged: the baseline's ŷ, pixels drawn from it, the CVAE's two, the true hidden pixels."""

OF_CLASSES = ("validity", "confidence", "log_score", "entropy")
OF_PIXELS = ("energy_score", "mse", "best_mse")

KEYS = [(who, name) for who in COMPLETED for name in (*OF_CLASSES, *OF_PIXELS)]
KEYS += [("x_only", name) for name in OF_CLASSES]
"""What is measured of each image, and whose it is; `x_only` is the classifier that sees x only."""


class Case(NamedTuple):
    """All that is needed to judge a run: its images, uint8, and their classes, int64 `[N]`, and the two classifiers."""

    model: CVAE
    images: Tensor
    classes: Tensor
    judges: Judges


class Judged(NamedTuple):
    """Measures of each image by `KEYS`, float64 `[N]`, and features of first completions by `COMPLETED`, `[N, F]`."""

    values: dict[tuple[str, str], Tensor]
    features: dict[str, Tensor]

    def estimates(self) -> dict[tuple[str, str], Estimate]:
        """Mean and standard error of each measure, and what is of all images together, without an error.

        density, coverage: of the first completions; of the truth, what others of its kind have in expectation.
        correlation: of the entropy of the classes with that of the classifier that sees x only.
        """
        found = {key: estimate(values) for key, values in self.values.items()}
        truth, ambiguity = self.features["truth"], self.values["x_only", "entropy"]
        for who in COMPLETED:
            density, coverage = torch.ones(1), torch.tensor(realism.coverage_of_the_truth(len(truth)))
            if who != "truth":
                density, coverage = realism.density_and_coverage(truth, self.features[who])
            pair = torch.stack([self.values[who, "entropy"], ambiguity])
            together = {"density": density.mean(), "coverage": coverage.mean(), "correlation": pair.corrcoef()[0, 1]}
            found |= {(who, name): Estimate(value.item(), float("nan")) for name, value in together.items()}
        return found


def open_case(subject: Subject, limit: int | None) -> Case:
    """What judging a run needs; limit: of the first so many test images. Raises DataError where it cannot be judged."""
    device = next(subject.model.parameters()).device
    judges = open_judges(subject.folder, subject.settings, subject.model.split, device)
    classes, images = load_labels(subject.settings, "test")[:limit], subject.test.images[:limit]
    if len(images) <= realism.NEIGHBOURS:
        raise DataError(f"{subject.folder}: {len(images)} test images are too few; density and coverage need 6")
    if (most := int(classes.max())) >= judges.whole.last.out_features:
        raise DataError(f"{subject.folder}: the test images have a class {most}, which the training images have not")
    return Case(subject.model, images, classes, judges)


def open_cases(
    subjects: Mapping[str, Subject], limit: int | None, processes: Processes
) -> tuple[dict[str, Case], list[str]]:
    """The runs that can be judged, by their names, and a line about each that cannot."""
    cases, problems = {}, []
    for name, subject in subjects.items():
        try:
            cases[name] = processes.on_all(partial(open_case, subject, limit))
        except DataError as error:
            problems.append(f"{error}; its realism is not measured")
    return cases, problems


def judge(name: str, case: Case, seed: int, device: torch.device, processes: Processes) -> Judged:
    """The measures of a run's images; each process computes its share."""
    images = ImageSet(case.images, case.model.split, device)
    rows = len(KEYS) + len(COMPLETED) * FEATURES
    portions = [torch.empty(rows, 0, dtype=torch.float64, device=device)]
    with Bar(f"{name}: realism", len(images) // processes.count, "img", processes.is_main) as bar:
        for portion in _portions(case, images, seed, processes.share):
            portions.append(portion)
            bar.update(portion.shape[1])
    values, features = processes.gather(torch.cat(portions, dim=1)).split([len(KEYS), rows - len(KEYS)])
    by_whom = features.float().view(len(COMPLETED), FEATURES, -1).mT.contiguous()
    return Judged(dict(zip(KEYS, values, strict=True)), dict(zip(COMPLETED, by_whom, strict=True)))


@torch.inference_mode()
def _portions(case: Case, images: ImageSet, seed: int, share: Callable[[int], slice]) -> Iterator[Tensor]:
    """Measures and features, `[rows, n]`, of some images each, in order; the noise is of the seed and their place."""
    starts, device = range(0, len(images), IMAGES_AT_ONCE), images.rows.device
    for start in starts[share(len(starts))]:
        rows = slice(start, start + IMAGES_AT_ONCE)
        batch, classes = images.batch(rows), case.classes[rows].to(device)
        random = context.generator(device, seed, "realism", start)
        eps = noise(COMPLETIONS, len(batch.x), case.model, random)
        values, features = [], []
        for completed in completions(case.model, batch, eps, random).values():
            logits, seen = classified(case, batch.x, completed)
            values += [*_of_classes(logits, classes), *_of_pixels(completed, batch.y)]
            features.append(seen.T.double())
        values += _of_x(case.judges.x_only(case.model.split.compose(batch.x, batch.y)), classes)
        yield torch.cat([torch.stack(values), *features])


def completions(model: CVAE, batch: Batch, eps: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """By `COMPLETED`, the hidden pixels of the images' completions, `[S, B, num_hidden]`; S = 1 where all are equal.

    eps: the noise, `[S, B, latent_dim]`. random: for the pixels that are drawn.
    """
    guess = model.baseline_net(batch.x).sigmoid()[None]
    means = model.completions(batch.x, eps)
    drawn = (torch.bernoulli(each.expand_as(means), generator=random) for each in (guess, means))
    return dict(zip(COMPLETED, (guess, next(drawn), means, next(drawn), batch.y[None]), strict=True))


def classified(case: Case, x: Tensor, completed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[S, B, K]` of the completed images' classes, and features `[B, FEATURES]` of the first ones."""
    pictures = case.model.split.compose(x, completed)
    features = case.judges.whole.features(pictures.flatten(0, 1)).view(*completed.shape[:2], -1)
    return case.judges.whole.classify(features), features[0]


def _of_classes(logits: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    frequency = realism.frequencies(logits)
    return (
        realism.validity(logits, classes),
        realism.confidence(logits),
        realism.log_score(frequency, classes, COMPLETIONS),
        realism.entropy(frequency),
    )


def _of_pixels(completed: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    errors = realism.squared_errors(completed, y)
    return realism.energy_score(completed, y), errors.mean(0), errors.amin(0)


def _of_x(logits: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    """The measures of classes, of class probabilities that are known, logits `[B, K]`."""
    logits = logits.double()
    return (
        realism.validity(logits[None], classes),
        realism.confidence(logits[None]),
        cross_entropy(logits, classes, reduction="none"),
        realism.entropy(logits.softmax(-1)),
    )
