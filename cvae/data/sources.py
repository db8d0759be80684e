"""The sources of images: what `--data` names is read, and divided into training, validation and test images.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0).
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cvae import context
from cvae.data.images import as_targets
from cvae.data.pictures import read_pictures, resized
from cvae.data.readers import Source, as_images, mnist, naming, read_arrays, read_idx_set
from cvae.errors import DataError, printable
from cvae.settings import LARGEST_SIDE, Settings

MNIST = "mnist"
TORCHVISION: dict[str, tuple[str, dict[str, str]]] = {
    "fashion-mnist": ("FashionMNIST", {}),
    "kmnist": ("KMNIST", {}),
    "qmnist": ("QMNIST", {}),
    **{
        f"emnist-{split}": ("EMNIST", {"split": split})
        for split in ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
    },
}
"""torchvision's data sets, by the names that `--data` takes: class and arguments."""

NAMES = (MNIST, *TORCHVISION)
ROOTS = ("~/.cache/torchvision", "data")  # where torchvision's data sets are looked for without --data-root
ALL = ("train", "validation", "test")


class TrainImages(NamedTuple):
    """The images of a training, each part uint8 `[N, height, width]`, 0 to 255.

    Attributes:
        train, validation: The images.
        about: One line for the user: form, place, counts, size, and what was chosen in reading them.
        record: What identifies the images, as `config.json` keeps it: `height` and `width`, and for each part
            (`train`, `validation`, `test`) its `count` and the `sha256` of its bytes, or None where there is no such
            part. The test images are hashed for it, and not used.
    """

    train: Tensor
    validation: Tensor
    about: str
    record: dict[str, Any]


class TestImages(NamedTuple):
    """The images of an evaluation; `about` and `record`, of the one part, as of `TrainImages`."""

    images: Tensor
    about: str
    record: dict[str, Any]


def load_train(
    s: Settings = Settings(), show: bool = False, check: Callable[[], None] = lambda: None  # noqa: B008
) -> TrainImages:  # fmt: skip
    """Load the training and validation images that the settings name, MNIST where they name none.

    The last 10,000 of the 60,000 images of MNIST are for validation. Other training images are permuted by `s.seed`, so
    that it does not matter in which order they lie, and the last sixth of them, 10,000 at the most, is for validation,
    unless the source has validation images. From a source that is not divided, a sixth is taken for the test first,
    the same one whatever the seed.

    Args:
        s: The settings.
        show: Whether the user sees a progress bar.
        check: Called while pictures are read; what it raises ends the reading.

    Raises:
        DataError: For images that are not there, damaged or too few, with the file.
        UsageError: For too little memory.
    """
    images, about = _load(s, ALL, show, check)
    return TrainImages(images["train"], images["validation"], about, record(**{part: images.get(part) for part in ALL}))


def load_test(
    s: Settings = Settings(), show: bool = False, check: Callable[[], None] = lambda: None  # noqa: B008
) -> TestImages:  # fmt: skip
    """Load the test images: `eval.py` alone measures on them, the page shows them. As `load_train`."""
    images, about = _load(s, ("test",), show, check)
    return TestImages(images["test"], about, record(**images))


def load_labels(s: Settings, part: str) -> Tensor:
    """Return the classes of the images of one part, `train`, `validation` or `test`, in the order of the images.

    Returns:
        int64 `[N]`.

    Raises:
        DataError: Where there are none, or they cannot be read.
    """
    word = MNIST if s.data is None else s.data
    named = word in NAMES
    source = _named(word, s.data_root, "labels") if named else read_idx_set(Path(word), ALL, "labels")
    labels = {} if source is None else _divided(source, s.seed)
    if part not in labels:
        raise DataError(f"{word}: has no labels, by which images are classified; MNIST and IDX files can have them")
    return labels[part]


def _load(s: Settings, wanted: tuple[str, ...], show: bool, check: Callable[[], None]) -> tuple[dict[str, Tensor], str]:
    """Return the images of the wanted parts, of which the first has to be there, and the line about them."""
    source = _read(s, wanted, show, check)
    notes = source.notes
    for part, images in source.parts.items():
        height, width = images.shape[1:]
        if s.transpose:
            source.parts[part] = images = images.transpose(1, 2).contiguous()
        if s.size is None and not (min(height, width) >= 2 and max(height, width) <= LARGEST_SIDE):
            raise DataError(
                f"{source.place}: has images of {height}×{width} pixels; 2 to {LARGEST_SIDE} a side can be trained on "
                "(--size N scales them)"
            )
        if s.size is not None and images.shape[1:] != (s.size, s.size):
            notes.append(f"scaled from {height}×{width}")
            source.parts[part] = resized(images, s.size, show, check)
    sizes = {part: "×".join(map(str, images.shape[1:])) for part, images in source.parts.items()}
    if len(set(sizes.values())) > 1:
        words = " and ".join(f"{part} images of {size} pixels" for part, size in sizes.items())
        raise DataError(f"{source.place}: has {words}; --size N scales them all")
    if s.transpose:
        notes.append("rows and columns swapped")
    elif "emnist" in "/".join(Path(source.place).parts[-3:]).lower():
        notes.append("EMNIST's files hold them transposed: --transpose turns them upright")
    images_of = _divided(source, s.seed)
    names = {"train": "training", "validation": "validation", "test": "test"}
    if wanted[0] not in images_of:
        raise DataError(f"{source.place}: has no {names[wanted[0]]} images")
    if "train" in wanted and "test" not in images_of:
        notes.append("no test images, so that eval.py will not be able to evaluate the run")
    images_of = {part: as_targets(s, part, images_of[part]) for part in wanted if part in images_of}
    counts = ", ".join(f"{len(images):,} {names[part]}" for part, images in images_of.items())
    size = next(iter(sizes.values()))
    about = f"{source.form} {source.place}".strip() + f": {counts} images of {size} pixels"
    return images_of, printable("; ".join(dict.fromkeys([about, *notes])))


def _read(s: Settings, wanted: tuple[str, ...], show: bool, check: Callable[[], None]) -> Source:
    """Read what the settings name."""
    word = MNIST if s.data is None else s.data
    if word in NAMES:
        return _named(word, s.data_root, "images", wanted)
    path, source = Path(os.path.expanduser(word)), None
    with naming(path):
        if word:
            source = read_idx_set(path, wanted) or read_arrays(path, wanted)
            source = source or read_pictures(path, wanted, s.size, show, check)
    if source is None:
        problem = "holds no images" if word and path.exists() else "there is no such folder or file"
        raise DataError(
            f"{word or '--data'}: {problem}; --data takes a folder of IDX files or of pictures, an .npz or .npy file, "
            f"or one of {', '.join(NAMES)}"
        )
    if path.parent == Path.cwd() and _name_of(path.name):
        source.notes.append("a path, not the data set of this name")
    return source


def _named(name: str, data_root: str | None, kind: str, wanted: tuple[str, ...] = ALL) -> Source:
    """Read the images or labels of one of NAMES. Raises DataError with the command that downloads it."""
    files = {"train": "train", "test": "t10k"}
    if name == MNIST:
        parts = {part: mnist(file, kind) for part, file in files.items() if part in wanted}
        return Source("MNIST, which comes with the package", "", parts, [])
    from torchvision import datasets  # takes a second, which MNIST does not need

    cls, arguments = TORCHVISION[name]
    roots = [os.path.expanduser(root) for root in ([data_root] if data_root is not None else ROOTS)]
    for root in roots:
        parts, place = {}, os.path.join(root, cls, "raw")
        notes: list[str] = []
        with naming(place):
            try:
                for part in (part for part in files if part in wanted):
                    stored = getattr(datasets, cls)(root, train=part == "train", **arguments)
                    classes = stored.targets.reshape(len(stored.targets), -1)[:, 0].long()
                    is_asked = kind == "labels"
                    parts[part] = classes if is_asked else as_images(stored.data.numpy(), f"{place}: {part}", notes)
            except RuntimeError as error:
                if "Dataset not found" in str(error):
                    continue
                raise
        return Source(f"{name}, as torchvision has it in", place, parts, notes)
    more = "".join(f", {key}={value!r}" for key, value in arguments.items())
    calls = "; ".join(f"D({json.dumps(roots[0])}, train={train}, download=True{more})" for train in (True, False))
    command = f"python -c {shlex.quote(f'from torchvision.datasets import {cls} as D; {calls}')}"
    raise DataError(f"{name}: is not below {' or '.join(roots)} (--data-root names another); to download: {command}")


def named(word: str) -> str:
    """Return what `--data` says as the settings keep it: a path from the root, or one of NAMES, however it is spelt.

    What exists as a path is a path; nothing (an empty variable of the shell) stays nothing, and is refused later.
    """
    path = os.path.expanduser(word)
    name = None if os.path.lexists(path) else _name_of(word)
    return name or (os.path.realpath(path) if word else word)


def _name_of(word: str) -> str | None:
    """Return the one of NAMES that a word means."""
    letters = word.lower().replace("-", "").replace("_", "")
    return next((name for name in NAMES if name.replace("-", "") == letters), None)


def _divided(source: Source, seed: int) -> dict[str, Tensor]:
    """Return images, or labels, divided into training, validation and test ones."""
    parts = dict(source.parts)
    if "all" in parts:
        everything = parts.pop("all")
        everything = everything[context.permutation(len(everything), "test images")]
        parts["train"], parts["test"] = _held_out(source, everything)
        source.notes.append("a sixth drawn for the test, the same for every seed")
    if "train" in parts:
        train = parts["train"]
        if source.place:  # MNIST has no place, and stays in order
            train = train[context.permutation(len(train), seed, "validation images")]
        if "validation" not in parts:
            train, parts["validation"] = _held_out(source, train)
            words = f"validation images drawn by seed {seed}" if source.place else "the last ones for validation"
            source.notes.append(words)
        parts["train"] = train
    return parts


def _held_out(source: Source, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images, and the last of them to be held out: a sixth, or 10,000 of 60,000 and more."""
    count = 10_000 if len(images) >= 60_000 else len(images) // 6
    if count == 0:
        raise DataError(f"{source.place}: {len(images)} images are too few to hold out a sixth; give at least 6")
    return images[:-count], images[-count:]


# What identifies images


def record(**parts: Tensor | None) -> dict[str, Any]:
    """Return what identifies images uint8 `[N, height, width]`: see `TrainImages`."""
    sides = [images.shape[1:] for images in parts.values() if images is not None]
    digests = {
        part: None
        if images is None
        else {"count": len(images), "sha256": hashlib.sha256(images.contiguous().numpy().data).hexdigest()}
        for part, images in parts.items()
    }
    return {"height": sides[0][0], "width": sides[0][1], **digests}


def difference(recorded: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Return in what the images that are here differ from the recorded ones, in the parts that both have; or None.

    Raises:
        KeyError, TypeError or AttributeError: For a record that is none.
    """
    sizes = [f"{each['height']}×{each['width']}" for each in (recorded, here)]
    if sizes[0] != sizes[1]:
        return f"images of {sizes[0]} pixels, and these have {sizes[1]}"
    for part in ALL:
        before, now = recorded.get(part), here.get(part)
        if before is None or now is None or before == now:
            continue
        if before["count"] != now["count"]:
            return f"{before['count']} {part} images, and here are {now['count']}"
        return f"other {part} images of the same number and size (their SHA-256 differs)"
    return None
