"""`python -m cvae.report.complete`: from pictures that people have to pictures of completions."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.inprocess import TINY, Ended, call, call_train, make_tiny_data
from support.scripts import PATIENCE, ROOT
from support.trainings import contents

import cvae
from cvae.data.pictures import read_picture
from cvae.report import complete

Complete = Callable[..., Ended]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on images of 30 × 28 pixels, `runs/q1`."""
    folder = tmp_path_factory.mktemp("complete")
    words = ["--data", make_tiny_data(folder / "data", 30, 28), *TINY, "--runs", folder / "runs"]
    assert call_train(*words).code == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with `runs`, a photograph `seven.jpg`, and `prepared.png` of the model's size."""
    (tmp_path / "runs").symlink_to(trained / "runs")
    sheet = Image.new("RGB", (300, 400), (230, 225, 210))
    ImageDraw.Draw(sheet).line([(90, 120), (190, 120), (120, 290)], fill=(30, 30, 60), width=14, joint="curve")
    sheet.save(tmp_path / "seven.jpg", quality=95)
    Image.fromarray(prepared().numpy()).save(tmp_path / "prepared.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared() -> torch.Tensor:
    """Grey levels that are no digit."""
    return torch.randint(256, (30, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def run(*words: str | Path) -> Ended:
    return call(complete, "q1", *words, "--device", "cpu")


def line(ended: Ended) -> str:
    """The one line with which it was refused."""
    assert ended.err.startswith("complete.py: ")
    assert ended.err.count("\n") == 1
    return ended.err.removeprefix("complete.py: ").rstrip("\n")


def test_a_photograph(here: Path) -> None:
    """The first image of the grid is what became of it, the second what is given of it; the rest the completions."""
    assert run("seven.jpg", "-o", "out.png", "--samples", "12", "--seed", "3")[:2] == (
        0, "seven.jpg: 12 completions in out.png\n",
    )  # fmt: skip
    with Image.open("out.png") as picture:
        grid = np.asarray(picture).astype(int)
    digit = cvae.as_digit("seven.jpg", 30, 28)
    assert digit.max() > 200
    model = cvae.load("q1")
    completions = model.complete(digit, samples=12, seed=3)[:, 0]
    zoom, gap, rows = 2, 4, 4  # 60 screen pixels; pictures, and twelve samples in two rows
    assert grid.shape[0] == (rows - 1) * (30 * zoom + gap) + gap
    left = grid.shape[1] - 10 * (28 * zoom + gap)

    def image(row: int, column: int) -> np.ndarray:
        y, x = gap + row * (30 * zoom + gap), left + column * (28 * zoom + gap)
        return grid[y : y + 30 * zoom : zoom, x : x + 28 * zoom : zoom]

    assert (image(0, 0) == digit.numpy()[..., None]).all()
    observed = model.split.observed.numpy()
    assert (image(0, 1)[observed] == digit.numpy()[observed][:, None]).all()
    assert len(np.unique(image(0, 1)[~observed], axis=0)) == 1
    for i, completion in enumerate(completions):
        assert abs(image(1 + i // 10, i % 10)[..., 0] - completion.numpy() * 255).max() <= 0.51
    assert (image(2, 2) == 255).all()


def test_separate_files_of_a_prepared_picture(here: Path) -> None:
    """Pixel for pixel what the model gives, and none of them replaces another."""
    words = ("prepared.png", "--as-is", "--separate", "-o", "parts", "--samples", "2", "--temperature", "0.5")
    assert run(*words).code == 0
    names = ["given", "picture", "sample01", "sample02"]
    assert sorted(os.listdir("parts")) == [f"prepared-{name}.png" for name in names]
    assert (read_picture("parts/prepared-picture.png") == prepared().numpy()).all()
    completions = cvae.load("q1").complete("prepared.png", 2, seed=0, temperature=0.5)
    for i, completion in enumerate(completions[:, 0], start=1):
        written = read_picture(f"parts/prepared-sample0{i}.png")
        assert (written == (completion * 255).round().to(torch.uint8).numpy()).all()
    before = contents(Path("parts"))
    assert "exists already and is left as it is" in line(again := run(*words))
    assert again.code == 2
    assert contents(Path("parts")) == before


def test_a_folder(here: Path) -> None:
    """A file for each picture below it, those of one name told apart; what is none costs a line and exit code 3."""
    (here / "photos/more").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "b.png", "more/a.jpg"):
        with Image.open("seven.jpg") as picture:
            picture.save(here / "photos" / name)
    assert run("photos", "-o", "good").code == 0
    written = {str(path.relative_to("good")) for path in Path("good").rglob("*.png")}
    assert written == {"a.png", "b.jpg.png", "b.png.png", os.path.join("more", "a.png")}
    (here / "photos/bad.png").write_text("no picture")
    Image.new("L", (50, 50), 200).save("photos/blank.png")
    ended = run("photos", "-o", "most")
    assert ended.code == 3
    assert ended.out.count("completions in") == 4
    assert "photos/bad.png: cannot be read as a picture" in ended.err.splitlines()[0].replace(os.sep, "/")
    assert "photos/blank.png: no digit is seen in it" in ended.err.splitlines()[1].replace(os.sep, "/")
    assert len(list(Path("most").rglob("*.png"))) == 4


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["none.png", "-o", "out.png"], 3, "none.png: there is no such file"),
        (["text.png", "-o", "out.png"], 3, "text.png: cannot be read as a picture"),
        (["empty", "-o", "out"], 3, "empty: has no pictures in it"),
        (
            ["wide.png", "--as-is", "-o", "out.png"],
            3,
            "wide.png: has 10×40 pixels, and the model's pictures have 30×28",
        ),
        (["blank.png", "-o", "out.png"], 3, "blank.png: no digit is seen in it"),
        (["seven.jpg", "-o", "out.txt"], 2, "out.txt: pictures are written as .png"),
        (["seven.jpg", "-o", "seven.jpg"], 2, "-o seven.jpg is the picture itself"),
        (["seven.jpg", "-o", "text.png/out.png"], 5, "text.png: cannot be made"),
    ],
)
def test_what_is_refused(here: Path, words: list[str], code: int, reason: str) -> None:
    """In one line that names it; nothing is written."""
    (here / "text.png").write_text("no picture")
    (here / "empty").mkdir()
    Image.new("L", (40, 10)).save("wide.png")
    Image.new("L", (40, 40), 200).save("blank.png")
    before = sorted(os.listdir())
    ended = run(*words)
    assert (ended.code, ended.out) == (code, "")
    assert line(ended).startswith(reason)
    assert sorted(os.listdir()) == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ([], "-o says where the completions are written, and --ascii shows them here"),
        (["--ascii", "--samples", "0"], "--samples has to be from 1 to 1000, not 0"),
        (["--ascii", "--temperature", "nan"], "--temperature has to be a number from 0 on, not nan"),
    ):
        with pytest.raises(SystemExit, match="2"):
            complete.parse(["q1", "seven.jpg", *words])
        assert reason in capsys.readouterr().err


def test_blocks() -> None:
    """A character stands for two pixels, one above the other; rows of images are as wide as the terminal."""
    image = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])[None].float()
    assert complete.in_blocks(image, 80) == "█▀▄\n   ▄"
    assert complete.in_blocks(image.expand(3, 4, 4), 10) == "█▀▄  █▀▄\n   ▄    ▄\n\n█▀▄\n   ▄"
    assert len(complete.in_blocks(torch.ones(1, 100, 200), 80).splitlines()) == 8


def test_the_command_in_a_terminal_without_blocks(here: Path) -> None:
    """As a process of its own, in ASCII."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    words = ["-m", "cvae.report.complete", "q1", "seven.jpg", "--ascii", "--samples", "1", "--device", "cpu"]
    shown = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert (shown.returncode, shown.stderr) == (0, "")
    first, *rows = shown.stdout.splitlines()
    assert first == "seven.jpg, then completions:"
    assert set("".join(rows)) <= set(' "_#')
    assert any("#" in row[:28] for row in rows)


def test_run_that_is_not_there(here: Path) -> None:
    missing = call(complete, "nothing", "seven.jpg", "--ascii", "--device", "cpu")
    assert (missing.code, missing.out) == (3, "")
    assert "nothing" in line(missing)
