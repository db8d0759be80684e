"""IDX and NumPy files: which are taken, which numbers are grey levels; damaged ones are refused, or read rightly."""

import gzip
import lzma
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import PACKERS, about, idx, in_order, mnist, random_images, refusal, training, write_idx
from torchvision import datasets

from cvae.data.readers import read_arrays, read_idx, read_idx_set
from cvae.data.sources import load_test, load_train
from cvae.errors import DataError
from cvae.settings import Settings

IMAGES = random_images(20, 4, 5)
TRAIN, TEST = IMAGES[:14], IMAGES[14:]
ARRAY = IMAGES.numpy()


def test_mnist_in_the_package_is_the_published_one() -> None:
    """By the means that everybody normalises MNIST with, and the counts of its classes."""
    train, test = mnist("train"), mnist("t10k")
    assert (train.shape, test.shape, train.dtype) == ((60_000, 28, 28), (10_000, 28, 28), torch.uint8)
    assert train.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert train.double().std().item() / 255 == pytest.approx(0.3081, abs=5e-5)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(mnist("train", "labels")).tolist() == counts


# IDX


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("below", ["", "MNIST/raw", "fashion"])
@pytest.mark.parametrize("start", ["", "emnist-letters-"])
def test_layouts_packings_and_prefixes(tmp_path: Path, below: str, suffix: str, start: str) -> None:
    write_idx(tmp_path / below, TRAIN, TEST, suffix, start)
    assert training(tmp_path) == in_order(TRAIN)
    assert torch.equal(load_test(Settings(data=str(tmp_path))).images, TEST)
    if (below, suffix, start) == ("MNIST/raw", "", ""):
        assert torch.equal(datasets.MNIST(tmp_path, train=False).data, TEST)


def test_names_as_people_have_them(tmp_path: Path) -> None:
    """The content says how it is packed, whatever the name does; labels may be missing, or be for nobody to read."""
    (tmp_path / "Train-Images.IDX3-UByte").write_bytes(gzip.compress(idx(TRAIN)))
    (tmp_path / "test-images-idx3-ubyte.gz").write_bytes(lzma.compress(idx(TEST)))
    (tmp_path / "test-labels-idx1-ubyte").write_bytes(b"no labels")
    assert training(tmp_path) == in_order(TRAIN)
    assert torch.equal(load_test(Settings(data=str(tmp_path))).images, TEST)


def test_labels_without_images_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"labels of pictures that lie beside")
    assert read_idx_set(tmp_path, ("train",)) is None


def test_plain_file_beside_its_packed_copy(tmp_path: Path) -> None:
    """It is taken, as torchvision leaves them."""
    write_idx(tmp_path, TRAIN, TEST)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"half of a download")
    assert training(tmp_path) == in_order(TRAIN)


def test_several_sets_are_refused_and_listed(tmp_path: Path) -> None:
    """Whether they are in folders, as torchvision has them, or have prefixes; what the message lists is taken."""
    write_idx(tmp_path / "KMNIST" / "raw", IMAGES[:7], TEST)
    write_idx(tmp_path / "MNIST", TRAIN, TEST)
    for start in ("emnist-balanced-", "emnist-letters-"):
        write_idx(tmp_path / "prefixes", TRAIN, TEST, start=start)
    for folder, names in ((tmp_path, ("KMNIST/raw", "MNIST")), (tmp_path / "prefixes", ("emnist-balanced",))):
        message = refusal(folder)
        assert message.startswith(f"{folder}: holds several sets of images; say which: --data with ")
        assert all(str(folder / name) in message for name in names)
    assert training(tmp_path / "KMNIST/raw") == in_order(IMAGES[:7])
    assert training(tmp_path / "prefixes/emnist-letters") == in_order(TRAIN)


# NumPy's files


@pytest.mark.parametrize("names", ["x_train x_test", "train test", "train_images test_images", "X_train X_test"])
def test_parts_by_name(tmp_path: Path, names: str) -> None:
    """With labels beside them, as Keras and MedMNIST have them."""
    path, (train, test) = tmp_path / "a.npz", names.split()
    arrays = {train: TRAIN, test: TEST, "y_train": ARRAY[:, 0, 0], "test_labels": ARRAY}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    assert training(path) == in_order(TRAIN)
    assert torch.equal(load_test(Settings(data=str(path))).images, TEST)
    assert about(path).startswith(f".npz file {path}: 12 training, 2 validation, 6 test images of 4×5 pixels; ")


@pytest.mark.parametrize("name", ["images.npz", "images.NPY"])
def test_one_array_is_divided(tmp_path: Path, name: str) -> None:
    """By seed; its test images are the same for every seed."""
    path = tmp_path / name
    with path.open("wb") as file:
        np.savez(file, ARRAY, labels=ARRAY[:, 0, 0]) if name.endswith("npz") else np.save(file, ARRAY)
    test = load_test(Settings(data=str(path))).images
    for seed in (0, 1):
        images = load_train(Settings(data=str(path), seed=seed))
        assert in_order(torch.cat([images.train, images.validation, test])) == in_order(IMAGES)
        assert (len(images.train), len(images.validation), len(test)) == (15, 2, 3)


@pytest.mark.parametrize(
    ("convert", "note"),
    [
        (lambda a: a[..., None], ""),
        (lambda a: a[:, None], ""),
        (lambda a: a[..., None].repeat(3, 3), ""),
        (lambda a: a[:, None].repeat(3, 1), ""),
        (lambda a: a.astype(np.int64), "int64 taken as levels from 0 to 255"),
        (lambda a: a.astype(">u2") * 257, "uint16 taken as levels from 0 to 65535"),
        (lambda a: np.minimum(a.astype("<i4") * 257 + 99, 65535), "int32 taken as levels from 0 to 65535"),
        (lambda a: np.maximum(a.astype("<i4") * 257 - 99, 0), "int32 taken as levels from 0 to 65535"),
        (lambda a: a / 255, "float64 taken as levels from 0 to 1"),
        (lambda a: (a / 255).astype(">f4")[..., None].repeat(3, 3), "float32 taken as levels from 0 to 1"),
    ],
)
def test_levels(tmp_path: Path, convert: Any, note: str) -> None:
    """All these are the same images, said to be read in this way."""
    for save, name in ((np.savez, "a.npz"), (np.save, "a.npy")):
        save(tmp_path / name, convert(ARRAY))
        s = Settings(data=str(tmp_path / name))
        images = load_train(s)
        assert in_order(torch.cat([images.train, images.validation, load_test(s).images])) == in_order(IMAGES)
        assert note in images.about


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_black_and_white(tmp_path: Path, dtype: Any) -> None:
    np.savez(tmp_path / "a.npz", x_train=(ARRAY > 99).astype(dtype))
    assert training(tmp_path / "a.npz") == in_order((IMAGES > 99).to(torch.uint8) * 255)
    said = "the brightest level is 1 of 255: taken as black and white, and scaled" in about(tmp_path / "a.npz")
    assert said == (dtype in (np.uint8, np.int64))


def with_value(value: float, dtype: Any = np.float64) -> Any:
    """Return images of which the eighth has this number in it."""
    images = (ARRAY > 99).astype(dtype)
    images[7, 3, 3] = value
    return images


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": ARRAY, "b": ARRAY}, "has to hold x_train and x_test, or one array of images; it holds a, b"),
        ({"y_train": ARRAY}, "it holds y_train"),
        ({"x_train": ARRAY, "train": ARRAY}, "it holds x_train, train"),
        ({"x_train": ARRAY.reshape(20, 20)}, "x_train: has the shape [20, 20]; images are [N, height, width]"),
        ({"x_train": ARRAY[..., None].repeat(2, 3)}, "x_train: has the shape [20, 4, 5, 2]"),
        ({"x_train": ARRAY[:0]}, "x_train: has the shape [0, 4, 5]"),
        ({"x_train": ARRAY.astype("S1")}, "a.npz: is damaged, or no .npz file of numbers"),
        ({"x_train": ARRAY.astype(complex)}, "a.npz: is damaged, or no .npz file of numbers"),
        ({"x_train": ARRAY.astype(object)}, "a.npz: is damaged, or no .npz file of numbers (ValueError)"),
        ({"x_train": ARRAY, "x_test": ARRAY[:, :3]}, "has images of 4×5 and 3×5 and 4×5 pixels; --size"),
        ({"x_train": with_value(np.nan)}, "x_train: holds numbers from nan to nan"),
        ({"x_train": with_value(np.inf)}, "x_train: holds numbers from 0 to inf, which have to be from 0 to 1"),
        ({"x_train": with_value(-1, np.int32)}, "x_train: holds numbers from -1 to 1"),
        ({"x_train": with_value(65536, np.int32)}, "holds numbers from 0 to 65536, which have to be from 0 to 65535"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_set_of_images(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert words in refusal(tmp_path / "a.npz")


def test_file_that_is_cut(tmp_path: Path) -> None:
    """Wherever it is: it is refused, in one line that names it."""
    np.save(tmp_path / "a.npy", ARRAY[:3])
    np.savez_compressed(tmp_path / "a.npz", ARRAY[:3])
    for suffix, pack in PACKERS.items():
        (tmp_path / f"images{suffix}").write_bytes(pack(idx(IMAGES[:3])))
    for path in sorted(tmp_path.iterdir()):
        read: Any = read_idx if path.stem == "images" else partial(read_arrays, wanted=("train",))
        content = path.read_bytes()
        assert read(path) is not None
        for end in range(len(content)):
            path.write_bytes(content[:end])
            with pytest.raises(DataError, match=f"^{path}: is damaged, or no "):
                read(path)
