"""The examples of use as a library, of the README and of a training step, as they stand there."""

import re
from pathlib import Path

from PIL import Image
from support.scripts import ROOT, run_python

from cvae.data.readers import mnist


def test_library_examples(tmp_path: Path) -> None:
    """With the weights that come with the project, in a folder that has nothing but the picture."""
    readme, using = (
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        for page in ("README.md", "docs/using.md")
    )
    assert (len(readme), len(using)) == (1, 2)
    Image.fromarray(mnist("train")[0].numpy()).save(tmp_path / "digit.png")
    code = "\n".join([*readme, using[-1]]) + "\nassert completions.shape == (10, 1, 28, 28)\nassert loss.isfinite()\n"
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(tmp_path / "completions.png") as shown:
        assert shown.width > 5 * shown.height
