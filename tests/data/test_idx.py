"""Folders of IDX files: which of them are taken, however called and packed, and what is wrong with damaged ones."""

import gzip
import lzma
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.images import everything, in_order, random_images, refusal
from support.scripts import NAMES, PACKERS, idx_bytes, small_mnist, write_data
from torch import Tensor

from cvae.data.readers import mnist
from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

TRAIN_IMAGES, TRAIN_LABELS = NAMES["train"]
TRAIN, TEST = random_images(12, 4, 5), random_images(6, 4, 5, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", TRAIN, TEST)


def images_for_the_test(data: Path | str) -> Tensor:
    return load_test(Settings(data=str(data))).images


# Names and packings


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("below", ["", "MNIST/raw", "FashionMNIST/raw", "raw", "fashion"])
def test_layouts_and_compressions(tmp_path: Path, below: str, suffix: str) -> None:
    write_data(tmp_path / below, TRAIN, TEST, suffix)
    assert everything(tmp_path) == in_order(TRAIN)
    assert torch.equal(images_for_the_test(tmp_path), TEST)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=["plain", "gzip", "xz"])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", "test-images-idx3-ubyte"),
        ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-test-images-idx3-ubyte.xz"),
        ("qmnist-train-images-idx3-ubyte.gz", "qmnist-test-images-idx3-ubyte.gz"),
        ("Train-Images-IDX3-UByte", "T10K-Images-IDX3-UByte"),
    ],
)
def test_names_as_people_have_them(tmp_path: Path, packer: object, train: str, test: str) -> None:
    """Whatever the name says of the packing, the content decides. There are no labels."""
    assert callable(packer)
    (tmp_path / train).write_bytes(packer(idx_bytes(TRAIN)))
    (tmp_path / test).write_bytes(packer(idx_bytes(TEST)))
    assert everything(tmp_path) == in_order(TRAIN)
    assert torch.equal(images_for_the_test(tmp_path), TEST)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("train-labels-idx2-int", struct.pack(">HBB2I", 0, 0x0C, 2, 12, 8) + bytes(12 * 8 * 4)),
        ("train-labels-idx1-double.gz", gzip.compress(struct.pack(">HBBI", 0, 0x0E, 1, 12) + bytes(12 * 8), mtime=0)),
        ("train-labels.idx1-ubyte", struct.pack(">HBBI", 0, 8, 1, 12)),  # its end is missing: nobody needs it
    ],
)
def test_labels_of_any_type_and_shape(folder: Path, name: str, header: bytes) -> None:
    (folder / TRAIN_LABELS).unlink()
    (folder / name).write_bytes(header)
    assert everything(folder) == in_order(TRAIN)
    (folder / name).write_bytes(PACKERS[".gz"](struct.pack(">HBBI", 0, 8, 1, 11)))
    assert refusal(folder) == f"{folder / name}: has 11 labels for the 12 images of {TRAIN_IMAGES}"


def test_plain_file_beside_its_compressed_copy(folder: Path) -> None:
    """As torchvision leaves them: the plain one is taken."""
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"half of a download")
    assert everything(folder) == in_order(TRAIN)


def test_two_files_for_one_part(folder: Path) -> None:
    shutil.copy(folder / "t10k-images-idx3-ubyte", folder / "test-images-idx3-ubyte")
    assert (
        refusal(folder) == f"{folder}: holds both t10k-images-idx3-ubyte and test-images-idx3-ubyte; leave one of them"
    )


def test_torchvision_reads_the_same_folder_alike(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    small_mnist(tmp_path / "MNIST" / "raw")
    assert everything(tmp_path) == in_order(torchvision.datasets.MNIST(tmp_path, train=True).data)


def test_rows_and_columns_are_not_swapped(tmp_path: Path) -> None:
    image = torch.arange(15, dtype=torch.uint8).view(1, 3, 5).expand(6, 3, 5)
    images = load_train(Settings(data=str(write_data(tmp_path, image, image)))).train
    assert images[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


# One set, from one place


@pytest.mark.parametrize("below", ["raw", ""])
def test_root_of_several_sets(tmp_path: Path, below: str) -> None:
    """None of them is taken silently; what the message says to give is taken."""
    root = tmp_path / "my data"
    for seed, name in enumerate(["FashionMNIST", "MNIST"]):
        write_data(root / name / below, random_images(12, 4, 5, seed), TEST)
    places = [root / name / below for name in ("FashionMNIST", "MNIST")]
    assert refusal(root) == refusal(root, test=True)
    assert refusal(root) == (
        f"{root}: holds several sets of images; say which: --data with " + ", ".join(f"'{place}'" for place in places)
    )
    for seed, place in enumerate(places):
        assert everything(place) == in_order(random_images(12, 4, 5, seed))


def test_folder_of_several_sets(tmp_path: Path) -> None:
    for seed, name in enumerate(["balanced", "letters"]):
        for part, count in (("train", 12), ("test", 6)):
            path = tmp_path / f"emnist-{name}-{part}-images-idx3-ubyte"
            path.write_bytes(idx_bytes(random_images(count, 4, 5, seed)))
    assert refusal(tmp_path).endswith(f"{tmp_path / 'emnist-balanced'}, {tmp_path / 'emnist-letters'}")
    assert everything(tmp_path / "emnist-letters") == in_order(random_images(12, 4, 5, 1))


def test_parts_never_come_from_two_places(tmp_path: Path) -> None:
    """A set without test images stays without, whatever lies beside or below it."""
    write_data(tmp_path, TRAIN, TEST)
    write_data(tmp_path / "FashionMNIST" / "raw", random_images(12, 4, 5, 7), TEST)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    images = load_train(Settings(data=str(tmp_path)))
    assert in_order(torch.cat([images.train, images.validation])) == in_order(TRAIN)
    assert images.record["test"] is None
    assert "no test images" in images.about
    assert refusal(tmp_path, test=True) == f"{tmp_path}: has no test images"


def test_set_without_training_images(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    assert refusal(folder) == f"{folder}: has no training images"
    assert torch.equal(images_for_the_test(folder), TEST)


# Damaged files: one line that names what is at fault


@pytest.mark.parametrize("place", ["nowhere", "data/train-images-idx3-ubyte", "x" * 5000])
def test_no_folder(folder: Path, place: str) -> None:
    assert "; --data takes a folder of IDX files or of pictures, " in refusal(folder.parent / place)


def test_folder_or_pipe_in_the_place_of_a_file(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).mkdir()
    assert refusal(folder) == f"{folder}: has no training images"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kept", [0, 3, 7, 15, 16, 40, -8, -1])
def test_truncated_file(tmp_path: Path, suffix: str, kept: int) -> None:
    write_data(tmp_path, TRAIN, TEST, suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: ")
    if suffix == "":
        assert "truncated" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_truncated_content_in_a_whole_archive(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, TRAIN, TEST, suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(PACKERS[suffix](idx_bytes(TRAIN)[:-1]))
    assert refusal(tmp_path) == (
        f"{path}: is truncated, it holds {16 + 239} of the {16 + 240} bytes that its header announces"
    )


@pytest.mark.parametrize("suffix", PACKERS)
def test_file_that_is_too_long(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, TRAIN, TEST, suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(PACKERS[suffix](idx_bytes(TRAIN) + b"\0"))
    assert refusal(tmp_path) == f"{path}: holds more than the 256 bytes that its header announces"


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_bytes_after_the_archive(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, TRAIN, TEST, suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(path.read_bytes() + b"more")
    assert refusal(tmp_path).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize(
    "magic",
    [
        pytest.param(bytes([0, 0, 8, 1]), id="labels"),
        pytest.param(bytes([0, 0, 13, 3]), id="floats"),
        pytest.param(bytes([3, 8, 0, 0]), id="little-endian"),
        pytest.param(b"\x89PNG", id="PNG"),
    ],
)
def test_wrong_magic(folder: Path, magic: bytes) -> None:
    path = folder / TRAIN_IMAGES
    path.write_bytes(magic + path.read_bytes()[4:] + bytes(4 * 255))
    message = refusal(folder)
    assert message.startswith(f"{path}: is no IDX file")
    assert f"magic {int.from_bytes(magic)}, not 2051" in message


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_counts_that_disagree(folder: Path, part: str) -> None:
    images, labels = (folder / name for name in NAMES[part])
    count = {"train": 12, "t10k": 6}[part]
    labels.write_bytes(idx_bytes(torch.zeros(count - 1, dtype=torch.uint8)))
    assert (
        refusal(folder, part == "t10k") == f"{labels}: has {count - 1} labels for the {count} images of {images.name}"
    )


@pytest.mark.parametrize("dims", [(0, 4, 5), (12, 0, 5), (12, 4, 0), (2**31, 28, 28), (2**32 - 1,) * 3])
def test_header_that_announces_nothing_or_far_too_much(folder: Path, dims: tuple[int, int, int]) -> None:
    path = folder / TRAIN_IMAGES
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, *dims) + path.read_bytes()[16:])
    assert refusal(folder).startswith(f"{path}: its header announces {'×'.join(map(str, dims))} elements")


@pytest.mark.parametrize(("height", "width"), [(1, 28), (28, 1), (2, 4097)])
def test_sizes_that_no_images_can_have(tmp_path: Path, height: int, width: int) -> None:
    images = random_images(6, height, width)
    write_data(tmp_path, images, images)
    assert refusal(tmp_path).startswith(f"{tmp_path / TRAIN_IMAGES}: image 0: has {height}×{width} pixels; 2 to 4096")
    assert load_train(Settings(data=str(tmp_path), size=3)).train.shape == (5, 3, 3)


def test_copy_of_the_embedded_files_is_a_data_folder_too(tmp_path: Path) -> None:
    """An xz file without an ending that says so."""
    for part in ("train", "t10k"):
        (tmp_path / NAMES[part][0]).write_bytes(lzma.compress(idx_bytes(mnist(part)[:60])))
    assert torch.equal(images_for_the_test(tmp_path), mnist("t10k")[:60])
