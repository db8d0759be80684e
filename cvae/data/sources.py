"""The sources of images: what `--data` names is read, and divided into training, validation and test images.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0).
"""

import hashlib
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvae import context
from cvae.data.pictures import resized
from cvae.data.readers import Source, read_arrays, read_idx_set, read_pictures
from cvae.data.tasks import binarized
from cvae.errors import DataError, printable, taken_for_damage
from cvae.settings import Settings

MNIST = "mnist"
TORCHVISION = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "qmnist": "QMNIST"}  # its classes, by --data
EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
TORCHVISION |= {f"emnist-{split}": "EMNIST" for split in EMNIST_SPLITS}
NAMES = (MNIST, *TORCHVISION)
ROOTS = ("~/.cache/torchvision", "data")  # where torchvision's data sets are looked for without --data-root
WORDS = {"train": "training", "validation": "validation", "test": "test"}
# The parts of the images that are black or white from the start, by the setting `targets`
DRAWN_ONCE = {"grey": (), "binary": ("validation", "test"), "binary-fixed": tuple(WORDS)}
DEFAULTS = Settings()


class TrainImages(NamedTuple):
    """The images of a training, uint8 `[N, height, width]`, 0 to 255; a line about them; their `record`."""

    train: Tensor
    validation: Tensor
    about: str
    record: dict[str, Any]


class TestImages(NamedTuple):
    """The images of an evaluation, as in `TrainImages`."""

    images: Tensor
    about: str
    record: dict[str, Any]


def load_train(s: Settings = DEFAULTS) -> TrainImages:
    """Load the training and validation images that the settings name, MNIST where they name none.

    The last 10,000 of the 60,000 images of MNIST are for validation. Other training images are permuted by `s.seed`,
    and the last sixth of them, 10,000 at most, is for validation, unless the source has validation images. From a
    source that is not divided, a sixth is taken for the test first, the same one for every seed. Test images are hashed
    for the record, and not used.

    Raises:
        DataError: For images that are not there, damaged or too few; UsageError: for too little memory.
    """
    images, about = _load(s, tuple(WORDS))
    entries = record(**{part: images.get(part) for part in WORDS})
    return TrainImages(images["train"], images["validation"], about, entries)


def load_test(s: Settings = DEFAULTS) -> TestImages:
    """Load the test images: `eval.py` alone measures on them. Arguments and errors as of `load_train`."""
    images, about = _load(s, ("test",))
    return TestImages(images["test"], about, record(test=images["test"]))


def load_labels(s: Settings, part: str) -> Tensor:
    """Load the classes of the images of one part, int64 `[N]`, in the order of the images; raise DataError for none."""
    labels = _divided(source := _read(s, WORDS, "labels"), s.seed)
    if part not in labels:
        raise DataError(f"{source.place}: has no labels to classify images by; MNIST and IDX files can have them")
    return labels[part]


def _load(s: Settings, wanted: tuple[str, ...]) -> tuple[dict[str, Tensor], str]:
    """Return the images of the wanted parts, of which the first has to be there, and the line about them."""
    form, place, _, notes = source = _read(s, wanted, "images")
    images = {part: pixels for part, pixels in _divided(source, s.seed).items() if part in wanted}
    if wanted[0] not in images:
        raise DataError(f"{place}: has no {WORDS[wanted[0]]} images")
    for part, pixels in images.items():
        if pixels.max() == 1:
            notes.append("the brightest level is 1 of 255: taken as black and white, and scaled")
            pixels = pixels * 255
        if s.transpose:
            pixels = pixels.transpose(1, 2).contiguous()
        if s.size is not None:
            pixels = torch.from_numpy(np.stack([resized(image, s.size) for image in pixels.numpy()]))
        images[part] = binarized(pixels, "targets", part) if part in DRAWN_ONCE[s.targets] else pixels
    sizes = {part: f"{pixels.shape[1]}×{pixels.shape[2]}" for part, pixels in images.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{place}: has images of {' and '.join(sizes.values())} pixels; --size N scales them all")
    if "emnist" in place.lower() and not s.transpose:
        notes.append("EMNIST's files hold them transposed: --transpose turns them upright")
    if "train" in images and "test" not in images:
        notes.append("no test images, so that eval.py will not be able to evaluate the run")
    counts = ", ".join(f"{len(images[part]):,} {WORDS[part]}" for part in wanted if part in images)
    about = f"{form} {place}".strip() + f": {counts} images of {sizes[wanted[0]]} pixels"
    return images, printable("; ".join(dict.fromkeys([about, *notes])))


def _read(s: Settings, wanted: Collection[str], kind: str) -> Source:
    """Read the wanted parts of what the settings name, `images` or `labels`, which IDX files alone have."""
    word = s.data or MNIST
    if word in TORCHVISION:
        return _read_torchvision(word, s, wanted, kind)
    path = Path(__file__).with_name("mnist") if word == MNIST else Path(os.path.expanduser(word))
    with taken_for_damage(f"{path}: cannot be read", Exception):
        source = read_idx_set(path, wanted, kind)
        if source is None and kind == "labels":
            source = Source("", word, {}, [])
        source = source or read_arrays(path, wanted) or read_pictures(path, wanted, s.size)
    if source is None:
        problem = "holds no images" if path.exists() else "there is no such folder or file"
        what = f"a folder of IDX files or of pictures, an .npz or .npy file, or one of {', '.join(NAMES)}"
        raise DataError(f"{word}: {problem}; --data takes {what}")
    return source._replace(form="MNIST, which comes with the package", place="") if word == MNIST else source


def _read_torchvision(name: str, s: Settings, wanted: Collection[str], kind: str) -> Source:
    """Read one of torchvision's data sets. Raise DataError with the command that downloads it."""
    cls = TORCHVISION[name]
    roots = [os.path.expanduser(root) for root in ([s.data_root] if s.data_root is not None else ROOTS)]
    for root in roots:
        if source := read_idx_set(Path(root, cls, "raw", name if cls == "EMNIST" else ""), wanted, kind):
            return source._replace(form=f"{name}, as torchvision has it in")
    more = f", split={name.removeprefix('emnist-')!r}" if cls == "EMNIST" else ""
    calls = f"[{cls}({roots[0]!r}, train=part, download=True{more}) for part in (True, False)]"
    command = f"python -c {shlex.quote(f'from torchvision.datasets import {cls}; {calls}')}"
    raise DataError(f"{name}: is not below {' or '.join(roots)} (--data-root names another); to download: {command}")


def named(word: str) -> str:
    """Return a word of `--data` as the settings keep it: one of NAMES that is no path, or a path from the root."""
    is_name = word.lower() in NAMES and not os.path.lexists(word)
    return word.lower() if is_name else word and os.path.realpath(os.path.expanduser(word))


def _divided(source: Source, seed: int) -> dict[str, Tensor]:
    """Return images, or labels, divided into training, validation and test ones."""
    parts = dict(source.parts)
    if (everything := parts.pop("all", None)) is not None:
        everything = everything[context.permutation(len(everything), "test images")]
        parts["train"], parts["test"] = _held_out(source, everything)
        source.notes.append("a sixth drawn for the test, the same for every seed")
    if "train" in parts and source.place:  # MNIST has no place, and stays in order
        parts["train"] = parts["train"][context.permutation(len(parts["train"]), seed, "validation images")]
    if "train" in parts and "validation" not in parts:
        parts["train"], parts["validation"] = _held_out(source, parts["train"])
        drawn = f"validation images drawn by seed {seed}"
        source.notes.append(drawn if source.place else "the last ones for validation")
    return parts


def _held_out(source: Source, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images, and the last of them to be held out: a sixth, 10,000 at most."""
    count = min(len(images) // 6, 10_000)
    if count == 0:
        raise DataError(f"{source.place}: {len(images)} images are too few to hold out a sixth; give at least 6")
    return images[:-count], images[-count:]


def record(**parts: Tensor | None) -> dict[str, Any]:
    """Return what identifies images in `config.json`: `height`, `width`, and for each part its `count` and `sha256`."""
    entries: dict[str, Any] = {"height": 0, "width": 0} | dict.fromkeys(parts)
    for part, images in parts.items():
        if images is not None:
            entries["height"], entries["width"] = images.shape[1:]
            digest = hashlib.sha256(images.contiguous().numpy().data).hexdigest()
            entries[part] = {"count": len(images), "sha256": digest}
    return entries


def refuse_others(run: Path, recorded: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise DataError unless the images that are here are the recorded ones of a run, in the parts that both have."""
    if (other := difference(recorded, here)) is not None:
        raise DataError(f"{run}: was begun on {other}; --data says where its own are")


def difference(recorded: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Return in what the images that are here differ from the recorded ones, in the parts that both have; or None."""
    size, size_here = (f"{entry['height']}×{entry['width']}" for entry in (recorded, here))
    if size != size_here:
        return f"images of {size} pixels, and these have {size_here}"
    for part in WORDS:
        before, now = recorded.get(part), here.get(part)
        if before and now and before["count"] != now["count"]:
            return f"{before['count']} {part} images, and here are {now['count']}"
        if before and now and before != now:
            return f"other {part} images of the same number and size (their SHA-256 differs)"
    return None
