"""The classifiers that judge completions: their files, the command that trains them, runs that cannot be judged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.inprocess import TINY, Ended, call, call_eval, call_train
from support.scripts import NAMES, idx_bytes

from cvae.data.masks import quadrants
from cvae.data.sources import load_labels, load_train
from cvae.report import classifier, realism
from cvae.settings import Settings

pytestmark = pytest.mark.usefixtures("place")


def train_classifiers(*words: str | Path) -> Ended:
    return call(classifier, *words, "--device", "cpu")


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
    (record,) = json.loads(call_eval(tmp_path, "--realism", "--format", "json").out)
    assert record["realism"]["truth"]["validity"]["mean"] > 0.3


# A run that cannot be judged keeps its likelihoods, and the line says what to do


def test_bad_classifier(copied: Path) -> None:
    path, own = copied / "classifier-x.safetensors", Path("runs/q1/classifier-x.safetensors").read_bytes()
    of_whole, of_mnist = Path("runs/q1/classifier.safetensors"), classifier.PACKAGED / "mnist-q1.safetensors"
    for content, problem in (
        (own[:-1], "is missing or damaged"),
        (of_whole.read_bytes(), "is of another mask, or of other images or targets"),
        (of_mnist.read_bytes(), "is of another mask, or of other images or targets"),
    ):
        path.write_bytes(content)
        ended = call_eval(copied, "--realism", "--format", "json")
        advice = f"python -m cvae.report.classifier {copied} trains the classifiers of the run"
        assert (ended.code, ended.line.startswith(f"{path}: {problem}; {advice}")) == (3, True)
    (record,) = json.loads(ended.out)
    assert record["realism"] is None
    assert record["nn_nll"]["mean"] > 0


def test_images_without_labels_and_other_images(place: Path, copied: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    (data / NAMES["t10k"][1]).write_bytes(idx_bytes(torch.full((60,), 10, dtype=torch.uint8)))
    problem = "the test images have a class 10, which the training images have not"
    assert call_eval(copied, "--realism", "--data", data).line == f"{copied}: {problem}; its realism is not measured"
    for part in NAMES:
        (data / NAMES[part][1]).unlink()
    ended = train_classifiers(copied, "--data", data)
    problem = ended.err.removeprefix("cvae.report.classifier: ").rstrip("\n")
    assert (ended.code, problem.startswith(f"{data}: has no labels")) == (3, True)
    assert call_eval(copied, "--realism", "--data", data).line == f"{problem}; its realism is not measured"
    problem = r"was begun on \d+ train images, and here are 50000; --data says where its own are"
    assert re.search(problem, train_classifiers(copied, "--data", "mnist").err)


def test_usage() -> None:
    for words in ([], ["q1", "--to", "there"]):
        with pytest.raises(SystemExit, match="2"):
            train_classifiers(*words)
    assert train_classifiers("nowhere").code == 3
    assert call_eval("q1", "--realism", "--realism-images", "5").line == (
        "runs/q1: 5 test images are too few; density and coverage need 6; its realism is not measured"
    )
