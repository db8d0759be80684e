"""The tutorial: its notebook says the same, and all its blocks and commands run; so do the README's."""

import re
import shlex
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from support.scripts import PATIENCE, ROOT
from support.trainings import ENVIRONMENT, SMALL, make_data

import eval as evaluation
import train
from cvae.report import complete

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCS = ROOT / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
SMALLER = {"EPOCHS = 20_000, 4, 8": "EPOCHS = 1_000, 2, 2", "images.validation[:1000]": "images.validation[:50]"}
CHECKS = """
assert baseline_means == sorted(baseline_means) and means == sorted(means)
observed = model.task.observed
expected = pictures[:, observed] / 255
assert torch.allclose(samples[..., observed], expected.expand(7, -1, -1), atol=1e-6)
assert samples[..., ~observed].std(0).mean() > 1e-3 and completions.shape == (9, 1, 28, 28)
assert (digit.float() - pictures[0]).abs().mean() < 8

from cvae.context import generator
from cvae.model.cvae import NOISE_IMAGES, SAMPLES_AT_ONCE

few = validation.batch(slice(NOISE_IMAGES))
random = generator(few.x.device, 0, "evaluation", 0)  # as in `evaluate`
noise(likelihood.ELBO_SAMPLES, len(few.x), model, random)
draws = [noise(SAMPLES_AT_ONCE, len(few.x), model, random) for _ in range(SAMPLES)]
eps = torch.cat(draws)[:SAMPLES]
with torch.no_grad():
    ours = torch.stack([monte_carlo(few, eps), log_mean_exp(log_weights(few, eps))])
theirs = -torch.cat([found.cvae_mc_nll, found.cvae_is_nll])[:, : len(few.x)].float()
assert torch.allclose(ours, theirs, rtol=1e-5), (ours, theirs)
"""
"""What the page's own code finds is what the project finds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the notebook is run."""
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def notebook(folder: Path) -> Any:
    """Return the notebook, run in a kernel of Jupyter on fewer images: its own assertions and CHECKS hold."""
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    for large, small in SMALLER.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and large in cell.source)
        cell.source = cell.source.replace(large, small)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            patch.setenv(name, ENVIRONMENT[name])
        NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def test_notebook_is_the_page() -> None:
    """Without outputs, and for Python's kernel; CONTRIBUTING.md has the command that makes it."""
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    cells, expected = (
        [(cell.cell_type, cell.source) for cell in each.cells] for each in (notebook, jupytext.reads(PAGE, "md"))
    )
    assert cells == expected
    assert [source + "\n" for kind, source in cells if kind == "code"] == BLOCK.findall(PAGE)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.metadata.kernelspec.name == "python3"


def test_blocks_print_and_show(notebook: Any, folder: Path) -> None:
    """No warnings; a picture from each cell that makes one."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    shown = [cell.source for cell in code if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert shown == [cell.source for cell in code if "cvae.show(" in cell.source]
    assert {path.name for path in folder.glob("*.png")} == {"completions.png", "photo.png"}


def test_commands(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few images, with the picture that the blocks have made."""
    monkeypatch.chdir(folder)
    mains = {"train.py": train.main, "eval.py": evaluation.main, "-m cvae.report.complete": complete.main}
    more = [[*SMALL, "--data", str(make_data(folder / "data"))], ["--samples", "2"], []]
    lines = re.findall(r"^    python (.*)$", PAGE, re.MULTILINE)
    for line, (name, main), words in zip(lines, mains.items(), more, strict=True):
        assert line.startswith(name)
        assert main([*shlex.split(line.removeprefix(name)), *words]) == 0
    assert {"learning.gif", "completions.png"} <= {path.name for path in (folder / "runs/q1").iterdir()}
    with Image.open(folder / "out.png") as picture:
        assert picture.width > 5 * picture.height


def test_library_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README.md's use as a library and docs/using.md's training step, in a folder that has nothing but the picture."""
    monkeypatch.chdir(tmp_path)
    (readme,), (_, step) = (BLOCK.findall((ROOT / page).read_text("utf-8")) for page in ("README.md", "docs/using.md"))
    digit = torch.randint(256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(digit.numpy()).save("digit.png")
    names: dict[str, Any] = {}
    exec(readme + step, names)
    assert names["completions"].shape == (10, 1, 28, 28)
    assert names["loss"].isfinite()
    with Image.open("completions.png") as picture:
        assert picture.width > 5 * picture.height
