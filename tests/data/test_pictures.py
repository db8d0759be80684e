"""Folders of pictures: all that people have in them, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import everything, in_order, random_images, refusal, write_pictures
from support.inprocess import TINY, call_eval, call_train, results
from support.scripts import write_data

from cvae.data.pictures import read_picture
from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

IMAGES = random_images(20, 6, 5)
GREY = IMAGES[0].numpy()


def about(folder: Path, **more: object) -> str:
    return load_train(Settings(data=str(folder), **more)).about  # type: ignore[arg-type]


# What they look like


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tif", ".TIFF", ".pgm", ".PNG"])
def test_formats_without_loss(tmp_path: Path, suffix: str) -> None:
    """All that is stored is read: the three parts together are the pictures."""
    folder = write_pictures(tmp_path, IMAGES, suffix)
    images, test = load_train(Settings(data=str(folder))), load_test(Settings(data=str(folder)))
    assert in_order(torch.cat([images.train, images.validation, test.images])) == in_order(IMAGES)
    assert images.record["test"] == test.record["test"]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG"])
def test_formats_with_loss(tmp_path: Path, suffix: str) -> None:
    smooth = (torch.arange(16)[:, None] * 9 + torch.arange(16) * 3).to(torch.uint8)
    folder = write_pictures(tmp_path, smooth.expand(12, 16, 16), suffix)
    read = load_train(Settings(data=str(folder))).train[0]
    assert (read.int() - smooth.int()).abs().max() <= 6


def saved(path: Path, picture: Image.Image, **more: object) -> Path:
    picture.save(path, **more)
    return path


def test_colours_become_luminance(tmp_path: Path) -> None:
    """By the weights of ITU-R 601, as an array of the same colours does."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    for i, picture in enumerate(colours):
        saved(tmp_path / f"{i:02}.png", Image.fromarray(picture))
    images = load_train(Settings(data=str(tmp_path)))
    assert "colour made grey by ITU-R 601" in images.about
    np.savez(tmp_path / "colours.npz", colours)
    arrays = load_train(Settings(data=str(tmp_path / "colours.npz")))
    assert "colour made grey by ITU-R 601" in arrays.about
    assert torch.equal(images.train, arrays.train)
    expected = np.rint(colours @ np.array([0.299, 0.587, 0.114]))
    for i, picture in enumerate(expected):
        assert (read_picture(tmp_path / f"{i:02}.png") == picture).all()
    red = saved(tmp_path / "red.png", Image.new("RGB", (5, 6), (255, 0, 0)))
    assert (read_picture(red) == round(0.299 * 255)).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", np.where(GREY > 127, 255, 0)), ("P", GREY), ("LA", GREY), ("RGBA", GREY), ("CMYK", GREY), ("RGB", GREY)],
)
def test_modes(tmp_path: Path, mode: str, expected: np.ndarray) -> None:
    picture = Image.fromarray(GREY)
    picture = picture.convert(mode, dither=Image.Dither.NONE) if mode == "1" else picture.convert(mode)
    path = saved(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), picture)
    assert (read_picture(path) == expected).all()


def test_transparent_is_black(tmp_path: Path) -> None:
    alpha = Image.merge("LA", [Image.new("L", (5, 6), 200), Image.fromarray(GREY)])
    notes: list[str] = []
    read = read_picture(saved(tmp_path / "a.png", alpha), notes=notes)
    assert np.abs(read - GREY * (200 / 255)).max() <= 1
    assert "transparent pixels made black" in notes
    palette = Image.fromarray(GREY // 2).convert("P")
    read = read_picture(saved(tmp_path / "b.png", palette, transparency=int(GREY[2, 2] // 2)))
    assert (read == np.where(GREY[2, 2] // 2 == GREY // 2, 0, GREY // 2)).all()


def test_sixteen_bits_and_floats_are_scaled(tmp_path: Path) -> None:
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    for name in ("a.png", "a.tif"):
        notes: list[str] = []
        assert (read_picture(saved(tmp_path / name, wide), notes=notes) == GREY).all()
        assert notes == ["16-bit levels scaled to 8"]
    floats = Image.fromarray(GREY.astype(np.float32) / 255)
    assert (read_picture(saved(tmp_path / "b.tif", floats)) == GREY).all()


def test_pictures_whose_brightest_level_is_one_are_black_and_white(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, (IMAGES > 99).to(torch.uint8))
    images = load_train(Settings(data=str(folder)))
    assert images.train.unique().tolist() == [0, 255]
    assert "the brightest level is 1 of 255: taken as black and white" in images.about
    assert load_test(Settings(data=str(folder))).record["test"] == images.record["test"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_orientation(tmp_path: Path, suffix: str, orientation: int, turns: int) -> None:
    """As cameras store it: turned by quarters, and said."""
    picture = np.zeros((16, 24), np.uint8)
    picture[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(8):
        saved(tmp_path / f"{i}{suffix}", Image.fromarray(picture), exif=exif)
    images = load_train(Settings(data=str(tmp_path)))
    expected = np.rot90(picture, turns)
    assert np.abs(images.validation[0].numpy().astype(int) - expected.astype(int)).max() < 20
    assert "turned as their EXIF orientation says" in images.about


def test_first_frame(tmp_path: Path) -> None:
    for name in ("a.gif", "a.tif", "a.webp"):
        more = {"lossless": True} if name == "a.webp" else {}
        frames = [Image.fromarray(image.numpy()) for image in IMAGES[1:3]]
        notes: list[str] = []
        path = saved(tmp_path / name, Image.fromarray(GREY), save_all=True, append_images=frames, **more)
        assert (read_picture(path, notes=notes) == GREY).all()
        assert "the first one of several frames taken" in notes


def test_content_decides_what_a_picture_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(GREY).save(path, "PNG")
    assert (read_picture(path) == GREY).all()


# Where they lie


def test_parts_and_classes(tmp_path: Path) -> None:
    for part, first, last in (("train", 0, 12), ("val", 12, 15), ("test", 15, 20)):
        for i in range(first, last):
            write_pictures(tmp_path / part / f"class {i % 3}", IMAGES[i : i + 1], f"-{i}.png")
    write_pictures(tmp_path / "more", IMAGES[:2])
    images = load_train(Settings(data=str(tmp_path)))
    assert in_order(images.train) == in_order(IMAGES[:12])
    assert in_order(images.validation) == in_order(IMAGES[12:15])
    assert in_order(load_test(Settings(data=str(tmp_path))).images) == in_order(IMAGES[15:])
    assert images.about.startswith(f"pictures below {tmp_path}: 12 training, 3 validation, 5 test images of 6×5 pixels")
    assert "2 pictures beside train and test passed over" in images.about


def test_train_without_test(tmp_path: Path) -> None:
    write_pictures(tmp_path / "Training", IMAGES)
    assert everything(tmp_path) == in_order(IMAGES)
    assert "no test images" in about(tmp_path)
    assert refusal(tmp_path, test=True) == f"{tmp_path}: has no test images"


def test_two_folders_for_one_part(tmp_path: Path) -> None:
    for name in ("train", "training"):
        write_pictures(tmp_path / name, IMAGES[:6])
    assert refusal(tmp_path) == f"{tmp_path}: has several folders for one part: train, training"


def test_parts_do_not_depend_on_the_file_system(tmp_path: Path) -> None:
    """Nor on in which order they were written; a link to the folder is the folder."""
    write_pictures(tmp_path / "a", IMAGES)
    (tmp_path / "b").mkdir()
    for path in sorted((tmp_path / "a").iterdir(), key=lambda path: path.name[::-1], reverse=True):
        shutil.copy(path, tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    records = [load_train(Settings(data=str(tmp_path / name))).record for name in "abc"]
    assert records[0] == records[1] == records[2]


def test_what_is_no_picture_is_counted_and_never_opened(tmp_path: Path) -> None:
    """A pipe would have to be waited for; what begins with a dot is no picture even if it is called one."""
    write_pictures(tmp_path, IMAGES)
    for name in ("Thumbs.db", "labels.csv"):
        (tmp_path / name).write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "._0001.png").write_text("no picture")
    for name in (".thumbnails", "__MACOSX"):
        write_pictures(tmp_path / name, IMAGES)
    images = load_train(Settings(data=str(tmp_path)))
    assert sum(part["count"] for part in images.record.values() if isinstance(part, dict)) == len(IMAGES)
    assert "3 files that are no pictures passed over" in images.about


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("../outside.png", "which is not in the folder"),
        ("nowhere.png", "which is not in the folder"),
        ("link.png", "which is not in the folder"),
        ("..", "is a symbolic link to a folder"),
        (".", "is a symbolic link to a folder"),
    ],
)
def test_links_that_lead_out_or_nowhere(tmp_path: Path, target: str, words: str) -> None:
    folder = write_pictures(tmp_path / "folder", IMAGES)
    saved(tmp_path / "outside.png", Image.fromarray(GREY))
    (folder / "link.png").symlink_to(target)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'link.png'}: is a symbolic link to ")
    assert words in message


def test_link_within_the_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", IMAGES)
    (tmp_path / "train" / "copy.png").symlink_to("0000.png")
    assert len(everything(tmp_path)) == len(IMAGES) + 1


def test_folder_a_thousand_levels_deep(tmp_path: Path) -> None:
    """Deeper than Python's recursion goes; the picture at the bottom is found."""
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        write_pictures(Path(), IMAGES)
    finally:
        os.chdir(here)
    try:
        assert load_train(Settings(data=str(tmp_path))).record["train"]["count"] == 15
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own way would recur


# Sizes


def test_unequal_sizes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", IMAGES)
    odd = saved(tmp_path / "train" / "1000.png", Image.fromarray(random_images(1, 7, 5)[0].numpy()))
    first = tmp_path / "train" / "0000.png"
    assert refusal(tmp_path) == f"{odd}: has 7×5 pixels, and {first} has 6×5; --size N scales all of them to N×N"
    assert load_train(Settings(data=str(tmp_path), size=4)).train.shape[1:] == (4, 4)


def test_scaled_alike_in_every_form(tmp_path: Path) -> None:
    """A folder, an .npz and IDX files of the same images, to the byte."""
    images = random_images(20, 12, 16)
    write_pictures(tmp_path / "pictures" / "train", images)
    np.savez(tmp_path / "images.npz", train=images.numpy())
    write_data(tmp_path / "idx", images, images)
    found = [everything(tmp_path / name, size=8) for name in ("pictures", "images.npz", "idx")]
    assert found[0] == found[1] == found[2]
    assert "scaled from 12×16" in about(tmp_path / "images.npz", size=8)


# What is refused


@pytest.mark.parametrize("content", [b"", b"no picture", b"half"])
def test_broken_picture(tmp_path: Path, content: bytes) -> None:
    write_pictures(tmp_path / "train", IMAGES)
    path = tmp_path / "train" / "0013.png"
    path.write_bytes(path.read_bytes()[:60] if content == b"half" else content)
    assert refusal(tmp_path).startswith(f"{path}: cannot be read as a picture (")


def test_constant_picture(tmp_path: Path) -> None:
    images = IMAGES.clone()
    images[[4, 9]] = 7
    write_pictures(tmp_path / "train", images)
    assert refusal(tmp_path) == (
        f"{tmp_path / 'train' / '0004.png'}: is of one grey level throughout (and 1 more); leave it out"
    )


def test_dark_sixteen_bit_picture(tmp_path: Path) -> None:
    """Its levels may be of 0 to 255, or nothing to see: it is not guessed."""
    path = saved(tmp_path / "a.png", Image.fromarray(GREY.astype(np.uint16)))
    assert refusal(tmp_path).startswith(f"{path}: is a 16-bit picture with no level above 255 of 65535")


@pytest.mark.parametrize(("brightest", "told"), [(4080, True), (4400, False)])
def test_twelve_bits_in_sixteen_are_said_to_be_dark(tmp_path: Path, brightest: int, told: bool) -> None:
    """It is asked of all images together: one dark picture among others says nothing."""
    wide = IMAGES.numpy().astype(np.uint16) * 16
    wide[3, 0, 0] = brightest
    np.savez(tmp_path / "images.npz", x_train=wide)
    (tmp_path / "images/train").mkdir(parents=True)
    for i, image in enumerate(wide):
        saved(tmp_path / f"images/train/{i}.png", Image.fromarray(image))
    for place in ("images", "images.npz"):
        assert ("none above 4095 of 65535: if they are of 12 bits" in about(tmp_path / place)) == told


def test_floats_out_of_range(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(GREY.astype(np.float32)))
    assert refusal(tmp_path).startswith(f"{path}: holds numbers from {GREY.min()} to {GREY.max()}; floats have to be")


def test_name_of_a_file_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb\x1b[1m.png").write_text("no picture")
    assert r"a\nb\x1b[1m.png: cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("count", [1, 5])
def test_too_few(tmp_path: Path, count: int) -> None:
    write_pictures(tmp_path, IMAGES[:count])
    assert refusal(tmp_path) == f"{tmp_path}: {count} images are too few to hold out a sixth; give at least 6"
    assert refusal(tmp_path, test=True) == refusal(tmp_path)


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    assert refusal(tmp_path).startswith(
        f"{tmp_path}: holds no images; --data takes a folder of IDX files or of pictures"
    )


def test_ten_thousand_files(tmp_path: Path) -> None:
    write_pictures(tmp_path, IMAGES)
    (tmp_path / "more").mkdir()
    for i in range(10_000):
        os.link(tmp_path / f"{i % 20:04}.png", tmp_path / "more" / f"{i}.png")
    images = load_train(Settings(data=str(tmp_path)))
    assert sum(part["count"] for part in images.record.values() if isinstance(part, dict)) == 10_020


# As the scripts read them


@pytest.mark.parametrize("form", ["pictures", "array"])
def test_training_and_evaluation(tmp_path: Path, form: str) -> None:
    """Each says in its first line what it took, and what it cannot read in the only one."""
    images = random_images(60, 6, 5)
    data = tmp_path / "images.npz"
    if form == "pictures":
        data = write_pictures(tmp_path / "images", images)
    else:
        np.savez(data, images.numpy())
    run = tmp_path / "runs" / "q1"
    trained = call_train("--data", data, *TINY, "--runs", tmp_path / "runs")
    assert trained.code == 0
    taken = {"pictures": "pictures below", "array": ".npz file"}[form] + f" {data}: "
    assert trained.out.startswith(f"{taken}42 training, 8 validation, 10 test images of 6×5 pixels; ")
    assert json.loads((run / "config.json").read_text())["images"] == load_train(Settings(data=str(data))).record
    assert call_eval(run).code == 0
    images[3] = 7
    damaged = write_pictures(tmp_path / "damaged" / "train", images) / "0003.png"
    refused = call_train("--data", damaged.parent.parent, *TINY, "--runs", tmp_path / "runs", "--name", "new")
    assert (refused.code, refused.line) == (3, f"{damaged}: is of one grey level throughout; leave it out")
    assert not (tmp_path / "runs" / "new").exists()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that are read, as they are read; the process gets a SIGTERM before one called `signal.png`."""
    names: list[str] = []

    def watched(path: str, *more: Any) -> Any:
        names.append(Path(path).name)
        if names[-1] == "signal.png":
            os.kill(os.getpid(), signal.SIGTERM)
        return read_picture(path, *more)

    monkeypatch.setattr("cvae.data.pictures.read_picture", watched)
    return names


def test_signal_while_pictures_are_read(tmp_path: Path, read: list[str]) -> None:
    """The training ends before the next one, and there is no folder of a run."""
    folder = write_pictures(tmp_path / "images" / "train", random_images(30, 6, 5))
    (folder / "0015.png").rename(folder / "signal.png")
    ended = call_train("--data", folder.parent, "--train-limit", "20", *TINY, "--runs", tmp_path / "runs")
    assert (ended.code, ended.line) == (143, "interrupted before the training began: nothing was written")
    assert read[-1] == "signal.png"
    assert not (tmp_path / "runs").exists()


def test_signal_at_the_last_picture(tmp_path: Path, read: list[str]) -> None:
    """No other one is read after it, and there is no folder of a run either."""
    write_pictures(tmp_path / "images" / "train", random_images(30, 6, 5))
    last = write_pictures(tmp_path / "images" / "val", random_images(1, 6, 5, 1))
    (last / "0000.png").rename(last / "signal.png")
    ended = call_train("--data", tmp_path / "images", "--size", "6", *TINY, "--runs", tmp_path / "runs")
    assert ended.code == 143
    assert not (tmp_path / "runs").exists()


def test_pictures_are_read_once_for_all_runs(tmp_path: Path, read: list[str]) -> None:
    """And each run has what it has alone; with --overwrite they are begun anew."""
    data = write_pictures(tmp_path / "images", random_images(60, 6, 5))
    words = ["--data", data, *TINY, "--baseline-epochs", "1", "--epochs", "1"]
    assert call_train(*words, "--quadrants", "1", "3", "--runs", tmp_path / "several").code == 0
    assert len(read) == 60 + 1  # the size is that of the first one
    assert call_train(*words, "--quadrants", "3", "--runs", tmp_path / "one").code == 0
    assert results(tmp_path / "several" / "q3") == results(tmp_path / "one" / "q3")


@pytest.mark.parametrize("quiet", [False, True])
def test_bar_over_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    """Where it takes its time, as if a minute passed with each image; with --quiet nothing is said."""
    monkeypatch.setattr("cvae.console.LINE_EVERY_S", 0)
    data = write_pictures(tmp_path / "images", random_images(60, 6, 5))
    words = [*TINY, "--epochs", "1"] + ["--quiet"] * quiet
    ended = call_train("--data", data, *words, "--runs", tmp_path / "runs")
    assert ended.code == 0
    lines = [line.split(",")[0] for line in ended.err.splitlines()]
    assert [line for line in lines if line.startswith("pictures")] == [
        f"pictures: {n}.{'0' if n > 9 else '00'} of 60.0 img" for n in range(61) if not quiet
    ]
    assert {line.split(":")[0] for line in lines} == (set() if quiet else {"pictures", "baseline", "cvae"})


def test_missing_test_images_are_said_before_the_others_are_read(tmp_path: Path) -> None:
    damaged = write_pictures(tmp_path / "train", IMAGES) / "0007.png"
    damaged.write_bytes(b"")
    ended = call_train("--data", tmp_path, *TINY, "--runs", tmp_path / "runs")
    assert ended.out == f"{tmp_path}: no test images, so that eval.py will not be able to evaluate the run\n"
    assert ended.line.startswith(f"{damaged}: cannot be read")
