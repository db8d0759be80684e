"""A trained model as a run, as one file, as the beginning of another: what comes back, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from reference.networks import TEST_NETWORKS
from support.inprocess import TINY, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents
from torch import Tensor

import cvae
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask
from cvae.errors import DataError
from cvae.model.networks import NETWORKS, build
from cvae.run import checkpoint
from cvae.run.folder import RunFolder
from cvae.run.load import as_safetensors, load, load_trained, save_safetensors, start_from
from cvae.settings import Settings

SMALL = Settings(hidden=(8, 7), latent_dim=4)
TASK = FixedMask(quadrants(1, 10, 9), "1 quadrant")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in float32, beside its data; and `baseline`, whose baseline alone is trained."""
    place = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(place / "data"), *TINY, "--precision", "fp32", "--runs", place, "--name"]
    assert call_train(*words, "done").code == 0
    with interrupted_after("baseline", 1):
        assert call_train(*words, "baseline").code == 143
    return place / "done"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a small model."""
    save_safetensors(build(TASK, SMALL), SMALL, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# Runs


def test_model_of_a_run(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights, frozen, in evaluation mode; by path and by name."""
    monkeypatch.chdir(done.parent.parent)
    for model in (cvae.load(done), cvae.load("done", "cpu", done.parent), cvae.load(f"{done.parent.name}/done")):
        assert_equal(model.state_dict(), checkpoint.load(done / "best.pt")["model"])
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model.task.observed, TASK.observed)
    assert load_trained(done).images["train"]["count"] == 60
    assert cvae.load("reference/q1").task.name == "1 quadrant"


def test_default_type_of_the_process_does_not_matter(done: Path, path: Path) -> None:
    for run in (done, path):
        expected = load(run).state_dict()
        torch.set_default_dtype(torch.float64)
        try:
            model = load(run)
            picture = torch.zeros(10, 9, dtype=torch.uint8)
            assert model.complete(picture, 2).dtype == torch.float32
            assert model.log_likelihood(picture, 2, seed=0).isfinite().all()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_equal(model.state_dict(), expected)


def test_weights_as_version_0_3_named_them(done: Path, tmp_path: Path) -> None:
    """Layers side by side were one tensor, and the checkpoint had a digest behind it."""
    run = Path(shutil.copytree(done, tmp_path / "run"))
    content = checkpoint.load(run / "best.pt")
    state = {k: v[None] for k, v in content["model"].items() if "prior" not in k and "recognition" not in k}
    for name in [name for name in content["model"] if name.startswith("prior_net")]:
        pair = [content["model"][name], content["model"][name.replace("prior", "recognition")]]
        state[name.replace("prior_net", "encoders")] = torch.stack(pair)
    checkpoint.save(run / "best.pt", {**content, "model": state})
    with open(run / "best.pt", "ab") as file:
        file.write(b"SHA-256\0" + bytes(32))
    assert_equal(load(run).state_dict(), load(done).state_dict())


def test_runs_that_cannot_be_loaded(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    for name, spoil, reason in (
        ("none", lambda: None, "is no run folder: it has no config.json"),
        ("run", lambda: (run / "best.pt").write_bytes(b"PK"), "best.pt: is damaged, or no checkpoint of this program"),
        ("run", lambda: (run / "best.pt").unlink(), r"best.pt: cannot be read \(No such file or directory\)"),
    ):
        spoil()
        with pytest.raises(DataError, match=reason):
            load(name, runs=tmp_path)
    shutil.copy(done.with_name("baseline") / "config.json", run)
    checkpoint.save(
        run / "best.pt", {"phase": "cvae", "model": build(TASK, replace(SMALL, hidden=(9, 7))).state_dict()}
    )
    with pytest.raises(DataError, match=r"best\.pt: does not hold the weights of a CVAE of the run's settings"):
        load(run)
    with pytest.raises(DataError, match="only its baseline is trained so far; go on with python train"):
        load("baseline", runs=done.parent)


# One file


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("network", [*NETWORKS, *TEST_NETWORKS])
def test_any_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, half: bool) -> None:
    """What comes back is float32; half precision rounds the weights once. Buffers that count stay numbers."""
    if network in TEST_NETWORKS:
        monkeypatch.setitem(NETWORKS, network, TEST_NETWORKS[network])
    settings = replace(SMALL, network=network, levels=2 if network == "deep" else 1)
    model = build(TASK, settings)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_safetensors(model, settings, tmp_path / "any name.safetensors", half)
    loaded = load(str(tmp_path / "any name.safetensors"))
    rounded = {name: t.half().float() if half and t.is_floating_point() else t for name, t in saved.items()}
    assert_equal(loaded.state_dict(), rounded)
    assert {t.dtype for t in loaded.state_dict().values()} == {t.dtype for t in saved.values()}
    assert type(loaded) is type(model)


@pytest.mark.parametrize("folder", ["/home/somebody/", "C:\\home\\somebody\\"])
def test_nothing_of_the_machine_is_passed_on(tmp_path: Path, folder: str) -> None:
    """The names of files are, and a mask that was a picture is there itself."""
    settings = replace(SMALL, observed=f"{folder}my mask.png", data=f"{folder}faces", data_root=f"{folder}sets")
    task = FixedMask(torch.rand(10, 9, generator=torch.Generator().manual_seed(0)) < 0.3)
    path = tmp_path / "m.safetensors"
    save_safetensors(build(task, settings), settings, path)
    assert b"somebody" not in path.read_bytes()
    model, read, images = load_trained(path)
    assert torch.equal(model.task.observed, task.observed)
    assert (model.task.name, read.data, images) == ("my mask", "faces", {"height": 10, "width": 9})


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_trained(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_refused(path: Path) -> None:
    """Damage, another program's weights, and metadata that does not suit the tensors: one line that names the file."""
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = safetensors.torch.load(content)
    for length in (0, 7, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path)
    cases: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        (tensors, {}, "holds no CVAE of this program, by its metadata (KeyError)"),
        (tensors, {**metadata, "observed": "01\n1"}, "by its metadata"),
        (tensors, {**metadata, "settings": json.dumps({"hidden": [30, 30]})}, "does not hold the weights"),
        ({**tensors, "more": torch.zeros(1)}, metadata, "does not hold the weights"),
    ]
    for changed, texts, reason in cases:
        path.write_bytes(safetensors.torch.save(changed, texts))
        assert reason in refused(path)


def test_published_run_is_evaluated_and_begun_with_and_not_resumed(done: Path, tmp_path: Path) -> None:
    """Its own checkpoint comes first, as long as it is there."""
    run = Path(shutil.copytree(done, tmp_path / "q1"))
    (run / "model.safetensors").write_bytes(as_safetensors(load_trained(done)))
    for name in ("best.pt", "last.pt"):
        (run / name).unlink()
    assert_equal(load(run).state_dict(), load(done).state_dict())
    assert RunFolder(run).is_passed_on
    assert call_eval(run, "--format", "csv").out.replace("q1", "done") == call_eval(done, "--format", "csv").out
    words = ["--data", done.parent / "data", *TINY, "--runs", tmp_path, "--name", "new", "--init", run]
    assert f"begins with the weights of {run}/model.safetensors\n" in call_train(*words).out
    before = contents(run)
    ended = call_train("--resume", run, "--epochs", "3")
    assert ended.code == 3
    assert ended.line == f"{run}: has published weights, for eval.py and --init; it cannot be resumed"
    assert contents(run) == before
    shutil.copy(done / "best.pt", run)
    save_safetensors(build(TASK, SMALL), SMALL, run / "model.safetensors")
    assert_equal(load(run).state_dict(), load(done).state_dict())


# Another run's weights


def test_begins_with_the_weights_of_another_run(done: Path, tmp_path: Path) -> None:
    """At a rate that changes nothing, all validations are those of the other's best weights; resumed or not."""
    words = ["--data", done.parent / "data", *TINY, "--precision", "fp32", "--learning-rate", "1e-30"]
    words += ["--runs", tmp_path, "--init", done, "--name"]
    ended = call_train(*words, "whole")
    assert f"begins with the weights of {done}/best.pt\n" in ended.out
    lines = {(line["phase"], line["epoch"]): line for line in results(done)["metrics"]}
    best = lines["cvae", checkpoint.load(done / "best.pt")["epoch"]]
    for line in results(tmp_path / "whole")["metrics"]:
        name, expected = "validation_elbo", best
        if line["phase"] == "baseline":
            name, expected = "validation_log_likelihood", lines["baseline", 1]
        assert line[name] == pytest.approx(expected[name], rel=1e-6)  # sums of some hundred float32
    digest = hashlib.sha256((done / "best.pt").read_bytes()).hexdigest()
    expected = {"run": str(done), "file": "best.pt", "sha256": digest, "not_fitting": ""}
    assert RunFolder(tmp_path / "whole").config["init"] == expected
    with interrupted_after("baseline", 1):
        assert call_train(*words, "parts").code == 143
    assert call_train("--resume", tmp_path / "parts").code == 0
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_what_does_not_fit_is_named_and_stays_new(done: Path) -> None:
    model = build(TASK, replace(SMALL, latent_dim=5))
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line, record = start_from(done, model)
    assert record["not_fitting"] == "prior_net.layers.2, recognition_net.layers.2, generation_net.layers.0"
    assert line.endswith(f"; drawn anew, as these do not fit: {record['not_fitting']}")
    other = checkpoint.load(done / "best.pt")["model"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other[key] if other[key].shape == tensor.shape else new[key])


def test_weights_that_face_other_pixels_do_not_fit(done: Path) -> None:
    """A mask of as many pixels: all weights fit by their shape, and half of them would stand for other pixels."""
    other = FixedMask(TASK.observed.roll(1, 1), "moved")
    model = build(other, SMALL)
    line, record = start_from(done, model)
    assert (other.x_dim, other.y_dim) == (TASK.x_dim, TASK.y_dim)
    assert line.endswith("; their mask is another")
    facing = ["baseline_net.layers.0", "baseline_net.layers.2", "prior_net.layers.0", "recognition_net.layers.0"]
    assert record["not_fitting"] == ", ".join([*facing, "generation_net.layers.2"])


def test_baseline_alone_and_last_weights(done: Path, tmp_path: Path) -> None:
    model = build(TASK, replace(SMALL, seed=9))
    assert "drawn anew" in start_from(done.with_name("baseline"), model)[0]
    best = checkpoint.load(done.with_name("baseline") / "best.pt")["model"]
    assert_equal(model.baseline_net.state_dict(), best)
    run = Path(shutil.copytree(done, tmp_path / "run"))
    (run / "best.pt").unlink()
    assert start_from(run, model)[1]["file"] == "last.pt"
    assert_equal(model.state_dict(), checkpoint.load(run / "last.pt")["average"])
    for spoil in (lambda: checkpoint.save(run / "last.pt", {"average": [1]}), lambda: (run / "last.pt").unlink()):
        spoil()
        with pytest.raises(DataError, match=str(run)):
            start_from(run, model)
