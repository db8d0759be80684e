"""The images: the embedded MNIST, folders of other images, and what is wrong with damaged ones."""

import gzip
import hashlib
import lzma
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.scripts import NAMES, PACKERS, idx_bytes, small_mnist, write_data
from torch import Tensor

from cvae.data import sources
from cvae.data.idx import read_idx
from cvae.data.images import ImageSet
from cvae.data.masks import Split, quadrants
from cvae.data.sources import load_images, load_test, load_train
from cvae.errors import DataError
from cvae.settings import Settings

EMBEDDED = Path(sources.__file__).parent / "mnist"
TRAIN_IMAGES, TRAIN_LABELS = NAMES["train"]


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width), generator=random, dtype=torch.uint8)


def refusal(folder: Path, part: sources.Part = "train") -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(DataError) as caught:
        load_images(folder, part)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", random_images(12, 4, 5), random_images(6, 4, 5))


# The embedded MNIST


def test_embedded_mnist_is_the_published_one() -> None:
    train, test = load_images(None, "train"), load_images(None, "t10k")
    assert (train.shape, test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert train.dtype == test.dtype == torch.uint8
    # The means that everybody normalises MNIST with.
    assert train.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert train.double().std().item() / 255 == pytest.approx(0.3081, abs=5e-5)
    labels = read_idx(EMBEDDED / f"{TRAIN_LABELS}.xz", 1)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert torch.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_embedded_files_have_the_digests_of_the_originals() -> None:
    for name, digest in sources.SHA256.items():
        content = lzma.decompress((EMBEDDED / f"{name}.xz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("kind", [0, 1], ids=["images", "labels"])
def test_embedded_mnist_is_checked_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch, part: str, kind: int) -> None:
    name = NAMES[part][kind]
    monkeypatch.setitem(sources.SHA256, name, "0" * 64)
    with pytest.raises(DataError, match=f"{name}.xz: is damaged"):
        load_images(None, part)


@pytest.mark.parametrize("part", NAMES)
def test_embedded_mnist_is_decompressed_once(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Each of the two files of a part, and none of the other part's."""
    read: list[str] = []

    def counting(path: Path, num_dims: int, sha256: str | None = None) -> Tensor:
        read.append(path.name)
        return read_idx(path, num_dims, sha256)

    monkeypatch.setattr(sources, "read_idx", counting)
    load_images(None, part)
    assert read == [f"{name}.xz" for name in NAMES[part]]


def test_flipped_byte_that_xz_cannot_see_is_seen(tmp_path: Path) -> None:
    name = NAMES["t10k"][1]
    content = bytearray(lzma.decompress((EMBEDDED / f"{name}.xz").read_bytes()))
    content[-1] ^= 1
    path = tmp_path / f"{name}.xz"
    path.write_bytes(lzma.compress(content))
    assert len(read_idx(path, 1)) == 10_000
    with pytest.raises(DataError, match="is damaged") as caught:
        read_idx(path, 1, sources.SHA256[name])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("position", [0, 7, 100, 2000, -30, -1])
def test_flipped_byte_in_the_file_itself_is_seen(tmp_path: Path, position: int) -> None:
    name = NAMES["t10k"][1]
    content = bytearray((EMBEDDED / f"{name}.xz").read_bytes())
    content[position] ^= 0x10
    path = tmp_path / f"{name}.xz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_idx(path, 1, sources.SHA256[name])


# The split


def test_last_ten_thousand_images_are_for_validation() -> None:
    everything = load_images(None, "train")
    train, validation, *_ = load_train()
    assert (len(train), len(validation)) == (50_000, 10_000)
    assert torch.equal(torch.cat([train, validation]), everything)
    assert torch.equal(load_test().images, load_images(None, "t10k"))


@pytest.mark.parametrize(("count", "held_out"), [(6, 1), (11, 1), (12, 2), (59_999, 9_999), (60_001, 10_000)])
def test_of_fewer_images_the_last_sixth_is_for_validation(tmp_path: Path, count: int, held_out: int) -> None:
    images = random_images(count, 2, 2)
    train, validation, *_ = load_train(Settings(data=str(write_data(tmp_path, images, images[:1]))))
    assert torch.equal(train, images[: count - held_out])
    assert torch.equal(validation, images[count - held_out :])


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_images_to_split(tmp_path: Path, count: int) -> None:
    write_data(tmp_path, random_images(count, 4, 4), random_images(1, 4, 4))
    with pytest.raises(DataError, match="too few") as caught:
        load_train(Settings(data=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)


# Folders


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("below", ["", "MNIST/raw", "FashionMNIST/raw", "raw"])
def test_layouts_and_compressions(tmp_path: Path, below: str, suffix: str) -> None:
    train, test = random_images(13, 17, 21), random_images(7, 17, 21, seed=1)
    write_data(tmp_path / below, train, test, suffix)
    assert torch.equal(load_images(tmp_path, "train"), train)
    assert torch.equal(load_test(Settings(data=str(tmp_path))).images, test)


def test_mixed_compressions(tmp_path: Path) -> None:
    train, test = random_images(13, 4, 4), random_images(7, 4, 4, seed=1)
    write_data(tmp_path, train, test, ".gz")
    plain = tmp_path / TRAIN_LABELS
    plain.write_bytes(gzip.decompress((tmp_path / f"{TRAIN_LABELS}.gz").read_bytes()))
    (tmp_path / f"{TRAIN_LABELS}.gz").unlink()
    assert torch.equal(load_images(tmp_path, "train"), train)


def test_torchvision_reads_the_same_folder_alike(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    small_mnist(tmp_path / "MNIST" / "raw")
    expected = torchvision.datasets.MNIST(tmp_path, train=True).data
    assert torch.equal(load_images(tmp_path, "train"), expected)


def test_rows_and_columns_are_not_swapped(tmp_path: Path) -> None:
    image = torch.arange(15, dtype=torch.uint8).view(1, 3, 5).expand(6, 3, 5)
    images = load_images(write_data(tmp_path, image, image), "train")
    assert images[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


# Damaged folders: one line that names what is at fault


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: there is no such folder")


def test_file_in_the_place_of_the_folder(folder: Path) -> None:
    assert "no such folder" in refusal(folder / TRAIN_IMAGES)


def test_folder_name_beyond_what_the_system_takes(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refusal(folder, "train" if name.startswith("train") else "t10k")
    assert message.startswith(f"{folder}: has no {name} ")


def test_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).mkdir()
    assert f"has no {TRAIN_IMAGES}" in refusal(folder)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kept", [0, 3, 7, 15, 16, 40, -8, -1])
def test_truncated_file(tmp_path: Path, suffix: str, kept: int) -> None:
    write_data(tmp_path, random_images(12, 4, 5), random_images(6, 4, 5), suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: ")
    if suffix == "":
        assert "truncated" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_truncated_content_in_a_whole_archive(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, random_images(12, 4, 5), random_images(6, 4, 5), suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(PACKERS[suffix](idx_bytes(random_images(12, 4, 5))[:-1]))
    assert refusal(tmp_path) == (
        f"{path}: is truncated, it holds {16 + 239} of the {16 + 240} bytes that its header announces"
    )


@pytest.mark.parametrize("suffix", PACKERS)
def test_file_that_is_too_long(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, random_images(12, 4, 5), random_images(6, 4, 5), suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(PACKERS[suffix](idx_bytes(random_images(12, 4, 5)) + b"\0"))
    assert refusal(tmp_path) == f"{path}: holds more than the 256 bytes that its header announces"


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_bytes_after_the_archive(tmp_path: Path, suffix: str) -> None:
    write_data(tmp_path, random_images(12, 4, 5), random_images(6, 4, 5), suffix)
    path = tmp_path / (TRAIN_IMAGES + suffix)
    path.write_bytes(path.read_bytes() + b"more")
    assert refusal(tmp_path).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_plain_file_that_is_called_compressed(folder: Path, suffix: str) -> None:
    path = (folder / TRAIN_IMAGES).rename(folder / (TRAIN_IMAGES + suffix))
    assert refusal(folder).startswith(f"{path}: cannot be read")


def test_compressed_file_that_is_called_plain(folder: Path) -> None:
    path = folder / TRAIN_IMAGES
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert refusal(folder).startswith(f"{path}: is no IDX file of 3-dimensional bytes")


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
    path.write_bytes(magic + path.read_bytes()[4:])
    message = refusal(folder)
    assert message.startswith(f"{path}: is no IDX file")
    assert f"magic {int.from_bytes(magic)}, not 2051" in message


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_counts_that_disagree(folder: Path, part: sources.Part) -> None:
    images, labels = (folder / name for name in NAMES[part])
    count = len(read_idx(images, 3))
    labels.write_bytes(idx_bytes(torch.zeros(count - 1, dtype=torch.uint8)))
    assert refusal(folder, part) == f"{labels}: has {count - 1} labels for the {count} images of {images.name}"


@pytest.mark.parametrize("dims", [(0, 4, 5), (12, 0, 5), (12, 4, 0), (2**31, 28, 28), (2**32 - 1,) * 3])
def test_header_that_announces_nothing_or_far_too_much(folder: Path, dims: tuple[int, int, int]) -> None:
    path = folder / TRAIN_IMAGES
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, *dims) + path.read_bytes()[16:])
    assert refusal(folder).startswith(f"{path}: its header announces {'×'.join(map(str, dims))} elements")


@pytest.mark.parametrize(("height", "width"), [(1, 28), (28, 1), (1, 1)])
def test_images_without_four_quadrants(tmp_path: Path, height: int, width: int) -> None:
    images = random_images(6, height, width)
    write_data(tmp_path, images, images)
    assert refusal(tmp_path).startswith(f"{tmp_path / TRAIN_IMAGES}: images of {height}×{width} pixels")


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


def test_copy_of_the_embedded_files_is_a_data_folder_too(tmp_path: Path) -> None:
    for name in NAMES["t10k"]:
        shutil.copy(EMBEDDED / f"{name}.xz", tmp_path)
    assert torch.equal(load_test(Settings(data=str(tmp_path))).images, load_test().images)
