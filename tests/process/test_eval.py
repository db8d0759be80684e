"""`eval.py`: which runs it evaluates, what it prints of them on what terminal, and what it draws.

In this process where the process does not matter: its imports take seconds.
"""

import csv
import io
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.inprocess import TINY, Ended, call, call_eval, call_train, interrupted_after
from support.scripts import ROOT, write_data
from support.trainings import ENVIRONMENT, contents, events, finish, start, torchrun
from torch.utils._pytree import tree_flatten

import eval as evaluation
import train
from cvae.console import safe_output
from cvae.data.sources import load_test, load_train
from cvae.errors import UsageError
from cvae.model.likelihood import Likelihoods
from cvae.model.objectives import OF_PRIOR
from cvae.report.figures import ENDINGS, completions, write_picture
from cvae.report.results import Column, Result, Row, by_setting
from cvae.report.tables import MNIST, render
from cvae.run import checkpoint
from cvae.run.folder import read_metrics
from cvae.run.load import load
from cvae.settings import Settings

LIKELIHOODS = ["nn_nll", "cvae_neg_elbo", "cvae_mc_nll", "cvae_is_nll"]
SAMPLES = ["--samples", "3", "--device", "cpu"]  # as call_eval takes them
PARTS = ["input", "nn", *(f"sample{i:02d}" for i in range(1, 11)), "truth"]
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `runs` (q1, q2, q3), and `unfinished`: of the baseline only, and of two epochs of four."""
    folder = tmp_path_factory.mktemp("eval")
    random = torch.Generator().manual_seed(0)
    images = (torch.randint(0, 256, (n, 10, 9), dtype=torch.uint8, generator=random) for n in (72, 50))
    words = ["--data", write_data(folder / "data", *images), *TINY]
    assert call_train(*words, "--runs", folder / "runs", "--quadrants", "1", "2", "3").code == 0
    (folder / "runs/nested").mkdir()
    (folder / "runs/nested/q2").symlink_to(folder / "runs/q2")
    for name, phase in (("baseline", "baseline"), ("begun", "cvae")):
        epoch = 1 if phase == "baseline" else 2
        with interrupted_after(phase, epoch):
            ended = call_train(*words, "--epochs", "4", "--runs", folder / "unfinished", "--name", name)
        assert ended.code == 143
    return folder


@pytest.fixture(scope="module")
def table(trained: Path) -> list[dict[str, Any]]:
    """What there is to say of its runs."""
    return records(call_eval("--runs", trained / "runs", "--format", "json"))


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes copies of runs below a folder of its own, to be spoilt."""

    def copy(run: str = "runs/q1", name: str = "q1") -> Path:
        return Path(shutil.copytree(place / run, tmp_path / "copies" / name))

    return copy


def records(ended: Ended, code: int = 0) -> list[dict[str, Any]]:
    """The table in JSON, of an evaluation that left nothing out."""
    assert (ended.code, ended.err) == (code, "")
    found: list[dict[str, Any]] = json.loads(ended.out)
    return found


def assert_agree(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """To the rounding of sums in another order."""
    leaves, others = tree_flatten(found), tree_flatten(expected)
    assert leaves[1] == others[1]
    for one, other in zip(leaves[0], others[0], strict=True):
        assert one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


def change(run: Path, *keys: str, value: Any) -> None:
    """Change an entry of a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (run / "config.json").write_text(json.dumps(config))


def settings_of(place: Path) -> Settings:
    return Settings(data=str(place / "data"))


def images_of(place: Path) -> torch.Tensor:
    return load_test(settings_of(place)).images


def values(count: int = 4, numbers: int = 1, levels: int = 1) -> Likelihoods:
    """Random ones, for so many numbers of samples."""
    rows = {"cvae_mc_nll": (numbers,), "cvae_is_nll": (numbers,), "ess": (numbers,), "kl": (levels,)}
    return Likelihoods(
        **{name: torch.rand(*rows.get(name, ()), count, dtype=torch.float64) for name in Likelihoods._fields}
    )


def result(run: str = "q1", images: str | None = None, epochs: int | None = None, **settings: Any) -> Result:
    """A run's, of random numbers at S = 9."""
    return Result(run, Settings(**settings), (9,), values(), [(3, 4)], "fp32", images, epochs)


def rendered(form: str, *results: Result) -> str:
    return render([Column((each,)) for each in results], form)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


# The table


def test_json(table: list[dict[str, Any]]) -> None:
    assert [(record["run"], record["quadrants"], record["samples"]) for record in table] == [
        ("q1", 1, 3), ("q2", 2, 3), ("q3", 3, 3)
    ]  # fmt: skip
    for record in table:
        for key in LIKELIHOODS:
            assert record[key].keys() == {"mean", "stderr"}
            assert 0 < record[key]["stderr"] < record[key]["mean"] < math.inf
        assert record["gap"] == pytest.approx(record["nn_nll"]["mean"] - record["cvae_is_nll"]["mean"], abs=1e-9)
        assert record["floor"]["mean"] < min(record[key]["mean"] for key in LIKELIHOODS)
        assert (record["images"], record["targets"], record["unfinished_at_epoch"]) == (50, "grey", None)
    means = [record["nn_nll"]["mean"] for record in table]
    assert means[0] > means[1] > means[2], "the fewer pixels are hidden, the fewer nats they cost"


def test_csv(table: list[dict[str, Any]]) -> None:
    ended = call_eval("--format", "csv")
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    assert (ended.code, [row["run"] for row in rows]) == (0, ["q1", "q2", "q3"])
    for row, record in zip(rows, table, strict=True):
        for key in LIKELIHOODS:
            assert float(row[f"{key}_mean"]) == record[key]["mean"]
            assert float(row[f"{key}_stderr"]) == record[key]["stderr"]
        assert float(row["gap"]) == record["gap"]
        assert float(row["by_samples_3_ess_median"]) == record["ess"]["median"]
        assert int(row["active_units_1"]) == record["active_units"][0]


def test_several_numbers_of_samples(table: list[dict[str, Any]]) -> None:
    """Each has its rows; the largest stands for the run; none depends on the others."""
    (found,) = records(call_eval("q1", "--format", "json", "--samples", "40", "3", "40"))
    assert (found["samples"], list(found["by_samples"])) == (3, ["3"]), "the last flag counts"
    words = ["q1", "--device", "cpu", "--precision", "fp32", "--samples", "40", "3", "40"]
    (found,) = records(call(evaluation, *words, "--format", "json"))
    assert (found["samples"], list(found["by_samples"])) == (40, ["3", "40"])
    assert {key: found[key] for key in found["by_samples"]["40"]} == found["by_samples"]["40"]
    (alone,) = records(call_eval("q1", "--precision", "fp32", "--format", "json"))
    assert_agree([found["by_samples"]["3"]], [alone["by_samples"]["3"]])
    assert found["cvae_is_nll"]["mean"] < alone["cvae_is_nll"]["mean"]
    assert 1 <= found["by_samples"]["3"]["ess"]["median"] <= 3 < found["ess"]["median"] <= 40
    assert found["by_samples"]["3"]["ess"]["below_5"] == 1 > found["ess"]["below_5"]
    printed = call(evaluation, *words).out
    for number in ("3", "40"):
        for label, key in (("Monte Carlo", "cvae_mc_nll"), ("importance sampling", "cvae_is_nll")):
            mean = found["by_samples"][number][key]["mean"]
            assert re.search(rf"^CVAE \({label}, S = {number}\) +{mean:.2f} ± ", printed, re.MULTILINE)
        ess = found["by_samples"][number]["ess"]
        row = f"{ess['median']:.1f}, {ess['below_5']:.1%} below 5"
        assert re.search(rf"^Effective samples of S = {number} +{re.escape(row)}$", printed, re.MULTILINE)


def test_bfloat16_is_close_to_float32() -> None:
    """Within what eight bits of mantissa make of it, and it is said which it was."""
    wide, half = (records(call_eval("q1", "--precision", name, "--format", "json"))[0] for name in ("fp32", "bf16"))
    assert (wide["precision"], half["precision"]) == ("fp32", "bf16")
    for key in LIKELIHOODS:
        assert half[key]["mean"] == pytest.approx(wide[key]["mean"], rel=1e-3)
    assert half["cvae_is_nll"] != wide["cvae_is_nll"]
    assert "in bfloat16" in call_eval("q1", "--precision", "bf16").out
    assert "in bfloat16" not in call_eval("q1", "--precision", "fp32").out


# Seeds, and differences


def of_seeds(count: int = 3) -> list[Result]:
    """Runs of one setting, and one of another; they differ by amounts that are the same for all images, and noise."""
    return [
        *(result(f"s{i}", "0" * 64, seed=i)._replace(per_image=values(50)) for i in range(count)),
        result("other", "0" * 64, hidden=(7,))._replace(per_image=values(50)),
    ]


def test_seeds_are_one_column() -> None:
    """Mean and standard error of the runs' mean per image, and the standard deviation between the runs' means."""
    results = of_seeds()
    columns = by_setting([results[0], results[3], *results[1:3]])
    assert [[each.run for each in column.results] for column in columns] == [["s0", "s1", "s2"], ["other"]]
    lines = render(columns, "text").splitlines()
    assert re.search(r" s0, s1, s2 \(1 quadrant, 3 seeds\) +other \(1 quadrant\)$", lines[0])
    numbers = np.stack([each.per_image.cvae_is_nll[0].numpy() for each in results[:3]])
    error, spread = numbers.mean(0).std(ddof=1) / math.sqrt(50), numbers.mean(1).std(ddof=1)
    (line,) = (line for line in lines if "importance sampling, S = 9" in line)
    assert f"  {numbers.mean():.2f} ± {error:.2f}, seeds ± {spread:.2f}  " in line
    assert "s0, s1, s2: seeds 0, 1, 2." in render(columns, "markdown")
    own = json.loads(render(columns, "json"))
    assert [record["seed"] for record in own] == [0, 1, 2, 0]
    assert [record["cvae_is_nll"]["mean"] for record in own[:3]] == pytest.approx(numbers.mean(1), rel=1e-12)


def test_what_is_no_other_seed_of_the_same() -> None:
    """Another setting, other images, fewer epochs so far, the same seed once more; the device does not count."""
    runs = [
        result("a", "0" * 64, seed=1),
        result("b", "0" * 64, seed=2, device="cpu"),
        result("c", "0" * 64, seed=3, learning_rate=1.0),
        result("d", "1" * 64, seed=4),
        result("e", "0" * 64, 3, seed=5),
        result("f", "0" * 64, seed=1),
        result("g", "0" * 64, seed=2),
    ]
    groups = ["".join(each.run for each in column.results) for column in by_setting(runs)]
    assert groups == ["ab", "c", "d", "e", "fg"]


def test_differences_are_paired_by_image() -> None:
    """Their standard error is that of the differences: far less than those of the means, where images differ alike."""
    a, b = of_seeds()[:2]
    hard = torch.linspace(0, 1000, 50, dtype=torch.float64)
    a, b = (each._replace(per_image=Likelihoods(*(v + hard for v in each.per_image))) for each in (a, b))
    a = a._replace(against=b)
    own = {
        key: (a.values(Row(key, s)) - b.values(Row(key, s))).numpy()
        for key, s in (("nn_nll", None), ("cvae_is_nll", 9))
    }
    (record, other) = json.loads(rendered("json", a, b))
    assert other["against"] is None
    assert record["against"]["run"] == "s1"
    for key, differences in own.items():
        error = differences.std(ddof=1) / math.sqrt(50)
        assert record["against"][key] == pytest.approx({"mean": differences.mean(), "stderr": error}, rel=1e-9)
        assert error < record[key]["stderr"] / 100
    block = rendered("text", a, b).split("\n\n")[1].splitlines()
    assert block[0].split("  ")[0] == "minus s1, below zero is better"
    assert block[0].endswith("  s0 (1 quadrant)")
    assert f"{own['nn_nll'].mean():+.3f} ± " in block[2]
    assert not any(line.startswith(("Effective", "Active")) for line in block)


def test_differences_of_settings_are_of_their_means_over_seeds() -> None:
    results = of_seeds()
    against = [results[0], *(each._replace(against=results[0]) for each in results[1:])]
    block = render(by_setting(against), "markdown").split("\n\n")[1].splitlines()
    assert block[0] == "| minus s0, s1, s2, below zero is better | other (1 quadrant) |"
    means = torch.stack([each.per_image.nn_nll for each in results[:3]]).mean(0)
    assert block[2].startswith(f"| NN (baseline) | {(results[3].per_image.nn_nll - means).mean():+.3f} ± ")


def test_against(place: Path, copied: Callable[..., Path], table: list[dict[str, Any]]) -> None:
    """The named run is among the table's, first if nobody named it; runs with another mask are refused in a line."""
    copy = copied(name="copy")
    ended = call_eval(copy, "q2", "--against", "q1", "--format", "json")
    assert ended.code == 3
    assert ended.line == "runs/q2: cannot be compared with runs/q1: the mask is another"
    found = json.loads(ended.out)
    assert [(record["run"], record["against"] and record["against"]["run"]) for record in found] == [
        ("q1", None), ("copy", "q1"), ("q2", None)
    ]  # fmt: skip
    zero = {"mean": 0.0, "stderr": 0.0}
    assert found[1]["against"]["cvae_is_nll"] == found[1]["against"]["by_samples"]["3"]["cvae_mc_nll"] == zero
    assert found[0] == table[0]
    assert "minus q1" not in call_eval("q1", "q2", "--against", "runs/q1").out, "there is none to compare"
    text = call_eval(copy, "q1", "--against", place / "runs/q1").out
    assert re.search(r"^minus q1, below zero is better +copy \(1 quadrant\)$", text, re.MULTILINE)
    columns = csv.DictReader(io.StringIO(call_eval(copy, "--against", "q1", "--format", "csv").out))
    assert [row["against_nn_nll_mean"] for row in columns] == ["", "0.0"]


def test_against_what_cannot_be_evaluated(tmp_path: Path) -> None:
    ended = call_eval("q1", "--against", "nowhere")
    assert (ended.code, ended.line) == (2, "--against nowhere: there is no such run")
    ended = call_eval("q1", "--against", "unfinished/begun")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.splitlines()[0].startswith("eval.py: unfinished/begun: is not finished")
    assert ended.err.splitlines()[-1].endswith("--against unfinished/begun: cannot be evaluated")


def test_other_test_images_are_not_compared(place: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    other = copied(name="other")
    images = images_of(place).flip(0)
    change(other, "settings", "data", value=str(write_data(tmp_path / "flipped", images.repeat(2, 1, 1), images)))
    change(other, "images", value={"height": 10, "width": 9})
    ended = call_eval(other, "--against", "q1")
    assert (ended.code, ended.line) == (3, f"{other}: cannot be compared with runs/q1: the test images are others")


def test_levels_of_z(place: Path) -> None:
    """A network of several: each with its KL, whose sum the −ELBO has, and its active units."""
    runs = place / "levels"
    words = ["--data", "data", "--network", "deep", "--levels", "2", *TINY]
    assert call_train(*words, "--runs", runs).code == 0
    (found,) = records(call_eval(runs, "--format", "json"))
    assert (len(found["kl"]), found["units"]) == (2, [2, 2])
    assert all(level["mean"] > 0 for level in found["kl"])
    active = "+".join(map(str, found["active_units"]))
    assert re.search(rf"^Active units of z +{re.escape(active)} of 4$", call_eval(runs).out, re.MULTILINE)
    logged = read_metrics(runs / "q1/metrics.jsonl")[-1]
    for part in ("train", "validation"):
        assert logged[f"{part}_kl"] == pytest.approx(logged[f"{part}_kl_1"] + logged[f"{part}_kl_2"], rel=1e-6)
    each = [logged[f"validation_active_units_{i}"] for i in (1, 2)]
    assert logged["validation_active_units"] == sum(each)
    assert {f"cvae/{name}/validation" for name in ("kl_1", "kl_2", "active_units_1")} <= events(runs / "q1")[
        "scalars"
    ].keys()


@pytest.mark.parametrize("objective", OF_PRIOR)
def test_nothing_is_said_of_an_untrained_recognition_network(place: Path, objective: str) -> None:
    assert call_train("--data", "data", "--objective", objective, *TINY, "--runs", objective).code == 0
    (found,) = records(call_eval(objective, "--format", "json"))
    assert found["kl"] is found["active_units"] is found["cvae_is_nll"]["mean"] is found["ess"]["median"] is None
    assert found["cvae_mc_nll"]["mean"] > 0
    rows = {line.split("  ")[0]: line.split()[-1] for line in call_eval(objective).out.splitlines() if "  " in line}
    assert rows["Active units of z"] == rows["Effective samples of S = 3"] == rows["Performance gap"] == "–"
    assert not any("active_units" in name for name in read_metrics(place / objective / "q1/metrics.jsonl")[-1])


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_table_to_read(table: list[dict[str, Any]], form: str) -> None:
    ended = call_eval("--format", form)
    assert (ended.code, ended.err) == (0, "")
    labels = {
        "NN (baseline)": "nn_nll",
        "CVAE (−ELBO)": "cvae_neg_elbo",
        "CVAE (Monte Carlo, S = 3)": "cvae_mc_nll",
        "CVAE (importance sampling, S = 3)": "cvae_is_nll",
    }
    for label, key in labels.items():
        (line,) = (line for line in ended.out.splitlines() if line.removeprefix("| ").startswith(label))
        numbers = re.findall(r"(\d+\.\d\d) ± (\d+\.\d\d)", line)
        assert numbers == [(f"{record[key]['mean']:.2f}", f"{record[key]['stderr']:.2f}") for record in table]
    assert "Performance gap" in ended.out
    assert "100.4" not in ended.out, "the tutorial's figures are for MNIST"


def test_seed_of_the_noise(table: list[dict[str, Any]]) -> None:
    (record,) = records(call_eval("q1", "--format", "json", "--seed", "1"))
    assert record["nn_nll"] == table[0]["nn_nll"], "no noise is in it"
    assert record["cvae_is_nll"] != table[0]["cvae_is_nll"]
    one, other = record["cvae_is_nll"], table[0]["cvae_is_nll"]
    assert abs(one["mean"] - other["mean"]) < 3 * (one["stderr"] + other["stderr"])


def test_single_test_image_has_no_standard_error_and_json_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the standard deviation of one number
        text = rendered("json", result()._replace(per_image=values(1)))
    (record,) = json.loads(text, parse_constant=pytest.fail)
    assert record["nn_nll"]["stderr"] is None
    assert record["gap_stderr"] is None


def test_published_figures_stand_under_columns_of_the_same_alone() -> None:
    """Quadrants of MNIST in grey levels, wherever MNIST comes from; each number of quadrants for itself."""
    assert load_test().record["test"]["sha256"] == MNIST
    published = {1: ("100.4", "71.8", "about 82"), 2: ("61.9", "51.0"), 3: ("25.4", "24.2")}
    same = {k: result(f"q{k}", MNIST, quadrants=k, data="/copy/of/mnist") for k in published}
    others = [
        result("fashion", "0" * 64),
        result("half", MNIST, observed="left"),
        result("binary", MNIST, targets="binary"),
        result("fixed", MNIST, targets="binary-fixed"),
    ]
    for form in ("text", "markdown"):
        for k, figures in published.items():
            printed = rendered(form, same[k], *others)
            assert all(figure in printed for figure in figures)
            assert not any(figure in printed for other in published if other != k for figure in published[other])
        printed = rendered(form, *others)
        assert "tutorial" not in printed
        assert "MNIST" not in printed
        assert not any(figure in printed for figures in published.values() for figure in figures)


def test_entropy_of_grey_levels_is_for_grey_levels_alone() -> None:
    grey, binary = result("g"), result("b", targets="binary")
    floor = grey.per_image.floor.mean()
    assert f"a floor under every row but the gap: {floor:.1f} for g.\n" in rendered("text", grey, binary)
    assert "floor" not in rendered("text", binary)


@pytest.mark.parametrize(
    ("settings", "epochs", "heading"),
    [
        ({"quadrants": 3}, None, "a (3 quadrants)"),
        ({"observed": "every-second-row"}, None, "a (every-second-row)"),
        ({"observed": "/masks/a face.v2.png"}, None, "a (a face.v2)"),
        ({"targets": "binary"}, None, "a (1 quadrant, binarized)"),
        ({"targets": "binary-fixed", "observed": "left"}, 12, "a (left, binarized, epoch 12 so far)"),
    ],
)
def test_heading(settings: dict[str, Any], epochs: int | None, heading: str) -> None:
    found = result("a", None, epochs, **settings)
    assert rendered("text", found).splitlines()[0].endswith(f"  {heading}")
    assert json.loads(rendered("json", found))[0]["unfinished_at_epoch"] == epochs


def test_names_that_would_break_a_table() -> None:
    found = result("a|b\nc")
    lines = rendered("markdown", found).splitlines()
    assert lines[0] == "| nats per image, lower is better | a\\|b\\nc (1 quadrant) |"
    assert json.loads(rendered("json", found))[0]["run"] == "a|b\nc"


# Which runs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "q1 q2 q3"),
        ("runs", "q1 q2 q3"),
        ("q2", "q2"),
        ("q3 runs/q1", "q3 q1"),
        ("{place}/runs/q3", "q3"),
        ("nested", "q2"),
        ("nested/q2", "q2"),
        ("--runs q2 q1", "q2 q1"),
        ("--runs q2 --runs runs/q1", "q2 q1"),
        ("q3 --runs q2", "q3 q2"),
        ("q2 --seed 0 q3", "q2 q3"),
        ("q2 runs/q2 {place}/runs/../runs/q2 --runs q2", "q2"),
        ("q3 runs", "q3 q1 q2"),
    ],
)
def test_runs_by_name_and_folder(place: Path, table: list[dict[str, Any]], words: str, expected: str) -> None:
    """Each once, in the order in which they are named first."""
    found = records(call_eval(*words.format(place=place).split(), "--format", "json"))
    assert found == [record for name in expected.split() for record in table if record["run"] == name]


def test_names_that_are_alike_get_their_folders(
    place: Path, copied: Callable[..., Path], tmp_path: Path, table: list[dict[str, Any]]
) -> None:
    other = copied()
    (tmp_path / "link").symlink_to(other)
    found = records(call_eval("q1", other, "q2", tmp_path / "link", "--format", "json"))
    assert [record.pop("run") for record in found] == ["runs/q1", "copies/q1", "q2"]
    assert found[0] == found[1] == {key: value for key, value in table[0].items() if key != "run"}
    words = ["--figure", tmp_path / "f.png", "--samples-to", tmp_path / "s", "--digits", "1"]
    assert call_eval("q1", other, "q2", *words).code == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["f-copies-q1.png", "f-q2.png", "f-runs-q1.png"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["copies-q1", "q2", "runs-q1"]
    assert sorted(path.name for path in (tmp_path / "s/q2").iterdir()) == [f"q2-image1-{part}.png" for part in PARTS]


@pytest.fixture
def mixed(place: Path, copied: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    """A folder with one good run, and others that are not, in `copies`: what has to be said of each of these."""
    copied(name="good")
    lines = {}
    best = copied(name="damaged") / "best.pt"
    best.write_bytes(best.read_bytes()[:-100])
    lines["damaged"] = "/best.pt: is damaged"
    (copied(name="no-weights") / "best.pt").unlink()
    lines["no-weights"] = "/best.pt: cannot be read"
    (copied(name="no-config") / "config.json").unlink()
    lines["no-config"] = " is no run folder: it has no config.json"
    copied("unfinished/begun", "begun")
    lines["begun"] = ": is not finished"
    copied("unfinished/baseline", "baseline")
    lines["baseline"] = ": is not finished"
    (copied("unfinished/begun", "begun-damaged") / "config.json").write_text("{")  # which cannot go on either
    lines["begun-damaged"] = "/config.json: is no valid JSON"
    old = copied(name="old")
    state = checkpoint.load(old / "best.pt")
    checkpoint.save(old / "best.pt", {**state, "phase": "joint"})
    change(old, "images", value=None)
    lines["old"] = "/config.json: does not say the size of the images"
    change(copied(name="later"), "settings", "shades", value=2)
    lines["later"] = "/config.json: this version knows no setting 'shades'"
    change(copied(name="no-data"), "settings", "data", value=str(tmp_path / "gone"))
    lines["no-data"] = f": {tmp_path}/gone: "
    write_data(tmp_path / "negative", 255 - load_train(settings_of(place)).train, 255 - images_of(place))
    change(copied(name="other-data"), "settings", "data", value=str(tmp_path / "negative"))
    lines["other-data"] = ": was begun on other test images of the same number and size"
    return lines


def assert_lines(err: str, folder: Path, expected: dict[str, str]) -> None:
    """One line for each of these runs, in order."""
    lines = err.splitlines()
    assert len(lines) == len(expected), err
    for line, name in zip(lines, sorted(expected), strict=True):
        assert line.startswith(f"eval.py: {folder / name}{expected[name]}"), line


def test_runs_that_cannot_be_evaluated_are_left_out(
    tmp_path: Path, table: list[dict[str, Any]], mixed: dict[str, str]
) -> None:
    folder = tmp_path / "copies"
    before = contents(folder)
    ended = call_eval(folder, "--format", "json")
    assert ended.code == 3
    assert_lines(ended.err, folder, mixed)
    assert json.loads(ended.out) == [{**table[0], "run": "good"}]
    named = [folder / name for name in mixed]
    ended = call_eval(*named, "nowhere")
    assert (ended.code, ended.out) == (3, "")
    assert len(ended.err.splitlines()) == len(mixed) + 1
    assert ended.err.startswith("eval.py: runs/nowhere: there is no such folder")
    assert contents(folder) == before


def test_two_processes_leave_out_the_same(
    place: Path, tmp_path: Path, table: list[dict[str, Any]], mixed: dict[str, str]
) -> None:
    """And each evaluates a half of the images: what they print agrees with what one process does."""
    code, out, err = finish(start(torchrun("eval.py", tmp_path / "copies", "--format", "json", *SAMPLES), place))
    assert code == 1, "torchrun's own"
    assert_lines(
        "".join(line for line in err.splitlines(True) if line.startswith("eval.py: ")), tmp_path / "copies", mixed
    )
    assert not re.search(rf'File "{ROOT}/(eval\.py|cvae/)', err)
    assert_agree(json.loads(out), [{**table[0], "run": "good"}])


def test_no_run_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call_eval()
    assert (ended.code, ended.out) == (3, "")
    assert ended.line == "runs: there is no such folder; python train.py trains a run"
    for name in ("q1", ".q1.123.old"):  # one not begun, and one that was being removed
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("config.json", "best.pt", "summary.json"):
        (tmp_path / "runs/.q1.123.old" / name).touch()
    ended = call_eval("--format", "json")
    assert (ended.code, ended.out, ended.line) == (3, "", "runs: has no run in it; python train.py trains a run")


def test_unfinished_runs(place: Path) -> None:
    ended = call_eval("unfinished", "--unfinished")
    assert ended.code == 3
    assert ended.line.startswith("unfinished/baseline: only its baseline is trained so far")
    assert "  begun (1 quadrant, epoch 2 so far)\n" in ended.out
    words = ["--unfinished", "--precision", "fp32", "--format", "json"]
    [record] = records(call_eval("unfinished/begun", "q1", *words))[:1]
    assert (record["run"], record["unfinished_at_epoch"]) == ("begun", 2)
    # By the best weights so far: the baseline's guess of the test images is computed here once more.
    model = load(place / "unfinished/begun")
    x, y = model.split.split(images_of(place) / 255)
    nll = torch.nn.functional.binary_cross_entropy_with_logits(model.baseline_net(x), y, reduction="none").sum(1)
    assert record["nn_nll"]["mean"] == pytest.approx(nll.mean().item(), rel=1e-6)


# Where the images are


def test_images_that_have_moved(
    place: Path, copied: Callable[..., Path], tmp_path: Path, table: list[dict[str, Any]]
) -> None:
    run = copied()
    change(run, "settings", "data", value=str(tmp_path / "gone"))
    assert records(call_eval(run, "--data", "data", "--format", "json")) == table[:1]
    images = images_of(place)
    for name, test, difference in (
        ("fewer", images[:7], "was begun on 50 test images, and here are 7"),
        ("turned", images.mT.contiguous(), "was begun on images of 10×9 pixels, and these have 9×10"),
        ("shuffled", images.flip(0), "was begun on other test images of the same number and size"),
    ):
        write_data(tmp_path / name, test.repeat(2, 1, 1), test)
        ended = call_eval(run, "--data", tmp_path / name)
        assert (ended.code, ended.out) == (3, "")
        assert ended.line.startswith(f"{run}: {difference}")


def test_run_of_an_earlier_version_says_the_size_alone(
    copied: Callable[..., Path], table: list[dict[str, Any]]
) -> None:
    run = copied()
    change(run, "images", value={"height": 10, "width": 9})
    assert records(call_eval(run, "--format", "json")) == table[:1]


def test_images_that_runs_share_are_read_once(
    place: Path, copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed of a run is none of their properties."""
    read = []
    change(other := copied(), "settings", "seed", value=1)

    def watched(s: Settings, reading: Any) -> Any:
        read.append(s.data)
        return load_test(s, reading)

    monkeypatch.setattr(evaluation, "load_test", watched)
    about = load_test(settings_of(place)).about
    ended = call_eval("runs", other)
    assert (ended.code, len(read)) == (0, 1)
    assert ended.out.count(about) == 1 or not about
    assert about not in call_eval("--format", "csv").out or not about


# Pictures


def test_figure(place: Path, tmp_path: Path, table: list[dict[str, Any]]) -> None:
    ended = call_eval("runs/q2", "--figure", tmp_path / "figure.png")
    assert ended.out.endswith(f"\nfigure: {tmp_path / 'figure.png'}\n")
    picture = pixels(tmp_path / "figure.png")
    assert picture.shape[0] >= (3 + 10) * 56
    assert picture.shape[1] >= 10 * 50
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50, "there are many greys"
    assert records(call_eval("q2", "--format", "json", "--figure", tmp_path / "figure.png")) == table[1:2]


@pytest.mark.parametrize("ending", [*ENDINGS, ".PNG"])
def test_figure_in_the_format_of_its_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.b{ending}"
    drawn = completions(torch.zeros(2, 10, 9, dtype=torch.uint8), load("q1").split, torch.full((2, 70), 0.5))
    write_picture(path, Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()))
    if ending == ".pdf":
        assert path.read_bytes().startswith(b"%PDF-")
        return
    with Image.open(path) as image:
        image.load()
        assert image.format == ENDINGS[ending.lower()][0]
        assert image.size == drawn.shape[:0:-1]
        error = np.asarray(image.convert("RGB")).astype(int) - drawn.permute(1, 2, 0).numpy()
    assert np.abs(error).mean() <= (2 if ending in (".jpg", ".jpeg", ".gif") else 0)


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--figure", "nowhere/f.png"], 5, "nowhere/f.png: cannot be written"),
        (["--figure", "runs/f.png/f.png"], 5, "runs/f.png/f.png: cannot be written"),
        (["--samples-to", "runs/q1/config.json"], 5, "runs/q1/config.json: cannot be made"),
        (["--figure", "x.png", "--digits", "3,50"], 2, "--digits 50: the test images of runs/q1 are numbered 0 to 49"),
        (["--samples-to", "x", "--digits=-1,3"], 2, "--digits -1: the test images of runs/q1 are numbered 0 to 49"),
    ],
)
def test_pictures_that_cannot_be_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, reason: str
) -> None:
    """It is said before the evaluation is spent, and nothing is written."""
    before = contents(place)
    monkeypatch.setattr(evaluation, "result_of", lambda *_: pytest.fail("it evaluates"))
    ended = call_eval("q1", *words)
    assert ended.code == code
    assert ended.line.startswith(reason)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--figure", "f.xyz"], "f.xyz: pictures are written as .png, "),
        (["--figure", "f"], "f: pictures are written as .png, "),
        (["--digits", "3,x", "--figure", "f.png"], "argument --digits: "),
        (["--digits", "", "--figure", "f.png"], "argument --digits: "),
        (["--digits", "3"], "--digits chooses test images for --figure and --samples-to"),
        (["--samples", "0"], "argument --samples: "),
        (
            ["--samples", "100", "q1"],
            "argument --samples: has to be from 1 to 1000000, not 'q1'; runs are named before it",
        ),
        (["--format", "xml"], "argument --format: "),
        (["--seed", "1.5"], "argument --seed: "),
        (["--data", "x" * 10_001], "data has to be a name"),
    ],
)
def test_usage(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluation.main(words)
    assert caught.value.code == 2
    assert f": error: {reason}" in capsys.readouterr().err.splitlines()[-1]


def test_picture_that_its_format_cannot_hold(tmp_path: Path) -> None:
    for name in ("wide.webp", "wide.jpg", "wide.gif", "wide.pdf"):
        with pytest.raises(UsageError, match=r"wide\.\w+: \w+ holds \d+ pixels a side, not 70000×1; choose .png"):
            write_picture(tmp_path / name, Image.new("RGB", (70_000, 1)))
    assert list(tmp_path.iterdir()) == []
    for name, side in (("w.webp", 16_383), ("w.jpg", 65_500), ("w.gif", 65_535), ("w.pdf", 65_500), ("w.png", 70_000)):
        write_picture(tmp_path / name, Image.new("RGB", (side, 1)))


def test_samples_of_chosen_images(place: Path, tmp_path: Path) -> None:
    """Pixel for pixel: what is given stays, what is not comes from the model, and the noise is the image's own."""
    ended = call_eval("q3", "--digits", "11,2,2", "--samples-to", tmp_path / "one")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith(f"\nsamples: {tmp_path / 'one'}\n")
    files = {path.name: pixels(path) for path in (tmp_path / "one").iterdir()}
    assert sorted(files) == [f"q3-image{i}-{part}.png" for i in (11, 2) for part in PARTS]
    model = load("q3")
    images, observed = images_of(place), model.split.observed.numpy()
    for i in (11, 2):
        truth = images[i].numpy()
        named = {part: files[f"q3-image{i}-{part}.png"] for part in PARTS}
        assert (named["truth"] == truth).all()
        assert (named["input"][observed] == truth[observed][:, None]).all()
        assert len(np.unique(named["input"][~observed], axis=0)) == 1, "one colour"
        x = model.split.split(images[i] / 255)[0]
        guess = model.split.compose(x, model.baseline_net(x[None]).sigmoid()[0]) * 255
        assert np.abs(named["nn"] - guess.numpy()).max() <= 0.51
        samples = [named[part] for part in PARTS if part.startswith("sample")]
        for sample in samples:
            assert (sample[observed] == truth[observed]).all()
        assert len({sample.tobytes() for sample in samples}) == 10
    assert call_eval("q3", "--digits", "2,5", "--samples-to", tmp_path / "two").code == 0
    for part in PARTS:
        name = f"q3-image2-{part}.png"
        assert np.abs(pixels(tmp_path / "two" / name).astype(int) - files[name]).max() <= 1, "the same once more"


def test_files_that_are_there_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "q1-image4-sample10.png").write_text("mine")
    ended = call_eval("q1", "--digits", "3,4", "--samples-to", tmp_path, "--figure", tmp_path / "f.png")
    assert ended.code == 2
    assert ended.line.startswith(f"{tmp_path}/q1-image4-sample10.png exists already and is left as it is")
    assert [path.name for path in tmp_path.iterdir()] == ["q1-image4-sample10.png"]
    assert call_eval("q1", "--digits", "3", "--samples-to", tmp_path).code == 0, "other names do not matter"
    assert (tmp_path / "q1-image4-sample10.png").read_text() == "mine"


@pytest.mark.parametrize(("height", "width"), [(2, 2), (28, 28), (3, 300), (1500, 1200)])
def test_figure_of_images_of_any_size(height: int, width: int) -> None:
    """Each is large enough to be seen, and none so large that the figure cannot be."""
    from cvae.data.masks import Split

    observed = torch.zeros(height, width, dtype=torch.bool)
    observed[0] = True
    split = Split(observed)
    images = torch.full((4, height, width), 255, dtype=torch.uint8)
    drawn = completions(images, split, torch.zeros(4, split.num_hidden))
    assert 3 * 12 <= drawn.shape[1] <= 3 * 140
    assert 4 * 56 <= drawn.shape[2] <= 4 * 140 + 100


# Terminals and pipes


def in_ascii(text: str) -> str:
    """How it is read where it cannot be shown."""
    for character, reading in {"±": "+-", "−": "-", "–": "-", "─": "-", "×": "x", "…": "...", "β": "\\u03b2"}.items():
        text = text.replace(character, reading)
    assert text.isascii()
    return text


def test_terminal_without_unicode(place: Path, copied: Callable[..., Path]) -> None:
    """Nothing is lost of the table, nor of the lines beside it."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("LC_", "LANG"))}
    processes = {}
    for name, variables in (("β", {"PYTHONIOENCODING": "ascii"}), ("b", {"LC_ALL": "C", "PYTHONUTF8": "0"})):
        run = copied(name=name)
        command = [sys.executable, ROOT / "eval.py", run, "nowhere", *SAMPLES]
        processes[run] = start(command, place, {**environment, **variables})
    for run, process in processes.items():
        expected = call_eval(run, "nowhere")
        assert finish(process) == (3, in_ascii(expected.out), in_ascii(expected.err))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_other_encodings(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoding has is kept; and the streams are as they were afterwards."""
    for script in (evaluation, train):
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as caught:
            script.main(["--help"])
        assert caught.value.code == 0
        assert written.getvalue()
        assert (sys.stdout, stream.errors) == (stream, "strict")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with safe_output():
        print("±−×ŷ\udcff", rendered("json", result("q\udcff")), end="")
    text, _, table = written.getvalue().decode(encoding).partition(" ")
    readings = {"ascii": "+--xy", "cp1252": "±-×y", "cp437": "±-xy", "utf-8": "±−×ŷ"}
    assert text == readings[encoding] + "\\udcff"
    assert json.loads(table)[0]["run"] == "q\udcff"


def test_output_that_nobody_takes(place: Path) -> None:
    """No traceback, and the exit code is that of the evaluation; what cannot be written at all is an error."""
    full = "eval.py: standard output: cannot be written (No space left on device)\n"
    expected = {"| true": (0, ""), ">&-": (0, ""), "nowhere 2>&1 | true": (3, ""), "> /dev/full": (5, full)}
    processes = {}
    for redirection in expected:
        line = f'"{sys.executable}" "{ROOT}/eval.py" q1 --samples 3 --device cpu {redirection}; exit ${{PIPESTATUS[0]}}'
        processes[redirection] = start(["bash", "-c", line], place)
    for redirection, process in processes.items():
        code, _, err = finish(process)
        assert (code, err) == expected[redirection], redirection
