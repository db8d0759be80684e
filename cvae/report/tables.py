"""The table of conditional log-likelihoods, as text, Markdown, JSON or CSV."""

from collections.abc import Iterator, Mapping, Sequence

from cvae.model.likelihood import ELBO_SAMPLES, LEAST_VARIANCE, estimate
from cvae.report.records import Record, as_csv, as_json, record
from cvae.report.results import OF_RECOGNITION, SMALL, Column, Result, Row

FORMATS = ("text", "markdown", "json", "csv")

LABELS = {
    "nn_nll": "NN (baseline)",
    "cvae_neg_elbo": "CVAE (−ELBO)",
    "cvae_mc_nll": "CVAE (Monte Carlo, S = {:,})",
    "cvae_is_nll": "CVAE (importance sampling, S = {:,})",
    "gap": "Performance gap",
    "ess": "Effective samples of S = {:,}",
    "active_units": "Active units of z",
}
SAMPLED = ("cvae_mc_nll", "cvae_is_nll", "ess")  # what there is for each number of samples S

# Pyro's tutorial on the CVAE, its table of results: published figures, by the number of quadrants.
TUTORIAL = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}
MNIST = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
"""The SHA-256 of the pixels of MNIST's test images, wherever they come from."""

Cells = list[list[str]]

NOTHING: Mapping[str, Record] = {}


def render(columns: Sequence[Column], form: str, beside: Mapping[str, Record] = NOTHING) -> str:
    """The table in one of `FORMATS`, of columns with the same numbers of samples S.

    All numbers but the gap are negative log-likelihoods in nats per image. JSON and CSV have a record for each run, its
    own, whatever other runs are in its column, and what there is of it in `beside`, by its name.
    """
    if form in ("text", "markdown"):
        return _table(columns, form)
    results = [result for column in columns for result in column.results]
    records = [{**record(result), **beside.get(result.run, {})} for result in results]
    return as_json(records) if form == "json" else as_csv(records)


def _rows(samples: Sequence[int], *keys: str) -> Iterator[Row]:
    """The rows of these quantities: one each, or one for each S."""
    for key in keys:
        yield from (Row(key, s) for s in (samples if key in SAMPLED else [None]))


def _blocks(columns: Sequence[Column]) -> list[Cells]:
    """The table, and that of the differences if there are any: the header and the rows of each, as strings."""
    samples = columns[0].first.samples
    first = [["nats per image, lower is better", *(column.heading for column in columns)]]
    first += [[_label(row), *(_cell(column, row) for column in columns)] for row in _rows(samples, *LABELS)]
    pairs = [(column, found) for column in columns if (found := _reference(column, columns)) is not None]
    if not pairs:
        return [first]
    differences = [[f"minus {pairs[0][1].name}, below zero is better", *(column.heading for column, _ in pairs)]]
    for row in _rows(samples, *(key for key in LABELS if key not in ("ess", "active_units"))):
        differences.append([_label(row), *(_difference(*pair, row) for pair in pairs)])
    return [first, differences]


def _label(row: Row) -> str:
    return LABELS[row.key].format(row.samples)


def _reference(column: Column, columns: Sequence[Column]) -> Column | None:
    """The column that one is compared with: the one that has the run of `Result.against`; None for that one itself."""
    against = column.first.against
    found = (other for other in columns if any(against and result.run == against.run for result in other.results))
    return next((other for other in found if other is not column), None)


def _cell(column: Column, row: Row) -> str:
    if not column.first.has(row.key):
        return "–"
    if row.key == "active_units":
        counts = ", ".join("+".join(str(active) for active, _ in result.units) for result in column.results)
        return f"{counts} of {sum(count for _, count in column.first.units)}"
    if row.key == "ess":
        found = [result.effective_samples(row.samples or 0) for result in column.results]
        median, few = (sum(numbers) / len(found) for numbers in zip(*found, strict=True))
        return ess_cell(median, few)
    mean, stderr = estimate(column.values(row))
    spread = column.spread(row)
    return f"{mean:.2f} ± {stderr:.2f}" + ("" if spread is None else f", seeds ± {spread:.2f}")


def ess_cell(median: float, few: float) -> str:
    """Effective samples: the median over the images, and the share of the images below SMALL."""
    return f"{median:.1f}, {few:.1%} below {SMALL}"


def _difference(column: Column, reference: Column, row: Row) -> str:
    if not (column.first.has(row.key) and reference.first.has(row.key)):
        return "–"
    mean, stderr = estimate(column.values(row) - reference.values(row))
    return f"{mean:+.3f} ± {stderr:.3f}"


def _notes(columns: Sequence[Column]) -> list[str]:
    runs = [column.first for column in columns]
    counts = sorted({len(run.per_image.nn_nll) for run in runs})
    notes = [
        f"± is the standard error over the {' or '.join(map(str, counts))} test images. −ELBO is estimated with "
        f"{ELBO_SAMPLES} samples of z per image, Monte Carlo and importance sampling with S."
        + " Matrix products are in bfloat16 (--precision)."
        * any(run.precision == "bf16" for run in runs)
    ]
    if several := [column for column in columns if len(column.results) > 1]:
        names = "; ".join(f"{column.name}: seeds {_seeds(column)}" for column in several)
        notes.append(
            f"Runs that differ in their seeds alone are one column, their mean; seeds ± is the standard deviation "
            f"between them, and no standard error. {names}."
        )
    if any(run.against is not None for run in runs):
        notes.append(
            "Differences are taken image by image, between means over the seeds where there are several; ± is their "
            "own standard error over the images."
        )
    if grey := [column for column in columns if column.first.is_grey]:
        floors = ", ".join(f"{column.values(Row('floor')).mean():.1f} for {column.name}" for column in grey)
        notes.append(
            "Grey levels under a Bernoulli are no normalised density; their own entropy is a floor under every row "
            f"but the gap: {floors}."
        )
    known_runs = {run.settings.quadrants: run.observed for run in runs if _is_of_the_tutorial(run)}
    example = " (with one quadrant of MNIST and 100 samples, about 82 where importance sampling gives 64)"
    notes.append(
        "Monte Carlo and importance sampling lie above −log p(y|x) in expectation: the smaller of the two is the one "
        f"to quote. For a well trained run it is importance sampling{example * (1 in known_runs)}. Its effective "
        "samples, the square of the sum of the weights over the sum of their squares: the median over the images, and "
        f"how many images have less than {SMALL}, so that a few samples make the estimate."
    )
    notes.append(f"Active: the mean of q(z|x,y) has a variance over the images above {LEAST_VARIANCE}; by level of z.")
    if not all(run.has(key) for run in runs for key in OF_RECOGNITION):
        notes.append("–: the run's objective trains no recognition network, which these estimates take z from.")
    if known_runs:
        figures = ((*TUTORIAL[quadrants], observed) for quadrants, observed in sorted(known_runs.items()))
        tutorial = "; ".join(f"NN {nn}, CVAE {cvae} for {observed}" for nn, cvae, observed in figures)
        notes.append(
            f"The tutorial's published table on MNIST: {tutorial}. Its CVAE row is a −ELBO; it stopped early "
            "on the test images."
        )
    return notes


def _is_of_the_tutorial(run: Result) -> bool:
    """Whether the tutorial's figures are of the same: quadrants of MNIST in grey levels."""
    return run.images == MNIST and run.settings.observed is None and run.is_grey


def _seeds(column: Column) -> str:
    return ", ".join(str(result.settings.seed) for result in column.results)


def _table(columns: Sequence[Column], form: str) -> str:
    mark = "[{}] {}" if form == "text" else "{}. {}"
    notes = "\n".join(mark.format(i, note) for i, note in enumerate(_notes(columns), start=1))
    return "\n\n".join([*(laid_out(cells, form) for cells in _blocks(columns)), notes]) + "\n"


def laid_out(cells: Cells, form: str) -> str:
    """Cells, the header's first, as the lines of a table, `text` or `markdown`; numbers to the right."""
    header, *rows = cells
    if form == "markdown":
        rule = ["---", *["---:"] * (len(header) - 1)]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
        return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["─" * width for width in widths]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in [header, rule, *rows])
    return "\n".join("  ".join(line) for line in lines)
