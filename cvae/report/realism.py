"""Realism and diversity of a run's completions of the test images: measured, as a table, and as a picture.

A completion by the CVAE is the pixel means of p(y|x,z) at a z ~ p(z|x); from these means each pixel can be drawn, black
or white. The same of the baseline's ŷ, which has no z. Two classifiers judge them: see `classifier`.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cross_entropy

from cvae.console import Bar
from cvae.context import Context
from cvae.data.sources import load_labels
from cvae.errors import DataError
from cvae.model.cvae import CVAE, NOISE_IMAGES
from cvae.model.likelihood import Estimate, estimate
from cvae.report import measures
from cvae.report.classifier import Judges, open_judges
from cvae.report.figures import INK, PAPER, as_picture, as_tensor, completion_rows, draw_rows, write_picture
from cvae.report.selection import Subject
from cvae.report.tables import laid_out

COMPLETIONS = 50  # of each image, S

COLUMNS = {
    "nn": "NN", "nn_drawn": "NN, drawn", "cvae": "CVAE", "cvae_drawn": "CVAE, drawn", "truth": "truth",
    "x_only": "x only",
}  # fmt: skip
"""Whose completions are judged: the baseline's ŷ, pixels drawn from it, the CVAE's two, and the true hidden pixels; and
`x_only`, the class probabilities of the classifier that sees x alone."""

ROWS = {
    "validity": "validity",
    "confidence": "confidence",
    "log_score": "log score of the class, nats",
    "entropy": "entropy of the classes, nats",
    "correlation": "… correlated with x only's",
    "energy_score": "energy score",
    "mse": "mean squared error",
    "best_mse": f"… best of {COMPLETIONS}",
    "density": "density",
    "coverage": "coverage",
}

NOTES = (
    f"{COMPLETIONS} completions of each image; ± is the standard error over the images. NN and CVAE are pixel means; "
    "drawn: each pixel drawn from them, black or white. x only: the classifier that sees the observed pixels alone.",
    "Validity: the share of completions that the classifier of whole images takes for the true class; that of the "
    "truth is its accuracy on these test images. Confidence: its probability of the class that it takes them for.",
    "Log score: of the true class under the frequencies of the classes among the completions, lower is better; none "
    "can be expected to do better than the best classifier of x. The entropy of these frequencies is right where it is "
    "that of x only, image by image: high where x does not settle the class.",
    "Energy score and squared errors: of the hidden pixels, lower is better. Density and coverage: of the classifier's "
    "features, of one completion an image; those of the truth are what other true images have in expectation.",
)

SHOWN, COMPLETIONS_SHOWN, SIDE = 10, 8, 84  # images and completions of each in the picture; their size, screen pixels
OTHER, TRUE = (150, 165, 190), (200, 60, 40)  # the colours of a class's bar, and of the true one's


class Case(NamedTuple):
    """All that is needed to judge a run: its images, uint8, and their classes, int64 `[N]`, and the two classifiers."""

    model: CVAE
    images: Tensor
    classes: Tensor
    judges: Judges


Judged = dict[tuple[str, str], Tensor]
"""Measures of each image, float64 `[N]`, by whose completions and by name; `features` of the first one: `[F, N]`."""


def open_cases(
    subjects: Mapping[str, Subject], limit: int | None, context: Context
) -> tuple[dict[str, Case], list[str]]:
    """Open what judging the runs needs, by their names; returns a line too about each that cannot be judged.

    limit: as many test images are judged at most, the first ones.
    """
    cases, problems = {}, []
    for name, subject in subjects.items():
        try:
            cases[name] = context.processes.on_all(partial(_open_case, subject, limit, context.device))
        except DataError as error:
            problems.append(f"{error}; its realism is not measured")
    return cases, problems


def _open_case(subject: Subject, limit: int | None, device: torch.device) -> Case:
    judges = open_judges(subject.folder, device)
    classes, images = load_labels(subject.settings, "test")[:limit], subject.test.images[:limit]
    if len(images) <= measures.NEIGHBOURS:
        raise DataError(f"{subject.folder}: {len(images)} test images are too few; density and coverage need 6")
    if (most := int(classes.max())) >= judges.whole.last.out_features:
        raise DataError(f"{subject.folder}: the test images have a class {most}, which the training images have not")
    return Case(subject.model, images, classes, judges)


@torch.inference_mode()
def judge(name: str, case: Case, seed: int, context: Context) -> Judged:
    """Measure the completions of a run's images; each process computes its share. Noise comes from seed and place."""
    starts = range(0, len(case.images), NOISE_IMAGES)
    portions, processes = [], context.processes
    with Bar(f"{name}: realism", len(case.images) // processes.count, "img", processes.is_main) as bar:
        for start in starts[processes.share(len(starts))] or [len(case.images)]:
            rows = slice(start, start + NOISE_IMAGES)
            images, classes = (part[rows].to(context.device) for part in (case.images, case.classes))
            portions.append(_measured(case, images, classes, context.generator(seed, "realism", start)))
            bar.update(len(images))
    return {key: processes.gather(torch.cat([portion[key] for portion in portions], dim=-1)) for key in portions[0]}


def _measured(case: Case, images: Tensor, classes: Tensor, random: torch.Generator) -> Judged:
    """Return the measures of some images; none of these makes empty ones."""
    task, whole = case.model.task, case.judges.whole
    x, y, *_ = task.batch(task.rows(images))
    guess = case.model.baseline_net(x).sigmoid()[None]
    means = task.asked(case.model.complete(images, COMPLETIONS, random))
    drawn = [torch.bernoulli(each.expand_as(means), generator=random) for each in (guess, means)]
    judged = {}
    for who, completed in zip(COLUMNS, (guess, drawn[0], means, drawn[1], y[None]), strict=False):
        pictures = task.compose(x, completed)
        features = whole.features(pictures.flatten(0, 1))
        logits = whole.last(features).unflatten(0, completed.shape[:2])
        errors = measures.squared_errors(completed, y)
        judged[who, "features"] = features[: len(images)].T
        judged |= {(who, key): value for key, value in _of_classes(logits, classes).items()}
        judged[who, "energy_score"] = measures.energy_score(completed, y)
        judged |= {(who, "mse"): errors.mean(0), (who, "best_mse"): errors.amin(0)}
    logits = case.judges.x_only(task.compose(x, y)).double()
    known = {
        "log_score": cross_entropy(logits, classes, reduction="none"),
        "entropy": measures.entropy(logits.softmax(-1)),
    }
    return judged | {("x_only", key): value for key, value in {**_of_classes(logits[None], classes), **known}.items()}


def _of_classes(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    frequency = measures.frequencies(logits)
    return {
        "validity": measures.validity(logits, classes),
        "confidence": measures.confidence(logits),
        "log_score": measures.log_score(frequency, classes, COMPLETIONS),
        "entropy": measures.entropy(frequency),
    }


def estimates(judged: Judged) -> dict[tuple[str, str], Estimate]:
    """Return mean and standard error of each measure, and what is of all images together, without an error (NaN).

    density, coverage: of the first completions; of the truth, what others of its kind have in expectation.
    correlation: of the entropy of the classes with that of the classifier that sees x only.
    """
    found = {(who, name): estimate(values) for (who, name), values in judged.items() if name != "features"}
    truth = judged["truth", "features"].T.contiguous()
    for who in (who for who in COLUMNS if who != "x_only"):
        density, coverage = torch.ones(1), torch.tensor(measures.coverage_of_the_truth(len(truth)))
        if who != "truth":
            density, coverage = measures.density_and_coverage(truth, judged[who, "features"].T.contiguous())
        pair = torch.stack([judged[who, "entropy"], judged["x_only", "entropy"]])
        together = {"density": density.mean(), "coverage": coverage.mean(), "correlation": pair.corrcoef()[0, 1]}
        found |= {(who, name): Estimate(value.item(), math.nan) for name, value in together.items()}
    return found


def records(runs: Iterable[str], judged: Mapping[str, Judged]) -> dict[str, dict[str, Any]]:
    """Return what the records of these runs have more, by their names: null for a run that was not judged."""
    return {run: {"realism": _record(judged[run]) if run in judged else None} for run in runs}


def _record(judged: Judged) -> dict[str, Any]:
    found = estimates(judged)
    record: dict[str, Any] = {"images": judged["truth", "features"].shape[-1], "completions": COMPLETIONS}
    for who in COLUMNS:
        whose = {row: found[who, row]._asdict() for row in ROWS if (who, row) in found}
        record[who] = {row: {part: None if math.isnan(v) else v for part, v in e.items()} for row, e in whose.items()}
    return record


def render(judged: Mapping[str, Judged], subjects: Mapping[str, Subject], form: str) -> str:
    """Return the tables to read, as `text` or `markdown`, one for each run; both mappings are by the runs' names."""
    mark, blocks = "[{}] {}" if form == "text" else "{}. {}", []
    for name, values in judged.items():
        found, count = estimates(values), values["truth", "features"].shape[-1]
        cells = [[f"{name} ({subjects[name].model.task.name}), {count:,} images", *COLUMNS.values()]]
        for row, label in ROWS.items():
            cells.append([label, *(_cell(found.get((who, row)), 4 if "mse" in row else 3) for who in COLUMNS)])
        blocks.append(laid_out(cells, form) + "\n")
    notes = "\n".join(mark.format(i, note) for i, note in enumerate(NOTES, start=1))
    return "\n".join(["", *blocks, notes]) + "\n"


def _cell(found: Estimate | None, digits: int) -> str:
    if found is None or math.isnan(found.mean):
        return "–"
    return f"{found.mean:.{digits}f}" + ("" if math.isnan(found.stderr) else f" ± {found.stderr:.{digits}f}")


def draw_all(cases: Mapping[str, Case], judged: Mapping[str, Judged], path: Path, seed: int, context: Context) -> None:
    """Write the picture of each run, of several one file each. Raises UsageError and DiskError."""
    for name, case in cases.items():
        file = path.with_stem(f"{path.stem}-{name.replace('/', '-')}") if len(cases) > 1 else path
        write_picture(file, draw(case, judged[name]["x_only", "entropy"].cpu(), seed, context))


def chosen(ambiguity: Tensor) -> list[int]:
    """Return which images are shown, from plain to ambiguous: the nearest to equal steps of the entropy `[N]`."""
    steps = torch.linspace(float(ambiguity.min()), float(ambiguity.max()), SHOWN, dtype=ambiguity.dtype)
    return list(dict.fromkeys((ambiguity[:, None] - steps).abs().argmin(0).tolist()))


@torch.inference_mode()
def draw(case: Case, ambiguity: Tensor, seed: int, context: Context) -> Image.Image:
    """Return the picture of a run, a column an image, from plain to ambiguous.

    Rows: input, truth, the class probabilities of the classifier that sees x only, with their entropy; the baseline's
    guess, completions by the CVAE, and how often each class is among 50 of them. The true class is red. The noise of an
    image is the same whichever others are drawn beside it.
    """
    numbers, task, model = chosen(ambiguity), case.model.task, case.model
    images, classes = case.images[numbers], case.classes[numbers].tolist()
    x, y, *_ = task.batch(task.rows(images.to(context.device)))
    random = [context.generator(seed, "realism figure", number) for number in numbers]
    completed = [model.complete(image, COMPLETIONS, each) for image, each in zip(images, random, strict=True)]
    pictures = torch.cat(completed, dim=1)
    rows = completion_rows(images, task, model.baseline_net(x).sigmoid(), task.asked(pictures[:COMPLETIONS_SHOWN]))
    known = case.judges.x_only(task.compose(x, y)).softmax(-1)
    came = measures.frequencies(case.judges.whole(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]))
    words = [f"{each:.2f}" for each in ambiguity[numbers]]
    charts = torch.stack([_chart(*each) for each in zip(known, classes, words, strict=True)])
    rows.insert(2, ("x only", charts / 255))
    charts = torch.stack([_chart(*each, "") for each in zip(came, classes, strict=True)])
    return as_picture(draw_rows([*rows, (f"of {COMPLETIONS}", charts / 255)], SIDE))


def _chart(shares: Tensor, true: int, words: str) -> Tensor:
    """Return bars as high as these shares `[K]`, in [0, 1], with the classes' numbers if there is room: uint8."""
    picture, font, width = Image.new("RGB", (SIDE, SIDE), PAPER), ImageFont.load_default(size=9), SIDE / len(shares)
    pen, foot = ImageDraw.Draw(picture), SIDE - 12
    for k, share in enumerate(shares.tolist()):
        colour, left = TRUE if k == true else OTHER, k * width
        if height := round(share * (foot - 12)):
            pen.rectangle((left + 1, foot - height, left + max(width - 2, 1), foot - 1), fill=colour)
        if width > 7:
            pen.text((left + width / 2, SIDE), str(k), fill=TRUE if k == true else INK, font=font, anchor="mb")
    pen.line((0, foot, SIDE - 1, foot), fill=INK)
    pen.text((SIDE / 2, 0), words, fill=INK, font=font, anchor="mt")
    return as_tensor(picture)
