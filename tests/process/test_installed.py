"""The installed package: commands that work anywhere, and speak of themselves by their names."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.inprocess import TINY, make_tiny_data
from support.scripts import PATIENCE, ROOT
from support.trainings import ENVIRONMENT

Command = Callable[..., subprocess.CompletedProcess[str]]
AS_LIBRARY = """
import signal, sys
import cvae.console

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("Ctrl-C ends it:", signal.getsignal(signal.SIGINT) == signal.SIG_DFL)

sys.meta_path.insert(0, Finder())
sys.argv = ["/bin/cvae-train", "--data", "data"]
print(cvae.console.train())
sys.argv = ["/bin/cvae-eval", "--samples", "2"]
print(cvae.console.evaluate())
sys.argv = ["/bin/cvae-page", "none"]
print(cvae.console.page())
import cvae, cvae_commands.eval
print("site-packages" in cvae_commands.eval.__file__, cvae.load("reference/q1").latent_dim)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return what runs a command of an environment into which the package alone is installed."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("cvae", "runs/reference"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env").glob("[lL]ib/**/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", scripts / "python"]
    install = [*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", folder]
    subprocess.run(install, check=True, timeout=PATIENCE, capture_output=True)

    def run(name: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
        line = [scripts / name, *words]
        ended = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


def test_commands_work_anywhere(command: Command, tmp_path: Path) -> None:
    """PyTorch is loaded after the process is prepared for it; the runs that come with the package are found."""
    make_tiny_data(tmp_path / "data")
    trained = command("cvae-train", *TINY, "--data", "data", cwd=tmp_path)
    assert "runs/q1: trained. Next: cvae-eval, or tensorboard" in trained.stdout
    Image.new("L", (9, 10), 128).save(tmp_path / "picture.png")
    completed = command("cvae-complete", "q1", "picture.png", "--as-is", "-o", "completed.png", cwd=tmp_path)
    assert completed.stdout == "picture.png: 10 completions in completed.png\n"
    library = command("python", "-c", AS_LIBRARY, cwd=tmp_path)
    assert re.fullmatch(
        "Ctrl-C ends it: True\n2\n(?s:.*)importance sampling.*\n(?s:.*)\n0\n3\nTrue 64\n", library.stdout
    )
    assert re.fullmatch("cvae-train: runs/q1 exists already.*\ncvae-page: .*\n", library.stderr)
