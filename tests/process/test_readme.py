"""The examples of use as a library, of the README and of a training step, as they stand there."""

import re
from pathlib import Path

import torch
from PIL import Image
from support.scripts import ROOT, run_python

EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_library_examples(tmp_path: Path) -> None:
    """With the weights that come with the project, in a folder that has nothing but the picture."""
    (readme,), (_, step) = (
        EXAMPLE.findall((ROOT / page).read_text("utf-8")) for page in ("README.md", "docs/using.md")
    )
    picture = torch.randint(256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(picture.numpy()).save(tmp_path / "digit.png")
    checks = "assert completions.shape == (10, 1, 28, 28)\nassert loss.isfinite()\n"
    result = run_python("-c", "\n".join([readme, step, checks]), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(tmp_path / "completions.png") as shown:
        assert shown.width > 5 * shown.height
