"""What several test files share: writing IDX files, and running the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from cvae.data.sources import load_train
from cvae.settings import Settings
from support.images import PACKERS, mnist
from support.images import idx as idx_bytes

ROOT = Path(__file__).resolve().parents[2]
NAMES = {part: (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")}
PATIENCE = 300  # seconds for a script that takes three: beyond them it hangs, however busy the machine is


def write_data(folder: Path, train: Tensor, test: Tensor, suffix: str = "") -> Path:
    """A folder of the four files: these images, and labels of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("t10k", test)):
        for name, array in zip(NAMES[part], (images, torch.zeros(len(images), dtype=torch.uint8)), strict=True):
            (folder / (name + suffix)).write_bytes(PACKERS[suffix](idx_bytes(array)))
    return folder


def write_contrary(folder: Path, train: Tensor, test: Tensor) -> Path:
    """The same, but those of the training images that are held out for validation are negatives."""
    validation = load_train(Settings(data=str(write_data(folder, train, test)))).validation
    held_out = (train[:, None] == validation).flatten(2).all(2).any(1)
    return write_data(folder, torch.where(held_out[:, None, None], 255 - train, train), test)


def small_mnist(folder: Path, num_train: int = 360, num_test: int = 60) -> Path:
    """A folder with the first images of MNIST."""
    return write_data(folder, mnist("train")[:num_train], mnist("t10k")[:num_test])


def run_script(*words: str | Path, cwd: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`train.py …` or `eval.py …` in a process of its own, as `run_python` has it."""
    return run_python(root / words[0], *words[1:], cwd=cwd, root=root)


def run_python(*words: str | Path, cwd: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python …` in a process of its own, on one thread, without a GPU in sight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
