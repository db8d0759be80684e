"""`python -m cvae.report.complete`: from pictures that people have to pictures of completions."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import photograph
from support.inprocess import Ended, call
from support.trainings import contents

import cvae
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask
from cvae.model.networks import build
from cvae.report import complete
from cvae.run.load import save_safetensors
from cvae.settings import Settings

PREPARED = torch.randint(256, (30, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)  # no digit


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a model of 30×28 pixels, a photograph, and `prepared.png` of the model's size."""
    settings = Settings(hidden=(8, 7), latent_dim=4)
    torch.manual_seed(0)
    save_safetensors(build(FixedMask(quadrants(1, 30, 28)), settings), settings, tmp_path / "model.safetensors")
    photograph(tmp_path / "seven.jpg")
    Image.fromarray(PREPARED.numpy()).save(tmp_path / "prepared.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str | Path) -> Ended:
    return call(complete, "model.safetensors", *words, "--device", "cpu")


def levels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_photograph(here: Path) -> None:
    """The first image of the grid is what became of it, the second what is given of it; the rest the completions."""
    ended = run("seven.jpg", "-o", "out.png", "--samples", "12", "--seed", "3")
    assert ended == (0, "seven.jpg: 12 completions in out.png\n", "")
    grid, digit, model = levels("out.png"), cvae.as_digit("seven.jpg", 30, 28), cvae.load("model.safetensors")
    observed = model.task.observed.numpy()
    zoom, gap = 2, 4  # to about 56 screen pixels
    left = grid.shape[1] - 10 * (28 * zoom + gap)

    def image(row: int, column: int) -> np.ndarray:
        y, x = gap + row * (30 * zoom + gap), left + column * (28 * zoom + gap)
        return grid[y : y + 30 * zoom : zoom, x : x + 28 * zoom : zoom]

    assert (image(0, 0) == digit.numpy()[..., None]).all()
    assert (image(0, 1)[observed] == digit.numpy()[observed][:, None]).all()
    assert len(np.unique(image(0, 1)[~observed], axis=0)) == 1
    for i, completion in enumerate(model.complete(digit, samples=12, seed=3)[:, 0]):
        assert abs(image(1 + i // 10, i % 10)[..., 0] - completion.numpy() * 255).max() <= 0.51


def test_separate_files_of_a_prepared_picture(here: Path) -> None:
    """Pixel for pixel what the model gives, and none of them replaces another."""
    words = ("prepared.png", "--as-is", "--separate", "-o", "parts", "--samples", "2", "--temperature", "0.5")
    assert run(*words) == (0, "prepared.png: 2 completions in parts (4 files)\n", "")
    names = ["given", "picture", "sample01", "sample02"]
    assert sorted(os.listdir("parts")) == [f"prepared-{name}.png" for name in names]
    assert (levels("parts/prepared-picture.png") == PREPARED.numpy()[..., None]).all()
    completions = cvae.load("model.safetensors").complete("prepared.png", 2, seed=0, temperature=0.5)[:, 0]
    for i, expected in enumerate((completions * 255).round().numpy(), start=1):
        assert (levels(f"parts/prepared-sample0{i}.png") == expected[..., None]).all()
    before = contents(Path("parts"))
    again = run(*words)
    assert "exists already and is left as it is" in again.err
    assert (again.code, contents(Path("parts"))) == (2, before)


def test_a_folder(here: Path) -> None:
    """A file of its own for each picture below it, whatever their names; what is none costs a line and exit code 3."""

    def written(output: str, *names: str) -> set[str]:
        """The completions of pictures of these names in `photos`."""
        for name in names:
            (here / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            photograph(here / "photos" / name)
        ended = run("photos", "-o", output, "--samples", "1")
        assert (ended.code, ended.out.count(f": 1 completions in {output}")) == (0, len(names))
        return {path.relative_to(output).as_posix() for path in Path(output).rglob("*")} - {"more"}

    assert written("plain", "a.jpg", "more/a.jpg") == {"a.png", "more/a.png"}
    shutil.rmtree("photos")
    assert written("alike", "a.jpg", "a.png", "a.png.png") == {"a.jpg.png", "a.png.png", "a.png.png.png"}
    shutil.rmtree("photos")
    assert written("case", "B.png", "b.jpg") == {"B.png.png", "b.jpg.png"}
    Path("photos/B.png").write_text("no picture")
    ended = run("photos", "-o", "most")
    assert (ended.code, os.listdir("most"), ended.err.count("\n")) == (3, ["b.jpg.png"], 1)
    assert ended.err.startswith("complete.py: photos/B.png: cannot be read as a picture")


def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that names it; nothing is written."""
    (here / "empty").mkdir()
    Image.new("L", (40, 10)).save("wide.png")
    Image.new("L", (40, 40), 200).save("blank.png")
    before = sorted(os.listdir())
    for words, code, reason in (
        (["none.png", "-o", "out.png"], 3, "none.png: "),
        (["empty", "-o", "out"], 3, "empty: has no pictures in it"),
        (["wide.png", "--as-is", "-o", "out.png"], 3, "wide.png: pictures for this model are [30, 28]"),
        (["blank.png", "-o", "out.png"], 3, "blank.png: no digit is seen in it"),
        (["seven.jpg", "-o", "out.txt"], 2, "out.txt: pictures are written as .png"),
        (["seven.jpg", "-o", "seven.jpg"], 2, "-o seven.jpg is the picture itself"),
        (["seven.jpg", "-o", "blank.png/out.png"], 5, "blank.png: cannot be made"),
    ):
        ended = run(*words)
        assert (ended.code, ended.out, ended.err.count("\n"), sorted(os.listdir())) == (code, "", 1, before)
        assert ended.err.startswith(f"complete.py: {reason}")
    for words, reason in (
        ([], "-o says where the completions are written, and --ascii shows them"),
        (["-o", "out.png", "--samples", "0"], "--samples has to be at least 1"),
        (["-o", "out.png", "--temperature", "nan"], "--temperature a number from 0 on"),
    ):
        with pytest.raises(SystemExit, match="2"):
            complete.main(["q1", "seven.jpg", *words])
        assert reason in capsys.readouterr().err


def test_the_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character stands for two pixels, one above the other; rows of images are as wide as the terminal."""
    image = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])[None].float()
    assert complete.in_blocks(image, 80) == "█▀▄\n   ▄"
    assert complete.in_blocks(image.expand(3, 4, 4), 10) == "█▀▄  █▀▄\n   ▄    ▄\n\n█▀▄\n   ▄"
    assert len(complete.in_blocks(torch.ones(1, 100, 200), 80).splitlines()) == 8
    monkeypatch.setenv("COLUMNS", "80")
    before = contents(here)
    ended = run("prepared.png", "--as-is", "--ascii", "--samples", "1", "--seed", "3")
    images = [PREPARED[None] / 255, cvae.load("model.safetensors").complete("prepared.png", 1, seed=3)[:, 0]]
    assert ended == (0, f"prepared.png, then completions:\n{complete.in_blocks(torch.cat(images), 80)}\n", "")
    assert contents(here) == before
