"""Which images of a source are for training, for validation and for the test."""

import torch
from torch import Tensor

from cvae import context
from cvae.data.parts import Part, Source
from cvae.errors import DataError
from cvae.settings import Settings

Rows = dict[str, tuple[Part, Tensor]]  # of training, validation and test images: where they are read from, and which


def divided(source: Source) -> tuple[Rows, list[str]]:
    """The parts of a source; of an undivided one, a sixth of its images are for the test. And what was chosen."""
    rows = {name: (part, torch.arange(part.count)) for name, part in source.parts.items()}
    notes = list(source.notes)
    if "all" in rows:
        part, _ = rows.pop("all")
        train, test = _held_out(source, context.permutation(part.count, "test images"))
        rows |= {"train": (part, train), "test": (part, test)}
        notes.append("a sixth drawn for the test, the same for every seed")
    return rows, notes


def hold_out_validation(source: Source, rows: Rows, notes: list[str], s: Settings) -> None:
    """Permute the training images, and take those for validation from them if the source has none of its own."""
    part, train = rows["train"]
    if source.place:  # MNIST has no place, and stays in order
        train = train[context.permutation(len(train), s.seed, "validation images")]
    if "validation" not in rows:
        train, held_out = _held_out(source, train)
        rows["validation"] = part, held_out
        notes.append(f"validation images drawn by seed {s.seed}" if source.place else "the last ones for validation")
    rows["train"] = part, train


def _held_out(source: Source, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and the last of them to be held out: a sixth, or 10,000 of 60,000 and more."""
    count = 10_000 if len(rows) >= 60_000 else len(rows) // 6
    if count == 0:
        raise DataError(f"{source.place}: {len(rows)} images are too few to hold out a sixth; give at least 6")
    return rows[:-count], rows[-count:]
