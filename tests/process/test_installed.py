"""The installed package: commands that work anywhere, and speak of themselves by their names."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.inprocess import TINY, make_tiny_data
from support.scripts import PATIENCE, ROOT

from cvae.data.masks import Split, quadrants
from cvae.model.networks import build
from cvae.run.weights_file import save_safetensors
from cvae.settings import Settings

SMALL = Settings(hidden=(8, 7), latent_dim=4)
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, but that its reference run has other, small weights."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "train.py", "eval.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "cvae", source / "cvae", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "runs/reference", source / "runs/reference")
    save_safetensors(build(Split(quadrants(1)), SMALL), SMALL, source / "runs/reference/q1/model.safetensors")
    return source


@pytest.fixture(scope="module")
def command(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a command of an environment into which the package alone is installed; the others come from this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env").glob("[lL]ib/**/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    install = ["--python", scripts / "python", "install", "--no-index", "--no-deps", "--no-build-isolation", source]
    subprocess.run([*pip, *install], check=True, timeout=PATIENCE, capture_output=True)

    def run(name: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        line = [scripts / name, *words]
        return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    return run


def test_commands_work_anywhere(command: Command, tmp_path: Path) -> None:
    """And torch is loaded after the process is prepared for it; as a library, they leave the process as it is."""
    make_tiny_data(tmp_path / "data")
    trained = command("cvae-train", *TINY, "--data", "data", cwd=tmp_path)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "runs/q1: trained. Next: cvae-eval, or tensorboard" in trained.stdout
    evaluated = command("cvae-eval", "--samples", "2", cwd=tmp_path)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert "importance sampling" in evaluated.stdout
    Image.new("L", (9, 10), 128).save(tmp_path / "picture.png")
    words = ("q1", "picture.png", "--as-is", "-o", "completed.png")
    completed = command("cvae-complete", *words, cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == "picture.png: 10 completions in completed.png\n"
    missing = command("cvae-page", "none", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.split(":")[0]) == (3, "cvae-page")
    code = """
import signal, sys
import cvae.console, cvae_commands.train, cvae_commands.eval
print(signal.getsignal(signal.SIGINT) == signal.default_int_handler, "site-packages" in cvae_commands.train.__file__)
for name, command, *words in (("cvae-complete", cvae.console.complete, "q1", "none.png", "-o", "completed.png"),
                              ("cvae-train", cvae.console.train, "--data", "data")):
    sys.argv = [f"/bin/{name}", *words]
    print(command())
"""
    refused = command("python", "-c", code, cwd=tmp_path)
    assert refused.stdout == "True True\n3\n2\n"
    without, again = refused.stderr.splitlines()
    assert without == "cvae-complete: none.png: there is no such file"
    assert again.startswith("cvae-train: runs/q1 exists already")
    code = """
import signal, sys
import cvae.console

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL)

sys.meta_path.insert(0, Finder())
cvae.console.train()
"""
    assert command("python", "-c", code, "--help", cwd=tmp_path).stdout.startswith("True\n")


def test_reference_runs_come_with_the_package(source: Path, command: Command, tmp_path: Path) -> None:
    """Found from any folder, installed or in a clone; one of this name that is there comes first."""
    code = "import cvae; print(cvae.__file__, cvae.load('reference/q1').latent_dim)"
    in_clone = f"import sys; sys.path.insert(0, {str(source)!r}); {code}"
    assert command("python", "-c", in_clone, cwd=tmp_path).stdout == f"{source / 'cvae/__init__.py'} 4\n"
    own = tmp_path / "own/runs/reference/q1/model.safetensors"
    own.parent.mkdir(parents=True)
    save_safetensors(build(Split(quadrants(1)), replace(SMALL, latent_dim=5)), replace(SMALL, latent_dim=5), own)
    code += "; import os; os.chdir('own'); print(cvae.load('reference/q1').latent_dim)"
    installed = command("python", "-c", code, cwd=tmp_path)
    assert (installed.stderr, installed.stdout[-5:]) == ("", " 4\n5\n")
    assert "site-packages" in installed.stdout
