"""The table of realism and diversity, after that of likelihoods: as text or Markdown, or in its records."""

import math
from collections.abc import Iterable, Mapping

from cvae.model.likelihood import Estimate
from cvae.report.realism import COMPLETIONS, Judged
from cvae.report.records import Record
from cvae.report.selection import Subject
from cvae.report.tables import laid_out

COLUMNS = {
    "nn": "NN", "nn_drawn": "NN, drawn", "cvae": "CVAE", "cvae_drawn": "CVAE, drawn", "truth": "truth",
    "x_only": "x only",
}  # fmt: skip

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


def records(runs: Iterable[str], judged: Mapping[str, Judged]) -> dict[str, Record]:
    """What the records of these runs have more, by their names: null for a run that was not judged."""
    return {run: {"realism": _record(judged[run]) if run in judged else None} for run in runs}


def render(judged: Mapping[str, Judged], subjects: Mapping[str, Subject], form: str) -> str:
    """The tables to read, as `text` or `markdown`, one for each run; both mappings are by the names of the runs."""
    blocks = [_block(f"{name} ({subjects[name].model.split.name})", each, form) for name, each in judged.items()]
    mark = "[{}] {}" if form == "text" else "{}. {}"
    notes = "\n".join(mark.format(i, note) for i, note in enumerate(NOTES, start=1))
    return "\n".join(["", *blocks, notes]) + "\n"


def _block(name: str, judged: Judged, form: str) -> str:
    """The table of a run."""
    found, count = judged.estimates(), len(judged.features["truth"])
    cells = [[f"{name}, {count:,} images", *COLUMNS.values()]]
    for row, label in ROWS.items():
        cells.append([label, *(_cell(found.get((who, row)), 4 if "mse" in row else 3) for who in COLUMNS)])
    return laid_out(cells, form) + "\n"


def _cell(estimate: Estimate | None, digits: int) -> str:
    if estimate is None or math.isnan(estimate.mean):
        return "–"
    error = "" if math.isnan(estimate.stderr) else f" ± {estimate.stderr:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{error}"


def _record(judged: Judged) -> Record:
    """What JSON has of a run: by whose they are and by name, mean and standard error, None where there is none."""
    found = judged.estimates()
    whose = {who: {row: found[who, row] for row in ROWS if (who, row) in found} for who in COLUMNS}
    return {
        "images": len(judged.features["truth"]),
        "completions": COMPLETIONS,
        **{
            who: {
                row: {part: None if math.isnan(value) else value for part, value in each._asdict().items()}
                for row, each in own.items()
            }
            for who, own in whose.items()
        },
    }
