"""Images in NumPy's files: which arrays are taken, which numbers are grey levels, and what is refused."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import everything, in_order, random_images, refusal

from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

IMAGES = random_images(20, 4, 5)
TRAIN, TEST = IMAGES[:14].numpy(), IMAGES[14:].numpy()


def load(path: Path) -> Any:
    return load_train(Settings(data=str(path)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.npz"


# Names


@pytest.mark.parametrize(
    ("train", "test"),
    [("x_train", "x_test"), ("train", "test"), ("train_images", "test_images"), ("X_train", "X_test")],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_parts_by_name(path: Path, save: Any, train: str, test: str) -> None:
    """With labels beside them, as Keras and MedMNIST have them."""
    save(
        path, **{train: TRAIN, test: TEST, "y_train": TRAIN[:, 0, 0], "train_labels": TRAIN[:, :1], "test_labels": TEST}
    )
    assert everything(path) == in_order(IMAGES[:14])
    assert torch.equal(load_test(Settings(data=str(path))).images, IMAGES[14:])
    assert load(path).about.startswith(f".npz file {path}: 12 training, 2 validation, 6 test images of 4×5 pixels")


def test_validation_images_of_its_own(path: Path) -> None:
    np.savez(path, train_images=TRAIN, val_images=TEST)
    assert in_order(load(path).train) == in_order(IMAGES[:14])
    assert torch.equal(load(path).validation, IMAGES[14:])
    assert "no test images" in load(path).about
    assert refusal(path, test=True) == f"{path}: has no test images"


@pytest.mark.parametrize("name", ["images.npz", "images.npy", "whatever"])
def test_one_array(tmp_path: Path, name: str) -> None:
    """It is divided by seed, and its test images are the same for every seed."""
    path = tmp_path / name
    with path.open("wb") as file:
        if name.endswith("npz"):
            np.savez(file, IMAGES.numpy(), labels=IMAGES[:, 0, 0].numpy())
        else:
            np.save(file, IMAGES.numpy())
    test = load_test(Settings(data=str(path))).images
    for seed in (0, 1):
        images = load_train(Settings(data=str(path), seed=seed))
        assert in_order(torch.cat([images.train, images.validation, test])) == in_order(IMAGES)
        assert (len(images.train), len(images.validation), len(test)) == (15, 2, 3)
    assert "a sixth drawn for the test, the same for every seed" in images.about


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": TRAIN, "b": TEST}, "has to hold x_train and x_test, or one array of images; it holds a [14, 4, 5], b"),
        ({"y_train": TRAIN}, "it holds y_train [14, 4, 5]"),
        ({"x_train": TRAIN, "train": TEST}, "holds several arrays for one part: x_train, train"),
        (
            {"x_train": TRAIN.reshape(14, 20)},
            "x_train: has the shape [14, 20]; images are [N, height, width], or with 1 or 3 channels; "
            "reshape them: images.reshape(-1, height, width)",
        ),
        (
            {"x_train": TRAIN[:, :4, :4].reshape(14, 16)},
            "x_train: has the shape [14, 16]; images are [N, height, width], or with 1 or 3 channels; "
            "reshape them: images.reshape(-1, 4, 4)",
        ),
        ({"x_train": TRAIN[..., None].repeat(2, 3)}, "x_train: has the shape [14, 4, 5, 2]"),
        ({"x_train": TRAIN[:0]}, "x_train: its header announces 0 bytes"),
        ({"x_train": TRAIN.astype("S1")}, "x_train: is of type |S1; images are bytes, whole numbers or floats"),
        ({"x_train": TRAIN, "x_test": TEST[:, :3]}, "train images of 4×5 pixels and test images of 3×5"),
        ({"x_train": TRAIN / 255, "x_test": TEST}, "the parts are not alike (train images: floats from 0 to 1; "),
    ],
)
def test_arrays_that_are_no_set_of_images(path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(path, **arrays)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_archive_without_arrays(tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"a picture")
    assert refusal(path) == f"{path}: is an archive without arrays; unpack it, and give the folder of pictures"


@pytest.mark.parametrize("kept", [0, 2, 40, 300, -30, -1])
def test_truncated(path: Path, kept: int) -> None:
    np.savez(path, x_train=TRAIN)
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path).startswith(f"{path}: ")


# Numbers


@pytest.mark.parametrize(
    ("convert", "note"),
    [
        (lambda a: a[..., None], ""),
        (lambda a: a[:, None], ""),
        (lambda a: np.asfortranarray(a), ""),
        (lambda a: a.transpose(0, 2, 1).copy().transpose(0, 2, 1), ""),
        (lambda a: a[..., None].repeat(3, 3), "colour made grey by ITU-R 601"),
        (lambda a: a[:, None].repeat(3, 1), "colour made grey by ITU-R 601"),
        (lambda a: a.astype(np.int64), "int64 up to 255 taken as levels of 0 to 255"),
        (lambda a: a.astype(">u2"), "uint16 up to 255 taken as levels of 0 to 255"),
        (lambda a: a.astype(np.uint16) * 257, "16-bit levels scaled to 8"),
        (lambda a: np.minimum(a.astype("<i4") * 257 + 99, 65535), "16-bit levels scaled to 8"),
        (lambda a: a / 255, "floats from 0 to 1"),
        (lambda a: (a / 255).astype(np.float32), "floats from 0 to 1"),
        (lambda a: (a / 255).astype(np.float16), "floats from 0 to 1"),
        (lambda a: (a / 255).astype(">f4")[..., None].repeat(3, 3), "floats from 0 to 1"),
    ],
)
def test_levels(path: Path, convert: Any, note: str) -> None:
    """All these are the same images, said to be read in this way."""
    np.savez(path, x_train=convert(IMAGES.numpy()))
    assert everything(path) == in_order(IMAGES)
    assert note in load(path).about


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_black_and_white(path: Path, dtype: Any) -> None:
    black_and_white = IMAGES > 99
    np.savez(path, x_train=black_and_white.numpy().astype(dtype))
    assert everything(path) == in_order(black_and_white.to(torch.uint8) * 255)
    said = "the brightest level is 1 of 255: taken as black and white, and scaled" in load(path).about
    assert said == (dtype in (np.uint8, np.int64))


def test_wide_levels_of_a_part_are_those_of_the_whole(path: Path) -> None:
    """The test images are all darker than 256 of 65535, and read as the others are."""
    wide = IMAGES.numpy().astype(np.uint16) * 257
    np.savez(path, wide)
    dark = {image.tobytes() for image in load_test(Settings(data=str(path))).images.numpy()}
    rows = [i for i, image in enumerate(IMAGES.numpy()) if image.tobytes() in dark]
    wide[rows] = np.arange(20).reshape(4, 5) * 13
    np.savez(path, wide)
    assert load_test(Settings(data=str(path))).record["test"] == load(path).record["test"]
    assert load_test(Settings(data=str(path))).images.max() == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "holds NaN; replace it or leave the image out"),
        (np.inf, "holds numbers from 0 to inf; floats have to be from 0 to 1"),
        (-0.25, "holds numbers from -0.25 to 1; floats have to be from 0 to 1: shift and scale them"),
        (255.0, "holds numbers from 0 to 255; floats have to be from 0 to 1: divide them by 255"),
    ],
)
def test_floats_that_are_no_levels(path: Path, value: float, words: str) -> None:
    train = np.zeros((14, 4, 5))
    train[:, 0, 0] = 1
    train[7, 3, 3] = train[9, 0, 0] = value
    np.savez(path, x_train=train)
    assert refusal(path).startswith(f"{path}: x_train: image 7: {words}")


@pytest.mark.parametrize("value", [-1, 65536])
def test_whole_numbers_that_are_no_levels(path: Path, value: int) -> None:
    train = TRAIN.astype(np.int32)
    train[13, 0, 0] = value
    np.savez(path, x_train=train)
    assert "x_train: image 13: holds numbers from " in refusal(path)
    assert "whole numbers have to be from 0 to 65535" in refusal(path)


def test_constant_image(path: Path) -> None:
    train = TRAIN.copy()
    train[[3, 11]] = 0
    np.savez(path, x_train=train)
    assert refusal(path) == f"{path}: x_train: image 3: is of one grey level throughout (and 1 more); leave it out"


def test_larger_than_a_portion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few images at a time, each lands where it belongs."""
    monkeypatch.setattr("cvae.data.arrays.CHUNK", 64)  # three images
    for name, array in (("a.npy", IMAGES.numpy()), ("b.npy", np.asfortranarray(IMAGES.numpy()))):
        np.save(tmp_path / name, array)
        assert load(tmp_path / name).record["train"] == load(tmp_path / "a.npy").record["train"]
    np.savez(tmp_path / "c.npz", x_test=TEST)
    assert torch.equal(load_test(Settings(data=str(tmp_path / "c.npz"))).images, IMAGES[14:])
