"""The sources of images: what `--data` names is found, read, and divided into training, validation and test images.

All of MNIST comes with the package (Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.console import say
from cvae.data.arrays import find_arrays
from cvae.data.division import Rows, divided, hold_out_validation
from cvae.data.identity import difference, record
from cvae.data.idx import find_idx
from cvae.data.images import as_targets
from cvae.data.names import MNIST, NAMES, find_named, name_of, named
from cvae.data.parts import Images, Part, Reading, Source, resized
from cvae.data.pictures import find_pictures
from cvae.data.room import needed, shortage
from cvae.errors import DataError, printable
from cvae.settings import LARGEST_SIDE, Settings

__all__ = [
    "READERS",
    "TestImages",
    "TrainImages",
    "difference",
    "load_labels",
    "load_test",
    "load_train",
    "named",
    "record",
]

READERS: tuple[Callable[[Path, Settings], Source | None], ...] = (find_idx, find_arrays, find_pictures)
"""Each finds images of its form at a path, or returns None; the first that finds any is taken."""

SMALL = 4  # pixels a side: where these do not fit either, scaling the images does not help


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


def load_train(s: Settings = Settings(), reading: Reading = Reading()) -> TrainImages:  # noqa: B008
    """The training and validation images of the source that the settings name, MNIST where they name none.

    The last 10,000 of the 60,000 images of MNIST are for validation. Other training images are permuted by
    `s.seed`, so that it does not matter in which order they lie, and the last sixth of them, 10,000 at the most, is for
    validation, unless the source has validation images. From a source that is not divided, a sixth is taken for
    the test first, the same one whatever the seed.

    Before anything is read whole, it is looked at whether the memory of `reading` holds what `room.needed` says. Raises
    DataError, naming the file at fault.
    """
    with _one_line():
        planned = _plan_train(s)
        source, rows, notes = planned
        missing = "no test images, so that eval.py will not be able to evaluate the run"
        if "test" not in rows and reading.show:
            say(printable(f"{source.place}: {missing}"))
        elif "test" not in rows:
            notes.append(missing)
        _check_room(planned, _plan_train, s, reading)
        pixels, about = _read_all(planned, s, reading)
        parts = {name: pixels.get(name) for name in ("train", "validation", "test")}
        return TrainImages(pixels["train"], pixels["validation"], about, record(**parts))


def load_test(s: Settings = Settings(), reading: Reading = Reading()) -> TestImages:  # noqa: B008
    """The test images: `eval.py` alone measures on them, the page shows them. Memory, errors: as in `load_train`."""
    with _one_line():
        planned = _plan_test(s)
        _check_room(planned, _plan_test, s, reading)
        pixels, about = _read_all(planned, s, reading)
        return TestImages(pixels["test"], about, record(**pixels))


def load_labels(s: Settings, part: str) -> Tensor:
    """The classes of the images of one part, `train`, `validation` or `test`, int64 `[N]`, in the order of the images.

    `eval.py` alone measures by those of the test images. Raises DataError where there are none, or they cannot be read.
    """
    with _one_line():
        source, rows, _ = _plan_test(s) if part == "test" else _plan_train(s)
        images, own = rows[part]
        if images.labels is None:
            place = source.place or source.form
            raise DataError(
                f"{place}: has no labels, by which images are classified; MNIST and IDX files can have them"
            )
        return images.labels().long()[own]


class _Planned(NamedTuple):
    """What is going to be read."""

    source: Source
    rows: Rows
    notes: list[str]

    def sizes(self, s: Settings) -> dict[str, tuple[int, int]]:
        """Height and width of the images of each part."""
        return {name: _size(self.rows[name][0], s) for name in sorted(self.rows, key="train validation test".find)}


def _plan_train(s: Settings) -> _Planned:
    source = _find(s)
    rows, notes = divided(source)
    if "train" not in rows:
        raise DataError(f"{source.place}: has no training images")
    hold_out_validation(source, rows, notes, s)
    return _Planned(source, rows, notes)


def _plan_test(s: Settings) -> _Planned:
    source = _find(s)
    rows, notes = divided(source)
    if "test" not in rows:
        raise DataError(f"{source.place}: has no test images")
    return _Planned(source, {"test": rows["test"]}, notes)


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


def _check_room(planned: _Planned, plan: Callable[[Settings], _Planned], s: Settings, reading: Reading) -> None:
    """Raises DataError if the images do not fit into the memory, with what would help."""

    def short(s: Settings, reading: Reading, planned: _Planned | None = None) -> str | None:
        planned = planned or plan(s)
        return shortage(needed(planned.rows, planned.sizes(s), s, reading), reading)

    if (problem := short(s, reading, planned)) is None:
        return
    ways = []
    for words, other, place in (
        ("smaller ones (--size N)", replace(s, size=SMALL), reading),
        ("fewer (--train-limit N)", replace(s, train_limit=1), reading),
        ("another --device", s, reading._replace(gpu=None)),
    ):
        with suppress(DataError):
            if (other, place) != (s, reading) and short(other, place) is None:
                ways.append(words)
    way = f"use {' or '.join(ways)}" if ways else "leave some of them out, or use a machine with more"
    images = f"{sum(len(own) for _, own in planned.rows.values()):,} images"
    raise DataError(f"{planned.source.place or planned.source.form}: {images} {problem}; {way}")


def _read_all(planned: _Planned, s: Settings, reading: Reading) -> tuple[dict[str, Tensor], str]:
    """The pixels of these rows, uint8 `[n, height, width]`, and the one line that says what was taken."""
    source, rows, notes = planned
    sizes = planned.sizes(s)
    for name, size in sizes.items():
        if size != sizes[first := next(iter(sizes))]:
            words = " and ".join(f"{each} images of {sizes[each][0]}×{sizes[each][1]} pixels" for each in (first, name))
            raise DataError(f"{source.place}: has {words}; --size N scales them all")
    pixels: dict[str, Tensor] = {}
    levels: dict[str, str] = {}
    for part in dict.fromkeys(part for part, _ in rows.values()):  # each is read once
        chosen = {name: own for name, (each, own) in rows.items() if each is part}
        images = _read(part, torch.cat(list(chosen.values())), s, reading)
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
    for name, own in pixels.items():
        if (drawn := as_targets(s, name, own)) is not own:
            own.copy_(drawn)  # in place: no second set of them
    return pixels, printable("; ".join(dict.fromkeys(filter(None, [taken, *notes]))))


def _read(part: Part, rows: Tensor, s: Settings, reading: Reading) -> Images:
    """The images at these rows as they are trained on. Raises DataError for one that is all of one level."""
    pixels, levels, notes = part.read(rows, reading)
    if not levels and pixels.max() == 1:
        pixels, levels = pixels.mul_(255), "the brightest level is 1 of 255: taken as black and white, and scaled"
    if s.transpose:
        pixels = pixels.transpose(1, 2).contiguous()
    if s.size is not None and pixels.shape[1:] != (s.size, s.size):
        notes = [*notes, f"scaled from {pixels.shape[1]}×{pixels.shape[2]}"]
        pixels = resized(pixels, s.size, reading)
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
