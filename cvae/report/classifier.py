"""Train the classifiers that `eval.py --realism` measures completions with, on the training images of runs.

    python -m cvae.report.classifier center others/q1    # of these runs: one and a half minutes for each classifier
    python -m cvae.report.classifier --to FOLDER         # the four of MNIST that come with the package

Two classifiers judge a run: one of whole images, and one that sees what the run's models are given of an image, x. Both
are .safetensors files of 0.4 MB in the run folder, but for those that come with the package: of MNIST in grey levels,
whole images and one, two and three quadrants. What is printed of them is measured on the validation images. It takes
images with labels: MNIST, or IDX files. Exit codes: 0 done, 2 usage, 3 a run or its images cannot be read, 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from cvae import context
from cvae.console import Bar, command, say
from cvae.data.bending import bent
from cvae.data.images import binarized
from cvae.data.masks import quadrants
from cvae.data.names import named
from cvae.data.parts import Reading
from cvae.data.sources import TrainImages, difference, load_labels, load_train
from cvae.errors import DataError
from cvae.model.classifier import Classifier
from cvae.report.judges import masks, packaged, training, write
from cvae.run.folder import find_run, read_record, read_settings, read_split
from cvae.run.plan import absolute, user_path
from cvae.settings import Settings

EPOCHS, BATCH, RATE, DECAY, BEND = 16, 200, 6e-3, 0.05, 0.8  # chosen on the validation images of MNIST


class Labelled(NamedTuple):
    """The images of a run and their classes, int64 `[N]`; targets: as the setting says."""

    images: TrainImages
    train: Tensor
    validation: Tensor
    targets: str


def load_labelled(s: Settings, reading: Reading) -> Labelled:
    """The images that the settings name. Raises DataError where there are none, or they have no labels."""
    train, validation = (load_labels(s, part) for part in ("train", "validation"))
    return Labelled(load_train(s, reading), train, validation, s.targets)


def fit(data: Labelled, observed: Tensor, device: torch.device) -> Classifier:
    """Train a classifier that sees the pixels of a mask; the images are bent a little, and drawn as the targets say.

    observed: bool `[height, width]`, True = seen. All randomness is of one seed, whatever that of the run.
    """
    pixels, classes = data.images.train.to(device), data.train.to(device)
    context.seed_dropout("classifier")  # and the first weights
    classifier = Classifier(observed, int(max(data.train.max(), data.validation.max())) + 1).to(device)
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
                if data.targets == "binary":
                    images = binarized(images, *key)
                loss = cross_entropy(classifier(images / 255), classes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(size)
    return classifier.eval()


@torch.inference_mode()
def examine(classifier: Classifier, pixels: Tensor, classes: Tensor) -> tuple[float, float]:
    """The share of images, uint8 `[N, height, width]`, whose class is predicted, and −log p(class), nats per image."""
    device = classifier.observed.device
    logits = torch.cat([classifier(part.to(device) / 255) for part in pixels.split(1000)]).cpu()
    return (logits.argmax(-1) == classes).double().mean().item(), cross_entropy(logits, classes).item()


def make(path: Path, data: Labelled, observed: Tensor, device: torch.device) -> None:
    """Train a classifier, write it, and say how good it is on the validation images. Raises DiskError."""
    started = time.perf_counter()
    classifier = fit(data, observed, device)
    right, nats = examine(classifier, data.images.validation, data.validation)
    write(path, classifier, training(data.images.record, Settings(targets=data.targets)))
    seen, seconds = f"{int(observed.sum())} of {observed.numel()} pixels", time.perf_counter() - started
    scores = f"{right:.2%} of {len(data.validation):,} validation images right, {nats:.4f} nats per image"
    say(f"{path}: sees {seen}; {scores}; {seconds:.0f} s")


def make_for(folder: Path, moved: dict[str, Any], device: torch.device) -> None:
    """Train the classifiers of a run that the package does not have. Raises DataError and DiskError."""
    settings, split = replace(read_settings(folder), **moved), read_split(folder)
    data = load_labelled(settings, Reading.on(device, show=True))
    if (other := difference(read_record(folder), data.images.record)) is not None:
        raise DataError(f"{folder}: was begun on {other}; --data says where its own are")
    for name, observed in masks(split).items():
        if next(packaged(observed, training(data.images.record, settings)), None) is not None:
            say(f"{folder / name}: is not needed, the package has such a classifier")
        else:
            make(folder / name, data, observed, device)


def make_packaged(folder: Path, device: torch.device) -> None:
    """Train the classifiers that the package has."""
    data = load_labelled(Settings(), Reading.on(device, show=True))
    make(folder / "mnist.safetensors", data, torch.ones(data.images.train.shape[1:], dtype=torch.bool), device)
    for count in (1, 2, 3):
        make(folder / f"mnist-q{count}.safetensors", data, quadrants(count), device)


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
    device = context.resolve_device(options.device)
    with context.prepare(device):
        for run in options.runs:
            make_for(find_run(run, Path("runs")), moved, device)
        if options.to is not None:
            make_packaged(options.to, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
