"""The tables of the reference runs, as README.md and docs/ have them: printed from what is in `runs/reference/`.

    python benchmarks/reference_tables.py    # Markdown, each table under the name of its file

`runs/reference/cll.json` has the records of `eval.py --format json` of all its runs; `records/` below it has the runs
whose weights are not kept. docs/recipe.md says by which commands they were made.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from start import ROOT

from cvae.report.evaluation import LABELS, TUTORIAL, Cells, Record, laid_out, number, rows
from cvae.report.realism import COLUMNS, ROWS

REFERENCE = ROOT / "runs" / "reference"
QUADRANTS = (1, 2, 3)
SEVERAL_SEEDS = ("default", "best")
SEEDS = (0, 1, 2)
HEADER = ("1 quadrant", "2 quadrants", "3 quadrants")
PRESETS = ("tutorial", "default", "paper", "best")
WITH_WEIGHTS = ("q1", "q2", "q3", "default-q1")
FEW, MANY = "100", "1000"


def read() -> dict[str, Record]:
    """What the evaluations found, by the names of the runs."""
    return {record["run"]: record for record in json.loads((REFERENCE / "cll.json").read_text(encoding="utf-8"))}


def folder(run: str) -> Path:
    """Where a run of the records is."""
    return REFERENCE / run if run in WITH_WEIGHTS else REFERENCE / "records" / run


def name(preset: str, quadrants: int, seed: int = 0) -> str:
    """What a preset's run is called."""
    if preset == "best" and seed == 0:
        return f"q{quadrants}"
    return f"{preset}-{seed}-q{quadrants}" if seed else f"{preset}-q{quadrants}"


def found(record: Record, key: str, samples: str | None = None) -> Record:
    """A quantity of a record, at this number of samples if there are several."""
    return record[key] if samples is None else record["by_samples"][samples][key]  # type: ignore[no-any-return]


def summary(records: dict[str, Record]) -> Cells:
    """The two bounds of −log p(y|x) that tell models apart, for each preset and number of quadrants."""

    def of_all(preset: str, *what: str) -> list[str]:
        return [number(found(records[name(preset, k)], *what)) for k in QUADRANTS]

    published = [str(TUTORIAL[k][1]) for k in QUADRANTS]
    return [
        ["nats per image, lower is better", *HEADER],
        ["NN (baseline)", *of_all("default", "nn_nll")],
        ["−ELBO: Pyro's tutorial, as published", *published],
        *([f"−ELBO: `--preset {preset}`", *of_all(preset, "cvae_neg_elbo")] for preset in PRESETS),
        *(
            [f"importance sampling, S = 1,000: `{preset}`", *of_all(preset, "cvae_is_nll", MANY)]
            for preset in PRESETS
        ),
    ]  # fmt: skip


def tutorial_rows(records: dict[str, Record]) -> Cells:
    """The rows of the tutorial's section 10: the default's at S = 100."""
    runs = [records[name("default", k)] for k in QUADRANTS]
    return [
        ["nats per image, lower is better", *HEADER],
        ["Pyro's tutorial: NN (baseline)", *(str(TUTORIAL[k][0]) for k in QUADRANTS)],
        ["Pyro's tutorial: CVAE (Monte Carlo)", *(str(TUTORIAL[k][1]) for k in QUADRANTS)],
        *likelihoods(runs, [FEW])[:4],
    ]


def likelihoods(runs: Sequence[Record], samples: Sequence[str]) -> Cells:
    """The rows of `eval.py`'s table for these runs, without a header and the active units."""
    return rows(runs, list(map(int, samples)))[:-1]


def of_presets(records: dict[str, Record], quadrants: int) -> Cells:
    """All that was found of the presets' runs for a number of quadrants, and how long they took."""
    names = [name(preset, quadrants) for preset in PRESETS]
    runs = [records[each] for each in names]
    summaries = [json.loads((folder(each) / "summary.json").read_text(encoding="utf-8")) for each in names]
    kl = ["+".join(f"{level['mean']:.1f}" for level in run["kl"]) for run in runs]
    units = ["+".join(map(str, run["active_units"])) + f" of {sum(run['units'])}" for run in runs]
    return [
        [f"{HEADER[quadrants - 1]}, nats per image", *(f"`{preset}`" for preset in PRESETS)],
        *likelihoods(runs, [FEW, MANY]),
        ["KL(q ‖ p) by level of z", *kl],
        [LABELS["active_units"], *units],
        ["validation images, −ELBO, best epoch", *(f"{each['best_loss']:.2f}" for each in summaries)],
        ["best epoch, epochs of the CVAE", *(f"{each['best_epoch']}, {each['epoch']}" for each in summaries)],
        ["training, minutes on one core", *(f"{each['seconds'] / 60:.1f}" for each in summaries)],
    ]


def of_seeds(records: dict[str, Record]) -> Cells:
    """Means over the seeds and the standard deviation between them, of the runs that have several."""
    rows = [["mean of seeds 0, 1, 2 ± standard deviation between them", *HEADER]]
    for preset in SEVERAL_SEEDS:
        for label, what in {"−ELBO": ("cvae_neg_elbo",), "importance sampling": ("cvae_is_nll", MANY)}.items():
            cells = []
            for k in QUADRANTS:
                means = [found(records[name(preset, k, seed)], *what)["mean"] for seed in SEEDS]
                cells.append(f"{mean(means):.2f} ± {stdev(means):.2f}")
            rows.append([f"`{preset}`: {label}" + (", S = 1,000" if len(what) > 1 else ""), *cells])
    return rows


def expected() -> dict[str, tuple[str, int]]:
    """The preset and the seed of each run that there has to be, by its name."""
    runs = {name(preset, k): (preset, 0) for preset in PRESETS for k in QUADRANTS}
    runs |= {name(preset, k, seed): (preset, seed) for preset in SEVERAL_SEEDS for k in QUADRANTS for seed in SEEDS}
    runs |= dict.fromkeys(("paper-gsnn", "paper-hybrid"), ("paper", 0))
    return runs | {"top-default": ("default", 0)} | dict.fromkeys(("top-best", "top-best-multisample"), ("best", 0))


def objectives(records: dict[str, Record]) -> Cells:
    """The objectives on the paper's network, one quadrant, and their differences from the ELBO's image by image."""
    runs = [records[each] for each in ("paper-q1", "paper-gsnn", "paper-hybrid")]
    rows = [["objectives, 1 quadrant, nats per image", "`elbo`", "`gsnn`", "`hybrid`"], *likelihoods(runs, [FEW, MANY])]
    for key in ("cvae_neg_elbo", "cvae_mc_nll", "cvae_is_nll"):
        label = LABELS[key].format(int(MANY))
        others = [run["against"] for run in runs[1:]]
        minus = [other[key] if key == "cvae_neg_elbo" else found(other, key, MANY) for other in others]
        rows.append([f"{label}, minus `elbo`'s", "–", *(number(each, "+.3f") for each in minus)])
    return rows


def binarized(records: dict[str, Record]) -> Cells:
    """The top half given, binarized pixels."""
    runs = [records[each] for each in ("top-default", "top-best", "top-best-multisample")]
    rows = [["top half given, binarized, nats per image", "`default`", "`best`", "`best`, then `multisample`"]]
    return rows + [row for row in likelihoods(runs, [FEW, MANY]) if row[0] != LABELS["gap"]]


def of_realism(records: dict[str, Record], run: str, title: str) -> Cells:
    """Realism and diversity of a run's completions."""
    own = records[run]["realism"]
    rows = [[title, *COLUMNS.values()]]
    for key, label in ROWS.items():
        each = [own[who].get(key) for who in COLUMNS]
        digits = 4 if "mse" in key else 3
        shown = ["–" if one is None or one["mean"] is None else f"{one['mean']:.{digits}f}" for one in each]
        rows.append([label, *shown])
    return rows


def tables() -> list[tuple[str, Cells]]:
    """The tables, each with the file that has it."""
    records = read()
    recipe, realism = "docs/recipe.md", "docs/realism.md"
    return [
        ("README.md", summary(records)),
        ("docs/tutorial.md", tutorial_rows(records)),
        *((recipe, of_presets(records, k)) for k in QUADRANTS),
        (recipe, of_seeds(records)),
        (recipe, objectives(records)),
        (recipe, binarized(records)),
        *(
            (realism, of_realism(records, name(preset, k), f"`{preset}`, {HEADER[k - 1]}"))
            for k in QUADRANTS
            for preset in ("default", "best")
        ),
    ]


def main() -> None:
    """Print the tables."""
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for file, cells in tables():
        print(f"<!-- {file} -->\n\n{laid_out(cells, 'markdown')}\n")


if __name__ == "__main__":
    main()
