"""`eval.py --realism` and the classifiers that it needs: their command and files, the table in all forms, a picture."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from prdc import compute_prdc
from support.inprocess import TINY, Ended, call, call_eval, call_train
from support.scripts import NAMES, idx_bytes, small_mnist
from support.trainings import fork_two
from torch.nn.functional import cross_entropy

import cvae
import eval as evaluation
from cvae.context import Context
from cvae.data.sources import load_labels, load_test, load_train
from cvae.data.tasks import quadrants
from cvae.report import classifier, realism
from cvae.report.evaluation import Subject
from cvae.report.figures import as_tensor
from cvae.run.folder import RunFolder
from cvae.settings import Settings

COUNTS = {"train": 600, "t10k": 60}
HERE = Context(torch.device("cpu"))
OF_CLASSES = ("validity", "confidence", "log_score", "entropy")
MEASURES = [*OF_CLASSES, "correlation", "energy_score", "mse", "best_mse", "density", "coverage"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, images of MNIST and their labels, and `runs/q1` with its classifiers."""
    folder = tmp_path_factory.mktemp("realism")
    small_mnist(folder / "data", *COUNTS.values())
    for part, count in COUNTS.items():
        labels = load_labels(Settings(), "train" if part == "train" else "test")[:count]
        (folder / "data" / NAMES[part][1]).write_bytes(idx_bytes(labels.to(torch.uint8)))
    assert call_train(*TINY, "--data", folder / "data", "--runs", folder / "runs").code == 0
    ended = train_classifiers(folder / "runs/q1")
    assert (ended.code, ended.err) == (0, "")
    pattern = r".*/(\S+): sees (\d+) of 784 pixels; ([\d.]+)% of 100 validation images right, .* nats .*; \d+ s"
    whole, x_only = re.findall(pattern, ended.out)
    assert (whole[:2], x_only[:2]) == ((classifier.WHOLE, "784"), (classifier.X_ONLY, "196"))
    assert float(whole[2]) > float(x_only[2]) > 25  # of ten classes
    return folder


@pytest.fixture(autouse=True)
def place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run, where the scripts are called."""
    torch.manual_seed(0)
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "runs/q1", tmp_path / "copy"))


@pytest.fixture(scope="module")
def record(trained: Path) -> dict[str, Any]:
    """What JSON says of the run's realism."""
    return recorded(call_eval(trained / "runs", "--realism", "--format", "json"))


@pytest.fixture
def case(place: Path) -> realism.Case:
    settings = RunFolder("runs/q1").settings
    subject = Subject(Path("runs/q1"), settings, cvae.load("q1"), load_test(settings), None)
    cases, problems = realism.open_cases({"q1": subject}, None, HERE)
    assert problems == []
    return cases["q1"]


def recorded(ended: Ended) -> dict[str, Any]:
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)[0]["realism"]  # type: ignore[no-any-return]


def train_classifiers(*words: str | Path) -> Ended:
    return call(classifier, *words, "--device", "cpu")


# The classifiers


def test_packaged_classifiers() -> None:
    """They are of MNIST's training images, and as good on its validation images as docs/realism.md says."""
    _, images, _, record = load_train()
    labels, right = load_labels(Settings(), "validation"), []
    for observed in (torch.ones(28, 28, dtype=torch.bool), quadrants(3), quadrants(2), quadrants(1)):
        judge = classifier.packaged(observed, classifier.training(record, "grey"))
        assert judge is not None
        with torch.no_grad():
            logits = torch.cat([judge(part / 255) for part in images.split(1000)])
        right.append((logits.argmax(1) == labels).float().mean().item())
    assert right == pytest.approx([0.9925, 0.9890, 0.9708, 0.8746], abs=0.0002)  # two images of 10,000 on the fence
    assert classifier.packaged(quadrants(1), classifier.training(record, "binary")) is None
    assert classifier.packaged(~quadrants(1), classifier.training(record, "grey")) is None


def test_classifier_sees_its_mask_alone(case: realism.Case) -> None:
    images, other = torch.rand(2, 5, 28, 28)
    mixed = torch.where(quadrants(1), images, other)
    assert torch.equal(case.x_only(images), case.x_only(mixed))
    assert not torch.equal(case.x_only(images), case.x_only(other))
    assert not torch.equal(case.whole(images), case.whole(mixed))
    for height, width in ((2, 2), (64, 33)):  # of any size
        network = classifier.Classifier(torch.ones(height, width, dtype=torch.bool), 7).eval()
        assert network(torch.rand(3, height, width)).shape == (3, 7)


def test_black_and_white_images(place: Path, tmp_path: Path) -> None:
    """A classifier of grey levels is none of these."""
    assert call_train(*TINY, "--data", place / "data", "--targets", "binary", "--runs", tmp_path).code == 0
    shutil.copy(place / "runs/q1" / classifier.WHOLE, tmp_path / "q1")
    assert "is of another mask, or of other images or targets" in call_eval(tmp_path, "--realism").line
    assert train_classifiers(tmp_path / "q1").code == 0
    record = recorded(call_eval(tmp_path, "--realism", "--format", "json"))
    assert record["truth"]["validity"]["mean"] > 0.3


# A run that cannot be judged keeps its likelihoods, and the line says what to do


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "is missing or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is missing or damaged"),
        (lambda path: shutil.copy("runs/q1/classifier.safetensors", path), "is of another mask"),
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


def test_measures_computed_another_way(record: dict[str, Any], case: realism.Case) -> None:
    """From the public functions, with the noise of each ten images, which comes from the seed and their place."""
    model, classes, images = case.model, case.classes, case.images / 255
    parts = [(part, HERE.generator(0, "realism", 10 * i)) for i, part in enumerate(images.split(10))]
    made = torch.cat([model.complete(part, 50, random) for part, random in parts], dim=1)
    y, means = (model.task.asked(pictures).double() for pictures in (images, made))
    guess = model.guess(model.task.batch(model.task.rows(images))).sigmoid().double()
    logits, of_classes = case.x_only(images).double(), case.whole(made.flatten(0, 1)).argmax(1).view(50, 60)
    for who, name, values in (
        ("x_only", "log_score", cross_entropy(logits, classes, reduction="none")),
        ("x_only", "entropy", torch.distributions.Categorical(logits=logits).entropy()),
        ("x_only", "validity", (logits.argmax(1) == classes).double()),
        ("truth", "validity", (case.whole(images).argmax(1) == classes).double()),
        ("nn", "mse", (guess - y).square().mean(1)),
        ("nn", "energy_score", (guess - y).norm(dim=1)),
        ("cvae", "validity", (of_classes == classes).double().mean(0)),
        ("cvae", "best_mse", (means - y).square().mean(2).amin(0)),
    ):
        expected = {"mean": values.mean().item(), "stderr": values.std().item() / 60**0.5}
        assert record[who][name] == pytest.approx(expected, rel=1e-5), (who, name)  # float32, of some hundred terms
    truth, first = case.whole.features(images), case.whole.features(made[0])
    torch.testing.assert_close(realism.judge("q1", case, 0, HERE)["cvae", "features"].T, first)
    expected = compute_prdc(truth.numpy(), first.numpy(), 5)
    for name in ("density", "coverage"):
        assert record["cvae"][name] == {"mean": pytest.approx(expected[name], abs=1 / 60), "stderr": None}
    # Squared errors of black and white pixels exceed those of their means p by p (1 − p): of 60 × 50 × 588 draws.
    for who, p in (("nn", guess), ("cvae", means)):
        more = record[f"{who}_drawn"]["mse"]["mean"] - record[who]["mse"]["mean"]
        assert more == pytest.approx((p * (1 - p)).mean().item(), rel=0.01)


def test_measures_that_follow(record: dict[str, Any]) -> None:
    assert (record["images"], record["completions"]) == (60, 50)
    means = {who: {name: parts["mean"] for name, parts in record[who].items()} for who in realism.COLUMNS}
    assert all(list(own) == (list(OF_CLASSES) if who == "x_only" else MEASURES) for who, own in means.items())
    for who in ("nn", "truth"):  # one completion, however often
        assert (means[who]["entropy"], means[who]["correlation"]) == (0, None)
        assert means[who]["mse"] == means[who]["best_mse"]
    assert (means["truth"]["energy_score"], means["truth"]["mse"], means["truth"]["density"]) == (0, 0, 1)


def test_forms_have_the_same_numbers(record: dict[str, Any]) -> None:
    (line,) = csv.DictReader(io.StringIO(call_eval("q1", "--realism", "--format", "csv").out))
    assert float(line["realism_cvae_log_score_mean"]) == record["cvae"]["log_score"]["mean"]
    assert line["realism_truth_coverage_stderr"] == ""
    for form in ("text", "markdown"):
        text = call_eval("q1", "--realism", "--format", form).out
        assert "q1 (1 quadrant), 60 images" in text
        for who in ("nn", "cvae_drawn"):
            validity = record[who]["validity"]
            assert f"{validity['mean']:.3f} ± {validity['stderr']:.3f}" in text


def test_noise_is_of_the_seed_and_the_place(case: realism.Case) -> None:
    """The first images are judged as in the whole set; one image again and again has other completions each time."""
    few = realism.judge("q1", case._replace(images=case.images[:20], classes=case.classes[:20]), 0, HERE)
    whole = realism.judge("q1", case, 0, HERE)
    assert all(torch.equal(values, whole[key][..., :20]) for key, values in few.items())
    case = case._replace(images=case.images[:1].expand(20, -1, -1))
    scores = [realism.judge("q1", case, seed, HERE)["cvae", "energy_score"] for seed in (0, 1)]
    assert len(torch.cat(scores).unique()) == 40


def test_two_processes_print_the_same(place: Path, record: dict[str, Any]) -> None:
    words = ("--realism", "--format", "json", "--samples", "3", "--device", "cpu")
    (code, out, err), other = fork_two("eval.py", "q1", *words, cwd=place)
    assert (code, err, other) == (0, "", (0, "", ""))
    for who in realism.COLUMNS:
        for name, parts in record[who].items():
            for part, value in parts.items():
                near = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert json.loads(out)[0]["realism"][who][name][part] == near


# The picture


def test_chosen_images_are_ever_more_ambiguous() -> None:
    ambiguity = torch.rand(500, dtype=torch.float64) ** 4
    shown = ambiguity[realism.chosen(ambiguity)]
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == (ambiguity.min(), ambiguity.max())
    assert (shown.diff() - shown.diff().mean()).abs().max() < 0.1
    assert realism.chosen(torch.zeros(3)) == [0]


def test_charts(case: realism.Case) -> None:
    """The bar of the true class is red, and as high as its share; each row of charts is of what its label says."""
    chart = realism._chart(torch.tensor([0.25, 0.75]), 1, "")
    colours = (torch.tensor(colour)[:, None, None] for colour in (realism.OTHER, realism.TRUE))
    assert [int((chart == colour).all(0).any(1)[:72].sum()) for colour in colours] == [15, 45]  # of 60 pixels
    ambiguity = torch.rand(60)
    drawn = as_tensor(realism.draw(case, ambiguity, 0, HERE))
    for i, number in enumerate(numbers := realism.chosen(ambiguity)):
        image, true, random = (
            case.images[number],
            int(case.classes[number]),
            HERE.generator(0, "realism figure", number),
        )
        came = case.whole(case.model.complete(image, 50, random)[:, 0]).argmax(1).bincount(minlength=10) / 50
        charts = (
            realism._chart(came, true, ""),
            realism._chart(case.x_only(image[None] / 255)[0].softmax(0), true, f"{ambiguity[number]:.2f}"),
        )
        column = drawn[..., drawn.shape[-1] - 88 * (len(numbers) - i) :][..., :84]
        assert torch.equal(column[:, -88:-4], charts[0])
        assert torch.equal(column[:, 4 + 2 * 88 :][:, :84], charts[1])


def test_pictures_of_several_runs(copied: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second ones replace the first
        words = ("--realism", "--realism-images", "10", "--realism-figure", tmp_path / "a.png")
        assert call_eval("q1", copied, *words)[::2] == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"a-q1.png", "a-copy.png", "copy"}
