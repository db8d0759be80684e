"""The classifiers that `eval.py --realism` judges completions with, and the command that trains them.

    python -m cvae.report.classifier center others/q1    # of these runs: one and a half minutes for each classifier
    python -m cvae.report.classifier --to FOLDER         # the four of MNIST that come with the package

Two classifiers judge a run: one sees whole images, and one what the run's models are given of an image, x. Both are
.safetensors files of 0.4 MB in the run folder, but for those that come with the package: of MNIST in grey levels, whole
images and one, two and three quadrants. What is printed of them is measured on the validation images. It takes images
with labels: MNIST, or IDX files. Exit codes: 0 done, 2 usage, 3 a run or its images cannot be read, 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.optim.lr_scheduler import OneCycleLR

from cvae import context
from cvae.console import Bar, command, say
from cvae.data.bending import bent
from cvae.data.images import binarized
from cvae.data.sources import difference, load_labels, load_train, named
from cvae.data.tasks import FixedMask, quadrants
from cvae.errors import DataError
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import RunFolder, find_run, quoted
from cvae.run.plan import absolute, user_path
from cvae.settings import Settings

FEATURES, DROPOUT = 64, 0.2
EPOCHS, BATCH, RATE, DECAY, BEND = 16, 200, 6e-3, 0.05, 0.8  # chosen on the validation images of MNIST
PACKAGED = Path(__file__).with_name("classifiers")  # the folder of those that come with the package
WHOLE, X_ONLY = "classifier.safetensors", "classifier-x.safetensors"  # their names in a run folder


class Classifier(nn.Module):
    """p(class | the pixels of a mask): a convolutional network of 90,000 weights that sees these pixels, others black.

    Args:
        observed: bool `[height, width]`, True = seen; kept with the weights.
        num_classes: K.
    """

    observed: Tensor

    def __init__(self, observed: Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("observed", observed)
        halvings = (_halving(1, 16, 5), _halving(16, 32, 3), _halving(32, 64, 3))
        pooling = nn.AdaptiveAvgPool2d(4)  # changes nothing of images of 28×28
        self.convolutions = nn.Sequential(*halvings, pooling, nn.Flatten())
        self.hidden = nn.Linear(64 * 4 * 4, FEATURES)
        self.last = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees of images `[B, height, width]` in [0, 1]: `[B, FEATURES]`."""
        features: Tensor = self.hidden(self.convolutions((images * self.observed)[:, None])).relu()
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, K]` of the classes of images `[B, height, width]` in [0, 1]."""
        logits: Tensor = self.last(dropout(self.features(images), DROPOUT, self.training))
        return logits


def _halving(inner: int, outer: int, size: int) -> nn.Sequential:
    """Return a convolution that halves both sides, normalised over the batch."""
    convolution = nn.Conv2d(inner, outer, size, stride=2, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer), nn.ReLU())


class Judges(NamedTuple):
    """The two classifiers of a run, on its device, frozen, in evaluation mode."""

    whole: Classifier
    x_only: Classifier


def masks(task: FixedMask) -> dict[str, Tensor]:
    """Return what the two classifiers of a run see, bool `[height, width]`, by the names of their files."""
    return {WHOLE: torch.ones_like(task.observed), X_ONLY: task.observed}


def training(record: Mapping[str, Any], targets: str) -> dict[str, str]:
    """Return what a file says of the training: the SHA-256 of the training images, and the setting `targets`."""
    return {"images": record["train"]["sha256"], "targets": targets}


def read(path: Path, observed: Tensor, trained_on: Mapping[str, str]) -> Classifier:
    """Return the classifier in a file, frozen. Raises DataError if it is not of this mask and training, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not (trained_on.items() <= metadata.items() and torch.equal(state["observed"], observed)):
            raise DataError(f"{path}: is of another mask, or of other images or targets")
        classifier = Classifier(observed, len(state["last.bias"]))
        classifier.load_state_dict(state)
    except OSError:
        raise DataError(f"{path}: cannot be read") from None
    except (SafetensorError, KeyError, RuntimeError):
        raise DataError(f"{path}: is damaged, or no classifier of images") from None
    return classifier.requires_grad_(False).eval()


def packaged(observed: Tensor, trained_on: Mapping[str, str]) -> Classifier | None:
    """Return the classifier of this mask and training that comes with the package, if there is one."""
    for path in sorted(PACKAGED.glob("*.safetensors")):
        with suppress(DataError):
            return read(path, observed, trained_on)
    return None


def open_judges(folder: Path, device: torch.device) -> Judges:
    """Open the classifiers of a run. Raises DataError, with the command that trains them, if one is missing or bad."""
    run, judges = RunFolder(folder), []
    if not run.record.get("train"):
        raise DataError(f"{folder}: does not say what its training images are; train anew")
    trained_on = training(run.record, run.settings.targets)
    for name, observed in masks(run.task).items():
        try:
            judges.append(packaged(observed, trained_on) or read(folder / name, observed, trained_on))
        except DataError as error:
            words = f"python -m cvae.report.classifier {quoted(folder)}"
            raise DataError(f"{error}; {words} trains the classifiers of the run, in a few minutes") from None
    return Judges(*(judge.to(device) for judge in judges))


class Labelled(NamedTuple):
    """The images of some settings, uint8 `[N, height, width]`, and their classes, int64 `[N]`."""

    train: Tensor
    classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor
    record: dict[str, Any]
    targets: str


def load_labelled(s: Settings) -> Labelled:
    """Read the images that the settings name. Raises DataError if there are none, or they have no labels."""
    classes, held_out_classes = (load_labels(s, part) for part in ("train", "validation"))
    train, held_out, _, record = load_train(s, show=True)
    return Labelled(train, classes, held_out, held_out_classes, record, s.targets)


def fit(data: Labelled, observed: Tensor, device: torch.device) -> Classifier:
    """Train a classifier that sees the pixels of a mask, on images bent a little, and drawn as the targets say.

    All randomness comes from one seed, whatever that of the run.
    """
    pixels, classes = data.train.to(device), data.classes.to(device)
    context.seed_dropout("classifier")  # and the first weights
    classifier = Classifier(observed, 1 + int(torch.cat([data.classes, data.held_out_classes]).max())).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=DECAY)
    size = min(BATCH, len(pixels))
    steps = len(pixels) // size
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps * EPOCHS)
    with Bar("classifier", steps * EPOCHS * size, "img") as bar:
        for epoch in range(EPOCHS):
            order = context.permutation(len(pixels), "classifier", epoch).to(device)
            for step, rows in enumerate(order[: steps * size].split(size)):
                key = ("classifier", epoch, step)
                images = bent(pixels[rows], BEND, *key)
                images = binarized(images, *key) if data.targets == "binary" else images
                loss = cross_entropy(classifier(images / 255), classes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(size)
    return classifier.eval()


@torch.inference_mode()
def examine(classifier: Classifier, images: Tensor, classes: Tensor) -> tuple[float, float]:
    """Return the share of images, uint8 `[N, height, width]`, that are classified right, and −log p(class) in nats."""
    parts = images.to(classifier.observed.device).split(1000)
    logits = torch.cat([classifier(part / 255) for part in parts]).cpu()
    return (logits.argmax(-1) == classes).double().mean().item(), cross_entropy(logits, classes).item()


def make(path: Path, data: Labelled, observed: Tensor, device: torch.device) -> None:
    """Train a classifier, write it, and say how good it is on the validation images. Raises DiskError."""
    started = time.perf_counter()
    classifier = fit(data, observed, device)
    right, nats = examine(classifier, data.held_out, data.held_out_classes)
    state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    metadata = {**training(data.record, data.targets), "format": "pt"}
    write_atomically(path, safetensors.torch.save(state, metadata))
    seen, seconds = f"{int(observed.sum())} of {observed.numel()} pixels", time.perf_counter() - started
    scores = f"{right:.2%} of {len(data.held_out):,} validation images right, {nats:.4f} nats per image"
    say(f"{path}: sees {seen}; {scores}; {seconds:.0f} s")


def make_for(folder: Path, moved: dict[str, Any], device: torch.device) -> None:
    """Train the classifiers of a run that the package does not have. Raises DataError and DiskError."""
    run = RunFolder(folder)
    data = load_labelled(replace(run.settings, **moved))
    if (other := difference(run.record, data.record)) is not None:
        raise DataError(f"{folder}: was begun on {other}; --data says where its own are")
    for name, observed in masks(run.task).items():
        if packaged(observed, training(data.record, data.targets)):
            say(f"{folder / name}: is not needed, the package has such a classifier")
        else:
            make(folder / name, data, observed, device)


@command("cvae.report.classifier")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cvae.report.classifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="*", type=user_path, metavar="RUN", help="run, as a path or a name below runs/")
    add("--to", type=user_path, metavar="FOLDER", help="without a run: where those of MNIST are written")
    add("--data", type=named, metavar="PATH", help="where the images of the runs are now, as for train.py")
    add("--data-root", type=absolute, metavar="DIR", help="where torchvision's data sets are now, as for train.py")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    options = parser.parse_args(argv)
    if bool(options.runs) == (options.to is not None):
        parser.error("name runs, or with --to the folder for the classifiers of MNIST")
    moved = {name: place for name in ("data", "data_root") if (place := getattr(options, name)) is not None}
    try:
        Settings(**moved)
    except ValueError as error:
        parser.error(str(error))
    with context.opened(options.device, "fp32") as opened:
        for run in options.runs:
            make_for(find_run(run, Path("runs")), moved, opened.device)
        if options.to is not None:
            data = load_labelled(Settings())
            for count, name in enumerate(("mnist", "mnist-q1", "mnist-q2", "mnist-q3")):
                observed = quadrants(count) if count else torch.ones(28, 28, dtype=torch.bool)
                make(options.to / f"{name}.safetensors", data, observed, opened.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
