"""What the tests of realism and its classifiers share: a small run on MNIST, with labels and classifiers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inprocess import TINY, call_eval, call_train
from support.scripts import NAMES, idx_bytes, small_mnist

import cvae
from cvae.context import Context
from cvae.data.sources import load_labels, load_test
from cvae.report import classifier, realism
from cvae.report.evaluation import Subject
from cvae.run.folder import RunFolder
from cvae.settings import Settings

COUNTS = {"train": 600, "t10k": 60}


@pytest.fixture(scope="session")
def judged_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, images of MNIST and their labels, `runs/q1` with its classifiers, and its `table.json`."""
    folder = tmp_path_factory.mktemp("realism")
    small_mnist(folder / "data", *COUNTS.values())
    for part, count in COUNTS.items():
        labels = load_labels(Settings(), "train" if part == "train" else "test")[:count]
        (folder / "data" / NAMES[part][1]).write_bytes(idx_bytes(labels.to(torch.uint8)))
    assert call_train(*TINY, "--data", folder / "data", "--runs", folder / "runs").code == 0
    ended = call_eval(folder / "runs", "--realism", "--format", "json")  # it trains them
    whole, x_only = re.findall(r".*/(\S+): trained; ([\d.]+)% of the validation images right, .* nats", ended.err)
    assert (ended.code, ended.err.count("\n"), whole[0], x_only[0]) == (0, 2, classifier.WHOLE, classifier.X_ONLY)
    assert float(whole[1]) > float(x_only[1]) > 25  # of ten classes
    (folder / "table.json").write_text(ended.out)
    return folder


@pytest.fixture
def place(judged_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    monkeypatch.chdir(judged_place)  # where the scripts are called
    return judged_place


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "runs/q1", tmp_path / "copy"))


@pytest.fixture(scope="session")
def record(judged_place: Path) -> dict[str, Any]:
    """What JSON says of the run's realism."""
    return json.loads((judged_place / "table.json").read_text())[0]["realism"]  # type: ignore[no-any-return]


@pytest.fixture
def case(place: Path) -> realism.Case:
    settings = RunFolder("runs/q1").settings
    subject = Subject(Path("runs/q1"), settings, cvae.load("q1"), load_test(settings), None)
    cases, problems = realism.open_cases({"q1": subject}, None, Context(torch.device("cpu")))
    assert problems == []
    return cases["q1"]
