"""`python -m cvae.report.complete`: from pictures that people have to pictures of completions."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.inprocess import Ended, call
from support.scripts import run_python
from support.trainings import contents

import cvae
from cvae.data.tasks import FixedMask, quadrants
from cvae.model.networks import build
from cvae.report import complete
from cvae.run.weights_file import save_safetensors
from cvae.settings import Settings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a model of 30×28 pixels, a photograph, and `prepared.png` of the model's size."""
    settings = Settings(hidden=(8, 7), latent_dim=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_safetensors(build(FixedMask(quadrants(1, 30, 28)), settings), settings, tmp_path / "model.safetensors")
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
    return call(complete, "model.safetensors", *words, "--device", "cpu")


def line(ended: Ended) -> str:
    """The one line with which it was refused."""
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    return ended.err.removeprefix("complete.py: ").rstrip("\n")


def levels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_photograph(here: Path) -> None:
    """The first image of the grid is what became of it, the second what is given of it; the rest the completions."""
    ended = run("seven.jpg", "-o", "out.png", "--samples", "12", "--seed", "3")
    assert ended == (0, "seven.jpg: 12 completions in out.png\n", "")
    grid = levels("out.png")
    digit = cvae.as_digit("seven.jpg", 30, 28)
    model = cvae.load("model.safetensors")
    completions = model.complete(digit, samples=12, seed=3)[:, 0]
    zoom, gap = 2, 4  # to about 56 screen pixels
    assert grid.shape[0] == 3 * (30 * zoom + gap) + gap  # the picture, and twelve samples in two rows
    left = grid.shape[1] - 10 * (28 * zoom + gap)

    def image(row: int, column: int) -> np.ndarray:
        y, x = gap + row * (30 * zoom + gap), left + column * (28 * zoom + gap)
        return grid[y : y + 30 * zoom : zoom, x : x + 28 * zoom : zoom]

    observed = model.task.observed.numpy()
    assert (image(0, 0) == digit.numpy()[..., None]).all()
    assert (image(0, 1)[observed] == digit.numpy()[observed][:, None]).all()
    assert len(np.unique(image(0, 1)[~observed], axis=0)) == 1
    for i, completion in enumerate(completions):
        assert abs(image(1 + i // 10, i % 10)[..., 0] - completion.numpy() * 255).max() <= 0.51
    assert (image(2, 2) == 255).all()


def test_separate_files_of_a_prepared_picture(here: Path) -> None:
    """Pixel for pixel what the model gives, and none of them replaces another."""
    words = ("prepared.png", "--as-is", "--separate", "-o", "parts", "--samples", "2", "--temperature", "0.5")
    assert run(*words) == (0, "prepared.png: 2 completions in parts (4 files)\n", "")
    names = ["given", "picture", "sample01", "sample02"]
    assert sorted(os.listdir("parts")) == [f"prepared-{name}.png" for name in names]
    assert (levels("parts/prepared-picture.png") == prepared().numpy()[..., None]).all()
    completions = cvae.load("model.safetensors").complete("prepared.png", 2, seed=0, temperature=0.5)
    for i, completion in enumerate(completions[:, 0], start=1):
        expected = (completion * 255).round().numpy()[..., None]
        assert (levels(f"parts/prepared-sample0{i}.png") == expected).all()
    before = contents(Path("parts"))
    again = run(*words)
    assert "exists already and is left as it is" in line(again)
    assert (again.code, contents(Path("parts"))) == (2, before)


def test_a_folder(here: Path) -> None:
    """A file of its own for each picture below it, whatever their names; what is none costs a line and exit code 3."""
    (here / "photos/more").mkdir(parents=True)

    def add(*names: str) -> None:
        for name in names:
            with Image.open("seven.jpg") as picture:
                picture.save(here / "photos" / name)

    def written(output: str) -> set[str]:
        return {path.relative_to(output).as_posix() for path in Path(output).rglob("*.png")}

    add("a.jpg", "more/a.jpg")
    assert run("photos", "-o", "plain").code == 0
    assert written("plain") == {"a.png", "more/a.png"}
    add("a.png", "a.png.png", "B.png", "b.jpg")
    ended = run("photos", "-o", "alike", "--samples", "3")
    assert ended.out.count(": 3 completions in alike") == 6
    assert written("alike") == {
        "a.jpg.png", "a.png.png", "a.png.png.png", "B.png.png", "b.jpg.png", "more/a.jpg.png"
    }  # fmt: skip
    (here / "photos/more/bad.png").write_text("no picture")
    Image.new("L", (50, 50), 200).save("photos/more/blank.png")
    ended = run("photos/more", "-o", "most")
    assert (ended.code, ended.out.count("completions in"), written("most")) == (3, 1, {"a.png"})
    bad, blank = ended.err.splitlines()
    assert bad.startswith("complete.py: photos/more/bad.png: cannot be read as a picture")
    assert blank.startswith("complete.py: photos/more/blank.png: no digit is seen in it")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["none.png", "-o", "out.png"], 3, "none.png: "),
        (["text.png", "-o", "out.png"], 3, "text.png: cannot be read as a picture"),
        (["empty", "-o", "out"], 3, "empty: has no pictures in it"),
        (["wide.png", "--as-is", "-o", "out.png"], 3, "wide.png: pictures for this model are [30, 28]"),
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
    assert (ended.code, sorted(os.listdir())) == (code, before)
    assert line(ended).startswith(reason)


def test_usage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ([], "-o says where the completions are written, and --ascii shows them"),
        (["--ascii", "--samples", "0"], "--samples has to be from 1 to 1000, not 0"),
        (["--ascii", "--temperature", "nan"], "--temperature has to be a number from 0 on, not nan"),
    ):
        with pytest.raises(SystemExit, match="2"):
            complete.parse(["q1", "seven.jpg", *words])
        assert reason in capsys.readouterr().err
    missing = call(complete, "nothing", "seven.jpg", "--ascii", "--device", "cpu")
    assert (missing.code, "nothing" in line(missing)) == (3, True)


def test_blocks() -> None:
    """A character stands for two pixels, one above the other; rows of images are as wide as the terminal."""
    image = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])[None].float()
    assert complete.in_blocks(image, 80) == "█▀▄\n   ▄"
    assert complete.in_blocks(image.expand(3, 4, 4), 10) == "█▀▄  █▀▄\n   ▄    ▄\n\n█▀▄\n   ▄"
    assert len(complete.in_blocks(torch.ones(1, 100, 200), 80).splitlines()) == 8


def test_the_command_in_a_terminal_without_blocks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of its own, in ASCII."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("COLUMNS", "80")
    words = ["seven.jpg", "--ascii", "--samples", "1", "--device", "cpu"]
    shown = run_python("-m", "cvae.report.complete", "model.safetensors", *words, cwd=here)
    assert (shown.returncode, shown.stderr) == (0, "")
    first, *rows = shown.stdout.splitlines()
    assert first == "seven.jpg, then completions:"
    assert set("".join(rows)) <= set(' "_#')
    assert any("#" in row[:28] for row in rows)
