"""Masks as pictures: whatever people draw them in is the same mask, and what is none is refused in one line."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from cvae.data.mask_pictures import mask_png, read_mask
from cvae.data.masks import MASKS, make_split
from cvae.errors import DataError
from cvae.settings import Settings

BLOCKS = torch.zeros(16, 24, dtype=torch.bool)  # in squares of eight pixels, as JPEG has them
BLOCKS[:8, 8:] = BLOCKS[8:, :8] = True


def picture(observed: Tensor) -> Image.Image:
    return Image.fromarray(observed.numpy().astype(np.uint8) * 255)


def disc(side: int) -> Image.Image:
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse((side // 5, side // 5, side - side // 5, side - side // 5), fill=255)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masks")


@given(st.data())
def test_what_a_run_keeps_is_the_mask(folder: Path, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    count = data.draw(st.integers(1, height * width - 1))
    observed = torch.tensor(data.draw(st.permutations(range(height * width)))).view(height, width) < count
    path = folder / "mask.png"
    path.write_bytes(mask_png(observed))
    with Image.open(path) as image:
        assert image.size == (width, height)
        assert np.unique(image).tolist() == [0, 255]
    found, about = read_mask(path, height, width, exact=True)
    assert torch.equal(found, observed)
    assert about == f"observed: {count} of {height * width} pixels, white in {path}"


def palette(image: Image.Image) -> Image.Image:
    """The picture in two colours, whose numbers are not their brightness."""
    result = Image.fromarray(1 - np.asarray(image) // 255, "P")
    result.putpalette([255, 255, 255, 0, 0, 0])
    return result


def on_transparent(image: Image.Image) -> Image.Image:
    """White strokes, and around them white too, but transparent."""
    return Image.merge("RGBA", [Image.new("L", image.size, 255)] * 3 + [image])


WAYS: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "as it is": (lambda image: image, ""),
    "of bits": (lambda image: image.convert("1"), ""),
    "with a palette": (palette, ""),
    "of colours that are grey": (lambda image: image.convert("RGB"), ""),
    "white and red": (lambda image: Image.merge("RGB", [image.point(lambda v: v or 200), image, image]), "grey"),
    "on transparent": (on_transparent, "black"),
    "of 16 bits": (lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257), "8"),
    "of zeros and ones": (lambda image: image.point(lambda v: v // 255), "level 1 of 255 = white"),
    "of two greys": (lambda image: image.point(lambda v: 40 + 3 * v // 4), "grey levels from 128 on = white"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_draw_a_mask(tmp_path: Path, way: str) -> None:
    draw, said = WAYS[way]
    draw(picture(BLOCKS)).save(tmp_path / "mask.png")
    found, about = read_mask(tmp_path / "mask.png", 16, 24)
    assert torch.equal(found, BLOCKS)
    assert said in about


@pytest.mark.parametrize(
    "name", ["mask.bmp", "mask.gif", "mask.tiff", "mask.webp", "mask.pbm", "mask.jpg", "no ending"]
)
def test_formats(tmp_path: Path, name: str) -> None:
    image = picture(BLOCKS).convert("1" if name.endswith("pbm") else "L")
    image.save(tmp_path / name, "JPEG" if name == "no ending" else None)
    assert torch.equal(read_mask(tmp_path / name, 16, 24)[0], BLOCKS)


@given(st.sampled_from(sorted(MASKS)), st.integers(3, 9), st.integers(3, 9), st.integers(1, 7), st.integers(1, 7))
def test_enlarged_picture_is_the_mask(
    folder: Path, name: str, height: int, width: int, tall: int, wide: int
) -> None:  # fmt: skip
    """Each pixel as a rectangle of its own, however large: what is nearest is the pixel."""
    observed = MASKS[name](height, width)
    path = folder / "mask.png"
    picture(observed.repeat_interleave(tall, 0).repeat_interleave(wide, 1)).save(path)
    found, about = read_mask(path, height, width)
    assert torch.equal(found, observed)
    scaled = f"; scaled from {height * tall}×{width * wide} to {height}×{width} (nearest)"
    assert about.endswith(scaled if tall * wide > 1 else str(path))


@pytest.mark.parametrize("name", ["disc.png", "disc.jpg"])
def test_soft_edges_are_cut_at_half(tmp_path: Path, name: str) -> None:
    """As drawing programs and JPEG leave them."""
    path = tmp_path / name
    disc(224).resize((28, 28), Image.Resampling.BOX).save(path)
    split = make_split(Settings(observed=str(path)), 28, 28)
    assert split.about == (
        f"observed: {split.num_observed} of 784 pixels, white in {path}; grey levels from 128 on = white"
    )
    assert split.name == "disc"
    area = torch.tensor(np.asarray(disc(224))).float().div(255).sum() / 64
    assert abs(split.num_observed - area) < 4


def ramp(side: int) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "pipe": (lambda path: os.mkfifo(path), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "picture"),
    "text": (lambda path: path.write_text("white\n" * 100), "picture"),
    "cut": (lambda path: path.write_bytes(mask_png(torch.rand(40, 40) < 0.5)[:-60]), "picture"),
    "photograph": (lambda path: ramp(28).save(path, "PNG"), "no mask in black and white: 50% of its pixels"),
    "all white": (lambda path: Image.new("L", (28, 28), 255).save(path, "PNG"), "so nothing is hidden"),
    "nearly white": (lambda path: Image.new("RGB", (28, 28), (255, 250, 245)).save(path, "JPEG"), "nothing is hidden"),
    "all black": (lambda path: Image.new("1", (50, 50)).save(path, "PNG"), "so nothing is given"),
    "white point": (lambda path: point().save(path, "PNG"), r"nothing is given \(scaled from 300×300 to 28×28"),
    "bomb": (lambda path: path.write_bytes(gif(60_000, 1)), "picture|pixels"),
    "frame as bomb": (lambda path: path.write_bytes(gif(1, 60_000)), "picture|pixels"),
}


def point() -> Image.Image:
    image = Image.new("L", (300, 300))
    image.putpixel((0, 0), 255)
    return image


def gif(screen: int, frame: int) -> bytes:
    """A picture of one pixel, whose headers claim this many on a side."""
    content = bytearray()
    with io.BytesIO() as buffer:
        Image.new("L", (1, 1)).save(buffer, "GIF")
        content += buffer.getvalue()
    content[6:10] = screen.to_bytes(2, "little") * 2
    at = content.index(b"\x2c\0\0\0\0\x01\0\x01\0") + 5
    content[at : at + 4] = frame.to_bytes(2, "little") * 2
    return bytes(content)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mask_is_refused(tmp_path: Path, case: str) -> None:
    make, said = REFUSED[case]
    path = tmp_path / "mask.png"
    make(path)
    with pytest.raises(DataError, match=said) as caught:
        make_split(Settings(observed=str(path)), 28, 28)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_mask_of_a_run_has_the_size_of_its_images(tmp_path: Path) -> None:
    """The picture that it was made from is not needed, and does not count."""
    kept = tmp_path / "observed.png"
    kept.write_bytes(mask_png(MASKS["border"](6, 8)))
    s = Settings(observed=str(tmp_path / "gone.png"))
    split = make_split(s, 6, 8, picture=kept)
    assert torch.equal(split.observed, MASKS["border"](6, 8))
    assert split.name == "gone"
    with pytest.raises(DataError, match=r"observed\.png: has 6×8 pixels, and the images .* have 8×6"):
        make_split(s, 8, 6, picture=kept)
    assert torch.equal(make_split(Settings(observed="top"), 8, 6, picture=kept).observed, MASKS["top"](8, 6))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_pictures(tmp_path: Path, form: str) -> None:
    """A mask of the right size, or one line."""
    buffer, path, chance = io.BytesIO(), tmp_path / "mask", random.Random(form)
    picture(BLOCKS).save(buffer, form)
    outcomes = {True: 0, False: 0}
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            observed, about = read_mask(path, 16, 24)
        except DataError as error:
            about = str(error)
            assert about.startswith(f"{path}: ")
            outcomes[False] += 1
        else:
            assert (observed.shape, observed.dtype) == ((16, 24), torch.bool)
            assert 0 < observed.sum() < observed.numel()
            outcomes[True] += 1
        assert "\n" not in about
    assert outcomes[False] > 20
