"""The classifiers that judge a run's completions: their files, and which are a run's.

One sees whole images, the other what the run's models are given, x. A file holds the weights with their mask, and says
of which images and targets they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.data.masks import Split
from cvae.errors import DataError
from cvae.model.classifier import Classifier
from cvae.run.checkpoint import kinds, write_atomically
from cvae.run.folder import CONFIG, quoted, read_record
from cvae.run.weights_file import read_weights, with_digest
from cvae.settings import Settings

PACKAGED = Path(__file__).with_name("classifiers")
"""The folder of those of MNIST in grey levels: of whole images, and of one, two and three quadrants."""

WHOLE, X_ONLY = "classifier.safetensors", "classifier-x.safetensors"
"""The names of the files in a run folder."""


class Judges(NamedTuple):
    """The two classifiers of a run, on its device, in evaluation mode."""

    whole: Classifier
    x_only: Classifier


def masks(split: Split) -> dict[str, Tensor]:
    """What the two classifiers see, bool `[height, width]`, by the names of their files."""
    return {WHOLE: torch.ones_like(split.observed), X_ONLY: split.observed}


def training(record: Mapping[str, Any], s: Settings) -> dict[str, str]:
    """What a classifier's file says of its training: the SHA-256 of the training images, and the targets.

    record: of the images, as `config.json` has it. Raises KeyError or TypeError for one that does not say it.
    """
    return {"images": record["train"]["sha256"], "targets": s.targets}


def write(path: Path, classifier: Classifier, of: Mapping[str, str]) -> None:
    """Write a classifier, wholly or not at all; of: what it was trained on. Raises DiskError."""
    state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_atomically(path, with_digest(state, {**of, "format": "pt"}))


def read(path: Path, observed: Tensor, of: Mapping[str, str]) -> Classifier:
    """The classifier in a file, frozen. Raises DataError if it is not that of this mask and training, or is damaged."""
    metadata, state = read_weights(path)
    if {name: metadata.get(name) for name in of} != of:
        raise DataError(f"{path}: is of other images or targets")
    try:
        if not torch.equal(state["observed"], observed):
            raise DataError(f"{path}: is of another mask")
        classifier = Classifier(observed, len(state["last.bias"]))
        if kinds(state) != kinds(classifier.state_dict()):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: does not hold the weights of a classifier of images") from None
    classifier.load_state_dict(state)
    return classifier.requires_grad_(False).eval()


def packaged(observed: Tensor, of: Mapping[str, str]) -> Iterator[Classifier]:
    """That of this mask and training which comes with the package, if there is one."""
    for path in sorted(PACKAGED.glob("*.safetensors")):
        with suppress(DataError):
            yield read(path, observed, of)


def open_judges(folder: Path, s: Settings, split: Split, device: torch.device) -> Judges:
    """The classifiers of a run. Raises DataError, with the command that trains them, where one is missing or bad."""
    try:
        of = training(read_record(folder), s)
    except (KeyError, TypeError):
        raise DataError(f"{folder / CONFIG}: does not say what the training images are; train anew") from None
    found = []
    for name, observed in masks(split).items():
        try:
            found.append(next(packaged(observed, of), None) or read(folder / name, observed, of))
        except DataError as error:
            command = f"python -m cvae.report.classifier {quoted(folder)}"
            raise DataError(f"{error}; {command} trains the classifiers of the run, in a few minutes") from None
    return Judges(*(classifier.to(device) for classifier in found))
