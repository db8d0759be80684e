"""The classifiers that `eval.py --realism` judges completions with, and the command that trains them.

    python -m cvae.report.classifier center others/q1    # of these runs: one and a half minutes for each classifier
    python -m cvae.report.classifier --to FOLDER         # the four of MNIST that come with the package

One sees whole images, the other what the run's models are given of an image, x. Both are .safetensors files in the run
folder, but for those that come with the package. What is printed of them is measured on the validation images. It takes
images with labels: MNIST, or IDX files. Exit codes: 0 done, 2 usage, 3 a run or its images cannot be read, 5 disk.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.optim.lr_scheduler import OneCycleLR

from cvae import context
from cvae.console import Bar, command, say
from cvae.data.bending import bent
from cvae.data.masks import quadrants
from cvae.data.sources import difference, load_labels, load_train, named
from cvae.data.tasks import FixedMask, binarized
from cvae.errors import DataError
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import RunFolder, find_run, quoted
from cvae.run.plan import absolute, user_path
from cvae.settings import Settings

EPOCHS, BATCH, RATE, DECAY, BEND = 16, 200, 6e-3, 0.05, 0.8  # chosen on the validation images of MNIST
PACKAGED = Path(__file__).with_name("classifiers")  # the folder of those that come with the package
WHOLE, X_ONLY = "classifier.safetensors", "classifier-x.safetensors"  # their names in a run folder


class Classifier(nn.Module):
    """p(class | the pixels of a mask): a convolutional network of 90,000 weights that sees these pixels, others black.

    observed: bool `[height, width]`, True = seen; kept with the weights. num_classes: K.
    """

    observed: Tensor

    def __init__(self, observed: Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("observed", observed)
        halving = (
            nn.Sequential(nn.Conv2d(*planes, size, 2, size // 2, bias=False), nn.BatchNorm2d(planes[1]), nn.ReLU())
            for planes, size in (((1, 16), 5), ((16, 32), 3), ((32, 64), 3))
        )  # of an image of 28×28 leaves 4×4, which the pooling does not change
        self.convolutions = nn.Sequential(*halving, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.hidden, self.last = nn.Linear(64 * 4 * 4, 64), nn.Linear(64, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees of images `[B, height, width]` in [0, 1]: `[B, 64]`."""
        return self.hidden(self.convolutions((images * self.observed)[:, None])).relu()  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, K]` of the classes of images `[B, height, width]` in [0, 1]."""
        return self.last(dropout(self.features(images), 0.2, self.training))  # type: ignore[no-any-return]


def masks_of(task: FixedMask) -> dict[str, Tensor]:
    """Return what the two classifiers of a run see, bool `[height, width]`, by the names of their files."""
    return {WHOLE: torch.ones_like(task.observed), X_ONLY: task.observed}


def training(record: Mapping[str, Any], targets: str) -> dict[str, str]:
    """Return what a file says of the training: the SHA-256 of the training images, and the setting `targets`."""
    return {"images": record["train"]["sha256"], "targets": targets}


def read(path: Path, observed: Tensor, source: Mapping[str, str]) -> Classifier:
    """Return the classifier in a file, frozen. Raises DataError if it is not of this mask and training, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not (source.items() <= metadata.items() and torch.equal(state["observed"], observed)):
            raise DataError(f"{path}: is of another mask, or of other images or targets")
        classifier = Classifier(observed, len(state["last.bias"]))
        classifier.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        raise DataError(f"{path}: is missing or damaged") from None
    return classifier.requires_grad_(False).eval()


def packaged(observed: Tensor, source: Mapping[str, str]) -> Classifier | None:
    """Return the classifier of this mask and training that comes with the package, if there is one."""
    for path in sorted(PACKAGED.glob("*.safetensors")):
        with suppress(DataError):
            return read(path, observed, source)
    return None


def open_judges(folder: Path, device: torch.device) -> list[Classifier]:
    """Return the classifiers of a run, of whole images and of x, frozen. Raises DataError if one is missing or bad."""
    run = RunFolder(folder)
    if not run.record.get("train"):
        raise DataError(f"{folder}: does not say what its training images are; train anew")
    source, files = training(run.record, run.settings.targets), masks_of(run.task).items()
    try:
        judges = [packaged(observed, source) or read(folder / name, observed, source) for name, observed in files]
    except DataError as error:
        words = f"python -m cvae.report.classifier {quoted(folder)}"
        raise DataError(f"{error}; {words} trains the classifiers of the run, in a few minutes") from None
    return [judge.to(device) for judge in judges]


def _fit(images: Tensor, classes: Tensor, num_classes: int, observed: Tensor, binary: bool) -> Classifier:
    """Train a classifier on images, uint8 `[N, height, width]`, on their device; all randomness is of one seed."""
    context.seed_dropout("classifier")  # and the first weights
    classifier = Classifier(observed, num_classes).to(images.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=DECAY)
    steps = len(images) // (size := min(BATCH, len(images)))
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps * EPOCHS)
    with Bar("classifier", steps * EPOCHS * size, "img") as bar:
        for epoch in range(EPOCHS):
            order = context.permutation(len(images), "classifier", epoch).to(images.device)
            for step, rows in enumerate(order[: steps * size].split(size)):
                batch = bent(images[rows], BEND, "classifier", epoch, step)
                batch = binarized(batch, "classifier", epoch, step) if binary else batch
                loss = cross_entropy(classifier(batch / 255), classes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(size)
    return classifier.requires_grad_(False).eval()


def make(masks: Mapping[Path, Tensor], s: Settings, device: torch.device, run: RunFolder | None = None) -> None:
    """Train classifiers of these masks, write each to its file, and say how good it is on the validation images.

    s: The settings that say what the images are. run: A run that they are for, which needs none that the package has.
    Raises DataError where the images cannot be read, have no labels, or are not those of the run, and DiskError.
    """
    classes, held_out_classes = (load_labels(s, part) for part in ("train", "validation"))
    images, held_out, _, record = load_train(s, show=True)
    if run is not None and (other := difference(run.record, record)) is not None:
        raise DataError(f"{run.path}: was begun on {other}; --data says where its own are")
    source, num_classes = training(record, s.targets), 1 + int(max(classes.max(), held_out_classes.max()))
    for path, observed in masks.items():
        started = time.perf_counter()
        if run is not None and packaged(observed, source):
            say(f"{path}: is not needed, the package has such a classifier")
            continue
        classifier = _fit(images.to(device), classes.to(device), num_classes, observed, s.targets == "binary")
        logits = torch.cat([classifier(part.to(device) / 255) for part in held_out.split(1000)]).cpu()
        state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
        write_atomically(path, safetensors.torch.save(state, {**source, "format": "pt"}))
        right, nats = (logits.argmax(-1) == held_out_classes).double().mean(), cross_entropy(logits, held_out_classes)
        scores = f"{right:.2%} of {len(held_out):,} validation images right, {nats:.4f} nats per image"
        seen, seconds = f"{int(observed.sum())} of {observed.numel()} pixels", time.perf_counter() - started
        say(f"{path}: sees {seen}; {scores}; {seconds:.0f} s")


@command("cvae.report.classifier")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m cvae.report.classifier", description=__doc__, formatter_class=raw)
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
    with context.opened(options.device, "fp32") as opened:
        for run in (RunFolder(find_run(word, Path("runs"))) for word in options.runs):
            masks = {run.path / name: observed for name, observed in masks_of(run.task).items()}
            make(masks, replace(run.settings, **moved), opened.device, run)
        if options.to is not None:
            masks = {options.to / f"mnist-q{count}.safetensors": quadrants(count) for count in (1, 2, 3)}
            masks[options.to / "mnist.safetensors"] = torch.ones(28, 28, dtype=torch.bool)
            make(masks, Settings(), opened.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
