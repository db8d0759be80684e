"""What an evaluation found, run by run, for programs: JSON and CSV.

| key | what it is |
|---|---|
| `run`, `seed`, `quadrants`, `observed`, `targets`, `network`, `objective`, `unfinished_at_epoch` | which run |
| `precision`, `images`, `samples` | of the products; how many test images; the largest S |
| `nn_nll`, `cvae_neg_elbo`, `floor` | nats per image: `mean` over the images, and its `stderr` |
| `cvae_mc_nll`, `cvae_is_nll` | the same, at the largest S |
| `ess` | effective samples among the largest S: `median` over the images, share of the images `below_5` |
| `by_samples` | `cvae_mc_nll`, `cvae_is_nll` and `ess` at each S |
| `gap`, `gap_stderr` | NN minus importance sampling |
| `kl` | KL(q ‖ p) in the −ELBO, nats per image: `mean` and `stderr` of each level of z, from top to bottom |
| `active_units`, `units` | of each level: how many dimensions are active, and how many there are |
| `against` | the run that this one is compared with (`--against`), `run`, and the differences from it by the names above |

null: what says nothing of the run, or cannot be known. In CSV what is inside of a value has a column of its own:
`ess_median`, `by_samples_100_ess_median`, `active_units_1`.
"""  # noqa: E501

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from cvae.model.likelihood import Estimate, estimate
from cvae.report.results import SMALL, Result, Row

Record = dict[str, Any]


def as_json(records: Sequence[Record]) -> str:
    """A list of the records."""
    return json.dumps(records, indent=2) + "\n"


def as_csv(records: Sequence[Record]) -> str:
    """A line for each record, with all columns that one of them has."""
    lines = [dict(_flattened(each)) for each in records]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, dict.fromkeys(name for line in lines for name in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def record(result: Result) -> Record:
    """All that was found of a run, by the names above."""
    s = result.settings
    own = partial(_own, result)
    gap, recognised = own(Row("gap")), result.has("kl")
    return {
        "run": result.run,
        "seed": s.seed,
        "quadrants": s.quadrants if s.observed is None else None,
        "observed": result.observed,
        "targets": s.targets,
        "unfinished_at_epoch": result.epochs,
        "network": s.network,
        "objective": s.objective,
        "precision": result.precision,
        "samples": result.samples[-1],
        "images": len(result.per_image.nn_nll),
        **_by_name(result.samples, own, "cvae_mc_nll", "cvae_is_nll", "ess"),
        "floor": own(Row("floor")),
        "gap": gap["mean"],
        "gap_stderr": gap["stderr"],
        "kl": [_as_dict(estimate(level)) for level in result.per_image.kl] if recognised else None,
        "active_units": [active for active, _ in result.units] if recognised else None,
        "units": [count for _, count in result.units],
        "against": None if result.against is None else _against(result, result.against),
    }


def _by_name(samples: Sequence[int], found: Callable[[Row], Record], *sampled: str) -> Record:
    """What is found in nats per image; `sampled` are the names of what there is for each S."""
    return {
        "nn_nll": found(Row("nn_nll")),
        "cvae_neg_elbo": found(Row("cvae_neg_elbo")),
        **{name: found(Row(name, samples[-1])) for name in sampled},
        "by_samples": {str(s): {name: found(Row(name, s)) for name in sampled} for s in samples},
    }


def _own(result: Result, row: Row) -> Record:
    if row.key == "ess":
        median, few = result.effective_samples(row.samples or 0) if result.has("ess") else (None, None)
        return {"median": median, f"below_{SMALL}": few}
    return _as_dict(estimate(result.values(row)) if result.has(row.key) else None)


def _against(result: Result, other: Result) -> Record:
    def found(row: Row) -> Record:
        has = result.has(row.key) and other.has(row.key)
        return _as_dict(estimate(result.values(row) - other.values(row)) if has else None)

    return {"run": other.run, **_by_name(result.samples, found, "cvae_mc_nll", "cvae_is_nll"), "gap": found(Row("gap"))}


def _as_dict(found: Estimate | None) -> Record:
    """An estimate; None for its parts where there is none, and for a NaN, as the error of a single image is."""
    parts = dict.fromkeys(Estimate._fields) if found is None else found._asdict()
    return {name: None if part is None or math.isnan(part) else part for name, part in parts.items()}


def _flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The parts of a value, each by the names that lead to it; those of a list are counted from 1."""
    parts = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield name, value
    for key, part in parts:
        yield from _flattened(part, f"{name}_{key}" if name else str(key))
