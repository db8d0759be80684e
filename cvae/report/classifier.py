"""The classifiers that `eval.py --realism` judges completions with: of whole images, and of what the run's models see.

Both are .safetensors files in the run folder. Those of MNIST with one, two and three quadrants come with the package;
others are trained when they are needed, in one and a half minutes each, on images with labels: MNIST, or IDX files.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.optim.lr_scheduler import OneCycleLR

from cvae import context
from cvae.console import Bar, complain
from cvae.data.bending import bent
from cvae.data.sources import load_labels, load_train, refuse_others
from cvae.data.tasks import binarized
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import RunFolder
from cvae.settings import Settings

EPOCHS, BATCH, RATE, DECAY, BEND = 16, 200, 6e-3, 0.05, 0.8  # chosen on the validation images of MNIST
PACKAGED = Path(__file__).with_name("classifiers")  # the folder of those that come with the package
WHOLE, X_ONLY = "classifier.safetensors", "classifier-x.safetensors"  # their names in a run folder


class Classifier(nn.Module):
    """p(class | the pixels of a mask): a convolutional network of 90,000 weights that sees these pixels, others black.

    observed: bool `[height, width]`, True = seen; kept with the weights. num_classes: K.
    """

    def __init__(self, observed: Tensor, num_classes: int):
        super().__init__()
        self.observed = nn.Buffer(observed)
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


def find(path: Path, observed: Tensor, source: Mapping[str, str]) -> Classifier | None:
    """Return the frozen classifier of this mask and these images, from this file or the package; None without one."""
    for file in (path, *sorted(PACKAGED.glob("*.safetensors"))):
        with suppress(OSError, SafetensorError, KeyError, RuntimeError), safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            if source.items() <= metadata.items() and torch.equal(content.get_tensor("observed"), observed):
                state = safetensors.torch.load_file(file)
                classifier = Classifier(observed, len(state["last.bias"]))
                classifier.load_state_dict(state)
                return classifier.requires_grad_(False).eval()
    return None


def open_judges(folder: Path, s: Settings, device: torch.device) -> list[Classifier]:
    """Return the classifiers of a run, of whole images and of x, on the CPU; missing ones are trained on `device`.

    s: The settings of the run, with the place of the images as it is now. Raises DataError where the training images
    cannot be read, have no labels, or are others now, and DiskError.
    """
    run = RunFolder(folder)
    masks = {folder / WHOLE: torch.ones_like(run.task.observed), folder / X_ONLY: run.task.observed}
    source = {"images": (run.record.get("train") or {}).get("sha256", "unknown"), "targets": s.targets}
    judges = {path: find(path, observed, source) for path, observed in masks.items()}
    if missing := [path for path, judge in judges.items() if judge is None]:
        labels, held_out_labels = (load_labels(s, part) for part in ("train", "validation"))
        images, held_out, _, record = load_train(s)
        refuse_others(folder, run.record, record)
        num_classes = 1 + int(max(labels.max(), held_out_labels.max()))
        for path in missing:
            judge = _fit(images.to(device), labels.to(device), num_classes, masks[path], s.targets == "binary")
            judges[path] = judge
            logits = torch.cat([judge(part / 255) for part in held_out.split(1000)])
            right, nats = (logits.argmax(-1) == held_out_labels).double().mean(), cross_entropy(logits, held_out_labels)
            write_atomically(path, safetensors.torch.save(judge.state_dict(), {**source, "format": "pt"}))
            complain(f"{path}: trained; {right:.2%} of the validation images right, {nats:.4f} nats per image")
    return list(filter(None, judges.values()))


def _fit(images: Tensor, classes: Tensor, num_classes: int, observed: Tensor, binary: bool) -> Classifier:
    """Return a classifier trained on images, uint8 `[N, height, width]`; all randomness is of one seed."""
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
    return classifier.requires_grad_(False).eval().cpu()
