"""Runs on the test images: found, evaluated, and printed as a table in four forms, which docs/table.md explains."""

import csv
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.console import Bar, called
from cvae.context import Context
from cvae.data.masks import mask_name
from cvae.data.sources import TestImages
from cvae.data.tasks import ImageSet
from cvae.errors import printable
from cvae.model.cvae import CVAE
from cvae.model.likelihood import Likelihoods, active_units, estimate, evaluate
from cvae.model.objectives import trains_recognition
from cvae.run.folder import CONFIG, find_run
from cvae.settings import Settings

Cells = list[list[str]]
Record = dict[str, Any]
OF_THE_IMAGES = ("data", "data_root", "size", "transpose", "targets")  # settings that the test images depend on
LABELS = {
    "nn_nll": "NN (baseline)", "cvae_neg_elbo": "CVAE (−ELBO)", "cvae_mc_nll": "CVAE (Monte Carlo, S = {:,})",
    "cvae_is_nll": "CVAE (importance sampling, S = {:,})", "gap": "Performance gap",
    "ess": "Effective samples of S = {:,}", "active_units": "Active units of z",
}  # fmt: skip
SAMPLED = ("cvae_mc_nll", "cvae_is_nll", "ess")  # quantities that depend on the number of samples S
COMPARED = ("nn_nll", "cvae_neg_elbo", "cvae_mc_nll", "cvae_is_nll", "gap")
SMALL = 5  # effective samples: with fewer the estimate is what a few samples make of it
TUTORIAL = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}  # published NN and CVAE by the number of quadrants
MNIST = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"  # SHA-256 of the pixels of its test images


class Subject(NamedTuple):
    """A run to be evaluated, with all of it read that can be missing or wrong."""

    folder: Path
    settings: Settings  # with the place of the images as it is now
    model: CVAE
    test: TestImages
    epochs: int | None  # that an unfinished run has had
    against: str = ""  # the name of the run that it is compared with: of the same images, with the same mask


class Evaluation(NamedTuple):
    """The estimates of a run, or the means over several that differ in their seeds alone."""

    name: str  # of the run in the table
    run: Subject  # the first one
    samples: tuple[int, ...]  # the numbers of samples S, ascending
    values: dict[str, Tensor]  # the Likelihoods by name, and `gap`: nn_nll less the last cvae_is_nll; NaN if unknown
    units: list[tuple[int, int]]  # of each level of z, from top to bottom: active dimensions, all dimensions
    precision: str


def find_runs(words: Sequence[Path], runs: Path) -> tuple[list[Path], list[str]]:
    """Return the folders of runs, each once and in the order of the words, and a line about each word that names none.

    words: Runs and folders of runs, as paths or as names below the folder `runs`; none: all runs there.
    """
    folders, problems = dict[Path, Path](), []
    for place in [find_run(word, runs) for word in words] or [runs]:
        below = [place / CONFIG] if os.path.isfile(place / CONFIG) else sorted(place.glob(f"[!.]*/{CONFIG}"))
        for file in below:
            folders.setdefault(file.parent.resolve(), file.parent)
        if not below:
            problem = "has no run in it" if os.path.isdir(place) else "there is no such folder"
            problems.append(f"{place}: {problem}; {called('train.py')} trains a run")
    return list(folders.values()), problems


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, with as many folders above it as tell it from the others."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    ends = [[path[-n:] for n in range(1, 1 + len(path))] for path in paths]
    return ["/".join(next(end for end in each if sum(end in other for other in ends) == 1)) for each in ends]


def evaluate_run(name: str, run: Subject, samples: tuple[int, ...], seed: int, context: Context) -> Evaluation:
    """Evaluate a run, under this name; each process computes the estimates of its share of the images."""
    images, processes, portions = ImageSet(run.test.images, run.model.task, context.device), context.processes, []
    with Bar(name, len(images) // processes.count, "img") as bar:
        for portion in processes.in_step(evaluate(run.model, images, samples, seed, context)):
            portions.append(portion)
            bar.update(len(portion.nn_nll))
    found = Likelihoods(*(processes.gather(torch.cat(parts, dim=-1)) for parts in zip(*portions, strict=True)))
    values = found._asdict() | {"gap": found.nn_nll - found.cvae_is_nll[-1]}
    if not trains_recognition(run.settings):  # from which all the others take z
        values |= {key: values[key] * math.nan for key in values.keys() - {"nn_nll", "cvae_mc_nll", "floor"}}
    return Evaluation(name, run, samples, values, active_units(run.model, images, seed, context), context.precision)


def in_columns(runs: Sequence[Evaluation], seeds: bool) -> list[tuple[Evaluation, list[Evaluation]]]:
    """Return the columns of the table, each with the runs that it is the mean of, image by image.

    seeds: Whether runs on the same images that differ in their seeds alone, or folders and devices, are one column.
    """
    groups, columns = defaultdict[object, list[Evaluation]](list), []
    for run in runs:
        setting = replace(run.run.settings, seed=0, data_root=None, device="auto")
        groups[(setting, run.run.test.record["test"]["sha256"], run.run.epochs) if seeds else run.name].append(run)
    for group in groups.values():
        names = [run.name for run in group]
        name = ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
        values = {key: torch.stack([run.values[key] for run in group]).mean(0) for key in group[0].values}
        columns.append((group[0]._replace(name=name, values=values), group))
    return columns


def render(runs: Sequence[Evaluation], form: str, seeds: bool = False, beside: Mapping[str, Record] = {}) -> str:
    """Return the table of runs with the same numbers of samples, as `text`, `markdown`, `json` or `csv`.

    seeds: Whether runs that differ in their seeds alone are one column, their mean; JSON and CSV have a record for each
    run, with more entries from `beside`, by the names of the runs.
    """
    columns = in_columns(runs, seeds)
    if form in ("json", "csv"):
        columns = [(run, [run]) for _, group in columns for run in group]
    by_run = {run.name: column for column, group in columns for run in group}
    records = [record(each, by_run.get(each.run.against)) | beside.get(each.name, {}) for each, _ in columns]
    if form == "json":
        return json.dumps(records, indent=2) + "\n"
    if form == "csv":
        lines, buffer = [dict(_flat(each)) for each in records], io.StringIO()
        writer = csv.DictWriter(buffer, dict.fromkeys(name for line in lines for name in line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return buffer.getvalue()
    for each, (column, group) in zip(records, columns, strict=True):
        each |= {"seeds": list(map(record, group)), "sha256": column.run.test.record["test"]["sha256"]}
    samples = runs[0].samples
    blocks = [[["nats per image, lower is better", *map(_heading, records)], *rows(records, samples)]]
    if compared := [each for each in records if each["against"]]:
        header = f"minus {printable(compared[0]['against']['run'])}, below zero is better"
        differences = rows([each["against"] for each in compared], samples, COMPARED, "+.3f")
        blocks.append([[header, *map(_heading, compared)], *differences])
    mark = "[{}] {}" if form == "text" else "{}. {}"
    notes = "\n".join(mark.format(i, note) for i, note in enumerate(_notes(records), start=1))
    return "\n\n".join([*(laid_out(cells, form) for cells in blocks), notes]) + "\n"


def record(evaluation: Evaluation, against: Evaluation | None = None) -> Record:
    """Return what JSON says of a run, compared with another one; None for what is not known or would say nothing."""
    run, s, values, samples = evaluation.run, evaluation.run.settings, evaluation.values, evaluation.samples
    gap, has_recognition, differences = _entry(values["gap"]), trains_recognition(s), None
    if against is not None and against is not evaluation:
        minus = {key: values[key] - against.values[key] for key in COMPARED}
        differences = {"run": against.name, **_entries(minus, samples), "gap": _entry(minus["gap"])}
    return {
        "run": evaluation.name, "seed": s.seed, "quadrants": s.quadrants if s.observed is None else None,
        "observed": mask_name(s), "targets": s.targets, "unfinished_at_epoch": run.epochs,
        "network": s.network, "objective": s.objective, "precision": evaluation.precision,
        "samples": samples[-1], "images": len(values["nn_nll"]), **_entries(values, samples),
        "floor": _entry(values["floor"]), "gap": gap["mean"], "gap_stderr": gap["stderr"],
        "kl": list(map(_entry, values["kl"])) if has_recognition else None,
        "active_units": [active for active, _ in evaluation.units] if has_recognition else None,
        "units": [count for _, count in evaluation.units], "against": differences,
    }  # fmt: skip


def _entries(values: Mapping[str, Tensor], samples: Sequence[int]) -> Record:
    """Return the entries in nats, and effective samples: those of `SAMPLED` at the largest S, and then at each."""
    sampled = [key for key in SAMPLED if key in values]
    by_samples = {str(s): {key: _entry(values[key][i], key) for key in sampled} for i, s in enumerate(samples)}
    plain = {key: _entry(values[key]) for key in ("nn_nll", "cvae_neg_elbo")}
    return {**plain, **by_samples[str(samples[-1])], "by_samples": by_samples}


def _entry(values: Tensor, key: str = "") -> Record:
    """Return mean and standard error; of effective samples the median, and the share of images below `SMALL`."""
    parts = estimate(values)._asdict()
    if key == "ess":
        few = torch.where(values.isnan(), values, (values < SMALL).double())
        parts = {"median": values.median().item(), f"below_{SMALL}": few.mean().item()}
    return {name: None if math.isnan(part) else part for name, part in parts.items()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the columns of CSV: each value under the names that lead to it; lists are counted from 1."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value, start=1):
            yield from _flat(part, f"{name}_{key}" if name else str(key))
    else:
        yield name, value


def _heading(record: Record) -> str:
    epoch, seeds = record["unfinished_at_epoch"], len(record["seeds"])
    marks = [record["observed"], "binarized" * (record["targets"] != "grey")]
    marks += [f"epoch {epoch} so far" * (epoch is not None), f"{seeds} seeds" * (seeds > 1)]
    return f"{printable(record['run'])} ({', '.join(filter(None, marks))})"


def rows(records: Sequence[Record], samples: Sequence[int], keys: Iterable[str] = LABELS, form: str = ".2f") -> Cells:
    """Return the rows of these quantities, a cell for each record; its `seeds`, if any, are those it is the mean of."""
    places = [(key, s) for key in keys for s in (samples if key in SAMPLED else (0,))]
    return [[LABELS[key].format(s), *(_cell(each, key, str(s), form) for each in records)] for key, s in places]


def _cell(record: Record, key: str, s: str, form: str) -> str:
    seeds = record.get("seeds", [record])
    *entries, entry = ((each["by_samples"][s] if key in SAMPLED else each)[key] for each in [*seeds, record])
    if key == "active_units":
        return f"{', '.join('+'.join(map(str, each)) for each in entries)} of {sum(record['units'])}" if entry else "–"
    if key == "ess":
        median, few = zip(*(each.values() for each in entries), strict=True)
        return "–" if None in median else f"{mean(median):.1f}, {mean(few):.1%} below {SMALL}"
    if key == "gap" and "gap_stderr" in record:  # JSON has two numbers in the place of an entry
        entries, entry = [{"mean": each} for each in entries], {"mean": entry, "stderr": record["gap_stderr"]}
    means = [each["mean"] for each in entries]
    return number(entry, form) + (f", seeds ± {stdev(means):.2f}" if len(means) > 1 and None not in means else "")


def number(entry: Record, form: str = ".2f") -> str:
    """Return mean and standard error in this form; a dash where there is no mean."""
    parts = (entry["mean"], form), (entry.get("stderr"), form.lstrip("+"))
    return " ± ".join(f"{value:{shape}}" for value, shape in parts if value is not None) or "–"


def _notes(records: Sequence[Record]) -> list[str]:
    counts = " or ".join(map(str, sorted({each["images"] for each in records})))
    half = " Matrix products are in bfloat16 (--precision)." * any(each["precision"] == "bf16" for each in records)
    notes = [f"± is the standard error over the {counts} test images.{half} docs/table.md explains the rows."]
    several = {printable(each["run"]): [one["seed"] for one in each["seeds"]] for each in records}
    if seeds := [f"{run}: seeds {', '.join(map(str, each))}" for run, each in several.items() if len(each) > 1]:
        words = "Several seeds are one column, their mean; seeds ± is the deviation between them."
        notes.append(f"{words} {'; '.join(seeds)}.")
    grey = [each for each in records if each["targets"] == "grey"]
    if floors := ", ".join(f"{each['floor']['mean']:.1f} for {printable(each['run'])}" for each in grey):
        words = "Grey levels under a Bernoulli are no normalised density; their own entropy is a floor under every row"
        notes.append(f"{words} but the gap: {floors}.")
    known = {each["quadrants"] for each in grey if each["sha256"] == MNIST} - {None}
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
