"""The sources of images: the embedded MNIST, what is for validation, names of data sets, and what a run records."""

import hashlib
import inspect
import lzma
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import everything, in_order, random_images, refusal, write_pictures
from support.scripts import NAMES, idx_bytes, write_data
from torch import Tensor

from cvae.data import sources
from cvae.data.idx import read_idx
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.names import SHA256, TORCHVISION, mnist
from cvae.data.parts import Reading
from cvae.data.sources import difference, load_labels, load_test, load_train, named
from cvae.errors import DataError
from cvae.settings import Settings

EMBEDDED = Path(sources.__file__).parent / "mnist"
PUBLISHED = {  # of the four files, uncompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


# The embedded MNIST


def test_embedded_mnist_is_the_published_one() -> None:
    train, test = mnist("train"), mnist("t10k")
    assert (train.shape, test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert train.dtype == test.dtype == torch.uint8
    # The means that everybody normalises MNIST with.
    assert train.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert train.double().std().item() / 255 == pytest.approx(0.3081, abs=5e-5)
    labels = read_idx(EMBEDDED / "train-labels-idx1-ubyte.xz", 1)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert torch.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_embedded_files_have_the_digests_of_the_originals() -> None:
    for name, digest in PUBLISHED.items():
        assert hashlib.sha256(lzma.decompress((EMBEDDED / f"{name}.xz").read_bytes())).hexdigest() == digest


@pytest.mark.parametrize("part", NAMES)
def test_embedded_mnist_is_checked_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    for name in ("images", "labels"):
        monkeypatch.setitem(SHA256, f"{part}-{name}", "0" * 64)
    with pytest.raises(DataError, match=f"{NAMES[part][0]}.xz: is damaged"):
        load_train()
    with pytest.raises(DataError, match=f"{NAMES[part][1]}.xz: is damaged"):
        load_labels(Settings(), {"train": "train", "t10k": "test"}[part])


def test_embedded_mnist_is_decompressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the files of a training, and for an evaluation those of the test alone."""
    read: list[str] = []

    def counting(path: Path, *more: Any) -> Tensor:
        read.append(path.name)
        return read_idx(path, *more)

    monkeypatch.setattr("cvae.data.names.read_idx", counting)
    load_train()
    assert sorted(read) == sorted(f"{names[0]}.xz" for names in NAMES.values())
    read.clear()
    load_test()
    assert read == ["t10k-images-idx3-ubyte.xz"]


def test_flipped_byte_that_xz_cannot_see_is_seen(tmp_path: Path) -> None:
    content = bytearray(idx_bytes(mnist("t10k")[:9]))
    digest = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    path = tmp_path / "images.xz"
    path.write_bytes(lzma.compress(content))
    assert len(read_idx(path, 3)) == 9
    with pytest.raises(DataError, match="is damaged") as caught:
        read_idx(path, 3, digest)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("position", [0, 7, 100, 2000, -30, -1])
def test_flipped_byte_in_the_file_itself_is_seen(tmp_path: Path, position: int) -> None:
    name = NAMES["t10k"][1]
    content = bytearray((EMBEDDED / f"{name}.xz").read_bytes())
    content[position] ^= 0x10
    path = tmp_path / f"{name}.xz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_idx(path, 1, PUBLISHED[name])


def test_last_ten_thousand_images_of_mnist_are_for_validation() -> None:
    """Whatever the seed: the numbers of the README depend on it."""
    images = load_train(Settings(seed=3))
    assert (len(images.train), len(images.validation)) == (50_000, 10_000)
    assert torch.equal(torch.cat([images.train, images.validation]), mnist("train"))
    assert torch.equal(load_test(Settings(data="mnist")).images, mnist("t10k"))
    assert images.about == (
        "MNIST, which comes with the package: 50,000 training, 10,000 validation, 10,000 test images of 28×28 pixels; "
        "the last ones for validation"
    )


# Which images are for validation


@pytest.mark.parametrize(("count", "held_out"), [(6, 1), (11, 1), (12, 2), (59_999, 9_999), (60_001, 10_000)])
def test_a_sixth_is_for_validation(tmp_path: Path, count: int, held_out: int) -> None:
    images = random_images(count, 2, 3)
    images[:, 0, :2] = torch.tensor([0, 255])
    found = load_train(Settings(data=str(write_data(tmp_path, images, images[:1]))))
    assert (len(found.train), len(found.validation)) == (count - held_out, held_out)
    assert in_order(torch.cat([found.train, found.validation])) == in_order(images)


def test_set_that_is_sorted_by_class(tmp_path: Path) -> None:
    """Validation images, and the first training images too, are of all classes; others for another seed."""
    images = random_images(600, 4, 4)
    images[:, 0, 0] = torch.arange(600) // 60
    data = str(write_data(tmp_path, images, images[:6]))
    found = [load_train(Settings(data=data, seed=seed)) for seed in (0, 0, 1)]
    for each in found:
        for part in (each.validation, each.train[:100]):
            counts = torch.bincount(part[:, 0, 0].int(), minlength=10)
            assert counts.min() > 0
            assert counts.max() < 30
    assert found[0].record == found[1].record
    assert found[0].record["validation"] != found[2].record["validation"]
    assert found[0].record["test"] == found[2].record["test"]
    assert "validation images drawn by seed 1" in found[2].about


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_images_to_split(tmp_path: Path, count: int) -> None:
    write_data(tmp_path, random_images(count, 4, 4), random_images(1, 4, 4))
    assert refusal(tmp_path) == f"{tmp_path}: {count} images are too few to hold out a sixth; give at least 6"


# The record of the images


def test_record_identifies_each_part(tmp_path: Path) -> None:
    images, test = random_images(12, 4, 5), random_images(6, 4, 5, 1)
    found = load_train(Settings(data=str(write_data(tmp_path, images, test))))
    assert found.record == {
        "height": 4, "width": 5,
        "train": {"count": 10, "sha256": hashlib.sha256(found.train.numpy().tobytes()).hexdigest()},
        "validation": {"count": 2, "sha256": hashlib.sha256(found.validation.numpy().tobytes()).hexdigest()},
        "test": {"count": 6, "sha256": hashlib.sha256(test.numpy().tobytes()).hexdigest()},
    }  # fmt: skip
    assert load_test(Settings(data=str(tmp_path))).record == {
        "height": 4, "width": 5, "test": found.record["test"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images, test: (images[:10], test), "10 train images, and here are 9"),
        (lambda images, test: (images[:, :3], test[:, :3]), "images of 4×5 pixels, and these have 3×5"),
        (lambda images, test: (255 - images, test), "other train images of the same number and size"),
        (lambda images, test: (images, 255 - test), "other test images of the same number and size"),
        (lambda images, test: (images, test), None),
    ],
)
def test_difference(tmp_path: Path, change: Any, words: str | None) -> None:
    images, test = random_images(12, 4, 5), random_images(6, 4, 5, 1)
    records = [
        load_train(Settings(data=str(write_data(tmp_path / name, *parts)))).record
        for name, parts in (("before", (images, test)), ("now", change(images, test)))
    ]
    found = difference(*records)
    assert found is None if words is None else words in str(found)


# Settings


def test_transposed(tmp_path: Path) -> None:
    images = random_images(12, 4, 5)
    write_data(tmp_path / "emnist" / "raw", images, images)
    found = load_train(Settings(data=str(tmp_path), transpose=True))
    assert in_order(torch.cat([found.train, found.validation])) == in_order(images.transpose(1, 2).contiguous())
    assert found.record["height"] == 5
    assert "rows and columns swapped" in found.about
    assert "--transpose turns them upright" in load_train(Settings(data=str(tmp_path))).about


def test_more_images_than_the_memory_holds(tmp_path: Path) -> None:
    """Found before anything is read whole; what is needed is what `room.needed` says, to the byte."""
    write_data(tmp_path, random_images(72, 4, 6), random_images(10, 4, 6, 1))
    path = tmp_path / NAMES["train"][0]
    read = (82 + 72) * 24  # all images are read, those of a permuted part twice
    for more, byte in (
        ({}, 72 * (24 + 4 * 18)),
        ({"quadrants": 3}, read),
        ({"train_limit": 8}, read),
        ({"size": 2}, 82 * 4 + 72 * (2 * 24 - 4)),
        ({"targets": "binary"}, 72 * (24 + 4 * 18) + 60 * 24),
        ({"bend": 0.5}, 72 * (24 + 4 * 18) + 60 * 24),
    ):
        load_train(Settings(data=str(tmp_path), **more), Reading(byte))  # type: ignore[arg-type]
        refusal(tmp_path, reading=Reading(byte - 1), **more)
    kept = 72 * (24 + 4 * 18) + 82 * 24  # for the next run of the same command
    load_train(Settings(data=str(tmp_path)), Reading(kept, keep=True))
    refusal(tmp_path, reading=Reading(kept - 1, keep=True))
    load_test(Settings(data=str(tmp_path)), Reading(480))
    refusal(tmp_path, test=True, reading=Reading(479))
    path.write_bytes(path.read_bytes()[:-1])  # what would be found if it were read whole
    assert refusal(tmp_path, reading=Reading(6911)).startswith(f"{tmp_path}: 82 images need 0 MiB of pixels in order +")


def test_memory_beside_a_gpu(tmp_path: Path) -> None:
    """Both are looked at: the images are read into the one, and trained on in the other."""
    data = write_data(tmp_path, random_images(72, 4, 6), random_images(10, 4, 6, 1))
    used, read = 72 * (24 + 4 * 18), (82 + 72) * 24
    load_train(Settings(data=str(data)), Reading(read, used))
    assert "MiB are free on the GPU; use " in refusal(data, reading=Reading(read, used - 1))
    assert "MiB are free; " in refusal(data, reading=Reading(read - 1, used))


def test_advice_that_helps(tmp_path: Path) -> None:
    data = write_data(tmp_path, random_images(72, 4, 6), random_images(10, 4, 6, 1))
    size, limit, device = "smaller ones (--size N)", "fewer (--train-limit N)", "another --device"
    for reading, more, ways in (
        (Reading(6911), {}, f"use {size} or {limit}"),
        (Reading(6911, keep=True), {"train_limit": 70}, f"use {size} or {limit}"),
        (Reading(3695), {"train_limit": 8}, f"use {size}"),
        (Reading(3500), {}, "leave some of them out, or use a machine with more"),
        (Reading(6912, 6911), {}, f"use {size} or {limit} or {device}"),
        (Reading(3696, 6911), {}, f"use {size} or {limit}"),
    ):
        assert refusal(data, reading=reading, **more).endswith(
            f"MiB are free{' on the GPU' * (reading.gpu is not None)}; {ways}"
        )


@pytest.mark.parametrize("form", ["idx", "scaled", "transposed", "wide", "columns"])
def test_no_more_memory_is_taken_than_is_looked_for(tmp_path: Path, form: str) -> None:
    """However few images are trained on: all are read."""
    images = random_images(9000, 64, 50)
    if form in ("wide", "columns"):
        numbers = images.numpy().astype(np.uint16) * 257
        np.save(tmp_path / "images.npy", np.asfortranarray(numbers) if form == "columns" else numbers)
        data = tmp_path / "images.npy"
    else:
        data = write_data(tmp_path, images, images[:10])
    s = Settings(data=str(data), train_limit=1, size=40 if form == "scaled" else None, transpose=form == "transposed")
    with pytest.raises(DataError) as caught:
        load_train(s, Reading(0))
    looked_for = int(str(caught.value).partition(" = ")[2].partition(" MiB")[0])
    del images
    before = memory_at_peak(reset=True)
    load_train(s)
    assert looked_for >= 50
    assert memory_at_peak() - before < looked_for + 12


def memory_at_peak(reset: bool = False) -> float:
    """MiB that this process has held at most, since it was reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("nothing tells how much memory is held")
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


# Names of data sets


def test_torchvision_data_sets(tmp_path: Path) -> None:
    """Below --data-root, as torchvision leaves them; what it names so is found by our name."""
    torchvision = pytest.importorskip("torchvision")
    for name, (kind, prefix, _) in TORCHVISION.items():
        raw = tmp_path / kind / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        start = f"{prefix}-" if prefix else ""
        test = "test" if prefix else "t10k"
        images = random_images(12, 4, 5, len(name))
        (raw / f"{start}train-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{start}train-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(12, dtype=torch.uint8)))
        (raw / f"{start}{test}-images-idx3-ubyte").write_bytes(idx_bytes(images[:6]))
        s = Settings(data=name, data_root=str(tmp_path))
        found = load_train(s)
        assert in_order(torch.cat([found.train, found.validation])) == in_order(images)
        assert torch.equal(load_test(s).images, images[:6])
        assert found.about.startswith(f"{name}, as torchvision has it in {raw}")
        assert hasattr(torchvision.datasets, kind)


@pytest.mark.parametrize("name", TORCHVISION)
def test_command_that_downloads(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has one that a shell takes; it calls torchvision as it wants to be called."""
    datasets = pytest.importorskip("torchvision.datasets")
    root = tmp_path / "it's here"
    message = refusal(name, data_root=str(root))
    assert message.startswith(f"{name}: is not below {root}")
    command, _, code = shlex.split(message.partition("; to download: ")[2])
    assert command == "python"
    kind = TORCHVISION[name][0]
    calls: list[tuple[Any, ...]] = []
    signature = inspect.signature(getattr(datasets, kind).__init__)

    def called(*words: Any, **named: Any) -> None:
        calls.append((signature.bind(None, *words, **named), words[0], named["download"]))

    monkeypatch.setattr(datasets, kind, called)
    exec(code)
    assert [call[1:] for call in calls] == [(str(root), True)] * (2 if name == "qmnist" else 1)


def test_default_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert f"is not below {tmp_path}/.cache/torchvision or data" in refusal("kmnist")
    for root in ("data", ".cache/torchvision"):
        write_data(tmp_path / root / "KMNIST" / "raw", random_images(12, 4, 5, len(root)), random_images(6, 4, 5))
        assert everything("kmnist") == in_order(random_images(12, 4, 5, len(root)))
        assert f"{root}/KMNIST/raw" in load_train(Settings(data="kmnist")).about


def test_words_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names however they are spelt; what is there as a path is a path; ~ is the home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for word, name in (
        ("FashionMNIST", "fashion-mnist"), ("fashion_mnist", "fashion-mnist"), ("EMNIST-Letters", "emnist-letters"),
        ("MNIST", "mnist"), ("./mnist", str(tmp_path / "mnist")), ("~/pictures", str(tmp_path / "home" / "pictures")),
        ("pictures", str(tmp_path / "pictures")),
    ):  # fmt: skip
        assert named(word) == name
    (tmp_path / "loop").symlink_to("loop")
    for word in ("~nobody-of-this-name/x", "loop", ""):
        assert "there is no such folder or file; --data takes a folder" in refusal(named(word))
    write_data(tmp_path / "mnist", random_images(12, 4, 5), random_images(6, 4, 5))
    assert named("mnist") == str(tmp_path / "mnist")
    assert "a path, not the data set of this name" in load_train(Settings(data=named("mnist"))).about
    write_data(tmp_path / "home" / "pictures", random_images(12, 4, 5), random_images(6, 4, 5))
    assert everything("~/pictures") == in_order(random_images(12, 4, 5))


# What the networks see of them


@pytest.mark.parametrize("num_quadrants", [1, 2, 3])
def test_batches_hold_every_pixel_once_and_scaled(num_quadrants: int) -> None:
    images = random_images(11, 5, 7)
    split = Split(quadrants(num_quadrants, 5, 7))
    image_set = ImageSet(images, split)
    assert len(image_set) == 11
    batches = list(image_set.batches(4))
    assert [len(batch.x) for batch in batches] == [4, 4, 3]
    x, y = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
    assert x.shape[1] == int(split.observed.sum())
    assert torch.equal(split.compose(x, y), images.float() / 255)
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(image_set.batch(rows).y, y[rows])


# Labels


def labelled(folder: Path, seed_of_images: int = 0) -> Path:
    """Images whose corner tells their label."""
    for part, count in (("train", 60), ("t10k", 9)):
        labels = torch.arange(count, dtype=torch.uint8) % 7
        images = random_images(count, 5, 4, seed_of_images)
        images[:, 0, 0] = labels
        for name, array in zip(NAMES[part], (images, labels), strict=True):
            (folder / name).write_bytes(idx_bytes(array))
    return folder


@pytest.mark.parametrize("seed", [0, 3])
def test_labels_are_in_the_order_of_the_images(tmp_path: Path, seed: int) -> None:
    """Which a seed permutes."""
    s = Settings(data=str(labelled(tmp_path)), seed=seed)
    images = load_train(s)
    assert torch.equal(load_labels(s, "train"), images.train[:, 0, 0].long())
    assert torch.equal(load_labels(s, "validation"), images.validation[:, 0, 0].long())
    assert torch.equal(load_labels(s, "test"), load_test(s).images[:, 0, 0].long())


def test_labels_of_mnist_are_those_of_torchvision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (*NAMES["train"], *NAMES["t10k"]):
        packed = resources.files("cvae.data") / "mnist" / f"{name}.xz"
        (raw / name).write_bytes(lzma.decompress(packed.read_bytes()))
    train, test = (torchvision.datasets.MNIST(tmp_path, train=part).targets for part in (True, False))
    assert torch.equal(torch.cat([load_labels(Settings(), part) for part in ("train", "validation")]), train)
    assert torch.equal(load_labels(Settings(), "test"), test)


def test_no_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", random_images(12, 4, 5))
    labelled(tmp_path)
    (tmp_path / NAMES["t10k"][1]).unlink()
    for folder, part in (("pictures", "train"), ("", "test")):
        with pytest.raises(DataError) as caught:
            load_labels(Settings(data=str(tmp_path / folder)), part)
        assert str(caught.value) == (
            f"{tmp_path / folder}: has no labels, by which images are classified; MNIST and IDX files can have them"
        )
