"""The sources of images: find, verify and split them.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0); `--data` names a folder with
other images in the same format.
"""

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from cvae.data.idx import SUFFIXES, read_idx
from cvae.data.images import as_targets
from cvae.errors import DataError
from cvae.settings import Settings

Part = Literal["train", "t10k"]

SHA256 = {  # of the four files, uncompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class TrainImages(NamedTuple):
    """What a training takes of a source: images, each part uint8 `[N, height, width]`, 0 to 255.

    about: one line for the user, what was taken: form, folder, counts, size. record: what identifies the images, as
    `config.json` keeps it: `height` and `width`, and for each part (`train`, `validation`, `test`) its `count` and the
    `sha256` of its bytes, or None for a part that there is not. The test images are hashed for it, and not used.
    """

    train: Tensor
    validation: Tensor
    about: str
    record: dict[str, Any]


class TestImages(NamedTuple):
    """What an evaluation takes of a source; `about` and `record`, of the one part, as of `TrainImages`."""

    images: Tensor
    about: str
    record: dict[str, Any]


def load_train(s: Settings = Settings(), room: int | None = None) -> TrainImages:  # noqa: B008
    """The training and validation images of the source that the settings name, MNIST where they name none.

    The last 10,000 of the 60,000 images of MNIST are for validation; of fewer images, the last sixth.
    room: bytes that the images may take on the device. Raises DataError, naming the file at fault.
    """
    images = load_images(s.data, "train")
    num_validation = 10_000 if len(images) >= 60_000 else len(images) // 6
    if num_validation == 0:
        raise DataError(f"{s.data}: {len(images)} training images are too few to hold out a sixth; give at least 6")
    train = as_targets(s, "train", images[:-num_validation])
    validation = as_targets(s, "validation", images[-num_validation:])
    parts = {"train": train, "validation": validation, "test": as_targets(s, "test", load_images(s.data, "t10k"))}
    return TrainImages(train, validation, "", record(**parts))


def load_test(s: Settings = Settings(), room: int | None = None) -> TestImages:  # noqa: B008
    """The test images: for `eval.py` alone. room, errors: as in `load_train`."""
    images = as_targets(s, "test", load_images(s.data, "t10k"))
    return TestImages(images, "", record(test=images))


def named(word: str) -> str:
    """What `--data` says, as the settings keep it: a path from the root, or the name of a data set."""
    return str(Path(word).expanduser().resolve())


def record(**parts: Tensor | None) -> dict[str, Any]:
    """What identifies images: see `TrainImages`."""
    sides = next(part.shape[1:] for part in parts.values() if part is not None)
    found = {
        name: None
        if part is None
        else {"count": len(part), "sha256": hashlib.sha256(part.numpy().tobytes()).hexdigest()}
        for name, part in parts.items()
    }
    return {"height": sides[0], "width": sides[1], **found}


def difference(recorded: dict[str, Any], found: dict[str, Any]) -> str | None:
    """In what the images that were found differ from the recorded ones, in the parts that both have; None: in nothing.

    Raises KeyError, TypeError or AttributeError for a record that is none.
    """
    sizes = [f"{each['height']}×{each['width']}" for each in (recorded, found)]
    if sizes[0] != sizes[1]:
        return f"images of {sizes[0]} pixels, and these have {sizes[1]}"
    for part in ("train", "validation", "test"):
        before, now = recorded.get(part), found.get(part)
        if before is None or now is None or before == now:
            continue
        if before["count"] != now["count"]:
            return f"{before['count']} {part} images, and here are {now['count']}"
        return f"other {part} images of the same number and size (their SHA-256 differs)"
    return None


def load_images(folder: str | Path | None, part: Part) -> Tensor:
    """The images of one part of a data set, uint8 `[N, height, width]`; its labels are read to be checked only.

    `folder`: where the IDX files lie (plain, .gz or .xz), flat or in torchvision's layout, `MNIST/raw` below it;
    None: the embedded MNIST. Raises DataError, naming the file at fault.
    """
    names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    if folder is None:
        embedded = resources.files("cvae.data") / "mnist"
        with resources.as_file(embedded) as directory:
            images, labels = (
                read_idx(directory / f"{name}.xz", num_dims, SHA256[name])
                for name, num_dims in zip(names, (3, 1), strict=True)
            )
        return images
    paths = [_find(Path(folder), name) for name in names]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise DataError(f"{paths[1]}: has {len(labels)} labels for the {len(images)} images of {paths[0].name}")
    if min(images.shape[1:]) < 2:
        raise DataError(f"{paths[0]}: images of {images.shape[1]}×{images.shape[2]} pixels have no four quadrants")
    return images


def _find(folder: Path, name: str) -> Path:
    """The file of this name, in the folder itself or in torchvision's layout below it."""
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise DataError(f"{folder}: there is no such folder; --data names one with the four IDX files")
    places = [folder, folder / "MNIST" / "raw", folder / "raw", *sorted(folder.glob("*/raw"))]
    for place in places:
        for suffix in SUFFIXES:
            path = place / (name + suffix)
            if os.path.isfile(path):
                return path
    raise DataError(f"{folder}: has no {name} (plain, .gz or .xz), nor has its MNIST/raw/")
