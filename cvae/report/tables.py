"""The table of conditional log-likelihoods, as text, Markdown, JSON or CSV."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cvae.data.masks import mask_name
from cvae.errors import printable
from cvae.model.likelihood import ELBO_SAMPLES, Estimate, Likelihoods, estimate
from cvae.settings import Settings

FORMATS = ("text", "markdown", "json", "csv")

ROWS = {
    "NN (baseline)": "nn_nll",
    "CVAE (−ELBO)": "cvae_neg_elbo",
    "CVAE (Monte Carlo)": "cvae_mc_nll",
    "CVAE (importance sampling)": "cvae_is_nll",
    "Performance gap": "gap",
}

# Pyro's tutorial on the CVAE, its table of results: published figures, by the number of quadrants.
TUTORIAL = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}
MNIST = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
"""The SHA-256 of the pixels of MNIST's test images, wherever they come from."""

# What the objective gsnn does not train: estimates that take z from the recognition network say nothing of its runs.
OF_RECOGNITION = ("cvae_neg_elbo", "cvae_is_nll", "gap")


class Column(NamedTuple):
    """One run's results: its settings, the samples S per estimate, the values per image.

    images: the SHA-256 of the test images. epochs: how many an unfinished run has had; None for a finished one.
    """

    run: str
    settings: Settings
    samples: int
    per_image: Likelihoods
    images: str | None = None
    epochs: int | None = None

    @property
    def observed(self) -> str:
        """What its models are given, in words."""
        return mask_name(self.settings)

    @property
    def heading(self) -> str:
        """The run, and what sets its numbers apart."""
        marks = [self.observed]
        marks += [] if self.is_grey else ["binarized"]
        marks += [] if self.epochs is None else [f"epoch {self.epochs} so far"]
        return f"{self.name} ({', '.join(marks)})"

    @property
    def name(self) -> str:
        """The run as a line of text can show it."""
        return printable(self.run)

    @property
    def is_grey(self) -> bool:
        """Whether its pixels are grey levels, and not drawn black or white."""
        return self.settings.targets == "grey"

    @property
    def is_of_the_tutorial(self) -> bool:
        """Whether the tutorial's figures are of the same: quadrants of MNIST in grey levels."""
        return self.images == MNIST and self.settings.observed is None and self.is_grey

    def has(self, key: str) -> bool:
        """Whether the estimate of this name says something of the run."""
        return self.settings.objective != "gsnn" or key not in OF_RECOGNITION

    def estimates(self) -> dict[str, Estimate]:
        """Mean and standard error by key; `gap` is NN minus importance sampling, image by image."""
        gap = estimate(self.per_image.nn_nll - self.per_image.cvae_is_nll)
        return {**self.per_image.estimates(), "gap": gap}


def render(columns: Sequence[Column], form: str) -> str:
    """The table in one of `FORMATS`; all numbers but the gap are negative log-likelihoods in nats per image."""
    renderers: dict[str, Callable[[Sequence[Column]], str]] = {
        "text": _text, "markdown": _markdown, "json": _json, "csv": _csv
    }  # fmt: skip
    return renderers[form](columns)


def _cells(columns: Sequence[Column]) -> list[list[str]]:
    """The header and the rows, as strings."""
    header = ["nats per image, lower is better", *(column.heading for column in columns)]
    return [header] + [[label, *(_cell(column, key) for column in columns)] for label, key in ROWS.items()]


def _cell(column: Column, key: str) -> str:
    mean, stderr = column.estimates()[key]
    return f"{mean:.2f} ± {stderr:.2f}" if column.has(key) else "–"


def _notes(columns: Sequence[Column]) -> list[str]:
    counts = sorted({len(column.per_image.nn_nll) for column in columns})
    samples = sorted({column.samples for column in columns})
    notes = [
        f"± is the standard error over the {_listed(counts)} test images. Samples of z per image: "
        f"{ELBO_SAMPLES} for −ELBO, {_listed(samples)} for Monte Carlo and importance sampling."
    ]
    if grey := [column for column in columns if column.is_grey]:
        floors = ", ".join(f"{column.estimates()['floor'].mean:.1f} for {column.name}" for column in grey)
        notes.append(
            "Grey levels under a Bernoulli are no normalised density; their own entropy is a floor under every row "
            f"but the gap: {floors}."
        )
    known = {column.settings.quadrants: column.observed for column in columns if column.is_of_the_tutorial}
    example = " (with one quadrant of MNIST and 100 samples, about 82 where importance sampling gives 64)"
    notes.append(
        "Monte Carlo and importance sampling lie above −log p(y|x) in expectation: the smaller of the two is the one "
        f"to quote. For a well trained run it is importance sampling{example * (1 in known)}."
    )
    if not all(column.has(key) for column in columns for key in OF_RECOGNITION):
        notes.append("–: the objective gsnn trains no recognition network, which these estimates take z from.")
    if known:
        figures = ((*TUTORIAL[quadrants], observed) for quadrants, observed in sorted(known.items()))
        tutorial = "; ".join(f"NN {nn}, CVAE {cvae} for {observed}" for nn, cvae, observed in figures)
        notes.append(
            f"The tutorial's published table on MNIST: {tutorial}. Its CVAE row is a −ELBO; it stopped early "
            "on the test images."
        )
    return notes


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _text(columns: Sequence[Column]) -> str:
    cells = _cells(columns)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return (
        "\n".join(lines) + "\n\n" + "\n".join(f"[{i}] {note}" for i, note in enumerate(_notes(columns), start=1)) + "\n"
    )


def _markdown(columns: Sequence[Column]) -> str:
    cells = _cells(columns)
    rule = ["---", *["---:"] * len(columns)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [cells[0], rule, *cells[1:]]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return (
        "\n".join(lines) + "\n\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(_notes(columns), start=1)) + "\n"
    )


def _record(column: Column) -> dict[str, Any]:
    estimates = column.estimates()
    gap = estimates.pop("gap")
    return {
        "run": column.run,
        "quadrants": column.settings.quadrants if column.settings.observed is None else None,
        "observed": column.observed,
        "targets": column.settings.targets,
        "unfinished_at_epoch": column.epochs,
        "network": column.settings.network,
        "objective": column.settings.objective,
        "samples": column.samples,
        "images": len(column.per_image.nn_nll),
        **{
            key: {"mean": value.mean, "stderr": _known(value.stderr)}
            if column.has(key)
            else dict.fromkeys(value._fields)
            for key, value in estimates.items()
        },
        "gap": gap.mean if column.has("gap") else None,
        "gap_stderr": _known(gap.stderr) if column.has("gap") else None,
    }


def _known(stderr: float) -> float | None:
    """The standard error; None for that of a single image, a NaN, which JSON does not have."""
    return None if math.isnan(stderr) else stderr


def _json(columns: Sequence[Column]) -> str:
    return json.dumps([_record(column) for column in columns], indent=2) + "\n"


def _csv(columns: Sequence[Column]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for number, column in enumerate(columns):
        flat: dict[str, Any] = {}
        for key, value in _record(column).items():
            flat |= (
                {f"{key}_{part}": number for part, number in value.items()} if isinstance(value, dict) else {key: value}
            )
        if number == 0:
            writer.writerow(flat)
        writer.writerow(flat.values())
    return buffer.getvalue()
