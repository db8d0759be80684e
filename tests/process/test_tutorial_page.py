"""The tutorial: its notebook says the same, and runs from top to bottom."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from support.scripts import PATIENCE, ROOT

DOCS = ROOT / "docs"
SIZES = "IMAGES, BASELINE_EPOCHS, EPOCHS = 20_000, 4, 8"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_is_the_page():
    """`jupytext --to ipynb docs/tutorial.md` makes it, without outputs."""
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    assert cells(notebook) == cells(jupytext.read(DOCS / "tutorial.md"))
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.process
def test_notebook_runs(tmp_path: Path, monkeypatch):
    """In a kernel of Jupyter, on fewer images: its own assertions hold, the objectives grow, pictures are shown."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    (sized,) = [cell for cell in notebook.cells if SIZES in cell.source]
    sized.source = sized.source.replace(SIZES, "IMAGES, BASELINE_EPOCHS, EPOCHS = 1000, 2, 2")
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            "assert baseline_means == sorted(baseline_means) and means == sorted(means)\n"
            "assert samples.shape == (10, 8, 28, 28) and completions.shape == (10, 1, 28, 28)\n"
            "expected = pictures.validation[:8, split.observed] / 255\n"
            "assert torch.allclose(samples[..., split.observed], expected.expand(10, -1, -1), atol=1e-6)\n"
        )
    )
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == sum("cvae.show(" in cell.source for cell in notebook.cells) - 1  # the last one is saved
    assert [path.name for path in tmp_path.iterdir()] == ["completions.png"]
