"""`eval.py --realism` and the classifiers that it needs: their command and files, the table in all forms, a picture."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from support.inprocess import TINY, Ended, call, call_eval, call_train
from support.scripts import NAMES, idx_bytes, small_mnist
from support.trainings import fork_two
from torch.nn.functional import cross_entropy

import cvae
import eval as evaluation
from cvae.context import Context
from cvae.data.sources import load_labels, load_test, load_train
from cvae.data.tasks import quadrants
from cvae.model.cvae import NOISE_IMAGES
from cvae.report import classifier, realism
from cvae.report.evaluation import Subject
from cvae.run.folder import RunFolder
from cvae.settings import Settings

COUNTS = {"train": 600, "t10k": 60}
HERE = Context(torch.device("cpu"))
OF_CLASSES = ("validity", "confidence", "log_score", "entropy")
MEASURES = [*OF_CLASSES, "correlation", "energy_score", "mse", "best_mse", "density", "coverage"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, images of MNIST and their labels, and `runs`: q1 and q2, with their classifiers."""
    folder = tmp_path_factory.mktemp("realism")
    small_mnist(folder / "data", *COUNTS.values())
    for part, count in COUNTS.items():
        labels = load_labels(Settings(), "train" if part == "train" else "test")[:count]
        (folder / "data" / NAMES[part][1]).write_bytes(idx_bytes(labels.to(torch.uint8)))
    words = [*TINY, "--data", folder / "data", "--runs", folder / "runs"]
    assert call_train(*words, "--quadrants", "1", "2").code == 0
    ended = train_classifiers(folder / "runs/q1", folder / "runs/q2")
    assert (ended.code, ended.err) == (0, "")
    pattern = r".*/(q\d/\S+): sees (\d+) of 784 pixels; ([\d.]+)% of 100 validation images right, .* nats .*; \d+ s"
    lines = re.findall(pattern, ended.out)
    files = [f"{run}/{name}" for run in ("q1", "q2") for name in (classifier.WHOLE, classifier.X_ONLY)]
    assert [line[:2] for line in lines] == list(zip(files, ("784", "196", "784", "392"), strict=True))
    whole, *x_only = (float(lines[i][2]) for i in (0, 1, 3))
    assert whole > x_only[1] > x_only[0] > 25  # the more is seen, the better
    return folder


@pytest.fixture(autouse=True)
def place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs, where the scripts are called."""
    torch.manual_seed(0)
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture(scope="module")
def found(trained: Path) -> list[dict[str, Any]]:
    """The records of the two runs."""
    ended = call_eval("--runs", trained / "runs", "--realism", "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    records: list[dict[str, Any]] = json.loads(ended.out)
    return records


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "runs/q1", tmp_path / "q1"))


def train_classifiers(*words: str | Path) -> Ended:
    return call(classifier, *words, "--device", "cpu")


def case_of(run: str, limit: int | None = None) -> realism.Case:
    settings = RunFolder(f"runs/{run}").settings
    subject = Subject(Path(f"runs/{run}"), settings, cvae.load(run), load_test(settings), None)
    cases, problems = realism.open_cases({run: subject}, limit, HERE)
    assert problems == []
    return cases[run]


# The classifiers


def test_packaged_classifiers() -> None:
    """They are of MNIST's training images; those that see more are right more often on images that they do not know."""
    _, images, _, record = load_train()
    labels, right = load_labels(Settings(), "validation"), []
    for observed in (torch.ones(28, 28, dtype=torch.bool), quadrants(3), quadrants(2), quadrants(1)):
        judge = classifier.packaged(observed, classifier.training(record, "grey"))
        assert judge is not None
        with torch.no_grad():
            logits = torch.cat([judge(part / 255) for part in images.split(1000)])
        right.append((logits.argmax(1) == labels).float().mean().item())
    assert right == pytest.approx([0.9925, 0.9890, 0.9708, 0.8746], abs=0.00006)  # as docs/realism.md says
    assert classifier.packaged(quadrants(1), classifier.training(record, "binary")) is None
    assert classifier.packaged(~quadrants(1), classifier.training(record, "grey")) is None


def test_classifier_sees_its_mask_alone(place: Path) -> None:
    images, other = torch.rand(2, 5, 28, 28)
    mixed = torch.where(quadrants(1), images, other)
    whole, x_only = classifier.open_judges(place / "runs/q1", HERE.device)
    assert torch.equal(x_only(images), x_only(mixed))
    assert not torch.equal(x_only(images), x_only(other))
    assert not torch.equal(whole(images), whole(mixed))
    for height, width in ((2, 2), (64, 33)):  # of any size
        network = classifier.Classifier(torch.ones(height, width, dtype=torch.bool), 7).eval()
        assert network(torch.rand(3, height, width)).shape == (3, 7)


def test_training_is_the_same_again(copied: Path) -> None:
    before = {path: safetensors.torch.load_file(path) for path in copied.glob("*.safetensors")}
    assert {path.name for path in before} == {classifier.X_ONLY, classifier.WHOLE}
    assert train_classifiers(copied).code == 0
    for path, weights in before.items():
        again = safetensors.torch.load_file(path)
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_black_and_white_images(place: Path, tmp_path: Path) -> None:
    """A classifier of grey levels is none of these."""
    assert call_train(*TINY, "--data", place / "data", "--targets", "binary", "--runs", tmp_path).code == 0
    shutil.copy(place / "runs/q1" / classifier.WHOLE, tmp_path / "q1")
    assert "is of another mask, or of other images or targets" in call_eval(tmp_path, "--realism").line
    assert train_classifiers(tmp_path / "q1").code == 0
    (record,) = json.loads(call_eval(tmp_path, "--realism", "--format", "json").out)
    assert record["realism"]["truth"]["validity"]["mean"] > 0.3


# A run that cannot be judged keeps its likelihoods, and the line says what to do


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged, or no classifier of images"),
        (lambda path: path.write_bytes(b"{}"), "is damaged, or no classifier of images"),
        (lambda path: shutil.copy("runs/q1/classifier.safetensors", path), "is of another mask, or of other images"),
        (
            lambda path: shutil.copy(classifier.PACKAGED / "mnist-q1.safetensors", path),
            "is of another mask, or of other",
        ),
    ],
)
def test_bad_classifier(copied: Path, spoil: Any, problem: str) -> None:
    path = copied / "classifier-x.safetensors"
    spoil(path)
    ended = call_eval(copied, "--realism", "--format", "json")
    assert ended.code == 3
    assert ended.line.startswith(f"{path}: {problem}")
    assert f"; python -m cvae.report.classifier {copied} trains the classifiers of the run" in ended.line
    (record,) = json.loads(ended.out)
    assert record["realism"] is None
    assert record["nn_nll"]["mean"] > 0


def test_images_without_labels_and_other_images(place: Path, copied: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    for part in NAMES:
        (data / NAMES[part][1]).unlink()
    ended = train_classifiers(copied, "--data", data)
    problem = ended.err.removeprefix("cvae.report.classifier: ").rstrip("\n")
    assert (ended.code, problem.startswith(f"{data}: has no labels")) == (3, True)
    assert call_eval(copied, "--realism", "--data", data).line == f"{problem}; its realism is not measured"
    ended = train_classifiers(copied, "--data", "mnist")
    assert ended.code == 3
    assert re.search(r"was begun on \d+ train images, and here are 50000; --data says where its own are", ended.err)


def test_usage() -> None:
    for script, words in (
        (classifier, []), (classifier, ["q1", "--to", "there"]),
        (evaluation, ["q1", "--realism-images", "9"]), (evaluation, ["q1", "--realism-figure", "a.png"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            call(script, *words)
        assert caught.value.code == 2
    assert train_classifiers("nowhere").code == 3
    assert call_eval("q1", "--realism", "--realism-images", "5").line == (
        "runs/q1: 5 test images are too few; density and coverage need 6; its realism is not measured"
    )


# The table


def test_measures_computed_another_way(place: Path, found: list[dict[str, Any]]) -> None:
    """Those that depend on no noise, from whole images and without portions."""
    settings = Settings(data=str(place / "data"))
    images, classes = load_test(settings).images / 255, load_labels(settings, "test")
    for record in found:
        own, model = record["realism"], cvae.load(record["run"])
        assert (own["images"], own["completions"]) == (60, 50)
        whole, x_only = classifier.open_judges(place / "runs" / record["run"], HERE.device)
        logits, right = x_only(images).double(), (whole(images).argmax(-1) == classes).double()
        x, y, *_ = model.task.batch(model.task.rows(images))
        error = (model.baseline_net(x).sigmoid() - y).double()
        for who, name, values in (
            ("x_only", "log_score", cross_entropy(logits, classes, reduction="none")),
            ("x_only", "entropy", torch.distributions.Categorical(logits=logits).entropy()),
            ("x_only", "validity", (logits.argmax(1) == classes).double()),
            ("truth", "validity", right),
            ("nn", "mse", error.square().mean(1)),
            ("nn", "energy_score", error.norm(dim=1)),
        ):
            expected = {"mean": values.mean().item(), "stderr": values.std().item() / 60**0.5}
            assert own[who][name] == pytest.approx(expected, rel=1e-5), (who, name)  # float32, of some hundred terms


def test_measures_that_follow(found: list[dict[str, Any]]) -> None:
    for record in found:
        own = {who: {name: each["mean"] for name, each in record["realism"][who].items()} for who in realism.COLUMNS}
        for who in list(realism.COLUMNS)[:-1]:
            assert list(own[who]) == MEASURES
        assert tuple(own["x_only"]) == OF_CLASSES
        for who in ("nn", "truth"):  # one completion, however often
            assert own[who]["entropy"] == 0
            assert own[who]["correlation"] is None
            assert own[who]["mse"] == own[who]["best_mse"]
        assert own["truth"]["energy_score"] == own["truth"]["mse"] == 0
        assert own["truth"]["density"] == 1
        for who in ("nn_drawn", "cvae", "cvae_drawn"):
            assert own[who]["best_mse"] < own[who]["mse"]
            assert own[who]["entropy"] > 0
        assert own["nn_drawn"]["mse"] > own["nn"]["mse"]  # by the variance of the pixels
        assert own["cvae_drawn"]["mse"] > own["cvae"]["mse"]


def test_forms_have_the_same_numbers(found: list[dict[str, Any]]) -> None:
    words = ("q1", "q2", "--realism")
    lines = list(csv.DictReader(io.StringIO(call_eval(*words, "--format", "csv").out)))
    for form in ("text", "markdown"):
        text = call_eval(*words, "--format", form).out
        for record, mask in zip(found, ("1 quadrant", "2 quadrants"), strict=True):
            assert f"{record['run']} ({mask}), 60 images" in text
            validity = record["realism"]["cvae_drawn"]["validity"]
            assert f"{validity['mean']:.3f} ± {validity['stderr']:.3f}" in text
    for line, record in zip(lines, found, strict=True):
        assert line["run"] == record["run"]
        assert float(line["realism_cvae_log_score_mean"]) == record["realism"]["cvae"]["log_score"]["mean"]
        assert float(line["realism_truth_coverage_mean"]) == record["realism"]["truth"]["coverage"]["mean"]
        assert line["realism_truth_coverage_stderr"] == ""


def test_noise_is_of_the_seed_and_the_place() -> None:
    """The first images are judged as in the whole set; one image again and again has other completions each time."""
    few, whole = (realism.judge("q1", case_of("q1", limit), 0, HERE) for limit in (20, None))
    assert all(torch.equal(values, whole[key][..., :20]) for key, values in few.items())
    case = case_of("q1", 2 * NOISE_IMAGES)
    case = case._replace(images=case.images[:1].expand_as(case.images))
    scores = [realism.judge("q1", case, seed, HERE)["cvae", "energy_score"] for seed in (0, 1)]
    assert len(torch.cat(scores).unique()) == 4 * NOISE_IMAGES


def test_draws_vary_as_their_means_say() -> None:
    """Squared errors of black and white pixels exceed those of their means p by the mean of p (1 − p)."""
    case = case_of("q1")
    judged, task = realism.judge("q1", case, 0, HERE), case.model.task
    means = case.model.guess(task.batch(task.rows(case.images))).sigmoid()
    more = (judged["nn_drawn", "mse"] - judged["nn", "mse"]).mean()
    assert more == pytest.approx((means * (1 - means)).mean().item(), rel=0.01)  # 60 × 50 × 588 draws


def test_two_processes_print_the_same(place: Path, found: list[dict[str, Any]]) -> None:
    words = ("--realism", "--format", "json", "--samples", "3", "--device", "cpu")
    (code, out, err), other = fork_two("eval.py", "q1", *words, cwd=place)
    assert (code, err, other) == (0, "", (0, "", ""))
    (record,) = json.loads(out)
    for who in realism.COLUMNS:
        for name, estimate in found[0]["realism"][who].items():
            for part, value in estimate.items():
                near = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert record["realism"][who][name][part] == near


# The picture


def test_chosen_images_are_ever_more_ambiguous() -> None:
    ambiguity = torch.rand(500, dtype=torch.float64) ** 4
    numbers = realism.chosen(ambiguity)
    shown = ambiguity[numbers]
    assert len(numbers) == 10
    assert torch.equal(shown, shown.sort().values)
    assert (shown[0], shown[-1]) == (ambiguity.min(), ambiguity.max())
    assert (shown.diff() - shown.diff().mean()).abs().max() < 0.1
    assert realism.chosen(torch.zeros(3)) == [0]


def test_pictures_of_several_runs(tmp_path: Path) -> None:
    """The bar of the true class is red, and as high as the share of the class."""
    chart = realism._chart(torch.tensor([0.25, 0.75]), 1, "")
    colours = (torch.tensor(colour)[:, None, None] for colour in (realism.OTHER, realism.TRUE))
    other, red = (int((chart == colour).all(0).any(1)[:72].sum()) for colour in colours)
    assert (other, red) == (15, 45)  # of 60 pixels
    for _ in range(2):  # the second ones replace the first
        ended = call_eval("q1", "q2", "--realism", "--realism-images", "30", "--realism-figure", tmp_path / "a.png")
        assert (ended.code, ended.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-q1.png", "a-q2.png"]
    for name in ("q1", "q2"):
        with Image.open(tmp_path / f"a-{name}.png") as picture:
            assert picture.width > 700
            assert any(colour == realism.TRUE for _, colour in picture.getcolors(1 << 20) or [])
