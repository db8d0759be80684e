"""Masks as pictures: whatever people draw them in is the same mask, and what is none is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from cvae.data.masks import MASKS, make_task, mask_png, read_mask
from cvae.errors import DataError
from cvae.settings import Settings

BLOCKS = torch.zeros(16, 24, dtype=torch.bool)  # in squares of eight pixels, as JPEG has them
BLOCKS[:8, 8:] = BLOCKS[8:, :8] = True


def picture(observed: Tensor) -> Image.Image:
    return Image.fromarray(observed.numpy().astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masks")


@given(st.data())
def test_what_a_run_keeps_is_the_mask(folder: Path, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    count = data.draw(st.integers(1, height * width - 1))
    observed = torch.tensor(data.draw(st.permutations(range(height * width)))).view(height, width) < count
    (path := folder / "mask.png").write_bytes(mask_png(observed))
    read, about = read_mask(path, height, width)
    assert torch.equal(read, observed)
    assert about == f"observed: {count} of {height * width} pixels, white in {path}"


@given(st.sampled_from(sorted(MASKS)), st.integers(3, 9), st.integers(3, 9), st.integers(1, 7), st.integers(1, 7))
def test_enlarged_picture_is_the_mask(folder: Path, name: str, height: int, width: int, tall: int, wide: int) -> None:
    """Each pixel as a rectangle of its own, however large: what is nearest is the pixel."""
    observed = MASKS[name](height, width)
    picture(observed.repeat_interleave(tall, 0).repeat_interleave(wide, 1)).save(path := folder / "mask.png")
    read, about = read_mask(path, height, width)
    assert torch.equal(read, observed)
    scaled = f"; scaled from {height * tall}×{width * wide} to {height}×{width} (nearest)"
    assert about.endswith(scaled if tall * wide > 1 else str(path))


WAYS: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "bits": (lambda image: image.convert("1"), ""),
    "white and red": (lambda image: Image.merge("RGB", [image.point(lambda v: v or 200), image, image]), "grey"),
    "on transparent": (lambda image: Image.merge("LA", [Image.new("L", image.size, 255), image]), ""),
    "zeros and ones": (lambda image: image.point(lambda v: v // 255), "grey levels from 1 on = white"),
    "two greys": (lambda image: image.point(lambda v: 40 + 3 * v // 4), "grey levels from 128 on = white"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_draw_a_mask(tmp_path: Path, way: str) -> None:
    draw, said = WAYS[way]
    draw(picture(BLOCKS)).save(tmp_path / "no ending", "PNG")
    read, about = read_mask(tmp_path / "no ending", 16, 24)
    assert torch.equal(read, BLOCKS)
    assert said in about


@pytest.mark.parametrize("name", ["disc.png", "disc.jpg"])
def test_soft_edges_are_cut_at_half(tmp_path: Path, name: str) -> None:
    """As drawing programs and JPEG leave them."""
    disc = Image.new("L", (224, 224))
    ImageDraw.Draw(disc).ellipse((44, 44, 180, 180), fill=255)
    disc.resize((28, 28), Image.Resampling.BOX).save(path := tmp_path / name)
    task = make_task(Settings(observed=str(path)), 28, 28)
    assert task.about.endswith("; grey levels from 128 on = white")
    assert task.name == "disc"
    assert abs(task.x_dim - np.asarray(disc).sum() / 255 / 64) < 4


def test_mask_of_a_run(tmp_path: Path) -> None:
    """The picture that it was made from is not needed, and does not count."""
    (kept := tmp_path / "observed.png").write_bytes(mask_png(MASKS["border"](6, 8)))
    s = Settings(observed=str(tmp_path / "gone.png"))
    task = make_task(s, 6, 8, picture=kept)
    assert (task.name, torch.equal(task.observed, MASKS["border"](6, 8))) == ("gone", True)


POINT = Image.new("L", (300, 300))
POINT.putpixel((0, 0), 255)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, r"cannot be read as a picture \(No such file"),
    "text": (lambda path: path.write_text("white\n" * 100), "cannot be read as a picture"),
    "cut": (lambda path: path.write_bytes(mask_png(BLOCKS)[:-30]), "cannot be read as a picture"),
    "photograph": (lambda path: Image.linear_gradient("L").save(path), "no mask in black and white: 50% of its pixels"),
    "white": (
        lambda path: Image.new("L", (28, 28), 255).save(path),
        "784 of 784 pixels are observed; some have to be",
    ),
    "black": (lambda path: Image.new("1", (50, 50)).save(path), "0 of 784 pixels are observed"),
    "point": (lambda path: POINT.save(path), "0 of 784 pixels are observed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mask_is_refused(tmp_path: Path, case: str) -> None:
    make, said = REFUSED[case]
    make(path := tmp_path / "mask.png")
    with pytest.raises(DataError, match=said) as caught:
        make_task(Settings(observed=str(path)), 28, 28)
    assert str(caught.value).startswith(f"{path}: ")
