"""What the tests of the sources of images share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cvae.data.sources import load_test, load_train
from cvae.errors import DataError
from cvae.settings import Settings


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 `[count, height, width]`."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width), generator=random, dtype=torch.uint8)


def refusal(data: Path | str, test: bool = False, **more: Any) -> str:
    """The one line with which images are refused."""
    load = load_test if test else load_train
    with pytest.raises(DataError) as caught:
        load(Settings(data=str(data), **more))
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(data: Path | str, **more: Any) -> list[bytes]:
    """All training and validation images, as bytes and in the order of these: whatever the order they came in."""
    images = load_train(Settings(data=str(data), **more))
    return in_order(torch.cat([images.train, images.validation]))


def in_order(images: Tensor) -> list[bytes]:
    """The images as bytes, in the order of these."""
    return sorted(image.numpy().tobytes() for image in images)


def write_pictures(folder: Path, images: Tensor, suffix: str = ".png") -> Path:
    """A folder of grey pictures, 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(folder / f"{i:04}{suffix}")
    return folder
