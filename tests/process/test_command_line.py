"""`train.py` and `eval.py` as a user starts them: what they write, what they print, and how they fail."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import NAMES, PATIENCE, ROOT, run_script, small_mnist, write_data
from support.trainings import fork_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cvae import context
from cvae.data.readers import mnist
from cvae.data.sources import load_train
from cvae.model.objectives import OF_PRIOR
from cvae.run import checkpoint
from cvae.run.folder import read_metrics
from cvae.settings import Settings

TINY = [
    *("--epochs", "2", "--baseline-epochs", "1", "--batch-size", "10", "--hidden", "32", "32", "--latent-dim", "8"),
    *("--average", "0", "--device", "cpu"),
]
SAMPLES = ["--samples", "5", "--device", "cpu"]


# Forked, because imports take seconds; where the start of a process may matter, by run_script


def train(*words: str | Path, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return fork_script("train.py", *words, cwd=cwd, **more)


def evaluate(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return fork_script("eval.py", *words, cwd=cwd)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """What it printed; nothing went to standard error."""
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def failed(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line with which it failed."""
    script = Path(result.args[1]).name
    assert result.returncode == code, result.stderr
    assert re.fullmatch(rf"{script}: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix(f"{script}: ").rstrip("\n")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint.load(run / "best.pt")["model"]
    return state


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`: 300 images of MNIST to train on, 60 to validate, 60 to test."""
    folder = tmp_path_factory.mktemp("place")
    small_mnist(folder / "data")
    return folder


@pytest.fixture(scope="session")
def trained(place: Path) -> subprocess.CompletedProcess[str]:
    """Three runs by one command: runs/q1, runs/q2 and runs/q3 below `place`."""
    return run_script("train.py", "--data", "data", "--quadrants", "1", "2", "3", *TINY, cwd=place)


@pytest.fixture
def finished(place: Path, trained: subprocess.CompletedProcess[str], tmp_path: Path) -> Path:
    """A copy of a finished run to be spoilt, `runs/q1` below a folder that has the data too."""
    shutil.copytree(place / "runs" / "q1", tmp_path / "runs" / "q1")
    (tmp_path / "data").symlink_to(place / "data")
    return tmp_path


# A training and what it leaves


def test_several_runs_by_one_command(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    printed = succeeded(trained)
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["q1", "q2", "q3"]
    for run in ("q1", "q2", "q3"):
        assert f"runs/{run}" in printed
    epochs = [line for line in printed.splitlines() if re.match(r"(baseline|cvae), epoch \d/\d: ", line)]
    assert len(epochs) == 3 * (1 + 2)
    said = r"loss \d+\.\d\d, on validation images \d+\.\d\d nats per image, \d+ images/s, \d+\.\d s"
    assert all(re.fullmatch(rf"[^:]+: {said}(, the best so far)?", line) for line in epochs)
    assert "\r" not in printed  # no progress bar where there is no terminal


def test_config(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    config = json.loads((place / "runs" / "q2" / "config.json").read_text())
    expected = Settings(
        quadrants=2,
        device="cpu",
        epochs=2,
        baseline_epochs=1,
        batch_size=10,
        average=0,
        hidden=(32, 32),
        latent_dim=8,
        data=str(place / "data"),
    )
    assert config["settings"] == expected.to_dict()
    assert config["images"] == load_train(expected).record
    assert [config["images"][part]["count"] for part in ("train", "validation", "test")] == [300, 60, 60]
    assert config["versions"]["torch"] == torch.__version__
    assert config["device"]["type"] == "cpu"
    assert config["precision"] == context.resolve_precision("auto", torch.device("cpu"))
    revision = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if revision.returncode == 0:
        assert config["git_revision"].rstrip("+") == revision.stdout.strip()


def test_metrics(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    for run in ("q1", "q2", "q3"):
        records = read_metrics(place / "runs" / run / "metrics.jsonl")
        assert [(record["phase"], record["epoch"]) for record in records] == [("baseline", 1), ("cvae", 1), ("cvae", 2)]
        for record in records:
            for part in ("train", "validation"):
                terms = {name.removeprefix(f"{part}_") for name in record if name.startswith(part)} - {"active_units"}
                if record["phase"] == "baseline":
                    assert terms == {"log_likelihood"}
                    assert record[f"{part}_log_likelihood"] < 0
                else:
                    assert terms == {"elbo", "log_likelihood", "kl"}
                    elbo, log_likelihood, kl = (record[f"{part}_{k}"] for k in ("elbo", "log_likelihood", "kl"))
                    assert elbo == pytest.approx(log_likelihood - kl, rel=1e-6)
                    assert log_likelihood < 0 < kl
            assert record["images_per_second"] > 0
            assert 0 <= record["learning_rate"] <= Settings().learning_rate
        assert records[2]["validation_elbo"] > records[1]["validation_elbo"]
        summary = json.loads((place / "runs" / run / "summary.json").read_text())
        assert summary["best_loss"] == -records[2]["validation_elbo"]
        assert (summary["epoch"], summary["best_epoch"]) == (2, 2)


def test_best_weights_are_those_of_a_cvae_of_these_sizes(
    place: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    state = weights(place / "runs" / "q1")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith("weight")}
    assert sorted(shapes.values()) == [
        (1, 32, 8), (1, 32, 32), (1, 32, 32), (1, 32, 196), (1, 588, 32), (1, 588, 32),
        (2, 16, 32), (2, 32, 32), (2, 32, 784),
    ]  # fmt: skip
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())


def test_events(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    """TensorBoard's own reader finds every curve and one picture per epoch."""
    events = EventAccumulator(str(place / "runs" / "q1"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    terms = {"baseline": ["log_likelihood"], "cvae": ["elbo", "log_likelihood", "kl"]}
    for phase, epochs in (("baseline", [1]), ("cvae", [1, 2])):
        found = [tag for tag in tags["scalars"] if tag.startswith(f"{phase}/")]
        assert {f"{phase}/{term}/{part}" for term in terms[phase] for part in ("train", "validation")} <= set(found)
        assert {f"{phase}/learning_rate", f"{phase}/images_per_second"} <= set(found)
        for tag in found:
            assert [event.step for event in events.Scalars(tag)] == epochs, tag
        pictures = events.Images(f"{phase}/completions")
        assert [picture.step for picture in pictures] == epochs
        for picture in pictures:
            with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
                image.load()
                assert image.size == (picture.width, picture.height)
                assert image.width >= 10 * 28
    records = read_metrics(place / "runs" / "q1" / "metrics.jsonl")
    logged = [event.value for event in events.Scalars("cvae/elbo/validation")]
    assert logged == [np.float32(record["validation_elbo"]) for record in records if record["phase"] == "cvae"]
    (text,) = (tag for tag in tags["tensors"] if "settings" in tag)
    assert b"latent_dim" in events.Tensors(text)[0].tensor_proto.string_val[0]
    plugins = {event.summary.value[0].metadata.plugin_data.plugin_name for event in raw_events(place / "runs" / "q1")}
    assert "hparams" in plugins


def raw_events(run: Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = list(run.glob("events.out.tfevents.*"))
    assert files
    return [event for file in files for event in EventFileLoader(str(file)).Load() if event.summary.value]


def test_same_seed_gives_the_same_weights_bit_for_bit(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    succeeded(train("--data", "data", "--quadrants", "2", "--name", "again", "--runs", "other", *TINY, cwd=place))
    first, second = weights(place / "runs" / "q2"), weights(place / "other" / "again")
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    clocks = {"seconds", "images_per_second"}
    runs = (read_metrics(path / "metrics.jsonl") for path in (place / "runs" / "q2", place / "other" / "again"))
    first_log, second_log = ([{k: v for k, v in line.items() if k not in clocks} for line in log] for log in runs)
    assert first_log == second_log


def test_another_seed_gives_other_weights_and_quiet_prints_nothing(
    place: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    printed = succeeded(
        train("--data", "data", "--seed", "1", "--quiet", "--runs", "other", "--name", "seed", *TINY, cwd=place)
    )
    assert printed == ""
    first, second = weights(place / "runs" / "q1"), weights(place / "other" / "seed")
    matrices = [name for name in first if name.endswith("weight")]
    assert len(matrices) == 9
    assert not any(torch.equal(first[name], second[name]) for name in matrices)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_cpu(place: Path, precision: str) -> None:
    rate = "5e-4" if precision == "bf16" else "2e-3"  # low enough for two trainings to keep together
    for name in ("fp32", precision):
        words = ["--data", "data", "--precision", name, "--runs", f"with-{precision}", "--name", name]
        succeeded(train(*words, *TINY, "--learning-rate", rate, cwd=place))
    exact = read_metrics(place / f"with-{precision}" / "fp32" / "metrics.jsonl")
    mixed = read_metrics(place / f"with-{precision}" / precision / "metrics.jsonl")
    for one, other in zip(exact, mixed, strict=True):
        name = "validation_log_likelihood" if one["phase"] == "baseline" else "validation_elbo"
        assert other["skipped_steps"] == 0
        assert other[name] != one[name], "it was computed in float32 after all"
        if precision == "bf16":  # it keeps 8 bits of a number, and the sums are in float32
            assert other[name] == pytest.approx(one[name], rel=2e-3)
    if precision == "fp16":  # gives up its first steps, until the scale of the loss is low enough; then it learns
        assert mixed[1]["overflow_steps"] > 0
        assert -mixed[2]["validation_elbo"] < 0.7 * -mixed[1]["validation_elbo"]
    assert all(tensor.dtype == torch.float32 for tensor in weights(place / f"with-{precision}" / precision).values())


def test_embedded_mnist_from_training_to_table(tmp_path: Path) -> None:
    succeeded(run_script("train.py", "--train-limit", "300", *TINY, "--average", "500", cwd=tmp_path))
    words = ["--format", "json", "--samples", "2", "--device", "cpu"]
    records = json.loads(succeeded(run_script("eval.py", *words, cwd=tmp_path)))
    assert [record["images"] for record in records] == [10_000]
    # The grey levels' own entropy with one quadrant observed, on the test set: known, whatever the model.
    assert records[0]["floor"]["mean"] == pytest.approx(34, abs=1)
    assert records[0]["nn_nll"]["mean"] < 784 * 0.75 * math.log(2), "it learned nothing: this is a fair coin's"


def test_pictures_of_another_size(place: Path) -> None:
    images = [mnist(part)[:count, 4:21, 3:24] for part, count in (("train", 360), ("t10k", 60))]
    write_data(place / "odd" / "MNIST" / "raw", *images, suffix=".gz")
    succeeded(train("--data", "odd", "--runs", "odd-runs", "--quadrants", "3", "--particles", "3", *TINY, cwd=place))
    shapes = {tuple(tensor.shape) for tensor in weights(place / "odd-runs" / "q3").values()}
    assert {(1, 32, 258), (2, 32, 17 * 21), (1, 99, 32)} <= shapes
    config = json.loads((place / "odd-runs" / "q3" / "config.json").read_text())
    assert (config["images"]["height"], config["images"]["width"]) == (17, 21)
    figure = place / "odd.png"
    printed = succeeded(evaluate("--runs", "odd-runs", "--format", "json", "--figure", figure, *SAMPLES, cwd=place))
    assert json.loads(printed)[0]["images"] == 60
    with Image.open(figure) as image:
        image.load()


@pytest.mark.parametrize(
    ("network", "objective"), [("paper", "elbo"), ("paper", "iwae"), ("tutorial", "gsnn"), ("tutorial", "hybrid")]
)
def test_any_network_and_objective_from_training_to_table(place: Path, network: str, objective: str) -> None:
    runs = f"{network}-{objective}"
    words = ["--data", "data", "--runs", runs, "--network", network, "--objective", objective, "--particles", "2"]
    printed = succeeded(train(*words, *TINY, cwd=place))
    epochs = [line for line in printed.splitlines() if line.startswith("cvae, epoch")]
    records = read_metrics(place / runs / "q1" / "metrics.jsonl")[1:]
    assert len(epochs) == len(records) == 2
    for line, record in zip(epochs, records, strict=True):
        losses = (f"{-record[f'{part}_{objective}']:.2f}" for part in ("train", "validation"))
        assert "loss {}, on validation images {} nats".format(*losses) in line
    assert records[1][f"validation_{objective}"] > records[0][f"validation_{objective}"]
    table = succeeded(evaluate("--runs", runs, *SAMPLES, cwd=place))
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    for label in ("NN (baseline)", "CVAE (−ELBO)", "CVAE (Monte Carlo, S = 5)", "CVAE (importance sampling, S = 5)"):
        known = objective not in OF_PRIOR or label in ("NN (baseline)", "CVAE (Monte Carlo, S = 5)")
        assert bool(re.search(r" \d+\.\d\d ± \d+\.\d\d$", rows[label])) == known, rows[label]


# Usage: exit 2


@pytest.mark.parametrize(
    "words",
    [
        ["--quadrants", "0"],
        ["--quadrants", "4"],
        ["--quadrants", "1", "x"],
        ["--quadrants"],
        ["--no-such-flag"],
        ["--epochs", "0"],
        ["--baseline-epochs", "-1"],
        ["--batch-size", "0"],
        ["--patience", "0"],
        ["--learning-rate", "0"],
        ["--learning-rate", "nan"],
        ["--weight-decay", "-0.1"],
        ["--weight-decay", "1.1"],
        ["--weight-decay", "nan"],
        ["--learning-rate", "inf"],
        ["--hidden", "500", "0"],
        ["--hidden", "1000000"],
        ["--latent-dim", "-8"],
        ["--particles", "0"],
        ["--train-limit", "0"],
        ["--precision", "fp8"],
        ["--schedule", "up"],
        ["--network", "nonsense"],
        ["--network", ""],
        ["--objective", "elb"],
        ["--objective", "likelihood"],
        ["--observed", "middle"],
        ["--observed", "left", "--quadrants", "2"],
        ["--alpha", "-0.5"],
        ["--alpha", "1.5"],
        ["--alpha", "nan"],
        ["--compile", "--objective", "iwae"],
        ["--objective", "iwae", "--compile", "--particles", "2"],
        ["--seed", "x"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_train_refuses_what_makes_no_sense(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for its imports take seconds; one of them as a process of its own is below."""
    import train as script

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        script.main(words)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("usage: ")
    assert ": error: " in lines[-1]
    if len(words) > 1:
        assert words[0].lstrip("-") in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_usage_error_of_the_real_process(tmp_path: Path) -> None:
    result = run_script("train.py", "--quadrants", "4", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: train.py ")
    assert result.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "Traceback" not in result.stderr


def test_cuda_where_there_is_none(place: Path, trained: subprocess.CompletedProcess[str]) -> None:
    before = contents(place / "runs")
    assert "CUDA is not available" in failed(train("--name", "x", "--device", "cuda", cwd=place), 2)
    assert "CUDA is not available" in failed(evaluate("--device", "cuda:0", cwd=place), 2)
    assert contents(place / "runs") == before


@pytest.mark.parametrize(
    "words",
    [
        ["--device", "tpu"],
        ["--device", "cuda:x"],
        ["--name", "../q1"],
        ["--name", "a/b"],
        ["--name", ".hidden"],
        ["--name", ""],
        ["--quadrants", "1", "1"],
        ["--hidden", *["8"] * 100],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_requests_that_cannot_be_served(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train as script

    monkeypatch.chdir(tmp_path)
    try:
        assert script.main(["--data", "nowhere", *words]) == 2
        assert re.fullmatch(r"train.py: [^\n]+\n", capsys.readouterr().err)
    except SystemExit as end:  # argparse may see it first
        assert end.code == 2  # noqa: PT017
    assert list(tmp_path.iterdir()) == []


def test_existing_run_is_left_as_it_is(finished: Path) -> None:
    before = contents(finished / "runs")
    line = failed(train("--data", "data", *TINY, cwd=finished), 2)
    assert "runs/q1 exists already" in line
    assert "--overwrite" in line
    assert contents(finished / "runs") == before


def test_overwrite_starts_anew(finished: Path) -> None:
    before = weights(finished / "runs" / "q1")
    (finished / "runs" / "q1" / "notes").write_text("on the old run")
    succeeded(train("--data", "data", "--overwrite", "--seed", "7", *TINY, cwd=finished))
    after = weights(finished / "runs" / "q1")
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert (finished / "runs" / "q1" / "notes").exists(), "no file of the run"
    assert [path.name for path in (finished / "runs").iterdir()] == ["q1"], "nothing is left lying about"
    assert len(read_metrics(finished / "runs" / "q1" / "metrics.jsonl")) == 3


def test_overwrite_of_what_is_no_run(finished: Path) -> None:
    (finished / "runs" / "letters").mkdir()
    (finished / "runs" / "letters" / "dear.txt").write_text("irreplaceable")
    before = contents(finished / "runs")
    line = failed(train("--data", "data", "--overwrite", "--name", "letters", *TINY, cwd=finished), 2)
    assert "runs/letters is no run folder" in line
    assert contents(finished / "runs") == before


# Data: exit 3


def spoil_missing(data: Path) -> str:
    shutil.rmtree(data)
    return "data: there is no such folder"


def spoil_truncated(data: Path) -> str:
    path = data / NAMES["train"][0]
    path.write_bytes(path.read_bytes()[:-1])
    return f"data/{path.name}: is truncated"


def spoil_counts(data: Path) -> str:
    shutil.copy(data / NAMES["t10k"][1], data / NAMES["train"][1])
    return f"data/{NAMES['train'][1]}: has 60 labels for the 360 images"


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_truncated, spoil_counts])
def test_damaged_data(place: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    expected = spoil(tmp_path / "data")
    before = contents(tmp_path)
    assert failed(train("--data", "data", *TINY, cwd=tmp_path), 3).startswith(f"{tmp_path}/{expected}")
    assert contents(tmp_path) == before, "no run is begun on bad data"


def test_flipped_byte_in_the_embedded_files(tmp_path: Path) -> None:
    for part in ("cvae", "train.py"):
        source = ROOT / part
        copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / part)
    path = tmp_path / "cvae" / "data" / "mnist" / f"{NAMES['train'][0]}.xz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = failed(run_script("train.py", *TINY, cwd=tmp_path, root=tmp_path), 3)
    assert line.startswith(str(path))
    assert not (tmp_path / "runs").exists()


# Disk: exit 5


@pytest.fixture
def large_file(place: Path, trained: subprocess.CompletedProcess[str]) -> int:
    """The size of the largest file of a run, in bytes: the CVAE's last.pt, next to which the baseline's is small."""
    return (place / "runs" / "q1" / "last.pt").stat().st_size


@pytest.fixture
def small_disk(tmp_path: Path, large_file: int) -> Iterator[Path]:
    """A file system that has room for the baseline's checkpoints, and none for those of the CVAE beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={large_file + (100 << 10)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def assert_baseline_intact(run: Path) -> None:
    """The disk took the baseline's checkpoints and not the larger ones of the CVAE."""
    for name in ("last.pt", "best.pt"):
        assert checkpoint.load(run / name)["phase"] == "baseline"
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert {record["phase"] for record in read_metrics(run / "metrics.jsonl")} >= {"baseline"}


def test_full_disk(place: Path, small_disk: Path) -> None:
    result = run_script("train.py", "--data", "data", "--runs", small_disk, *TINY, cwd=place)
    line = failed(result, 5)
    assert str(small_disk) in line
    assert "No space left on device" in line
    assert_baseline_intact(small_disk / "q1")


def test_disk_that_is_full_from_the_start(place: Path, small_disk: Path) -> None:
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 4096))
    failed(train("--data", "data", "--runs", small_disk, *TINY, cwd=place), 5)
    assert not list(small_disk.glob(".*")), "nothing half made is left"


def test_read_only_disk(place: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = failed(train("--data", "data", "--runs", small_disk, *TINY, cwd=place), 5)
    assert "Read-only file system" in line


def test_file_size_limit(place: Path, tmp_path: Path, large_file: int) -> None:
    """As a full disk, where none can be mounted."""
    result = train("--data", "data", "--runs", tmp_path, *TINY, cwd=place, file_size=large_file - 1)
    assert "File too large" in failed(result, 5)
    assert_baseline_intact(tmp_path / "q1")


def test_log_that_cannot_grow(place: Path, tmp_path: Path) -> None:
    """The events outgrow the limit before any checkpoint is written."""
    result = train("--data", "data", "--runs", tmp_path, *TINY, cwd=place, file_size=10_000)
    assert str(tmp_path / "q1") in failed(result, 5)


def test_too_little_memory(place: Path, tmp_path: Path) -> None:
    """For the many samples of the CVAE's first step: one line, what was reached stays, and it is not called damaged."""
    words, run = [*TINY, "--particles", "20000"], tmp_path / "q1"
    ended = train("--data", "data", "--runs", tmp_path, *words, cwd=place, memory=200 << 20)
    assert "memory does not suffice" in failed(ended, 2)
    assert_baseline_intact(run)
    reached = (run / "last.pt").read_bytes()
    again = train("--runs", tmp_path, "--resume", "q1", cwd=place, memory=200 << 20)
    assert "memory does not suffice" in failed(again, 2)
    assert (run / "last.pt").read_bytes() == reached


def test_folder_that_is_moved_away_while_training(place: Path, tmp_path: Path) -> None:
    words = ["--data", "data", "--runs", str(tmp_path), *TINY, "--epochs", "100000", "--patience", "100000"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / "q1" / "best.pt").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            (tmp_path / "q1").rename(tmp_path / "away")
            _, stderr = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 5
    assert re.fullmatch(rf"train.py: {tmp_path / 'q1'}[^\n]+\n", stderr)
    assert checkpoint.load(tmp_path / "away" / "last.pt")["phase"] in ("baseline", "cvae")
