"""`train.py` and `eval.py` as a user starts them: what they write, what they print, and how they fail."""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inprocess import TINY, call_eval, call_train, make_tiny_data
from support.scripts import NAMES, run_script
from support.trainings import fork_script

import train
from cvae.run import checkpoint
from cvae.run.folder import RunFolder


def failed(code: int, *words: str | Path, **limits: Any) -> str:
    """Return the one line with which a training fails."""
    ended = fork_script("train.py", *words, **limits)
    assert ended.returncode == code, ended.stderr
    assert re.fullmatch(r"train\.py: [^\n]+\n", ended.stderr), ended.stderr
    return ended.stderr.partition(": ")[2].rstrip("\n")


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint.load(run / "best.pt")["model"]
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small images in `data`."""
    folder = tmp_path_factory.mktemp("place")
    make_tiny_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> subprocess.CompletedProcess[str]:
    """Return how a training of three runs by one command ended, in `folder`."""
    return run_script("train.py", "--data", "data", "--quadrants", "1", "2", "3", *TINY, cwd=folder)


def test_several_runs_read_their_images_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, load_train = [], train.load_train
    monkeypatch.setattr(train, "load_train", lambda s: seen.append(s) or load_train(s))
    words = ["--data", folder / "data", "--quadrants", "1", "2", *TINY, "--runs", tmp_path]
    assert call_train(*words).code == 0
    assert len(seen) == 1
    tasks = [RunFolder(tmp_path / name).task for name in ("q1", "q2")]
    assert [task.x_dim for task in tasks] == [20, 40]  # of 10×9 pixels


def test_several_runs_by_one_command(folder: Path, trained: subprocess.CompletedProcess[str]) -> None:
    """Each with its settings, metrics in nats, a summary, and weights that are finite."""
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "\r" not in trained.stdout  # no progress bar where there is no terminal
    said = r"loss \d+\.\d\d, on validation images \d+\.\d\d nats per image, \d+ images/s, \d+\.\d s(, the best so far)?"
    assert len(re.findall(rf"^(?:baseline|cvae), epoch \d/\d: {said}$", trained.stdout, re.MULTILINE)) == 3 * (1 + 2)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["q1", "q2", "q3"]
    for number, run in enumerate(sorted((folder / "runs").iterdir()), start=1):
        config = json.loads((run / "config.json").read_text())
        assert (config["settings"]["quadrants"], config["settings"]["hidden"]) == (number, [8, 7])
        assert config["settings"]["data"] == str(folder / "data")
        assert [config["images"][part]["count"] for part in ("train", "validation", "test")] == [60, 12, 12]
        assert config["versions"]["torch"] == torch.__version__
        records = RunFolder(run).metrics()
        assert [(record["phase"], record["epoch"]) for record in records] == [("baseline", 1), ("cvae", 1), ("cvae", 2)]
        for record in records[1:]:
            for part in ("train", "validation"):
                elbo, log_likelihood, kl = (record[f"{part}_{name}"] for name in ("elbo", "log_likelihood", "kl"))
                assert elbo == pytest.approx(log_likelihood - kl, rel=1e-6)
                assert log_likelihood < 0 < kl
        best = max(records[1:], key=lambda record: record["validation_elbo"])
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["best_epoch"], summary["best_loss"]) == (best["epoch"], -best["validation_elbo"])
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights(run).values())


@pytest.mark.usefixtures("trained")
def test_seed_decides_every_bit(folder: Path) -> None:
    words = ["--data", folder / "data", "--quadrants", "2", "--quiet", "--runs", folder / "seeds", *TINY]
    for seed in ("0", "1"):
        assert call_train(*words, "--seed", seed, "--name", seed) == (0, "", "")
    first, same, other = (weights(folder / run) for run in ("runs/q2", "seeds/0", "seeds/1"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


@pytest.mark.parametrize(
    "words",
    ["paper iwae 2", "tutorial gsnn 2", "tutorial hybrid 1", "tutorial hybrid 1 --alpha 0", "deep elbo 1 --levels 2"],
)
def test_any_network_and_objective_from_training_to_table(folder: Path, words: str) -> None:
    """What is printed is minus what is logged; an untrained recognition network has no rows."""
    network, objective, particles, *more = words.split()
    given = ["--network", network, "--objective", objective, "--particles", particles, *more]
    ended = call_train("--data", folder / "data", "--runs", folder / words, *TINY, *given)
    assert (ended.code, ended.err) == (0, "")
    for record in RunFolder(folder / words / "q1").metrics()[1:]:
        train_loss, validation_loss = (-record[f"{part}_{objective}"] for part in ("train", "validation"))
        assert f"loss {train_loss:.2f}, on validation images {validation_loss:.2f} nats" in ended.out
    table = call_eval("--runs", folder / words).out
    for label, by_prior in (("−ELBO)", False), ("Monte Carlo, S = 3)", True), ("importance sampling, S = 3)", False)):
        known = by_prior or (objective != "gsnn" and "--alpha" not in more)
        assert bool(re.search(rf"CVAE \({re.escape(label)} +\d+\.\d\d ± \d+\.\d\d$", table, re.MULTILINE)) == known


def test_embedded_mnist_from_training_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call_train("--train-limit", "300", *TINY, "--hidden", "32", "--quiet") == (0, "", "")
    (record,) = json.loads(call_eval("--format", "json", "--samples", "1").out)
    assert record["images"] == 10_000
    assert record["floor"]["mean"] == pytest.approx(34, abs=1)  # the grey levels' own entropy, whatever the model
    assert record["nn_nll"]["mean"] < 784 * 0.75 * math.log(2), "it learned nothing: this is a fair coin's"


def test_early_stopping_waits_for_the_unbent_epochs(tmp_path: Path) -> None:
    """Patience begins anew with them: of six epochs that are all worse, four are bent, and one is not."""
    data = make_tiny_data(tmp_path / "data", contrary=True)
    words = ["--data", data, "--runs", tmp_path, *TINY, "--epochs", "6", "--patience", "1", "--bend", "0.5"]
    for unbent, epochs in (("0", 2), ("2", 5)):
        assert call_train(*words, "--unbent-epochs", unbent, "--name", unbent).code == 0
        assert RunFolder(tmp_path / unbent).metrics()[-1]["epoch"] == epochs


# Usage: exit 2


@pytest.mark.parametrize(
    "words",
    ["--quadrants 4", "--quadrants 1 x", "--quadrants", "--no-such-flag", "--epochs 0",
     "--learning-rate nan", "--hidden 8 0", "--network nonsense", "--observed middle", "--observed left --quadrants 2",
     "--alpha 0.3", "--levels 2", "--compile", "--seed x", "stray", "--device tpu", "--device cuda:99", "--name ../q1",
     "--name .hidden", "--data s\udcff", "--name s\udcff", "--resume s\udcff", "--resume q1 --overwrite"],
    ids=ascii,
)  # fmt: skip
def test_requests_that_make_no_sense(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line says what is wrong; nothing is made."""
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(words.split())
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 2
    assert re.match(r"\S+\.py: [^\n]+$", capsys.readouterr().err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


# Data: exit 3; disk: exit 5; memory: exit 2


def test_damaged_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by name; no run is begun on it."""
    monkeypatch.chdir(tmp_path)
    path = make_tiny_data(tmp_path / "data") / NAMES["train"][0]
    path.write_bytes(path.read_bytes()[:-1])
    for data, place in (("data", path), ("none", tmp_path / "none")):
        ended = call_train("--data", data, *TINY)
        assert ended.code == 3
        assert ended.line.startswith(f"{place}: ")
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def assert_baseline_intact(run: Path) -> None:
    assert {checkpoint.load(run / name)["phase"] for name in ("last.pt", "best.pt")} == {"baseline"}
    assert not list(run.glob("*.tmp"))
    assert RunFolder(run).metrics()[0]["phase"] == "baseline"


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """Told in one line, with all that was reached; nothing half made is left where it is full from the start."""
    words = ["--data", "data", "--runs", tmp_path, *TINY, "--hidden", "256", "256"]  # larger than the baseline
    assert str(tmp_path / "q1") in failed(5, *words, cwd=folder, file_size=2 << 20)
    assert_baseline_intact(tmp_path / "q1")
    assert str(tmp_path / "x") in failed(5, *words, "--name", "x", cwd=folder, file_size=600)
    assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]


def test_too_little_memory(folder: Path, tmp_path: Path) -> None:
    """For the many samples of the CVAE's first step: what was reached stays, and it is not called damaged."""
    words = ["--data", "data", *TINY, "--hidden", "256", "--particles", "20000"]
    reached = b""
    for more in (words, ["--resume", "q1"]):
        assert "memory does not suffice" in failed(2, "--runs", tmp_path, *more, cwd=folder, memory=200 << 20)
        assert_baseline_intact(tmp_path / "q1")
        reached = reached or (tmp_path / "q1/last.pt").read_bytes()
    assert (tmp_path / "q1/last.pt").read_bytes() == reached
