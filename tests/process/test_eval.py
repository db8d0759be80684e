"""`eval.py`: which runs it evaluates, which it leaves out and with what words, and what it draws.

In this process where the process does not matter: its imports take seconds.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.inprocess import TINY, call, call_eval, call_train
from support.scripts import ROOT, write_data
from support.trainings import ENVIRONMENT, contents, finish, fork_two, start
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._pytree import tree_flatten

import eval as evaluation
from cvae.data.sources import load_test
from cvae.report import export
from cvae.run.load import load
from cvae.settings import Settings

SAMPLES = ["--samples", "3", "--device", "cpu"]  # as call_eval takes them
PARTS = ["input", "nn", *(f"sample{i:02d}" for i in range(1, 11)), "truth"]
pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and `runs`: q1, q2, q3."""
    folder = tmp_path_factory.mktemp("eval")
    random = torch.Generator().manual_seed(0)
    images = (torch.randint(0, 256, (n, 10, 9), dtype=torch.uint8, generator=random) for n in (72, 50))
    words = ["--data", write_data(folder / "data", *images), *TINY]
    assert call_train(*words, "--runs", folder / "runs", "--quadrants", "1", "2", "3").code == 0
    (folder / "runs/nested").mkdir()
    (folder / "runs/nested/q2").symlink_to(folder / "runs/q2")
    return folder


@pytest.fixture(scope="module")
def table(trained: Path) -> list[dict[str, Any]]:
    return records("--runs", trained / "runs")


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes copies of q1 below a folder of its own, to be spoilt."""
    return lambda name="q1": Path(shutil.copytree(place / "runs/q1", tmp_path / "copies" / name))


def records(*words: str | Path) -> list[dict[str, Any]]:
    """The table in JSON, of an evaluation that leaves nothing out."""
    ended = call_eval(*words, "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)  # type: ignore[no-any-return]


def assert_agree(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """To rounding: log-weights of 50 nats in float32 are right to 1e-5, and effective samples go with exp of them."""
    leaves, others = tree_flatten(found), tree_flatten(expected)
    assert leaves[1] == others[1]
    for one, other in zip(leaves[0], others[0], strict=True):
        assert one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other)


def change(run: Path, **settings: Any) -> None:
    """Change settings in a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= settings
    (run / "config.json").write_text(json.dumps(config))


def images_of(place: Path) -> torch.Tensor:
    return load_test(Settings(data=str(place / "data"))).images


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_baseline_is_evaluated_on_all_test_images(place: Path, table: list[dict[str, Any]]) -> None:
    """Its likelihood is computed here once more; the table in text has the numbers of JSON."""
    (record,) = records("q1", "--precision", "fp32")
    model, printed = load("q1"), call_eval().out
    assert printed.startswith(f"IDX files in {place}/data: 50 test images of 10×9 pixels\n\n")
    x, y, *_ = model.task.batch(model.task.rows(images_of(place)))
    nll = binary_cross_entropy_with_logits(model.baseline_net(x), y, reduction="none").sum(1).double()
    assert record["nn_nll"]["mean"] == pytest.approx(nll.mean().item(), rel=1e-6)  # sums of 70 terms in float32
    assert record["nn_nll"]["stderr"] == pytest.approx(nll.std().item() / 50**0.5, rel=1e-4)
    (line,) = (line for line in printed.splitlines() if line.startswith("CVAE (−ELBO)"))
    entries = [record["cvae_neg_elbo"] for record in table]
    assert re.findall(r"(\S+) ± (\S+)", line) == [(f"{each['mean']:.2f}", f"{each['stderr']:.2f}") for each in entries]


def test_samples_precision_and_seed_change_what_depends_on_them_alone() -> None:
    """bfloat16 is within what eight bits of mantissa make of float32, and the table says which it was."""
    words: tuple[tuple[str, ...], ...] = ("fp32",), ("bf16",), ("fp32", "--seed", "1")
    (wide,), (half,), (other,) = (records("q1", "--precision", *each) for each in words)
    more = ("--samples", "40", "3", "40", "--format", "json", "--device", "cpu")
    (several,) = json.loads(call(evaluation, "q1", "--precision", "fp32", *more).out)
    assert (several["samples"], list(several["by_samples"])) == (40, ["3", "40"])
    assert_agree([several["by_samples"]["3"]], [wide["by_samples"]["3"]])
    assert several["cvae_is_nll"]["mean"] < wide["cvae_is_nll"]["mean"], "the bound gets tighter"
    assert several["gap"] == pytest.approx(several["nn_nll"]["mean"] - several["cvae_is_nll"]["mean"], abs=1e-9)
    assert 1 <= wide["ess"]["median"] <= 3 < several["ess"]["median"] <= 40
    assert (wide["precision"], half["precision"]) == ("fp32", "bf16")
    for key in ("nn_nll", "cvae_neg_elbo", "cvae_mc_nll", "cvae_is_nll"):
        assert half[key]["mean"] == pytest.approx(wide[key]["mean"], rel=1e-3)
    assert half["cvae_is_nll"] != wide["cvae_is_nll"]
    for name in ("fp32", "bf16"):
        assert ("in bfloat16" in call_eval("q1", "--precision", name).out) == (name == "bf16")
    assert other["nn_nll"] == wide["nn_nll"], "no noise is in it"
    distance = abs(other["cvae_is_nll"]["mean"] - wide["cvae_is_nll"]["mean"])
    assert 0 < distance < 6 * wide["cvae_is_nll"]["stderr"]


def test_against(place: Path, copied: Callable[..., Path], tmp_path: Path, table: list[dict[str, Any]]) -> None:
    """The named run is in the table, first if nobody named it; a line says of other masks and images that they are."""
    copy, other, negatives = copied("copy"), copied("other"), 255 - images_of(place)
    change(other, data=str(write_data(tmp_path / "negative", negatives.repeat(2, 1, 1), negatives)))
    config = json.loads((other / "config.json").read_text()) | {"images": {"height": 10, "width": 9}}
    (other / "config.json").write_text(json.dumps(config))
    ended = call_eval(copy, other, "q2", "--against", "q1", "--format", "json")
    line = "eval.py: {}: cannot be compared with runs/q1: the test images or masks differ"
    assert (ended.code, ended.err.splitlines()) == (3, [line.format(name) for name in (other, "runs/q2")])
    found = json.loads(ended.out)
    assert [(record["run"], record["against"] and record["against"]["run"]) for record in found] == [
        ("q1", None), ("copy", "q1"), ("other", None), ("q2", None)
    ]  # fmt: skip
    assert found[0] == table[0]
    assert found[1]["against"]["by_samples"]["3"]["cvae_mc_nll"] == {"mean": 0.0, "stderr": 0.0}
    text = call_eval(copy, "q1", "--against", place / "runs/q1").out
    assert re.search(r"^minus q1, below zero is better +copy \(1 quadrant\)$", text, re.MULTILINE)
    ended = call_eval("q1", "--against", "nowhere")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.splitlines()[1] == "eval.py: --against nowhere: cannot be evaluated"


def test_runs_by_name_and_folder(place: Path, table: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, in the order in which they are named first; the images that runs share are read once."""
    read: list[Settings] = []
    monkeypatch.setattr(evaluation, "load_test", lambda s: read.append(s) or load_test(s))
    for words, expected in {
        "": "q1 q2 q3",
        "q3 runs/q1": "q3 q1",
        "q3 --seed 0 q1 --runs q2 --runs runs/q1": "q3 q1 q2",
        f"q2 runs/q2 {place}/runs/../runs/q2 nested/q2": "q2",
        "q3 runs": "q3 q1 q2",
    }.items():
        read.clear()
        found = records(*words.split())
        assert found == [record for name in expected.split() for record in table if record["run"] == name], words
        assert len(read) == 1


def test_runs_that_cannot_be_evaluated_are_left_out(
    place: Path, copied: Callable[..., Path], tmp_path: Path, table: list[dict[str, Any]]
) -> None:
    """Each with a line that says why; two processes leave out the same, and print what one does."""
    folder = copied("good").parent
    best = copied("damaged") / "best.pt"
    best.write_bytes(best.read_bytes()[:-100])
    for name, file in (("no-weights", "best.pt"), ("no-run", "config.json"), ("begun", "summary.json")):
        (copied(name) / file).unlink()
    change(copied("later"), shades=2)
    config = copied("no-size") / "config.json"
    config.write_text(config.read_text().replace('"height": ', '"height": "high", "was": '))
    change(copied("no-data"), data=str(tmp_path / "gone"))
    flipped = images_of(place).flip(0)
    change(copied("other-data"), data=str(write_data(tmp_path / "flipped", flipped.repeat(2, 1, 1), flipped)))
    reasons = {
        "begun": ": is not finished; train.py --resume goes on with it, --unfinished",
        "damaged": "/best.pt: ",
        "later": "/config.json: this version knows no setting 'shades'",
        "no-data": f": {tmp_path}/gone: ",
        "no-size": "/config.json: does not describe a run",
        "no-weights": "/best.pt: cannot be read",
        "other-data": ": was begun on other test images of the same number and size",
    }
    before = contents(folder)
    ended = call_eval(folder, "--format", "json")
    two, second = fork_two("eval.py", folder, "--format", "json", *SAMPLES, cwd=place)
    assert (ended.code, two[0], second) == (3, 3, (3, "", ""))
    for err in (ended.err, two[2]):
        for line, (name, reason) in zip(err.splitlines(), reasons.items(), strict=True):
            assert line.startswith(f"eval.py: {folder / name}{reason}"), line
    assert json.loads(ended.out) == [{**table[0], "run": "good"}]
    assert_agree(json.loads(two[1]), json.loads(ended.out))
    assert contents(folder) == before


def test_no_run_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call_eval()
    assert (ended.code, ended.out) == (3, "")
    assert ended.line == "runs: there is no such folder; python train.py trains a run"
    (tmp_path / "runs/.half-made").mkdir(parents=True)
    (tmp_path / "runs/.half-made/config.json").touch()
    assert call_eval().line == "runs: has no run in it; python train.py trains a run"


def test_unfinished_runs_and_published_weights(place: Path, table: list[dict[str, Any]]) -> None:
    """Both have no summary; published weights do not say where the images are on this machine."""
    shutil.copytree("runs/q1", "begun/q1", ignore=shutil.ignore_patterns("summary.json"))
    assert records("begun", "--unfinished") == [{**table[0], "unfinished_at_epoch": 2}]
    assert "  q1 (1 quadrant, epoch 2 so far)\n" in call_eval("begun", "--unfinished").out
    assert call(export, "q1", "--to", "hub-folder", "published").code == 0
    before = contents(place / "published")
    assert records("published", "--data", "data") == [{**table[0], "run": "published"}]
    assert contents(place / "published") == before


def test_nothing_is_said_of_an_untrained_recognition_network(copied: Callable[..., Path]) -> None:
    run = copied()
    change(run, objective="gsnn")
    q1, record = records("q1", run, "--against", "q1")
    assert record["kl"] is record["active_units"] is record["gap"] is record["gap_stderr"] is None
    assert record["ess"] == {"median": None, "below_5": None}
    for entries in (record, record["against"]):
        assert entries["cvae_is_nll"] == entries["cvae_neg_elbo"] == {"mean": None, "stderr": None}
    assert [record[key] for key in ("nn_nll", "cvae_mc_nll")] == [q1[key] for key in ("nn_nll", "cvae_mc_nll")]
    lines = call_eval(run).out.splitlines()[4:11]
    assert [line.endswith(" –") for line in lines] == [False, True, False, True, True, True, True]


def test_figures_and_samples_of_chosen_images(place: Path, copied: Callable[..., Path], tmp_path: Path) -> None:
    """One figure and one folder for each run; of runs whose names are alike, under their folders' names too.

    Each image once; what is given stays, and the noise is the image's own, whichever others are drawn beside it.
    """
    ended = call_eval(
        "q1", copied(), "q3", "--figure", tmp_path / "f.png", "--samples-to", tmp_path, "--digits", "11,2,2"
    )
    assert (ended.code, len(re.findall("^(figure|samples): ", ended.out, re.MULTILINE))) == (0, 6)
    assert {path.name for path in tmp_path.glob("*q?*")} == {
        "f-copies-q1.png", "f-runs-q1.png", "f-q3.png", "copies-q1", "runs-q1", "q3"
    }  # fmt: skip
    assert len(np.unique(pixels(tmp_path / "f-q3.png").reshape(-1, 3), axis=0)) > 50, "there are many greys"
    files = {path.name: pixels(path) for path in (tmp_path / "q3").iterdir()}
    assert sorted(files) == [f"q3-image{i}-{part}.png" for i in (11, 2) for part in PARTS]
    image, observed = images_of(place)[2].numpy(), load("q3").task.observed.numpy()
    parts = {part: files[f"q3-image2-{part}.png"] for part in PARTS}
    samples = [sample for part, sample in parts.items() if part.startswith("sample")]
    assert (parts["truth"] == image).all()
    assert all((sample[observed] == image[observed]).all() for sample in samples)
    assert len({sample.tobytes() for sample in samples}) == 10
    assert call_eval("q3", "--digits", "2,5", "--samples-to", tmp_path / "more").code == 0
    for part, expected in parts.items():
        again = pixels(tmp_path / f"more/q3-image2-{part}.png")
        assert np.abs(again.astype(int) - expected).max() <= 1, "to rounding: products of other numbers of rows"


def test_pictures_that_cannot_be_drawn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before the evaluation is spent, and nothing is written."""
    (place / "mine").mkdir()
    (place / "mine/q1-image4-sample10.png").write_text("mine")
    before = contents(place)
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("it evaluates"))
    for words, code, reason in (
        ("--samples-to runs/q1/config.json", 5, "runs/q1/config.json: cannot be made"),
        ("--figure x.png --digits 3,50", 2, "--digits: the test images of runs/q1 are numbered 0 to 49"),
        ("--samples-to x --digits=-1,3", 2, "--digits: the test images of runs/q1 are numbered 0 to 49"),
        ("--samples-to mine --figure x.png", 2, "mine/q1-image4-sample10.png exists already and is left"),
    ):
        ended = call_eval("q1", *words.split())
        assert (ended.code, ended.line[: len(reason)]) == (code, reason)
    assert contents(place) == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ("--digits 3", "--digits chooses test images for --figure and --samples-to"),
        ("--samples 3 0", "--samples and --realism-images have to be at least 1"),
        ("--samples 100 q1", "argument --samples: invalid int value: 'q1'"),
        ("--realism-images 3", "--realism-images and --realism-figure need --realism"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluation.main(words.split())
        assert f": error: {reason}" in capsys.readouterr().err.splitlines()[-1]
    ended = call_eval("--figure", "f.xyz")
    assert (ended.code, ended.line[:32]) == (2, "f.xyz: pictures are written as .")


def test_as_a_user_starts_it(place: Path) -> None:
    """In UTF-8 whatever the locale is, and with a full disk: no traceback, and the right exit code."""
    expected = call_eval("q1", "nowhere")
    full = "eval.py: standard output: cannot be written (No space left on device)\n"
    ends = {"nowhere": (3, expected.out, expected.err), "> /dev/full": (5, "", full)}
    processes = {}
    for words in ends:
        line = f'"{sys.executable}" "{ROOT}/eval.py" q1 {" ".join(SAMPLES)} --runs q1 {words}'
        processes[words] = start(["bash", "-c", line], place, {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    for words, process in processes.items():
        assert finish(process) == ends[words], words
