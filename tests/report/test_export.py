"""Exported models, as other programs read them: the same completions, what the files say, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from support.inprocess import call
from support.scripts import ROOT, run_python
from torch import Tensor

import cvae
from cvae.data.masks import quadrants
from cvae.data.tasks import Batch, FixedMask
from cvae.errors import DataError
from cvae.model.networks import NETWORKS, build
from cvae.report import export
from cvae.run.load import Trained, as_safetensors, load_trained, save_safetensors
from cvae.settings import Settings

TASK = FixedMask(quadrants(1, 10, 9), "1 quadrant")
SMALL = Settings(hidden=(8, 7), latent_dim=4)
SIZE = {"height": 10, "width": 9}
TOLERANCE = 1e-5  # sums of some ten float32 terms of size 1, and a sigmoid, rounded in another order: 1e-6 at most


def trained(seed: int = 0, **more: object) -> Trained:
    """A model of random weights, the same for the same seed."""
    settings = Settings(**{**SMALL.to_dict(), "hidden": (8, 7), "seed": seed, **more})
    torch.manual_seed(seed)
    return Trained(build(TASK, settings).requires_grad_(False).eval(), settings, SIZE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of a small model, to export."""
    save_safetensors(trained().model, SMALL, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def exported(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The function in a file, without the program's own reader."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x, eps: torch.from_numpy(session.run(["completed"], {"x": x.numpy(), "eps": eps.numpy()})[0])


def plainly_completed(model: cvae.model.cvae.CVAE, x: Tensor, eps: Tensor) -> Tensor:
    """What is observed of each picture, and what the model makes of the rest."""
    completed = x.expand(len(eps), *x.shape).clone()
    batch = Batch(x[:, TASK.observed], x.new_empty(len(x), TASK.y_dim))
    completed[..., ~TASK.observed] = model.from_prior(batch, eps).logits.sigmoid()
    return completed


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_same_completions(tmp_path: Path, network: str, ending: str) -> None:
    """For any number of pictures and samples, whatever hidden pixels hold; nothing in the file is of this machine."""
    subject = trained(network=network, levels=2 if network == "deep" else 1, data="/home/somebody/faces")
    path = tmp_path / f"model{ending}"
    assert path.name in export.export(path, subject)
    function = exported(path)
    random = torch.Generator().manual_seed(1)
    for samples, batch in ((1, 1), (1, 4), (5, 1), (3, 7)):
        x = torch.rand(batch, 10, 9, generator=random)
        eps = torch.randn(samples, batch, 4, generator=random)
        expected = plainly_completed(subject.model, x, eps)
        torch.testing.assert_close(function(x, eps), expected, atol=TOLERANCE, rtol=0)
        filled = torch.where(TASK.observed, x, torch.tensor([-1.0, 7.0]).repeat(5)[:, None])
        torch.testing.assert_close(function(filled, eps), expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(function(x, eps)[..., TASK.observed], expected[..., TASK.observed])
    with pytest.raises(Exception, match=r"(?i)dim|shape|size|expected"):
        function(torch.rand(2, 9, 10), torch.randn(1, 2, 4))
    content = path.read_bytes()
    for word in (str(ROOT), "site-packages", "somebody", str(tmp_path), "export.py"):
        assert word.encode() not in content, word


def test_command(tmp_path: Path, source: Path) -> None:
    """It says that it has checked the file; what is in it is described there, and needs nothing of this package."""
    ended = call(export, source, "--to", tmp_path / "model.onnx")
    line = f"{tmp_path}/model.onnx: 0.0 MB; read again, its completions differ from the model's by at most "
    assert (ended.code, ended.err) == (0, "")
    assert float(ended.out.removeprefix(line)) < export.TOLERANCE

    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {"x": ["batch", 10, 9], "eps": ["samples", "batch", 4], "completed": ["samples", "batch", 10, 9]}
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert "hidden pixels may hold anything" in said["x"]
    assert "noise, N(0, 1)" in said["eps"]
    assert Settings.from_dict(json.loads(said["settings"])) == SMALL
    assert said["observed"].splitlines() == ["0" * 9] * 5 + ["1111" + "0" * 5] * 5

    assert call(export, source, "--to", tmp_path / "model.pt2").code == 0
    code = """
import sys
sys.modules["cvae"] = None
import torch
extra = {"metadata.json": ""}
completed = torch.export.load("model.pt2", extra_files=extra).module()(torch.ones(3, 10, 9), torch.ones(2, 3, 4))
assert completed.shape == (2, 3, 10, 9) and "float32 [samples, batch, 4]: noise" in extra["metadata.json"]
"""
    ended = run_python("-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_what_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and nothing is written."""
    for words, reason in (
        (["model.txt"], "--to takes a file (.onnx, .pt2, .safetensors), or the word hub-folder and a new folder"),
        (["one.onnx", "two.onnx"], "not one.onnx two.onnx"),
        (["model.onnx", "--half"], "with --half .safetensors or hub-folder, not model.onnx"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export.main([str(source), "--to", *words])
        assert reason in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for arguments, code, reason in (
        ([source, "--to", tmp_path / "m.onnx"], 2, "needs more packages: pip install onnx onnxscript onnxruntime"),
        ([tmp_path / "nowhere", "--to", tmp_path / "m.pt2"], 3, "nowhere"),
        ([source, "--to", tmp_path / "no folder" / "m.safetensors"], 5, "no folder"),
        ([source, "--to", "hub-folder", source / "folder"], 5, "cannot be made"),
        ([source, "--to", "hub-folder", tmp_path], 2, "exists already and is left as it is"),
    ):
        ended = call(export, *arguments)
        assert (ended.code, ended.out, ended.err.count("\n"), reason in ended.err) == (code, "", 1, True)
    assert list(tmp_path.iterdir()) == [source]


def test_file_that_does_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood there before is intact."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    other = as_safetensors(trained(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(export, "content", lambda *_: other)
        with pytest.raises(DataError, match="is not written, for its completions differ from the model's by"):
            export.export(path, trained())
    broken = trained()
    next(iter(broken.model.baseline_net.parameters())).fill_(torch.nan)
    with pytest.raises(DataError, match="differ from the model's by nan"):
        export.export(path, broken)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_half_precision(tmp_path: Path, source: Path) -> None:
    """Half the weights' size; what the rounding costs is said. Weights that float16 does not hold are refused."""
    ended = call(export, source, "--to", tmp_path / "half.safetensors", "--half")
    assert 0 < float(ended.out.rpartition("by at most ")[2]) < 1e-3  # float16 has 11 bits
    weights, half = cvae.load(source).state_dict(), cvae.load(tmp_path / "half.safetensors").state_dict()
    assert all(torch.equal(weights[name].half().float(), half[name]) for name in weights)
    large = trained()
    next(iter(large.model.baseline_net.parameters())).view(-1)[0] = 70_000
    save_safetensors(large.model, SMALL, source)
    ended = call(export, source, "--to", tmp_path / "new.safetensors", "--half")
    assert (ended.code, ended.out, (tmp_path / "new.safetensors").exists()) == (3, "", False)


def test_hub_folder(tmp_path: Path) -> None:
    """It is loaded as it is; its card says what the model is; nothing in it is of this machine."""
    observed = torch.rand(10, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    settings = Settings(observed="/home/somebody/a|mask.png", hidden=(8, 7), latent_dim=4, train_limit=50)
    images = {**SIZE, "train": {"count": 60, "sha256": "f" * 64}}
    model = build(FixedMask(observed), settings)
    (tmp_path / "source.safetensors").write_bytes(as_safetensors(Trained(model, settings, images)))
    folder = tmp_path / "new" / "my model"
    ended = call(export, tmp_path / "source.safetensors", "--to", "hub-folder", folder)
    assert ended.out.endswith(f"{folder}: ready; to upload it: hf upload USER/NAME '{folder}'\n")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "observed.png"]
    read = load_trained(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.model.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert (read.images, config["images"]) == (images, images)
    assert (read.settings, read.settings.observed) == (Settings.from_dict(config["settings"]), "/a|mask.png")
    with Image.open(folder / "observed.png") as picture:
        assert (torch.tensor(list(picture.getdata())).view(10, 9) == 255 * observed).all()
    assert not [path for path in folder.iterdir() if b"somebody" in path.read_bytes()]

    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert (card.data.library_name, card.data.pipeline_tag) == ("cvae-quadrants", "image-to-image")
    assert card.text.strip().startswith("# my model\n")
    assert "| training images | MNIST, 50 of them |" in card.text
    assert f"| observed | a\\|mask: {int(observed.sum())} of 90 pixels |" in card.text
