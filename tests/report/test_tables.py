"""The table: its numbers against NumPy, what stands in which column and under which note; processes in step."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cvae.data import sources
from cvae.model.likelihood import Likelihoods
from cvae.processes import Processes
from cvae.report.evaluation import MNIST, Evaluation, Subject, in_columns, render, short_names
from cvae.settings import Settings

OTHERS: dict[str, dict[str, Any]] = {"half": {"observed": "left"}, "binary": {"targets": "binary"}}
COUNT, SAMPLES, UNITS = 50, (3, 40), [(3, 4), (0, 2)]


def evaluated(
    name: str = "q1", images: str = "0" * 64, epochs: int | None = None, against: str = "", **settings: Any
) -> Evaluation:
    """A run's evaluation, of random numbers that come from its name."""
    random = torch.Generator().manual_seed(sum(name.encode()))
    rows = {"cvae_mc_nll": (2,), "cvae_is_nll": (2,), "ess": (2,), "kl": (2,)}
    values = {
        key: 10 * torch.rand(*rows.get(key, ()), COUNT, dtype=torch.float64, generator=random)
        for key in Likelihoods._fields
    }
    values["gap"] = values["nn_nll"] - values["cvae_is_nll"][-1]
    test = sources.TestImages(torch.empty(0), "", {"test": {"sha256": images}})
    run = Subject(Path(name), Settings(**settings), None, test, epochs, against)  # type: ignore[arg-type]
    return Evaluation(name, run, SAMPLES, values, UNITS, "fp32")


def of_seeds() -> list[Evaluation]:
    """Three runs of one setting, and one of another, all against the first one."""
    runs = [evaluated(f"s{i}", against="s0", seed=i) for i in range(3)]
    return [*runs, evaluated("other", against="s0", hidden=(7,))]


def text(*runs: Evaluation, form: str = "text") -> str:
    """The table with a column for each run."""
    return render(runs, form)


def records(*runs: Evaluation) -> list[dict[str, Any]]:
    return json.loads(text(*runs, form="json"), parse_constant=pytest.fail)  # type: ignore[no-any-return]


def rows(block: str) -> dict[str, list[str]]:
    """The cells of a table in text, by the first one of their row."""
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line.strip()) for line in block.splitlines())}


def numpy_of(run: Evaluation, key: str, s: int | None = None) -> Any:
    """A quantity for each image, at S samples if it depends on them."""
    return (run.values[key] if s is None else run.values[key][SAMPLES.index(s)]).numpy()


def entry(values: Any) -> Any:
    """Mean and standard error, to the rounding of sums of 50 numbers in float64."""
    return pytest.approx({"mean": values.mean(), "stderr": values.std(ddof=1) / math.sqrt(COUNT)}, rel=1e-12)


def cell(values: Any, digits: int = 2, sign: str = "") -> str:
    return f"{values.mean():{sign}.{digits}f} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"


def test_every_number_of_a_run() -> None:
    run = evaluated()
    (record,), printed = records(run), rows(text(run).split("\n\n")[0])
    assert (record["samples"], record["images"], record["units"], record["active_units"]) == (40, COUNT, [4, 2], [3, 0])
    assert record["kl"] == list(map(entry, numpy_of(run, "kl")))
    for key, label in (("nn_nll", "NN (baseline)"), ("cvae_neg_elbo", "CVAE (−ELBO)")):
        assert (record[key], printed[label]) == (entry(numpy_of(run, key)), [cell(numpy_of(run, key))])
    assert record["floor"] == entry(numpy_of(run, "floor"))
    for s in SAMPLES:
        for key, label in (("cvae_mc_nll", "Monte Carlo"), ("cvae_is_nll", "importance sampling")):
            values = numpy_of(run, key, s)
            assert record["by_samples"][str(s)][key] == entry(values)
            assert printed[f"CVAE ({label}, S = {s})"] == [cell(values)]
        ess = torch.tensor(numpy_of(run, "ess", s))
        few = (ess < 5).double().mean().item()
        assert record["by_samples"][str(s)]["ess"] == {"median": ess.median().item(), "below_5": few}
        assert printed[f"Effective samples of S = {s}"] == [f"{ess.median():.1f}, {few:.1%} below 5"]
    assert {key: record[key] for key in record["by_samples"]["40"]} == record["by_samples"]["40"]
    gap = numpy_of(run, "nn_nll") - numpy_of(run, "cvae_is_nll", 40)
    assert {"mean": record["gap"], "stderr": record["gap_stderr"]} == entry(gap)
    assert (printed["Performance gap"], printed["Active units of z"]) == ([cell(gap)], ["3+0 of 6"])
    (row,) = csv.DictReader(io.StringIO(text(run, form="csv")))
    assert float(row["nn_nll_stderr"]) == record["nn_nll"]["stderr"]
    assert float(row["by_samples_3_ess_median"]) == record["by_samples"]["3"]["ess"]["median"]
    assert (float(row["kl_2_mean"]), row["active_units_2"]) == (record["kl"][1]["mean"], "0")
    assert row["against"] == ""


def test_seeds_are_one_column() -> None:
    """Mean and standard error of the runs' mean per image, and the deviation between the means of the runs.

    Differences are from that mean; JSON has each run by itself.
    """
    runs = of_seeds()
    printed = render([runs[0], runs[3], *runs[1:3]], "text", True)
    table, differences, notes = printed.split("\n\n")
    header = ["s0, s1, s2 (1 quadrant, 3 seeds)", "other (1 quadrant)"]
    assert rows(table)["nats per image, lower is better"] == header
    for label, values in {
        "CVAE (importance sampling, S = 40)": np.stack([numpy_of(run, "cvae_is_nll", 40) for run in runs[:3]]),
        "Performance gap": np.stack([numpy_of(run, "gap") for run in runs[:3]]),
    }.items():
        assert rows(table)[label][0] == f"{cell(values.mean(0))}, seeds ± {values.mean(1).std(ddof=1):.2f}"
    medians = [torch.tensor(numpy_of(run, "ess", 3)).median() for run in runs[:3]]
    assert rows(table)["Effective samples of S = 3"][0].startswith(f"{sum(medians) / 3:.1f}, ")
    assert rows(table)["Active units of z"][0] == "3+0, 3+0, 3+0 of 6"
    assert "s0, s1, s2: seeds 0, 1, 2." in notes
    assert json.loads(render(runs, "json", True)) == records(*runs)
    assert rows(differences)["minus s0, s1, s2, below zero is better"] == header[1:]
    means = np.stack([numpy_of(run, "nn_nll") for run in runs[:3]]).mean(0)
    assert rows(differences)["NN (baseline)"] == [cell(numpy_of(runs[3], "nn_nll") - means, 3, "+")]


def test_what_is_no_other_seed_of_the_same() -> None:
    """Another setting, other images, fewer epochs so far; the device does not count."""
    runs = [evaluated("a", seed=1), evaluated("b", seed=2, device="cpu"), evaluated("c", seed=3, learning_rate=1.0)]
    runs += [evaluated("d", "1" * 64, seed=4), evaluated("e", epochs=3, seed=5)]
    assert [column.name for column, _ in in_columns(runs, seeds=True)] == ["a, b", "c", "d", "e"]


def test_differences_are_paired_by_image() -> None:
    """Their standard error is that of the differences: far less than those of the means, where images differ alike."""
    hard = torch.linspace(0, 1000, COUNT, dtype=torch.float64)
    two, one = (run._replace(values={row: v + hard for row, v in run.values.items()}) for run in of_seeds()[:2])
    record, reference = records(one, two)
    assert (reference["against"], record["against"]["run"]) == (None, "s0")
    for key, s in (("nn_nll", None), ("cvae_is_nll", 40)):
        wanted = entry(numpy_of(one, key, s) - numpy_of(two, key, s))
        assert record["against"][key] == wanted
        assert record["against"][key]["stderr"] < record[key]["stderr"] / 50
    assert not any(label.startswith(("Effective", "Active")) for label in rows(text(one, two).split("\n\n")[1]))


@pytest.mark.filterwarnings("ignore:std")
def test_single_image_has_no_standard_error_and_json_says_so() -> None:
    run = evaluated()
    (record,) = records(run._replace(values={key: values[..., :1] for key, values in run.values.items()}))
    assert record["nn_nll"]["stderr"] is record["gap_stderr"] is None


def test_published_figures_stand_under_columns_of_the_same_alone() -> None:
    """Quadrants of MNIST in grey levels, wherever MNIST comes from; the floor is that of grey levels."""
    assert sources.load_test().record["test"]["sha256"] == MNIST
    published = {1: ("100.4", "71.8"), 2: ("61.9", "51.0"), 3: ("25.4", "24.2")}
    others = [evaluated("fashion"), *(evaluated(name, MNIST, **of) for name, of in OTHERS.items())]
    for quadrants, figures in published.items():
        printed = text(evaluated("same", MNIST, quadrants=quadrants, data="/copy/of/mnist"), *others)
        assert [figure for each in published.values() for figure in each if figure in printed] == list(figures)
    printed = text(*others, form="markdown")
    assert "tutorial" not in printed
    floors = (f"{numpy_of(run, 'floor').mean():.1f} for {run.name}" for run in others[:2])
    assert f"but the gap: {', '.join(floors)}.\n" in printed, "none for black and white pixels"


def test_headings() -> None:
    """What numbers depend on; and names that would break a table."""
    for settings, epochs, heading in (
        ({"quadrants": 3}, None, "a (3 quadrants)"),
        ({"observed": "/masks/a face.v2.png"}, None, "a (a face.v2)"),
        ({"targets": "binary-fixed", "observed": "left"}, 12, "a (left, binarized, epoch 12 so far)"),
    ):
        run = evaluated("a", epochs=epochs, **settings)
        assert text(run).splitlines()[0].endswith(f"  {heading}")
        assert records(run)[0]["unfinished_at_epoch"] == epochs
    run = evaluated("a|b\nc")
    assert text(run, form="markdown").startswith("| nats per image, lower is better | a\\|b\\nc (1 quadrant) |\n")
    assert records(run)[0]["run"] == "a|b\nc"


def test_names_have_as_many_folders_as_tell_them_apart() -> None:
    folders = ["/r/a/q1", "/r/b/q1", "/r/b/q2", "/s/b/q1", "/q1"]
    assert short_names(list(map(Path, folders))) == ["a/q1", "r/b/q1", "q2", "s/b/q1", "//q1"]


class Exchange(Processes):
    """One of two processes, the other of which has four parts; it keeps what was done between two exchanges."""

    rounds: ClassVar[list[list[int]]] = []

    def maximum(self, value: int) -> int:
        self.rounds.append([])
        return max(value, len(self.rounds) <= 4)


def test_processes_wait_for_each_other_portion_by_portion() -> None:
    """No exchange lasts longer than a portion; who has done all of its own goes on exchanging."""
    processes = Exchange()
    for part in processes.in_step(range(3)):
        processes.rounds[-1].append(part)
    assert processes.rounds == [[0], [1], [2], [], []]
