"""The sources of images: what `--data` names is read, and divided into training, validation and test images.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0).
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cvae import context
from cvae.data.pictures import read_pictures, resized
from cvae.data.readers import Source, mnist, naming, read_arrays, read_idx_set
from cvae.data.tasks import as_targets
from cvae.errors import DataError, printable
from cvae.settings import Settings

MNIST = "mnist"
EMNIST = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
TORCHVISION = {"fashion-mnist": ("FashionMNIST", ""), "kmnist": ("KMNIST", ""), "qmnist": ("QMNIST", "qmnist")}
TORCHVISION |= {f"emnist-{split}": ("EMNIST", f"emnist-{split}") for split in EMNIST}
"""torchvision's data sets, by the names that `--data` takes: class, and the prefix of the files' names."""

NAMES = (MNIST, *TORCHVISION)
ROOTS = ("~/.cache/torchvision", "data")  # where torchvision's data sets are looked for without --data-root
WORDS = {"train": "training", "validation": "validation", "test": "test"}
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


def load_train(s: Settings = DEFAULTS, show: bool = False, check: Callable[[], None] = lambda: None) -> TrainImages:
    """Load the training and validation images that the settings name, MNIST where they name none.

    The last 10,000 of the 60,000 images of MNIST are for validation. Other training images are permuted by `s.seed`,
    and the last sixth of them, 10,000 at most, is for validation, unless the source has validation images. From a
    source that is not divided, a sixth is taken for the test first, the same one for every seed. Test images are hashed
    for the record, and not used.

    show: whether the user sees a progress bar. check: called before each picture; what it raises ends the reading.

    Raises:
        DataError: For images that are not there, damaged or too few; UsageError: for too little memory.
    """
    images, about = _load(s, tuple(WORDS), show, check)
    entries = record(**{part: images.get(part) for part in WORDS})
    return TrainImages(images["train"], images["validation"], about, entries)


def load_test(s: Settings = DEFAULTS, show: bool = False, check: Callable[[], None] = lambda: None) -> TestImages:
    """Load the test images: `eval.py` alone measures on them. Arguments and errors as of `load_train`."""
    images, about = _load(s, ("test",), show, check)
    return TestImages(images["test"], about, record(test=images["test"]))


def load_labels(s: Settings, part: str) -> Tensor:
    """Load the classes of the images of one part, int64 `[N]`, in the order of the images; raise DataError for none."""
    word = s.data or MNIST
    source = _read_named(word, s, WORDS, "labels") if word in NAMES else read_idx_set(Path(word), WORDS, "labels")
    labels = {} if source is None else _divided(source, s.seed)
    if part not in labels:
        raise DataError(f"{word}: has no labels, by which images are classified; MNIST and IDX files can have them")
    return labels[part]


def _load(s: Settings, wanted: tuple[str, ...], show: bool, check: Callable[[], None]) -> tuple[dict[str, Tensor], str]:
    """Return the images of the wanted parts, of which the first has to be there, and the line about them."""
    source = _read(s, wanted, show, check)
    form, place, _, notes = source
    parts = _divided(source, s.seed)
    if wanted[0] not in parts:
        raise DataError(f"{place}: has no {WORDS[wanted[0]]} images")
    images = {}
    for part in (part for part in wanted if part in parts):
        pixels = parts[part].transpose(1, 2).contiguous() if s.transpose else parts[part]
        if s.size is not None and pixels.shape[1:] != (s.size, s.size):
            notes.append(f"scaled from {pixels.shape[1]}×{pixels.shape[2]}")
            pixels = resized(pixels, s.size, check)
        images[part] = as_targets(s, part, pixels)
    sizes = {part: f"{pixels.shape[1]}×{pixels.shape[2]}" for part, pixels in images.items()}
    if len(set(sizes.values())) > 1:
        words = " and ".join(f"{part} images of {size} pixels" for part, size in sizes.items())
        raise DataError(f"{place}: has {words}; --size N scales them all")
    if s.transpose:
        notes.append("rows and columns swapped")
    elif "emnist" in "/".join(Path(place).parts[-3:]).lower():
        notes.append("EMNIST's files hold them transposed: --transpose turns them upright")
    if "train" in images and "test" not in images:
        notes.append("no test images, so that eval.py will not be able to evaluate the run")
    counts = ", ".join(f"{len(pixels):,} {WORDS[part]}" for part, pixels in images.items())
    about = f"{form} {place}".strip() + f": {counts} images of {sizes[wanted[0]]} pixels"
    return images, printable("; ".join(dict.fromkeys([about, *notes])))


def _read(s: Settings, wanted: tuple[str, ...], show: bool, check: Callable[[], None]) -> Source:
    """Read what the settings name."""
    word = MNIST if s.data is None else s.data
    if word in NAMES:
        return _read_named(word, s, wanted, "images")
    path, source = Path(os.path.expanduser(word)), None
    if word:
        with naming(path):
            source = read_idx_set(path, wanted) or read_arrays(path, wanted)
            source = source or read_pictures(path, wanted, s.size, show, check)
    if source is None:
        problem = "holds no images" if word and os.path.exists(path) else "there is no such folder or file"
        what = f"a folder of IDX files or of pictures, an .npz or .npy file, or one of {', '.join(NAMES)}"
        raise DataError(f"{word or '--data'}: {problem}; --data takes {what}")
    return source


def _read_named(name: str, s: Settings, wanted: Collection[str], kind: str) -> Source:
    """Read the `images` or `labels` of one of NAMES. Raise DataError with the command that downloads it."""
    if name == MNIST:
        parts = {part: mnist(file, kind) for part, file in (("train", "train"), ("test", "t10k")) if part in wanted}
        return Source("MNIST, which comes with the package", "", parts, [])
    cls, prefix = TORCHVISION[name]
    roots = [os.path.expanduser(root) for root in ([s.data_root] if s.data_root is not None else ROOTS)]
    for root in roots:
        with naming(path := Path(root, cls, "raw", prefix)):
            if source := read_idx_set(path, wanted, kind):
                return source._replace(form=f"{name}, as torchvision has it in")
    more = f", split={name.removeprefix('emnist-')!r}" if cls == "EMNIST" else ""
    calls = "; ".join(f"D({roots[0]!r}, train={train}, download=True{more})" for train in (True, False))
    command = f"python -c {shlex.quote(f'from torchvision.datasets import {cls} as D; {calls}')}"
    raise DataError(f"{name}: is not below {' or '.join(roots)} (--data-root names another); to download: {command}")


def named(word: str) -> str:
    """Return a word of `--data` as the settings keep it: one of NAMES, however it is spelt, or a path from the root.

    A name that exists as a path is a path; an empty word stays empty, and is refused later.
    """
    path, letters = os.path.expanduser(word), word.lower().replace("-", "").replace("_", "")
    names = [name for name in NAMES if name.replace("-", "") == letters and not os.path.lexists(path)]
    return names[0] if names else word and os.path.realpath(path)


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
