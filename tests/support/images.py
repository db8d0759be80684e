"""Random images in the forms that people have them in, and how they are refused."""

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import cvae.data
from cvae.data.readers import read_idx
from cvae.data.sources import load_test, load_train
from cvae.errors import DataError
from cvae.settings import Settings

PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def mnist(part: str, kind: str = "images") -> Tensor:
    """Return all images, or labels, of MNIST's `train` or `t10k`, as the files in the package have them."""
    (path,) = (Path(cvae.data.__path__[0]) / "mnist").glob(f"{part}-{kind}-*")
    return torch.tensor(read_idx(path))


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return uint8 `[count, height, width]`."""
    return torch.randint(256, (count, height, width), generator=torch.manual_seed(seed), dtype=torch.uint8)


def photograph(path: Path) -> None:
    """Write a picture of a seven on paper."""
    sheet = Image.new("RGB", (300, 400), (230, 225, 210))
    ImageDraw.Draw(sheet).line([(90, 120), (190, 120), (120, 290)], fill=(30, 30, 60), width=14, joint="curve")
    sheet.save(path, quality=95)


def idx(array: Tensor) -> bytes:
    """Return an IDX file of unsigned bytes, written after the description of the format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.contiguous().numpy().tobytes()


def write_idx(folder: Path, train: Tensor, test: Tensor, suffix: str = "", start: str = "") -> Path:
    """Write the four files of a set; the labels count from 0 to 6, and begin again."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in ((f"{start}train", train), (f"{start}test" if start else "t10k", test)):
        labels = torch.arange(len(images), dtype=torch.uint8) % 7
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(PACKERS[suffix](idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(PACKERS[suffix](idx(labels)))
    return folder


def write_pictures(folder: Path, images: Tensor, suffix: str = ".png") -> Path:
    """Write a folder of grey pictures, 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{i:04}{suffix}")
    return folder


def refusal(data: Path | str, test: bool = False, **more: Any) -> str:
    """Return the one line with which images are refused."""
    with pytest.raises(DataError) as caught:
        (load_test if test else load_train)(Settings(data=str(data), **more))
    assert str(caught.value).isprintable()
    return str(caught.value)


def about(data: Path | str, **more: Any) -> str:
    """Return the line that says what was taken."""
    return load_train(Settings(data=str(data), **more)).about


def training(data: Path | str, **more: Any) -> list[bytes]:
    """Return all training and validation images, whatever the order they came in."""
    images = load_train(Settings(data=str(data), **more))
    return in_order(torch.cat([images.train, images.validation]))


def in_order(images: Tensor) -> list[bytes]:
    """Return images as bytes, sorted."""
    return sorted(image.numpy().tobytes() for image in images)
