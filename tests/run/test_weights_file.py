"""A trained model as one file: what comes back, what it says, and files that are refused."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from reference.networks import TEST_NETWORKS
from support.inprocess import TINY, call_eval, call_train, make_tiny_data
from test_checkpoint import Payload, saved_by_torch
from torch import Tensor

import cvae
from cvae.data.masks import MASKS, Split, quadrants
from cvae.errors import DataError
from cvae.model.networks import NETWORKS, build
from cvae.report.classifier import PACKAGED
from cvae.run import weights_file
from cvae.run.load import load, load_trained
from cvae.run.weights_file import Trained, as_safetensors, load_safetensors, read_trained, save_safetensors
from cvae.settings import Settings
from cvae.training.weights import Weights

SMALL = Settings(hidden=(8, 7), latent_dim=4)
SPLIT = Split(quadrants(1, 10, 9), "1 quadrant")


def as_read_by_others(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, by the description of the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"], safetensors.torch.load(content)


def write(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Path:
    """A file whose digest is right, whatever is in it."""
    signed = {**metadata, "sha256": weights_file._digest(metadata, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, signed))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a small model."""
    save_safetensors(build(SPLIT, SMALL), SMALL, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What it holds, but for the digest."""
    metadata, tensors = as_read_by_others(path)
    del metadata["sha256"]
    return metadata, tensors


# What comes back


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("network", [*NETWORKS, *TEST_NETWORKS])
def test_any_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, half: bool) -> None:
    """As it was, in float32; half precision rounds the weights once. Buffers that count stay numbers."""
    if network in TEST_NETWORKS:
        monkeypatch.setitem(NETWORKS, network, TEST_NETWORKS[network])
    settings = Settings(network=network, hidden=(8, 7), latent_dim=4, levels=2 if network == "deep" else 1)
    model = build(SPLIT, settings)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Weights(model, None)  # as in a training, where all of them are parts of one vector
    path = tmp_path / "any name.safetensors"
    save_safetensors(model, settings, path, half)
    loaded = load(str(path))
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    found, stored = loaded.state_dict(), as_read_by_others(path)[1]
    assert found.keys() == stored.keys() == saved.keys()
    for name, tensor in saved.items():
        expected = tensor.half().float() if half and tensor.is_floating_point() else tensor
        assert torch.equal(found[name], expected)
        assert found[name].dtype == tensor.dtype
        assert stored[name].dtype == (torch.float16 if half and tensor.is_floating_point() else tensor.dtype)


def test_bfloat16_is_read_too(path: Path, parts: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    metadata, tensors = parts
    write(path, metadata, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, tensors[name].bfloat16().float())


@pytest.mark.parametrize("name", MASKS)
def test_any_mask(tmp_path: Path, name: str) -> None:
    settings = Settings(observed=name, hidden=(8,), latent_dim=4)
    split = Split(MASKS[name](10, 9))
    save_safetensors(build(split, settings), settings, tmp_path / "m.safetensors")
    found = load_safetensors(tmp_path / "m.safetensors").split
    assert torch.equal(found.observed, split.observed)
    assert found.name == name


@pytest.mark.parametrize("folder", ["/home/somebody/", "C:\\home\\somebody\\"])
def test_nothing_of_the_machine_is_passed_on(tmp_path: Path, folder: str) -> None:
    """The names of files are, and a mask that was a picture is there itself."""
    settings = Settings(
        observed=f"{folder}my mask.png", data=f"{folder}faces", data_root=f"{folder}sets", hidden=(8,), latent_dim=4
    )
    split = Split(torch.rand(10, 9, generator=torch.manual_seed(0)) < 0.3)
    path = tmp_path / "m.safetensors"
    save_safetensors(build(split, settings), settings, path)
    assert b"somebody" not in path.read_bytes()
    model, read, images = read_trained(path)
    assert torch.equal(model.split.observed, split.observed)
    assert (model.split.name, read.data, images) == ("my mask", "faces", {"height": 10, "width": 9})


def test_metadata_says_what_it_is(path: Path) -> None:
    metadata = as_read_by_others(path)[0]
    assert Settings.from_dict(json.loads(metadata["settings"])) == SMALL
    assert metadata["version"] == cvae.__version__
    rows = [[letter == "1" for letter in row] for row in metadata["observed"].splitlines()]
    assert torch.equal(torch.tensor(rows), SPLIT.observed)


def test_setting_that_there_was_not_yet(path: Path, parts: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    """It takes the value that means what the run did, as in `config.json`."""
    metadata, tensors = parts
    settings = json.loads(metadata["settings"])
    del settings["network"], settings["levels"]
    write(path, {**metadata, "settings": json.dumps(settings)}, tensors)
    assert read_trained(path).settings == SMALL


# Where it is found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(folder / "data"), *TINY, "--runs", folder / "runs"]
    assert call_train(*words).code == 0
    return folder / "runs/q1"


def test_in_the_place_of_checkpoints(tmp_path: Path, run: Path) -> None:
    """The run is loaded, evaluated and begun with as before, but not gone on with; its own checkpoint comes first."""
    passed_on = Path(shutil.copytree(run, tmp_path / "q1"))
    (passed_on / "model.safetensors").write_bytes(as_safetensors(load_trained(run)))
    kept = load(passed_on).state_dict()
    for name in ("best.pt", "last.pt"):
        (passed_on / name).unlink()
    trained = load_trained(passed_on)
    assert trained.images == load_trained(run).images
    assert trained.images["train"]["count"] == 60
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained.model.state_dict().items())
    assert call_eval(passed_on, "--format", "csv") == call_eval(run, "--format", "csv")
    new = ["--data", run.parent.parent / "data", *TINY, "--runs", tmp_path, "--name", "new", "--init", passed_on]
    ended = call_train(*new)
    assert (ended.code, ended.err) == (0, "")
    assert f"begins with the weights of {passed_on}/model.safetensors\n" in ended.out
    assert call_train("--resume", passed_on, "--epochs", "3").code == 3
    (passed_on / "config.json").unlink()
    assert load(passed_on).latent_dim == 4

    save_safetensors(build(SPLIT, SMALL), SMALL, run / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load(run).state_dict().items())


def test_no_old_weights_in_a_run_begun_anew(tmp_path: Path, run: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "q1"))
    save_safetensors(build(SPLIT, SMALL), SMALL, again / "model.safetensors")
    words = ["--data", run.parent.parent / "data", *TINY, "--runs", tmp_path, "--overwrite"]
    assert call_train(*words).code == 0
    assert not (again / "model.safetensors").exists()


# Files that are refused


def assert_refused(path: Path, reason: str | None = None) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load_trained(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_damage(path: Path) -> None:
    """Every bit of the file counts, wherever it is, and every byte that is missing."""
    content, choice = path.read_bytes(), random.Random(0)
    for _ in range(300):
        at = choice.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << choice.randrange(8)]) + content[at + 1 :])
        assert_refused(path)
    for length in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path)
    path.write_bytes(content + b"\0")
    assert_refused(path)


def test_foreign_files(path: Path, tmp_path: Path) -> None:
    """Those of another program, of another model of this one, and pickled objects, which are not run."""
    path.write_bytes(next(PACKAGED.glob("*.safetensors")).read_bytes())
    assert_refused(path, "holds no CVAE: its metadata has no ")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert_refused(path, "is damaged, or no weights of this program")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"settings": "{}"})
    assert_refused(path, "is damaged, or no weights of this program")
    object = Payload((tmp_path / "run").write_text, "was run")
    for content in (pickle.dumps(object), saved_by_torch(object), b"text"):
        path.write_bytes(content)
        assert_refused(path, "is damaged, or no weights of this program")
    assert not (tmp_path / "run").exists()
    path.unlink()
    assert_refused(path, "cannot be read")


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda settings: settings.update(hidden=[9, 7]), "does not hold the weights"),
        (lambda settings: settings.update(hidden=[30_000, 30_000]), "does not hold the weights"),
        (lambda settings: settings.update(network="paper"), "does not hold the weights"),
        (lambda settings: settings.update(network="hierarchical"), "this version knows no network 'hierarchical'"),
        (lambda settings: settings.update(latent_dim="4"), "latent-dim has to be"),
        (lambda settings: settings.update(shades=2), "this version knows no setting 'shades'"),
    ],
)
def test_settings_that_are_not_those_of_the_weights(
    path: Path, parts: tuple[dict[str, str], dict[str, Tensor]], change: Change, reason: str
) -> None:
    metadata, tensors = parts
    settings = json.loads(metadata["settings"])
    change(settings)
    assert_refused(write(path, {**metadata, "settings": json.dumps(settings)}, tensors), reason)


@pytest.mark.parametrize("name", ["settings", "observed", "images"])
@pytest.mark.parametrize(
    "value", [None, "", "{}", "[]", "null", "1", "{", "[" * 100_000, "01\n1", "11\n11", "2", '{"height": 10}']
)
def test_metadata_of_another_kind(
    path: Path, parts: tuple[dict[str, str], dict[str, Tensor]], name: str, value: str | None
) -> None:
    metadata, tensors = parts
    del metadata[name]
    assert_refused(write(path, metadata if value is None else {**metadata, name: value}, tensors))


def test_tensors_of_another_kind(path: Path, parts: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    metadata, tensors = parts
    first = next(iter(tensors))
    for changed in (
        {**tensors, "more": torch.zeros(1)},
        {name: tensor for name, tensor in tensors.items() if name != first},
        {name: tensor.double() for name, tensor in tensors.items()},
        {**tensors, first: tensors[first].to(torch.float8_e5m2)},
        {},
    ):
        assert_refused(write(path, metadata, changed), "does not hold the weights")


def test_trained_is_what_was_read(path: Path) -> None:
    """Written again, it is the same."""
    trained = read_trained(path)
    assert isinstance(trained, Trained)
    again = path.with_name("again.safetensors")
    again.write_bytes(as_safetensors(trained))
    assert as_read_by_others(again)[0] == as_read_by_others(path)[0]
