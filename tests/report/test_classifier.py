"""The classifiers that judge completions: their files, when they are trained, runs that cannot be judged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.inprocess import TINY, call_eval, call_train
from support.scripts import NAMES, ROOT, idx_bytes

from cvae.data.masks import quadrants
from cvae.data.sources import load_labels, load_train
from cvae.data.tasks import binarized
from cvae.report import classifier, realism
from cvae.run.folder import RunFolder
from cvae.settings import Settings

pytestmark = pytest.mark.usefixtures("place")


def test_packaged_classifiers() -> None:
    """They are of MNIST's training images, and as good on its validation images as docs/realism.md says."""
    images, labels, right = load_train().validation, load_labels(Settings(), "validation"), {}
    for name in ("q1", "q2", "q3"):
        folder = ROOT / "runs/reference" / name
        for judge in classifier.open_judges(folder, RunFolder(folder).settings, torch.device("cpu")):
            with torch.no_grad():
                logits = torch.cat([judge(part / 255) for part in images.split(1000)])
            right[int(judge.observed.sum())] = (logits.argmax(1) == labels).float().mean().item()
        assert not list(folder.glob("classifier*")), "none is trained"
    expected = {196: 0.8746, 392: 0.9708, 588: 0.9890, 784: 0.9925}
    assert right == pytest.approx(expected, abs=0.0002)  # two images of 10,000 on the fence


def test_classifier_sees_its_mask_alone(case: realism.Case) -> None:
    images, other = torch.rand(2, 5, 28, 28)
    mixed = torch.where(quadrants(1), images, other)
    assert torch.equal(case.x_only(images), case.x_only(mixed))
    assert not torch.equal(case.x_only(images), case.x_only(other))
    assert not torch.equal(case.whole(images), case.whole(mixed))
    for height, width in ((2, 2), (64, 33)):  # of any size
        network = classifier.Classifier(torch.ones(height, width, dtype=torch.bool), 7).eval()
        assert network(torch.rand(3, height, width)).shape == (3, 7)


def test_files_that_do_not_fit_are_trained_anew(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another mask, of other images, of grey levels, damaged or missing; the same ones again, by a fixed seed."""
    keys: list[Any] = []  # of the binarized batches
    monkeypatch.setattr(classifier, "binarized", lambda batch, *key: keys.append(key) or binarized(batch, *key))
    assert call_train(*TINY, "--data", place / "data", "--targets", "binary", "--runs", tmp_path).code == 0
    whole, x_only = tmp_path / "q1" / classifier.WHOLE, tmp_path / "q1" / classifier.X_ONLY
    shutil.copy(place / "runs/q1" / classifier.WHOLE, whole)
    shutil.copy(classifier.PACKAGED / "mnist-q1.safetensors", x_only)
    states = []
    for _ in range(2):
        ended = call_eval(tmp_path, "--realism", "--format", "json")
        lines = [line.partition(": trained; ")[0] for line in ended.err.splitlines()]
        assert (ended.code, lines) == (0, [str(path) for path in (whole, x_only)])
        states.append([load_file(path) for path in (whole, x_only)])
        whole.write_bytes(x_only.read_bytes())
        x_only.write_bytes(x_only.read_bytes()[:-1])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert len(set(keys)) == len(keys) / 4 == 2 * classifier.EPOCHS  # two classifiers, twice; two steps an epoch
    assert json.loads(ended.out)[0]["realism"]["truth"]["validity"]["mean"] > 0.3


def test_run_that_cannot_be_judged(place: Path, copied: Path, tmp_path: Path) -> None:
    """It keeps its likelihoods, and a line says why."""
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    (data / NAMES["t10k"][1]).write_bytes(idx_bytes(torch.full((60,), 10, dtype=torch.uint8)))
    problem = "the test images have a class 10, unlike the training images"
    assert call_eval(copied, "--realism", "--data", data).line == f"{copied}: {problem}; its realism is not measured"
    problem = "5 test images are too few; density and coverage need 6"
    assert call_eval(copied, "--realism", "--realism-images", "5").line.startswith(f"{copied}: {problem}; ")
    (copied / classifier.X_ONLY).unlink()
    (copied / classifier.X_ONLY).mkdir()
    assert call_eval(copied, "--realism").line.startswith(f"{copied}/{classifier.X_ONLY}: cannot be written")
    (data / NAMES["train"][0]).write_bytes(idx_bytes(torch.randint(256, (600, 28, 28), dtype=torch.uint8)))
    assert call_eval(copied, "--realism", "--data", data).line.startswith(f"{copied}: was begun on other train images")
    for part in NAMES:
        (data / NAMES[part][1]).unlink()
    ended = call_eval(copied, "--realism", "--data", data, "--format", "json")
    assert ended.line.startswith(f"{data}: has no labels")
    (record,) = json.loads(ended.out)
    assert (ended.code, record["realism"], record["nn_nll"]["mean"] > 0) == (3, None, True)
