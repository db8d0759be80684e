"""Folders of pictures: all that people have in them, and what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import in_order, random_images, refusal, training, write_idx, write_pictures

import train
from cvae.data import readers
from cvae.data.pictures import pictures_below, read_picture
from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

IMAGES = random_images(20, 6, 5)
GREY = IMAGES[0].numpy()
PICTURE = Image.fromarray(GREY)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tif", ".TIFF", ".pgm", ".PNG"])
def test_formats_without_loss(tmp_path: Path, suffix: str) -> None:
    """All that is stored is read: the three parts together are the pictures."""
    s = Settings(data=str(write_pictures(tmp_path, IMAGES, suffix)))
    images, test = load_train(s), load_test(s)
    assert in_order(torch.cat([images.train, images.validation, test.images])) == in_order(IMAGES)
    assert images.record["test"] == test.record["test"]


@pytest.mark.parametrize("suffix", [".jpeg", ".webp", ".JPG"])
def test_formats_with_loss(tmp_path: Path, suffix: str) -> None:
    smooth = (torch.arange(16)[:, None] * 9 + torch.arange(16) * 3).to(torch.uint8)
    write_pictures(tmp_path, smooth.expand(12, 16, 16), suffix)
    assert (load_train(Settings(data=str(tmp_path))).train[0].int() - smooth.int()).abs().max() <= 6


def test_colours_become_luminance(tmp_path: Path) -> None:
    """By the weights of ITU-R 601, as an array of the same colours does, to the byte."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    for i, picture in enumerate(colours):
        Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    np.savez(tmp_path / "colours.npz", colours)
    images = [load_train(Settings(data=str(place))) for place in (tmp_path, tmp_path / "colours.npz")]
    assert torch.equal(images[0].train, images[1].train)
    expected = np.rint(colours @ np.array([0.299, 0.587, 0.114]))
    assert all((read_picture(tmp_path / f"{i:02}.png") == picture).all() for i, picture in enumerate(expected))


MODES: dict[str, tuple[Image.Image, np.ndarray]] = {
    "bits": (PICTURE.convert("1", dither=Image.Dither.NONE), np.where(GREY > 127, 255, 0)),
    "palette": (PICTURE.convert("P"), GREY),
    "RGB": (PICTURE.convert("RGB"), GREY),
    "opaque": (PICTURE.convert("RGBA"), GREY),
    "transparent": (Image.merge("LA", [Image.new("L", (5, 6), 255), PICTURE]), GREY),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "floats": (Image.fromarray(GREY.astype(np.float32) / 255), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(tmp_path: Path, mode: str) -> None:
    picture, expected = MODES[mode]
    picture.save(path := tmp_path / ("a.tif" if mode == "floats" else "a.png"))
    assert (read_picture(path) == expected).all()


def test_orientation_and_frames(tmp_path: Path) -> None:
    """Pictures are turned as cameras say it; of several frames the first one is taken."""
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "a.png", exif=exif, save_all=True, append_images=[Image.new("L", (5, 6))])
    assert (read_picture(tmp_path / "a.png") == np.rot90(GREY, 3)).all()


def test_parts_classes_and_what_lies_beside(tmp_path: Path) -> None:
    """Hidden files are not looked at, other ones counted and never opened."""
    for part, first, last in (("Training", 0, 12), ("val", 12, 15), ("test", 15, 20)):
        for i in range(first, last):
            write_pictures(tmp_path / part / f"class {i % 3}", IMAGES[i : i + 1], f"-{i}.png")
    write_pictures(tmp_path / "more", IMAGES[:2])
    write_pictures(tmp_path / "test" / ".thumbnails", IMAGES)
    (tmp_path / "test" / "._0001.png").write_text("no picture")
    (tmp_path / "Thumbs.db").write_text("no picture")
    s = Settings(data=str(tmp_path))
    images = load_train(s)
    assert in_order(images.train) == in_order(IMAGES[:12])
    assert in_order(images.validation) == in_order(IMAGES[12:15])
    assert in_order(load_test(s).images) == in_order(IMAGES[15:])
    assert images.about.startswith(f"pictures below {tmp_path}: 12 training, 3 validation, 5 test images of 6×5 pixels")
    assert "; 3 other files passed over" in images.about


def test_order_is_that_of_the_names(tmp_path: Path) -> None:
    """In whichever order the pictures were written, folder by folder; a link to a folder is the folder."""
    for name in ("b/2.png", "a.png", "b/1.png", "a/3.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(tmp_path / "x" / name)
    (tmp_path / "y").mkdir()
    for place in (tmp_path / "x").iterdir():
        (tmp_path / "y" / place.name).symlink_to(place)
    expected = ["a/3.png", "a.png", "b/1.png", "b/2.png"], 0
    assert pictures_below(tmp_path / "x") == expected
    assert pictures_below(tmp_path / "y") == pictures_below(tmp_path / "x")
    (tmp_path / "x" / "a" / "back").symlink_to("..")  # a link that leads back, and one that leads nowhere
    (tmp_path / "x" / "4.png").symlink_to("nothing.png")
    assert pictures_below(tmp_path / "x") == expected


def test_scaled_alike_in_every_form(tmp_path: Path) -> None:
    """A folder, an .npz and IDX files of the same images, to the byte; pictures of unequal sizes are refused else."""
    images = random_images(20, 12, 16)
    first = write_pictures(tmp_path / "pictures" / "train", images) / "0000.png"
    np.savez(tmp_path / "images.npz", train=images.numpy())
    write_idx(tmp_path / "idx", images, images)
    assert training(tmp_path / "pictures", size=8) == training(tmp_path / "idx", size=8)
    assert training(tmp_path / "images.npz", size=8) == training(tmp_path / "idx", size=8)
    PICTURE.save(odd := first.with_name("1000.png"))
    assert refusal(first.parents[1]) == f"{odd}: has 6×5 pixels, and {first} has 12×16; --size N scales all"
    assert load_train(Settings(data=str(first.parents[1]), size=4)).train.shape[1:] == (4, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as a picture ("),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as a picture ("),
        (Image.fromarray(GREY.astype(np.float32)), "holds numbers from "),
        (Image.fromarray(GREY.astype(np.uint16)), "is a 16-bit picture with no level above 255 of 65535"),
    ],
)
def test_picture_that_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    """With its name, whatever is in that."""
    path = write_pictures(tmp_path / "train", IMAGES) / "0013\n\x1b.tif"
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    assert refusal(tmp_path).startswith(f"{tmp_path}/train/0013\\n\\x1b.tif: {words}")


def test_signal_while_pictures_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training ends at once, and there is no folder of a run."""
    write_pictures(tmp_path / "images" / "train", IMAGES)
    names: list[str] = []

    def watched(path: str, *more: Any) -> Any:
        names.append(Path(path).name)
        if names[-1] == "0007.png":
            os.kill(os.getpid(), signal.SIGTERM)
        return read_picture(path, *more)

    monkeypatch.setattr(readers, "read_picture", watched)
    assert train.main(["--data", str(tmp_path / "images"), "--runs", str(tmp_path / "runs")]) == 143
    assert capsys.readouterr().err.startswith("train.py: interrupted before the training began")
    assert names[-1] == "0007.png"
    assert not (tmp_path / "runs").exists()
