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

from cvae.data.sources import load_test
from cvae.model.likelihood import Likelihoods
from cvae.processes import Processes
from cvae.report.evaluation import Evaluation, by_name, by_setting, short_names
from cvae.report.tables import MNIST, render
from cvae.settings import Settings

OTHERS: dict[str, dict[str, Any]] = {"half": {"observed": "left"}, "binary": {"targets": "binary"}}
COUNT, SAMPLES, UNITS = 50, (3, 40), [(3, 4), (0, 2)]


def evaluated(name: str = "q1", images: str = "0" * 64, epochs: int | None = None, **settings: Any) -> Evaluation:
    """A run's evaluation, of random numbers that come from its name."""
    random = torch.Generator().manual_seed(sum(name.encode()))
    rows = {"cvae_mc_nll": (2,), "cvae_is_nll": (2,), "ess": (2,), "kl": (2,)}
    values = {
        key: 10 * torch.rand(*rows.get(key, ()), COUNT, dtype=torch.float64, generator=random)
        for key in Likelihoods._fields
    }
    s = Settings(**settings)
    return Evaluation(name, s, SAMPLES, by_name(Likelihoods(**values), s), UNITS, "fp32", images, epochs)


def shown(*runs: Evaluation, form: str = "text") -> str:
    """The table with a column for each run."""
    return render([[run] for run in runs], form)


def records(*runs: Evaluation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shown(*runs, form="json"), parse_constant=pytest.fail)
    return found


def of_seeds(count: int = 3) -> list[Evaluation]:
    """Runs of one setting, and one of another, all against the first one."""
    runs = [*(evaluated(f"s{i}", seed=i) for i in range(count)), evaluated("other", hidden=(7,))]
    return [runs[0], *(run._replace(against="s0") for run in runs[1:])]


def numpy_of(run: Evaluation, key: str, s: int | None = None) -> Any:
    """A quantity for each image, at S samples if it depends on them."""
    return (run.values[key] if s is None else run.values[key][SAMPLES.index(s)]).numpy()


def mean_and_error(values: Any, digits: int = 2, sign: str = "") -> str:
    return f"{values.mean():{sign}.{digits}f} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"


def cells(line: str) -> list[str]:
    """The cells of a line of the table in text."""
    return re.split(r"  +", line.strip())


def test_every_number_of_a_run() -> None:
    run = evaluated()
    (record,) = records(run)
    printed = dict(map(cells, shown(run).splitlines()[2:12]))
    assert (record["samples"], record["images"], record["units"], record["active_units"]) == (40, COUNT, [4, 2], [3, 0])
    assert [level["mean"] for level in record["kl"]] == pytest.approx(run.values["kl"].mean(1).tolist())
    for key, label in (("nn_nll", "NN (baseline)"), ("cvae_neg_elbo", "CVAE (−ELBO)"), ("floor", None)):
        values = numpy_of(run, key)
        wanted = {"mean": values.mean(), "stderr": values.std(ddof=1) / math.sqrt(COUNT)}
        assert record[key] == pytest.approx(wanted, rel=1e-12)
        assert label is None or printed[label] == mean_and_error(values)
    for s in SAMPLES:
        for key, label in (("cvae_mc_nll", "Monte Carlo"), ("cvae_is_nll", "importance sampling")):
            values = numpy_of(run, key, s)
            assert record["by_samples"][str(s)][key]["mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert printed[f"CVAE ({label}, S = {s})"] == mean_and_error(values)
        ess = torch.tensor(numpy_of(run, "ess", s))
        few = (ess < 5).double().mean().item()
        assert record["by_samples"][str(s)]["ess"] == {"median": ess.median().item(), "below_5": few}
        assert printed[f"Effective samples of S = {s}"] == f"{ess.median():.1f}, {few:.1%} below 5"
    assert {key: record[key] for key in record["by_samples"]["40"]} == record["by_samples"]["40"]
    gap = numpy_of(run, "nn_nll") - numpy_of(run, "cvae_is_nll", 40)
    assert record["gap"] == pytest.approx(gap.mean(), rel=1e-12)
    assert printed["Performance gap"] == mean_and_error(gap)
    assert printed["Active units of z"] == "3+0 of 6"
    (row,) = csv.DictReader(io.StringIO(shown(run, form="csv")))
    assert float(row["nn_nll_stderr"]) == record["nn_nll"]["stderr"]
    assert float(row["by_samples_3_ess_median"]) == record["by_samples"]["3"]["ess"]["median"]
    assert (float(row["kl_2_mean"]), row["active_units_2"]) == (record["kl"][1]["mean"], "0")
    assert row["against"] == ""


def test_seeds_are_one_column() -> None:
    """Mean and standard error of the runs' mean per image, and the deviation between the means of the runs.

    Differences are from that mean; JSON has each run by itself.
    """
    runs = of_seeds()
    text = render(by_setting([runs[0], runs[3], *runs[1:3]]), "text")
    lines = text.split("\n\n")[0].splitlines()
    assert cells(lines[0])[1:] == ["s0, s1, s2 (1 quadrant, 3 seeds)", "other (1 quadrant)"]
    numbers = np.stack([numpy_of(run, "cvae_is_nll", 40) for run in runs[:3]])
    (line,) = (line for line in lines if "importance sampling, S = 40" in line)
    assert cells(line)[1] == f"{mean_and_error(numbers.mean(0))}, seeds ± {numbers.mean(1).std(ddof=1):.2f}"
    medians = [torch.tensor(numpy_of(run, "ess", 3)).median() for run in runs[:3]]
    assert f"{sum(medians) / 3:.1f}, " in next(line for line in lines if "samples of S = 3 " in line)
    assert "s0, s1, s2: seeds 0, 1, 2." in text
    assert json.loads(render(by_setting(runs), "json")) == records(*runs)
    block = text.split("\n\n")[1].splitlines()
    assert cells(block[0]) == ["minus s0, s1, s2, below zero is better", "other (1 quadrant)"]
    means = np.stack([numpy_of(run, "nn_nll") for run in runs[:3]]).mean(0)
    assert cells(block[2])[1] == mean_and_error(numpy_of(runs[3], "nn_nll") - means, 3, "+")


def test_what_is_no_other_seed_of_the_same() -> None:
    """Another setting, other images, fewer epochs so far; the device does not count."""
    runs = [evaluated("a", seed=1), evaluated("b", seed=2, device="cpu"), evaluated("c", seed=3, learning_rate=1.0)]
    runs += [evaluated("d", "1" * 64, seed=4), evaluated("e", epochs=3, seed=5)]
    assert [[run.name for run in column] for column in by_setting(runs)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_differences_are_paired_by_image() -> None:
    """Their standard error is that of the differences: far less than those of the means, where images differ alike."""
    hard = torch.linspace(0, 1000, COUNT, dtype=torch.float64)
    one, two = (run._replace(values={row: v + hard for row, v in run.values.items()}) for run in of_seeds()[:2])
    one = one._replace(against="s1")
    record, other = records(one, two._replace(against="s1"))
    assert (other["against"], record["against"]["run"]) == (None, "s1"), "none from itself"
    for key, s in (("nn_nll", None), ("cvae_is_nll", 40)):
        minus = numpy_of(one, key, s) - numpy_of(two, key, s)
        wanted = {"mean": minus.mean(), "stderr": minus.std(ddof=1) / math.sqrt(COUNT)}
        assert record["against"][key] == pytest.approx(wanted, rel=1e-9)
        assert wanted["stderr"] < record[key]["stderr"] / 50
    block = shown(one, two).split("\n\n")[1].splitlines()
    assert not any(line.startswith(("Effective", "Active")) for line in block)


def test_nothing_is_said_of_an_untrained_recognition_network() -> None:
    run = evaluated(objective="gsnn")
    record = records(run._replace(against="q2"), evaluated("q2"))[0]
    assert record["kl"] is record["active_units"] is record["gap"] is record["ess"]["median"] is None
    assert record["cvae_is_nll"]["mean"] is record["cvae_neg_elbo"]["mean"] is record["against"]["gap"]["mean"] is None
    assert record["cvae_mc_nll"]["mean"] > 0
    printed = dict(map(cells, shown(run).splitlines()[2:12]))
    assert {label for label, cell in printed.items() if cell == "–"} == {
        "CVAE (−ELBO)", "CVAE (importance sampling, S = 3)", "CVAE (importance sampling, S = 40)", "Performance gap",
        "Effective samples of S = 3", "Effective samples of S = 40", "Active units of z",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:std")
def test_single_image_has_no_standard_error_and_json_says_so() -> None:
    run = evaluated()
    single = run._replace(values={row: values[..., :1] for row, values in run.values.items()})
    (record,) = records(single)
    assert record["nn_nll"]["stderr"] is record["gap_stderr"] is None


def test_published_figures_stand_under_columns_of_the_same_alone() -> None:
    """Quadrants of MNIST in grey levels, wherever MNIST comes from; the floor is that of grey levels."""
    assert load_test().record["test"]["sha256"] == MNIST
    published = {1: ("100.4", "71.8"), 2: ("61.9", "51.0"), 3: ("25.4", "24.2")}
    others = [evaluated("fashion"), *(evaluated(name, MNIST, **of) for name, of in OTHERS.items())]
    for quadrants, figures in published.items():
        printed = shown(evaluated("same", MNIST, quadrants=quadrants, data="/copy/of/mnist"), *others)
        assert [figure for each in published.values() for figure in each if figure in printed] == list(figures)
    text = shown(*others, form="markdown")
    assert "tutorial" not in text
    floors = (f"{numpy_of(run, 'floor').mean():.1f} for {run.name}" for run in others[:2])
    assert f"but the gap: {', '.join(floors)}.\n" in text, "none for black and white pixels"


def test_headings() -> None:
    """What numbers depend on; and names that would break a table."""
    for settings, epochs, heading in (
        ({"quadrants": 3}, None, "a (3 quadrants)"),
        ({"observed": "/masks/a face.v2.png"}, None, "a (a face.v2)"),
        ({"targets": "binary-fixed", "observed": "left"}, 12, "a (left, binarized, epoch 12 so far)"),
    ):
        run = evaluated("a", epochs=epochs, **settings)
        assert shown(run).splitlines()[0].endswith(f"  {heading}")
        assert records(run)[0]["unfinished_at_epoch"] == epochs
    run = evaluated("a|b\nc")
    assert shown(run, form="markdown").startswith("| nats per image, lower is better | a\\|b\\nc (1 quadrant) |\n")
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
