"""The sources of images: what `--data` names is found, read, and divided into training, validation and test images.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0).
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.data.arrays import find_arrays
from cvae.data.division import Rows, divided, hold_out_validation
from cvae.data.idx import find_idx
from cvae.data.images import as_targets
from cvae.data.masks import is_picture, make_split
from cvae.data.names import MNIST, NAMES, find_named, name_of, named
from cvae.data.parts import Images, Part, Source, resized
from cvae.data.pictures import find_pictures
from cvae.errors import DataError, printable
from cvae.settings import LARGEST_SIDE, Settings

__all__ = ["READERS", "TestImages", "TrainImages", "difference", "load_test", "load_train", "named", "record"]

READERS: tuple[Callable[[Path, Settings], Source | None], ...] = (find_idx, find_arrays, find_pictures)
"""Each finds images of its form at a path, or returns None; the first that finds any is taken."""


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

    The last 10,000 of the 60,000 images of MNIST are for validation. Other training images are permuted by
    `s.seed`, so that it does not matter in which order they lie, and the last sixth of them, 10,000 at the most, is for
    validation, unless the source has validation images. Of a source that is not divided, a sixth is taken for the
    test first, the same one whatever the seed.

    room: bytes that the images may take on the device. They need `(T + V) · (P + 4 · H)`, for T training (at most
    `s.train_limit`) and V validation images of P pixels, a byte each, H of them hidden, for which the baseline's
    guesses are kept in float32; `T · P` more where they are binarized anew each epoch. This is looked at before
    anything is read whole. Raises DataError, naming the file at fault.
    """
    with _one_line():
        source = _find(s)
        rows, notes = divided(source)
        if "train" not in rows:
            raise DataError(f"{source.place}: has no training images")
        hold_out_validation(source, rows, notes, s)
        (part, train), (_, validation) = rows["train"], rows["validation"]
        height, width = _size(part, s)
        used, hidden = min(len(train), s.train_limit or len(train)), height * width
        if not is_picture(s):
            hidden = make_split(s, height, width).num_hidden
        sums = {
            "pixels": (used + len(validation) + used * (s.targets == "binary")) * height * width,
            "the baseline's guesses": (used + len(validation)) * hidden * 4,
        }
        _check_room(source, f"{used + len(validation):,} images of {height}×{width} pixels", sums, room)
        pixels, about = _read_all(source, rows, notes, s)
        parts = {name: pixels.get(name) for name in ("train", "validation", "test")}
        return TrainImages(pixels["train"], pixels["validation"], about, record(**parts))


def load_test(s: Settings = Settings(), room: int | None = None) -> TestImages:  # noqa: B008
    """The test images: for `eval.py` alone. room: bytes for their pixels; errors: as in `load_train`."""
    with _one_line():
        source = _find(s)
        rows, notes = divided(source)
        if "test" not in rows:
            raise DataError(f"{source.place}: has no test images")
        part, chosen = rows["test"]
        height, width = _size(part, s)
        sums = {"pixels": len(chosen) * height * width}
        _check_room(source, f"{len(chosen):,} test images of {height}×{width} pixels", sums, room)
        pixels, about = _read_all(source, {"test": rows["test"]}, notes, s)
        return TestImages(pixels["test"], about, record(**pixels))


def _find(s: Settings) -> Source:
    """What the settings name."""
    word = MNIST if s.data is None else s.data
    if word in NAMES:
        return find_named(word, s)
    path = Path(os.path.expanduser(word))
    for reader in READERS if word else ():
        if (source := reader(path, s)) is not None:
            here = path.parent == Path.cwd() and name_of(path.name) is not None
            return source._replace(
                notes=[*source.notes, "a path, not the data set of this name"] if here else source.notes
            )
    problem = "holds no images" if word and os.path.exists(path) else "there is no such folder or file"
    raise DataError(
        f"{word or '--data'}: {problem}; --data takes a folder of IDX files or of pictures, an .npz or .npy file, "
        f"or one of {', '.join(NAMES)}"
    )


def _size(part: Part, s: Settings) -> tuple[int, int]:
    """Height and width of the images that come of a part. Raises DataError if they are none to train on."""
    if s.size is not None:
        return s.size, s.size
    if not (2 <= part.height <= LARGEST_SIDE and 2 <= part.width <= LARGEST_SIDE):
        raise DataError(
            f"{part.name(0)}: has {part.height}×{part.width} pixels; 2 to {LARGEST_SIDE} a side can be trained on "
            "(--size N scales the images)"
        )
    return (part.width, part.height) if s.transpose else (part.height, part.width)


def _check_room(source: Source, what: str, sums: dict[str, int], room: int | None) -> None:
    """Raises DataError if the images need more bytes than there are."""
    if room is not None and (total := sum(sums.values())) > room:
        words = " + ".join(f"{number / 2**20:,.0f} MiB of {name}" for name, number in sums.items())
        raise DataError(
            f"{source.place}: {what} need {words} = {total / 2**20:,.0f} MiB, and {room / 2**20:,.0f} MiB are free; "
            "use smaller ones (--size N), fewer (--train-limit N), or another --device"
        )


def _read_all(source: Source, rows: Rows, notes: list[str], s: Settings) -> tuple[dict[str, Tensor], str]:
    """The pixels of these rows, uint8 `[n, height, width]`, and the one line that says what was taken."""
    sizes = {name: _size(part, s) for name, (part, _) in rows.items()}
    for name, size in sizes.items():
        if size != sizes[first := next(iter(sizes))]:
            words = " and ".join(f"{each} images of {sizes[each][0]}×{sizes[each][1]} pixels" for each in (first, name))
            raise DataError(f"{source.place}: has {words}; --size N scales them all")
    pixels: dict[str, Tensor] = {}
    levels: dict[str, str] = {}
    for part in dict.fromkeys(part for part, _ in rows.values()):  # each is read once
        chosen = {name: own for name, (each, own) in rows.items() if each is part}
        images = _read(part, torch.cat(list(chosen.values())), s)
        pixels |= zip(chosen, images.pixels.split([len(own) for own in chosen.values()]), strict=True)
        levels |= dict.fromkeys(chosen, images.levels)
        notes += [*images.notes, images.levels]
    if len(set(levels.values())) > 1:
        words = "; ".join(f"{name} images: {words or 'levels as they are'}" for name, words in levels.items())
        raise DataError(f"{source.place}: the parts are not alike ({words}); store them in the same way")
    if s.transpose:
        notes.append("rows and columns swapped")
    elif any("emnist" in folder.lower() for folder in Path(source.place).parts[-3:]):
        notes.append("EMNIST's files hold them transposed: --transpose turns them upright")
    names = {"train": "training", "validation": "validation", "test": "test"}
    counts = [f"{len(pixels[part]):,} {name}" for part, name in names.items() if part in pixels]
    height, width = sizes[next(iter(sizes))]
    taken = f"{source.form} {source.place}".strip() + f": {', '.join(counts)} images of {height}×{width} pixels"
    pixels = {name: as_targets(s, name, images) for name, images in pixels.items()}
    return pixels, printable("; ".join(dict.fromkeys(filter(None, [taken, *notes]))))


def _read(part: Part, rows: Tensor, s: Settings) -> Images:
    """The images at these rows as they are trained on. Raises DataError for one that is all of one level."""
    pixels, levels, notes = part.read(rows)
    if not levels and pixels.max() == 1:
        pixels, levels = pixels * 255, "the brightest level is 1 of 255: taken as black and white, and scaled"
    if s.transpose:
        pixels = pixels.transpose(1, 2).contiguous()
    if s.size is not None and pixels.shape[1:] != (s.size, s.size):
        notes = [*notes, f"scaled from {pixels.shape[1]}×{pixels.shape[2]}"]
        pixels = resized(pixels, s.size)
    low, high = pixels.flatten(1).aminmax(dim=1)
    if len(constant := (low == high).nonzero().flatten()):
        more = f" (and {len(constant) - 1} more)" if len(constant) > 1 else ""
        raise DataError(f"{part.name(int(rows[constant].min()))}: is of one grey level throughout{more}; leave it out")
    return Images(pixels, levels, notes)


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors in one line, whatever the names of files are."""
    try:
        yield
    except DataError as error:
        raise DataError(printable(str(error))) from None


def record(**parts: Tensor | None) -> dict[str, Any]:
    """What identifies images: see `TrainImages`."""
    sides = next(part.shape[1:] for part in parts.values() if part is not None)
    found = {
        name: None
        if part is None
        else {"count": len(part), "sha256": hashlib.sha256(part.contiguous().numpy().data).hexdigest()}
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
