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

from cvae.context import Processes
from cvae.data.images import ImageSet
from cvae.data.masks import quadrants
from cvae.data.sources import load_labels, load_test, load_train
from cvae.model.classifier import Classifier
from cvae.model.likelihood import IMAGES_AT_ONCE, noise
from cvae.report import classifier, judges, realism, realism_figure
from cvae.run.load import load
from cvae.run.weights_file import read_weights, with_digest
from cvae.settings import Settings

COUNTS = {"train": 600, "t10k": 60}
WHOSE = ["nn", "nn_drawn", "cvae", "cvae_drawn", "truth", "x_only"]
COMMAND = "python -m cvae.report.classifier"
pytestmark = pytest.mark.usefixtures("place")


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
    pattern = (
        r".*/(q\d)/(\S+): sees (\d+) of 784 pixels; ([\d.]+)% of 100 validation images right, [\d.]+ nats .*; \d+ s"
    )
    lines = [re.fullmatch(pattern, line) for line in ended.out.splitlines()]
    assert [line and line.group(1, 2, 3) for line in lines] == [
        ("q1", judges.WHOLE, "784"), ("q1", judges.X_ONLY, "196"),
        ("q2", judges.WHOLE, "784"), ("q2", judges.X_ONLY, "392"),
    ]  # fmt: skip
    right = [float(line[4]) for line in lines if line]
    assert right[0] == right[2] > right[3] > right[1] > 25  # the more is seen, the better
    return folder


@pytest.fixture(scope="module")
def found(trained: Path) -> list[dict[str, Any]]:
    """What JSON has of the two runs."""
    ended = call_eval("--runs", trained / "runs", "--realism", "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    records: list[dict[str, Any]] = json.loads(ended.out)
    return records


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """A copy of q1, to be spoilt."""
    return Path(shutil.copytree(place / "runs/q1", tmp_path / "q1"))


def train_classifiers(*words: str | Path) -> Ended:
    return call(classifier, *words, "--device", "cpu")


def settings(place: Path) -> Settings:
    return Settings(data=str(place / "data"))


# The classifiers


def test_packaged_classifiers() -> None:
    """They are of MNIST's training images; that of whole images is right on 99% of those that it has not seen."""
    images, of = load_train(), load_labels(Settings(), "validation")
    assert sum(path.stat().st_size for path in judges.PACKAGED.iterdir()) <= 2_000_000
    right = []
    for observed in (torch.ones(28, 28, dtype=torch.bool), quadrants(3), quadrants(2), quadrants(1)):
        (found,) = judges.packaged(observed, judges.training(images.record, Settings()))
        right.append(classifier.examine(found, images.validation, of)[0])
    assert right == sorted(right, reverse=True)
    assert right[0] > 0.99
    assert right[-1] > 0.86
    assert not list(judges.packaged(quadrants(1), judges.training(images.record, Settings(targets="binary"))))
    assert not list(judges.packaged(~quadrants(1), judges.training(images.record, Settings())))


def test_file_opens_without_this_package(place: Path) -> None:
    state = safetensors.torch.load_file(place / "runs/q2/classifier-x.safetensors")
    assert torch.equal(state["observed"], load("q2").split.observed)
    assert state["last.bias"].shape == (10,)


def test_classifier_sees_its_mask_alone(place: Path) -> None:
    torch.manual_seed(0)
    images, other, split = *torch.rand(2, 5, 28, 28), load("q1").split
    mixed = torch.where(split.observed, images, other)
    found = judges.open_judges(place / "runs/q1", settings(place), split, torch.device("cpu"))
    assert torch.equal(found.x_only(images), found.x_only(mixed))
    assert not torch.equal(found.x_only(images), found.x_only(other))
    assert not torch.equal(found.whole(images), found.whole(mixed))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 4), (64, 33)])
def test_classifier_of_any_size(height: int, width: int) -> None:
    network = Classifier(torch.ones(height, width, dtype=torch.bool), 7).eval()
    images = torch.rand(3, height, width)
    assert network(images).shape == (3, 7)
    assert torch.equal(network.classify(network.features(images)), network(images))


def test_training_is_the_same_again(copied: Path) -> None:
    before = {path.name: read_weights(path) for path in copied.glob("*.safetensors")}
    assert set(before) == {judges.WHOLE, judges.X_ONLY}
    assert train_classifiers(copied).code == 0
    for name, (metadata, weights) in before.items():
        again = read_weights(copied / name)
        assert again[0] == metadata
        assert all(torch.equal(again[1][key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("targets", ["binary", "binary-fixed"])
def test_black_and_white_images(place: Path, tmp_path: Path, targets: str) -> None:
    """A classifier of grey levels is none of these."""
    words = [*TINY, "--data", place / "data", "--targets", targets, "--runs", tmp_path]
    assert call_train(*words).code == 0
    shutil.copy(place / "runs/q1" / judges.WHOLE, tmp_path / "q1")
    assert "is of other images or targets" in call_eval(tmp_path, "--realism").line
    assert train_classifiers(tmp_path / "q1").code == 0
    ended = call_eval(tmp_path, "--realism", "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    (record,) = json.loads(ended.out)
    assert record["realism"]["truth"]["validity"]["mean"] > 0.3


# A run that cannot be judged keeps its likelihoods, and the line says what to do


def change(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + 1 or None] = value
    path.write_bytes(content)


def write_other(path: Path) -> None:
    """Weights of the right training, and of another network."""
    metadata, _ = read_weights(path)
    path.write_bytes(with_digest({"observed": load("q1").split.observed, "last.bias": torch.zeros(10)}, metadata))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "cannot be read (No such file or directory)"),
        (lambda path: change(path, -1, b""), "is damaged, or no weights of this program"),
        (lambda path: change(path, -9000, b"\x41"), "is damaged, or no weights of this program"),
        (lambda path: path.write_bytes(b"{}"), "is damaged, or no weights of this program"),
        (lambda path: shutil.copy(f"runs/q2/{judges.X_ONLY}", path), "is of another mask"),
        (lambda path: shutil.copy(judges.PACKAGED / "mnist-q1.safetensors", path), "is of other images or targets"),
        (write_other, "does not hold the weights of a classifier of images"),
    ],
)
def test_bad_classifier(copied: Path, spoil: Any, problem: str) -> None:
    path = copied / "classifier-x.safetensors"
    spoil(path)
    ended = call_eval(copied, "--realism", "--format", "json")
    assert ended.code == 3
    assert ended.line.startswith(f"{path}: {problem}")
    assert f"; {COMMAND} {copied} trains the classifiers of the run" in ended.line
    (record,) = json.loads(ended.out)
    assert record["realism"] is None
    assert record["nn_nll"]["mean"] > 0


def test_images_without_labels(place: Path, copied: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    for part in NAMES:
        (data / NAMES[part][1]).unlink()
    problem = f"{data}: has no labels, by which images are classified; MNIST and IDX files can have them"
    assert train_classifiers(copied, "--data", data).err == f"cvae.report.classifier: {problem}\n"
    ended = call_eval(copied, "--realism", "--data", data)
    assert (ended.code, ended.line) == (3, f"{problem}; its realism is not measured")


def test_other_images(copied: Path) -> None:
    ended = train_classifiers(copied, "--data", "mnist")
    assert ended.code == 3
    assert re.search(r"was begun on \d+ train images, and here are 50000; --data says where its own are", ended.err)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "name runs, or with --to the folder"),
        (["q1", "--to", "there.safetensors"], "name runs, or with --to the folder"),
    ],
)
def test_usage_of_the_command(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        classifier.main(words)
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err
    assert train_classifiers("nowhere").code == 3


@pytest.mark.parametrize("words", [["--realism-images", "9"], ["--realism-figure", "a.png"]])
def test_usage_of_eval(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call_eval("q1", *words)
    assert caught.value.code == 2
    assert call_eval("q1", "--realism", "--realism-images", "5").line == (
        "runs/q1: 5 test images are too few; density and coverage need 6; its realism is not measured"
    )


# The table


def test_measures_computed_another_way(place: Path, found: list[dict[str, Any]]) -> None:
    """Those that depend on no noise, from whole images and without portions."""
    images, classes = load_test(settings(place)).images / 255, load_labels(settings(place), "test")
    for record in found:
        own, model = record["realism"], load(record["run"])
        assert (own["images"], own["completions"]) == (60, 50)
        judge = judges.open_judges(place / "runs" / record["run"], settings(place), model.split, torch.device("cpu"))
        with torch.no_grad():
            probabilities = judge.x_only(images).double().softmax(-1)
            right = (judge.whole(images).argmax(-1) == classes).double()
            x, y = model.split.split(images)
            error = (model.baseline_net(x).sigmoid() - y).double()
        means = {key: own["x_only"][key]["mean"] for key in realism.OF_CLASSES}
        assert means["log_score"] == pytest.approx(-probabilities[range(60), classes].log().mean().item(), rel=1e-5)
        assert means["entropy"] == pytest.approx(-(probabilities * probabilities.log()).sum(1).mean().item(), rel=1e-5)
        assert means["validity"] == pytest.approx((probabilities.argmax(1) == classes).double().mean().item())
        assert own["truth"]["validity"]["mean"] == pytest.approx(right.mean().item(), rel=1e-9)
        assert own["truth"]["validity"]["stderr"] == pytest.approx((right.std() / 60**0.5).item(), rel=1e-9)
        assert own["nn"]["mse"]["mean"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert own["nn"]["energy_score"]["mean"] == pytest.approx(error.norm(dim=1).mean().item(), rel=1e-5)


def test_measures_that_follow(found: list[dict[str, Any]]) -> None:
    for record in found:
        own = {who: {name: each["mean"] for name, each in record["realism"][who].items()} for who in WHOSE}
        for who in ("nn", "truth"):  # one completion, however often
            assert own[who]["entropy"] == 0
            assert own[who]["correlation"] is None
            assert own[who]["mse"] == own[who]["best_mse"]
        assert own["truth"]["energy_score"] == own["truth"]["mse"] == 0
        assert own["truth"]["density"] == 1
        for who in ("nn_drawn", "cvae", "cvae_drawn"):
            assert own[who]["best_mse"] < own[who]["mse"]
        assert own["nn_drawn"]["mse"] > own["nn"]["mse"]
        assert own["cvae_drawn"]["mse"] > own["cvae"]["mse"]
        assert set(own["x_only"]) == set(realism.OF_CLASSES)


def test_forms_have_the_same_numbers(found: list[dict[str, Any]]) -> None:
    words = ("q1", "q2", "--realism")
    ended = call_eval(*words, "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(ended.out)))
    for form in ("text", "markdown"):
        text = call_eval(*words, "--format", form).out
        for name, mask in (("q1", "1 quadrant"), ("q2", "2 quadrants")):
            assert f"{name} ({mask}), 60 images" in text
        for record in found:
            validity = record["realism"]["cvae_drawn"]["validity"]
            assert f"{validity['mean']:.3f} ± {validity['stderr']:.3f}" in text
    for line, record in zip(lines, found, strict=True):
        assert line["run"] == record["run"]
        assert float(line["nn_nll_mean"]) == record["nn_nll"]["mean"]
        assert float(line["realism_cvae_log_score_mean"]) == record["realism"]["cvae"]["log_score"]["mean"]
        assert float(line["realism_truth_coverage_mean"]) == record["realism"]["truth"]["coverage"]["mean"]
        assert line["realism_truth_coverage_stderr"] == ""


def test_first_images_are_judged_as_in_the_whole_set(place: Path) -> None:
    [subject] = [subject_of(place)]
    few, all_of_them = (
        realism.judge("q1", realism.open_case(subject, limit), 0, torch.device("cpu"), Processes())
        for limit in (20, None)
    )
    for key, values in few.values.items():
        assert torch.equal(values, all_of_them.values[key][:20])
    for who, features in few.features.items():
        assert torch.equal(features, all_of_them.features[who][:20])


def test_noise_is_of_the_seed_and_the_place(place: Path) -> None:
    """One image again and again has other completions each time, others with another seed, the same with the same."""
    case = realism.open_case(subject_of(place), 2 * IMAGES_AT_ONCE)
    case = case._replace(images=case.images[:1].expand_as(case.images))
    energy, again, other = (
        realism.judge("q1", case, seed, torch.device("cpu"), Processes()).values["cvae", "energy_score"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(energy, again)
    assert len(torch.cat([energy, other]).unique()) == 4 * IMAGES_AT_ONCE


def subject_of(place: Path) -> realism.Subject:
    return realism.Subject(place / "runs/q1", settings(place), load("q1"), load_test(settings(place)), None)


def test_means_and_draws(place: Path) -> None:
    """Draws are black or white, and their mean over many is the mean."""
    torch.manual_seed(0)
    model = load("q1")
    batch = ImageSet(load_test(settings(place)).images[:3], model.split).batch(slice(None))
    eps = noise(1, 1, model, torch.Generator()).expand(4000, 3, -1)
    found = realism.completions(model, batch, eps, torch.Generator())
    assert list(found) == list(realism.COMPLETED)
    assert torch.equal(found["truth"][0], batch.y)
    for who in ("nn", "cvae"):
        drawn, means = found[f"{who}_drawn"], found[who][0]
        assert set(drawn.unique().tolist()) == {0, 1}
        error = (means * (1 - means) / 4000).sqrt()
        assert ((drawn.mean(0) - means).abs() < 5 * error + 1e-3).all()


def test_two_processes_print_the_same(place: Path, found: list[dict[str, Any]]) -> None:
    words = ("--realism", "--format", "json", "--samples", "3", "--device", "cpu")
    (code, out, err), other = fork_two("eval.py", "q1", *words, cwd=place)
    assert (code, err, other) == (0, "", (0, "", ""))
    (record,) = json.loads(out)
    for who in WHOSE:
        for name, each in found[0]["realism"][who].items():
            for part, value in each.items():
                other = record["realism"][who][name][part]
                assert other == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6))


# The picture


def test_chosen_images_are_ever_more_ambiguous() -> None:
    torch.manual_seed(0)
    ambiguity = torch.rand(500, dtype=torch.float64) ** 4
    numbers = realism_figure.chosen(ambiguity)
    shown = ambiguity[numbers]
    assert len(numbers) == 10
    assert torch.equal(shown, shown.sort().values)
    assert (shown[0], shown[-1]) == (ambiguity.min(), ambiguity.max())
    assert (shown.diff() - shown.diff().mean()).abs().max() < 0.1
    assert realism_figure.chosen(torch.zeros(3)) == [0]


def test_pictures_of_several_runs(tmp_path: Path) -> None:
    for _ in range(2):  # the second ones replace the first
        ended = call_eval("q1", "q2", "--realism", "--realism-images", "30", "--realism-figure", tmp_path / "a.png")
        assert (ended.code, ended.err) == (0, "")
    for name in ("q1", "q2"):
        with Image.open(tmp_path / f"a-{name}.png") as picture:
            assert picture.width > 700
            assert any(colour == realism_figure.TRUE for _, colour in picture.getcolors(1 << 20) or [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-q1.png", "a-q2.png"]
