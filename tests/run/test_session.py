"""Which weights a run validates, keeps and goes on with: the average, of the best epoch."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from cvae.run.state import fitting
from support.inprocess import TINY, call_train, interrupted_after, make_tiny_data, results
from support.steps import CPU

import cvae.run.log
from cvae.data.images import ImageSet
from cvae.data.sources import load_train
from cvae.errors import DataError, DiskError, UsageError
from cvae.model.likelihood import noise
from cvae.model.objectives import objective
from cvae.processes import Processes
from cvae.run import checkpoint
from cvae.run.folder import read_json, read_settings
from cvae.run.load import load
from cvae.run.log import RunLog
from cvae.training.phase import Phase


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on images of which no epoch learns anything that is good for those to validate.

    `whole` is one, and `baseline` the same when its baseline was done; `last` has no average of the weights.
    """
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(folder / "data", contrary=True), *TINY, "--runs", folder, "--precision", "fp32"]
    words += ["--epochs", "6", "--baseline-epochs", "6", "--patience", "9", "--particles", "2"]
    assert call_train(*words, "--average", "4", "--name", "whole").code == 0
    with interrupted_after("baseline", 6):
        assert call_train(*words, "--average", "4", "--name", "baseline").code == 143
    assert call_train(*words, "--average", "0", "--name", "last").code == 0
    return folder


def test_the_best_epoch_is_not_the_last_one(place: Path) -> None:
    """The control of all the others."""
    for run in ("whole", "last"):
        summary = read_json(place / run / "summary.json")
        assert summary["epoch"] == 6
        assert summary["best_epoch"] == 1
    progress = checkpoint.load(place / "baseline/last.pt")["progress"]
    assert (progress["epoch"], progress["best_epoch"]) == (6, 1)


@pytest.mark.parametrize("run", ["whole", "last"])
def test_validated_weights_are_those_that_are_kept(place: Path, run: str) -> None:
    """The loaded model, validated once more, has the very numbers of the best epoch's line."""
    folder = place / run
    settings, model, summary = read_settings(folder), load(folder), read_json(folder / "summary.json")
    images = ImageSet(load_train(settings).validation, model.split)
    images.set_guesses(model.baseline_net)
    phase = Phase(
        "cvae", model, objective(settings), 1, images, images,
        lambda count, random: (noise(2, count, model, random),), lambda model: torch.zeros(1),
    )  # fmt: skip
    found = phase.validate(model, settings.seed, "fp32", Processes()).means()
    lines = [record for record in results(folder)["metrics"] if record["phase"] == "cvae"]
    best = lines[summary["best_epoch"] - 1]
    assert best["epoch"] == summary["best_epoch"]
    assert found == {name: best[f"validation_{name}"] for name in found}
    assert summary["best_loss"] == -best["validation_elbo"] == min(-line["validation_elbo"] for line in lines)


def test_run_from_before_some_settings_opens_and_goes_on(place: Path, tmp_path: Path) -> None:
    """What they leave out is what the run did, and is written down with what follows."""
    ends = []
    for added in ((), ("free_epochs", "bend", "clip", "levels")):
        folder = tmp_path / str(len(added))
        shutil.copytree(place / "whole", folder)
        config = read_json(folder / "config.json")
        for name in added:
            del config["settings"][name]
        (folder / "config.json").write_text(json.dumps(config))
        assert load(folder).latent_dim == 4
        ended = call_train("--runs", tmp_path, "--resume", folder.name, "--epochs", "7")
        assert (ended.code, ended.err) == (0, "")
        ends.append((results(folder), read_json(folder / "config.json")["settings"]))
    assert ends[0] == ends[1]
    assert len(ends[0][0]["metrics"]) == 6 + 7


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=repr,
)
def test_too_little_memory_is_no_damage(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), fitting(tmp_path, "last.pt"):
        raise error
    with pytest.raises(UsageError, match=r"^the memory does not suffice"), Processes().one_voice():
        raise error
    with pytest.raises(DataError, match="does not fit"), fitting(tmp_path, "last.pt"):
        raise RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"), Processes().one_voice():
        raise RuntimeError("size mismatch")


def test_average_is_what_is_kept(place: Path) -> None:
    """It is another model than the last weights are, unless none is asked for."""
    for run, same in (("whole", False), ("last", True)):
        last = checkpoint.load(place / run / "last.pt")
        trained = [name for name in last["model"] if not name.startswith("baseline_net")]
        assert trained
        assert all(torch.equal(last["model"][name], last["average"][name]) == same for name in trained)
    with interrupted_after("cvae", 1):  # its first epoch is the best so far
        words = ["--data", place / "data", *TINY, "--runs", place, "--average", "4", "--name", "first"]
        assert call_train(*words).code == 143
    last, best = (checkpoint.load(place / "first" / name) for name in ("last.pt", "best.pt"))
    assert last["progress"]["best_epoch"] == 1
    assert all(torch.equal(tensor, last["average"][name]) for name, tensor in best["model"].items())


def test_cvae_is_trained_on_top_of_the_best_baseline(place: Path) -> None:
    """Its average of its best epoch; and it stays as it is."""
    baseline = checkpoint.load(place / "baseline/best.pt")
    last = checkpoint.load(place / "baseline/last.pt")
    assert (baseline["phase"], last["phase"]) == ("baseline", "baseline")
    whole = checkpoint.load(place / "whole/last.pt")
    for name, tensor in baseline["model"].items():
        assert not torch.equal(tensor, last["model"][name])
        assert not torch.equal(tensor, last["average"][name])
        assert torch.equal(whole["model"][f"baseline_net.{name}"], tensor)
        assert torch.equal(load(place / "whole", CPU).state_dict()[f"baseline_net.{name}"], tensor)


def test_log_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as it is made nor as it is closed: no file, no thread, no hook of ours."""

    def left() -> tuple[object, int, int]:
        return threading.excepthook, threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = left()
    log = RunLog(tmp_path, {})
    os.close(log._metrics.fileno())
    with pytest.raises(DiskError, match="the log cannot be written"):
        log.close()
    assert left() == before

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cvae.run.log, "SummaryWriter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, {})
    assert left() == before
