"""Data sets by name: MNIST, which comes with the package, and those that torchvision has downloaded."""

import json
import os
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from torch import Tensor

from cvae.data.idx import idx_set, read_idx
from cvae.data.parts import Images, Part, Source, taken
from cvae.errors import DataError
from cvae.settings import Settings

MNIST = "mnist"
COUNTS = {"train": 60_000, "t10k": 10_000}
SHA256 = {  # of the files of MNIST, uncompressed
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

EMNIST = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
TORCHVISION: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fashion-mnist": ("FashionMNIST", "", ("",)),
    "kmnist": ("KMNIST", "", ("",)),
    "qmnist": ("QMNIST", "qmnist", ('what="train", ', 'what="test", ')),
    **{f"emnist-{split}": ("EMNIST", f"emnist-{split}", (f'split="{split}", ',)) for split in EMNIST},
}
"""torchvision's data sets, by the names that `--data` takes: class, prefix of the files, arguments of its downloads."""

ROOTS = ("~/.cache/torchvision", "data")  # where they are looked for without --data-root
NAMES = (MNIST, *TORCHVISION)


def named(word: str) -> str:
    """What `--data` says, as the settings keep it: a path from the root, or one of NAMES, however it is spelt.

    What exists as a path is a path; nothing (an empty variable of the shell) stays nothing, and is refused later.
    """
    path = os.path.expanduser(word)
    if not os.path.lexists(path) and (name := name_of(word)) is not None:
        return name
    return os.path.realpath(path) if word else word


def name_of(word: str) -> str | None:
    """Which of NAMES a word means, however it is spelt."""
    return next((name for name in NAMES if _letters(name) == _letters(word)), None)


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def find_named(name: str, s: Settings) -> Source:
    """The data set of one of NAMES. Raises DataError with the command that downloads it where it is not."""
    if name == MNIST:
        return Source("MNIST, which comes with the package", "", {"train": _mnist("train"), "test": _mnist("t10k")}, [])
    kind, prefix, arguments = TORCHVISION[name]
    roots = [Path(os.path.expanduser(root)) for root in ([s.data_root] if s.data_root is not None else ROOTS)]
    for root in roots:
        if (source := idx_set(root / kind / "raw", prefix)) is not None:
            return source._replace(form=f"{name}, as torchvision has it in")
    calls = "; ".join(f"D({json.dumps(str(roots[0]))}, {more}download=True)" for more in arguments)
    command = f"python -c {shlex.quote(f'from torchvision.datasets import {kind} as D; {calls}')}"
    raise DataError(
        f"{name}: is not below {' or '.join(map(str, roots))} (--data-root names another); to download: {command}"
    )


def _mnist(part: str) -> Part:
    """A part of the embedded MNIST, whose digest is checked when it is read."""
    return Part(
        COUNTS[part], 28, 28,
        read=lambda rows, reading: Images(taken(mnist(part, reading.check), rows)),
        name=lambda row: f"MNIST: image {row} of {part}",
        held=lambda count: count * 28 * 28,
        labels=lambda: _embedded(f"{part}-labels", 1),
    )  # fmt: skip


def mnist(part: str, check: Callable[[], None] = lambda: None) -> Tensor:
    """The images of the embedded MNIST, part `train` or `t10k`, uint8 `[N, 28, 28]`, as its files have them."""
    return _embedded(f"{part}-images", 3, check)


def _embedded(name: str, num_dims: int, check: Callable[[], None] = lambda: None) -> Tensor:
    with resources.as_file(resources.files("cvae.data") / "mnist" / f"{name}-idx{num_dims}-ubyte.xz") as path:
        return read_idx(path, num_dims, SHA256[name], check)
