"""The table of conditional log-likelihoods in four forms: text, Markdown, JSON, CSV. docs/table.md explains them."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from cvae.data.masks import mask_name
from cvae.errors import printable
from cvae.model.likelihood import estimate
from cvae.report.evaluation import Evaluation, Values

Cells = list[list[str]]
Record = dict[str, Any]

FORMATS = ("text", "markdown", "json", "csv")
LABELS = {
    "nn_nll": "NN (baseline)", "cvae_neg_elbo": "CVAE (−ELBO)", "cvae_mc_nll": "CVAE (Monte Carlo, S = {:,})",
    "cvae_is_nll": "CVAE (importance sampling, S = {:,})", "gap": "Performance gap",
    "ess": "Effective samples of S = {:,}", "active_units": "Active units of z",
}  # fmt: skip
SAMPLED = ("cvae_mc_nll", "cvae_is_nll", "ess")  # quantities that depend on the number of samples S
SMALL = 5  # effective samples: with fewer the estimate is what a few samples make of it
TUTORIAL = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}  # published NN and CVAE by the number of quadrants
MNIST = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"  # SHA-256 of the pixels of its test images


def render(runs: Sequence[Evaluation], form: str, beside: Mapping[str, Record] | None = None) -> str:
    """Return the table of runs with the same numbers of samples, in one of `FORMATS`.

    JSON and CSV have a record for each run by itself, with more entries from `beside`, by the names of the runs.
    """
    if form in ("text", "markdown"):
        mark = "[{}] {}" if form == "text" else "{}. {}"
        notes = "\n".join(mark.format(i, note) for i, note in enumerate(_notes(runs), start=1))
        return "\n\n".join([*(laid_out(cells, form) for cells in _blocks(runs)), notes]) + "\n"
    records = [record(one) | (beside or {}).get(one.name, {}) for run in runs for one in run.seeds or (run,)]
    if form == "json":
        return json.dumps(records, indent=2) + "\n"
    lines, buffer = [dict(_flat(each)) for each in records], io.StringIO()
    writer = csv.DictWriter(buffer, dict.fromkeys(name for line in lines for name in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def record(run: Evaluation) -> Record:
    """Return what JSON says of a run; None for what cannot be known, or would say nothing."""
    s, values, gap, levels = run.settings, run.values, _entry(run.values, "gap"), range(1, 1 + len(run.units))
    recognises, against = ("kl", 1) in values, None
    if run.against is not None:
        minus = {row: values[row] - run.against.values[row] for row in values if row in run.against.values}
        against = {"run": run.against.name, **_entries(minus, run.samples, SAMPLED[:2]), "gap": _entry(minus, "gap")}
    return {
        "run": run.name, "seed": s.seed, "quadrants": s.quadrants if s.observed is None else None,
        "observed": mask_name(s), "targets": s.targets, "unfinished_at_epoch": run.epochs,
        "network": s.network, "objective": s.objective, "precision": run.precision,
        "samples": run.samples[-1], "images": len(values["nn_nll", 0]), **_entries(values, run.samples, SAMPLED),
        "floor": _entry(values, "floor"), "gap": gap["mean"], "gap_stderr": gap["stderr"],
        "kl": [_entry(values, "kl", level) for level in levels] if recognises else None,
        "active_units": [active for active, _ in run.units] if recognises else None,
        "units": [count for _, count in run.units], "against": against,
    }  # fmt: skip


def _entries(values: Values, samples: Sequence[int], sampled: Sequence[str]) -> Record:
    """Return the entries in nats; those of `sampled` at the largest S, and then at each."""
    at_largest = {key: _entry(values, key, samples[-1]) for key in sampled}
    by_samples = {str(s): {key: _entry(values, key, s) for key in sampled} for s in samples}
    return {key: _entry(values, key) for key in ("nn_nll", "cvae_neg_elbo")} | at_largest | {"by_samples": by_samples}


def _entry(values: Values, key: str, s: int = 0) -> Record:
    """Return mean and standard error; of effective samples the median, and the share of images below `SMALL`."""
    each, parts = values.get((key, s)), (math.nan, math.nan)
    if each is not None:
        parts = (each.median().item(), (each < SMALL).double().mean().item()) if key == "ess" else estimate(each)
    names = ("median", f"below_{SMALL}") if key == "ess" else ("mean", "stderr")
    return {name: None if math.isnan(part) else part for name, part in zip(names, parts, strict=True)}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the columns of CSV: each value under the names that lead to it; lists are counted from 1."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value, start=1):
        yield from _flat(part, f"{name}_{key}" if name else str(key))


def _blocks(runs: Sequence[Evaluation]) -> list[Cells]:
    """Return the cells of the table, and those of the differences if there are any, each with its header."""
    samples, records = runs[0].samples, [record(run) | {"seeds": [*map(record, run.seeds)]} for run in runs]
    blocks = [[["nats per image, lower is better", *map(_heading, runs)], *rows(records, samples)]]
    if compared := [run for run in runs if run.against is not None]:
        differences, keys = [record(run)["against"] for run in compared], list(LABELS)[:5]
        header = f"minus {printable(differences[0]['run'])}, below zero is better"
        blocks.append([[header, *map(_heading, compared)], *rows(differences, samples, keys, "+.3f")])
    return blocks


def _heading(run: Evaluation) -> str:
    """Return a run's name, and what its numbers depend on."""
    marks = [mask_name(run.settings)] + ["binarized"] * (run.settings.targets != "grey")
    marks += [f"epoch {run.epochs} so far"] * (run.epochs is not None)
    marks += [f"{len(run.seeds)} seeds"] * (len(run.seeds) > 1)
    return f"{printable(run.name)} ({', '.join(marks)})"


def rows(
    records: Sequence[Record], samples: Sequence[int], keys: Sequence[str] = (*LABELS,), form: str = ".2f"
) -> Cells:
    """Return the rows of these quantities, a cell for each record."""
    each = [(key, s) for key in keys for s in (samples if key in SAMPLED else (0,))]
    return [[LABELS[key].format(s), *(_cell(record, key, str(s), form) for record in records)] for key, s in each]


def _cell(record: Record, key: str, s: str, form: str) -> str:
    """Return a quantity of a record; `seeds` in it are the records of the runs that were put together."""
    seeds = record.get("seeds") or [record]
    if key == "active_units":
        counts = ["+".join(map(str, each[key])) for each in seeds if each[key]]
        return f"{', '.join(counts)} of {sum(record['units'])}" if counts else "–"
    found = [each["by_samples"][s] if key in SAMPLED else each for each in [*seeds, record]]
    if key == "ess":
        median, few = zip(*(each[key].values() for each in found[:-1]), strict=True)
        return "–" if None in median else f"{mean(median):.1f}, {mean(few):.1%} below {SMALL}"
    if key == "gap" and "gap_stderr" in record:
        found = [{"gap": {"mean": each["gap"], "stderr": each["gap_stderr"]}} for each in found]
    entries = [each[key] for each in found]
    means = [entry["mean"] for entry in entries[:-1]]
    return number(entries[-1], form) + (f", seeds ± {stdev(means):.2f}" if len(means) > 1 and None not in means else "")


def number(entry: Record, form: str = ".2f") -> str:
    """Return mean and standard error in this form; a dash where there is no mean."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:{form}}" + ("" if entry["stderr"] is None else f" ± {entry['stderr']:{form.lstrip('+')}}")


def _notes(runs: Sequence[Evaluation]) -> list[str]:
    """Return what has to be known beside the numbers."""
    counts = " or ".join(map(str, sorted({len(run.values["nn_nll", 0]) for run in runs})))
    half = " Matrix products are in bfloat16 (--precision)." * any(run.precision == "bf16" for run in runs)
    notes = [f"± is the standard error over the {counts} test images.{half} docs/table.md explains the rows."]
    names = {run.name: printable(run.name) for run in runs}
    if several := [run for run in runs if len(run.seeds) > 1]:
        seeds = {names[run.name]: ", ".join(str(one.settings.seed) for one in run.seeds) for run in several}
        words = "Several seeds are one column, their mean; seeds ± is the deviation between them."
        notes.append(f"{words} {'; '.join(f'{name}: seeds {each}' for name, each in seeds.items())}.")
    grey = [run for run in runs if run.settings.targets == "grey"]
    if floors := ", ".join(f"{run.values['floor', 0].mean():.1f} for {names[run.name]}" for run in grey):
        words = "Grey levels under a Bernoulli are no normalised density; their own entropy is a floor under every row"
        notes.append(f"{words} but the gap: {floors}.")
    known = {run.settings.quadrants for run in grey if run.images == MNIST and run.settings.observed is None}
    if figures := "; ".join(f"NN {TUTORIAL[k][0]}, CVAE {TUTORIAL[k][1]} with {k}" for k in sorted(known)):
        notes.append(f"The tutorial's published table, by quadrants of MNIST: {figures}. Its CVAE row is a −ELBO.")
    return notes


def laid_out(cells: Cells, form: str) -> str:
    """Return cells, the header's first, as the lines of a table, `text` or `markdown`; numbers to the right."""
    header, *rows = cells
    if form == "markdown":
        rule = ["---", *["---:"] * (len(header) - 1)]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
        return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["─" * width for width in widths]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in [header, rule, *rows])
    return "\n".join("  ".join(line) for line in lines)
