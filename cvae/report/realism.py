"""Realism and diversity of a run's completions of the test images: measured, as a table, and as a picture.

A completion by the CVAE is the pixel means of p(y|x,z) at a z ~ p(z|x); from these means each pixel can be drawn, black
or white. The same of the baseline's ŷ, which has no z. Two classifiers judge them: see `classifier`.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cross_entropy

from cvae.console import Bar
from cvae.context import Context, generator
from cvae.data.sources import load_labels
from cvae.errors import DataError, DiskError
from cvae.model.cvae import CVAE, NOISE_IMAGES
from cvae.model.likelihood import estimate
from cvae.report import measures
from cvae.report.classifier import Classifier, open_judges
from cvae.report.evaluation import Record, Subject, laid_out, number
from cvae.report.figures import INK, PAPER, completion_rows, draw_rows

COMPLETIONS = 50  # of each image, S
SHOWN, COMPLETIONS_SHOWN, SIDE = 10, 6, 84  # images and completions of each in the picture; their size, screen pixels
OTHER, TRUE = (150, 165, 190), (200, 60, 40)  # the colours of a class's bar, and of the true one's
# Whose completions, and what is measured of them: see docs/realism.md
COLUMNS = {"nn": "NN", "nn_drawn": "NN, drawn", "cvae": "CVAE", "cvae_drawn": "CVAE, drawn", "truth": "truth"}
COLUMNS["x_only"] = "x only"  # the class probabilities of the classifier that sees x alone
ROWS = {
    "validity": "validity", "confidence": "confidence", "log_score": "log score of the class, nats",
    "entropy": "entropy of the classes, nats", "correlation": "… correlated with x only's",
    "energy_score": "energy score", "mse": "mean squared error", "best_mse": f"… best of {COMPLETIONS}",
    "density": "density", "coverage": "coverage",
}  # fmt: skip
NOTE = f"{COMPLETIONS} completions of each image; ± is the standard error. docs/realism.md explains rows and columns."


class Case(NamedTuple):
    """All that is needed to judge a run."""

    model: CVAE
    images: Tensor  # uint8 `[N, height, width]`
    classes: Tensor  # int64 `[N]`
    whole: Classifier
    x_only: Classifier


# Measures of each image, float64 `[N]`, by whose completions and by name; `features` of the first completion: `[F, N]`
Judged = dict[tuple[str, str], Tensor]


def open_cases(runs: Mapping[str, Subject], limit: int | None, context: Context) -> tuple[dict[str, Case], list[str]]:
    """Return what is needed to judge runs on their first `limit` test images, and a line about each that cannot be."""
    cases, problems = {}, []
    for name, run in runs.items():
        try:
            classes = context.processes.on_all(partial(load_labels, run.settings, "test"))[:limit]
            opening = partial(open_judges, run.folder, run.settings, context.device)
            whole, x_only = (judge.to(context.device) for judge in context.processes.on_main(opening))
            if len(classes) <= measures.NEIGHBOURS:
                raise DataError(f"{run.folder}: {len(classes)} test images are too few; density and coverage need 6")
            if (most := int(classes.max())) >= whole.last.out_features:
                raise DataError(f"{run.folder}: the test images have a class {most}, unlike the training images")
            cases[name] = Case(run.model, run.test.images[:limit], classes, whole, x_only)
        except (DataError, DiskError) as error:
            problems.append(f"{error}; its realism is not measured")
    return cases, problems


@torch.inference_mode()
def judge(name: str, case: Case, seed: int, context: Context) -> Judged:
    """Measure the completions of a run's images; each process computes its share. Noise comes from seed and place."""
    processes, portions = context.processes, []
    with Bar(f"{name}: realism", len(case.images) // processes.count, "img") as bar:
        for start in processes.in_step(processes.portions(len(case.images), NOISE_IMAGES)):
            rows = slice(start, start + NOISE_IMAGES)
            images, classes = (part[rows].to(context.device) for part in (case.images, case.classes))
            portions.append(_measured(case, images, classes, generator(context.device, seed, "realism", start)))
            bar.update(len(images))
    return {key: processes.gather(torch.cat([portion[key] for portion in portions], dim=-1)) for key in portions[0]}


def _measured(case: Case, images: Tensor, classes: Tensor, random: torch.Generator) -> Judged:
    task, judged = case.model.task, Judged()
    x, y, *_ = task.batch(task.rows(images))
    guess = case.model.baseline_net(x).sigmoid()[None]
    means = task.asked(case.model.complete(images, COMPLETIONS, random))
    drawn = [torch.bernoulli(each.expand_as(means), generator=random) for each in (guess, means)]
    for who, completed in zip(COLUMNS, (guess, drawn[0], means, drawn[1], y[None]), strict=False):
        features = case.whole.features(task.compose(x, completed).flatten(0, 1))
        logits = case.whole.last(features).unflatten(0, completed.shape[:2])
        found = measures.class_measures(logits, classes, COMPLETIONS) | measures.pixel_measures(completed, y)
        judged |= {(who, name): values for name, values in found.items()}
        judged[who, "features"] = features[: len(images)].T
    logits = case.x_only(task.compose(x, y)).double()
    found = measures.class_measures(logits[None], classes, COMPLETIONS)
    found["log_score"] = cross_entropy(logits, classes, reduction="none")
    found["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    return judged | {("x_only", name): values for name, values in found.items()}


def record(judged: Judged | None) -> Record | None:
    """Return what JSON has of a run's realism: mean and standard error of each measure; None if it was not judged.

    The standard error of density, coverage and correlation is not known. Density and coverage are of the first
    completions; of the truth, what others of its kind have in expectation.
    """
    if judged is None:
        return None
    truth = judged["truth", "features"].T.contiguous()
    found: Record = {"images": len(truth), "completions": COMPLETIONS}
    for who in COLUMNS:
        entries = {name: estimate(judged[who, name])._asdict() for name in ROWS if (who, name) in judged}
        if who != "x_only":
            density, coverage = torch.ones(1), torch.tensor(measures.coverage_of_the_truth(len(truth)))
            if who != "truth":
                density, coverage = measures.density_and_coverage(truth, judged[who, "features"].T.contiguous())
            correlation = torch.stack([judged[who, "entropy"], judged["x_only", "entropy"]]).corrcoef()[0, 1]
            for name, value in (("density", density), ("coverage", coverage), ("correlation", correlation)):
                entries[name] = {"mean": None if value.isnan().any() else value.mean().item(), "stderr": None}
        found[who] = {name: entries[name] for name in ROWS if name in entries}
    return found


def render(records: Mapping[str, Record], runs: Mapping[str, Subject], form: str) -> str:
    """Return the tables to read, as `text` or `markdown`, one for each run that was judged."""
    blocks = []
    for name, judged in ((name, each["realism"]) for name, each in records.items() if each["realism"]):
        cells = [[f"{name} ({runs[name].model.task.name}), {judged['images']:,} images", *COLUMNS.values()]]
        for row, label in ROWS.items():
            entries = [judged[who].get(row, {"mean": None}) for who in COLUMNS]
            cells.append([label, *(number(entry, ".4f" if "mse" in row else ".3f") for entry in entries)])
        blocks.append(laid_out(cells, form) + "\n")
    return "\n".join(["", *blocks, NOTE, ""])


def chosen(ambiguity: Tensor) -> list[int]:
    """Return which images are shown, from plain to ambiguous: the nearest to equal steps of the entropy `[N]`."""
    steps = torch.linspace(float(ambiguity.min()), float(ambiguity.max()), SHOWN, dtype=ambiguity.dtype)
    return list(dict.fromkeys((ambiguity[:, None] - steps).abs().argmin(0).tolist()))


@torch.inference_mode()
def draw(case: Case, ambiguity: Tensor, seed: int, context: Context) -> Image.Image:
    """Return the picture of a run, a column an image, from plain to ambiguous; the true class is red.

    Charts: the class probabilities of the classifier that sees x only, with their entropy, and how often each class is
    among 50 completions. The noise of an image is the same whichever others are drawn beside it.
    """
    numbers, model, task = chosen(ambiguity), case.model, case.model.task
    images, classes = case.images[numbers], case.classes[numbers].tolist()
    x, y, *_ = task.batch(task.rows(images.to(context.device)))
    random = [generator(context.device, seed, "realism figure", number) for number in numbers]
    made = torch.cat(list(map(model.complete, images, [COMPLETIONS] * len(numbers), random)), dim=1)
    rows = completion_rows(images, task, model.baseline_net(x).sigmoid(), task.asked(made[:COMPLETIONS_SHOWN]))
    known = case.x_only(task.compose(x, y)).softmax(-1)
    came = measures.frequencies(case.whole(made.flatten(0, 1)).unflatten(0, made.shape[:2]))
    words = [f"{entropy:.2f}" for entropy in ambiguity[numbers]]
    rows.insert(2, ("x only", torch.stack(list(map(_chart, known, classes, words)))))
    rows.append((f"of {COMPLETIONS}", torch.stack(list(map(_chart, came, classes, [""] * len(numbers))))))
    return draw_rows(rows, SIDE)


def _chart(shares: Tensor, true: int, words: str) -> Tensor:
    """Return bars as high as these shares `[K]`, in [0, 1], with the classes' numbers if there is room: uint8."""
    picture, font = Image.new("RGB", (SIDE, SIDE), PAPER), ImageFont.load_default(size=9)
    pen, foot, width = ImageDraw.Draw(picture), SIDE - 12, SIDE / len(shares)
    for k, share in enumerate(shares.tolist()):
        left, top = k * width, foot - round(share * (foot - 12))
        pen.rectangle((left + 1, top, left + max(width - 2, 1), foot), fill=TRUE if k == true else OTHER)
        if width > 7:
            pen.text((left + width / 2, SIDE), str(k), fill=TRUE if k == true else INK, font=font, anchor="mb")
    pen.line((0, foot, SIDE - 1, foot), fill=INK)
    pen.text((SIDE / 2, 0), words, fill=INK, font=font, anchor="mt")
    return torch.tensor(np.asarray(picture)).movedim(-1, 0)
