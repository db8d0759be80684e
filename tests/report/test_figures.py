"""Pictures of images in rows, pixel by pixel, and the files that they are written to."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

import cvae
from cvae.data.masks import quadrants
from cvae.data.tasks import FixedMask
from cvae.errors import DiskError, UsageError
from cvae.report import figures

BLUE = [92, 112, 143]  # the colour of what is not given


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return a picture as `[height, width, 3]`."""
    return np.asarray(image.convert("RGB"))


def random_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width", "zoom"), [(28, 28, 2), (10, 9, 6), (2, 2, 28), (100, 128, 1)])
def test_each_image_is_where_it_belongs(height: int, width: int, zoom: int) -> None:
    """Magnified by a whole number, in the row of its label, GAP screen pixels from the next one, on white."""
    images = random_images(2, 3, height, width)
    rows = [("first", images[0] / 255), ("second row", images[1, :2, None].expand(-1, 3, -1, -1))]
    drawn = pixels(figures.draw_rows(rows)).copy()
    across, down = zoom * width + figures.GAP, zoom * height + figures.GAP
    left = drawn.shape[1] - 3 * across
    assert drawn.shape[0] == 2 * down + figures.GAP
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        top, start = figures.GAP + i * down, left + j * across
        place = drawn[top : top + zoom * height, start : start + zoom * width]
        assert (place == np.kron(images[i, j], np.ones((zoom, zoom), np.uint8))[..., None]).all()
        place[:] = 255
    assert (drawn[:, left:] == 255).all(), "nothing else is drawn, also where the second row has no third image"
    for i in range(2):
        assert (drawn[figures.GAP + i * down :][:down, :left] < 100).any(), "its label"


@pytest.mark.parametrize(("height", "width"), [(1500, 1200), (3, 300), (300, 2)])
def test_large_images_are_shrunk(height: int, width: int) -> None:
    """To 128 screen pixels; their mean stays, and the label has room."""
    images = random_images(4, height, width).float() / 255
    drawn = pixels(figures.draw_rows([("", images)]))
    tile = [max(1, round(side * 128 / max(height, width))) for side in (height, width)]
    place = [max(side, 12) for side in tile]
    assert drawn.shape == (place[0] + 8, 4 * (place[1] + 4) + 8, 3)
    seen = [drawn[4:, 8 + j * (place[1] + 4) :][: tile[0], : tile[1], 0] for j in range(4)]
    assert np.mean(seen) == pytest.approx(255 * images.mean().item(), abs=2)  # windows overlap at their edges


def test_rows_of_completions() -> None:
    """What is given is the image's own in each row; what is asked is coloured, true, guessed, or sampled."""
    task, images = FixedMask(quadrants(1, 6, 8), "1 quadrant"), random_images(3, 6, 8)
    guess, samples = torch.rand(3, task.y_dim), torch.rand(2, 3, task.y_dim)
    rows = dict(figures.completion_rows(images, task, guess, samples))
    assert list(rows) == ["input: 1 quadrant", "truth", "NN", "CVAE 1", "CVAE 2"]
    for name, label in (("", "input"), ("a" * 300, f"input: {'a' * 20}")):
        assert figures.completion_rows(images, FixedMask(task.observed, name), guess)[0][0] == label
    given = rows.pop("input: 1 quadrant").permute(0, 2, 3, 1)
    assert (given[:, task.observed].mul(255).round().byte() == images[:, task.observed, None]).all()
    assert (given[:, ~task.observed].mul(255).round() == torch.tensor(BLUE)).all()
    for row in rows.values():
        assert torch.equal(row[:, task.observed], images[:, task.observed] / 255)
    asked = {"truth": images[:, ~task.observed] / 255, "NN": guess, "CVAE 1": samples[0], "CVAE 2": samples[1]}
    for label, y in asked.items():
        assert torch.equal(rows[label][:, ~task.observed], y)


def test_show_in_a_notebook() -> None:
    """An image; images beside each other; and the completions of each image in its row."""
    completed = torch.rand(5, 2, 28, 28)  # S, B
    assert cvae.show(completed[0, 0]).size[0] >= 56
    row = pixels(cvae.show(completed[:, 1].mul(255).round().byte()))
    both = pixels(cvae.show(completed))
    assert both.shape[1] == row.shape[1]
    assert (both[-row.shape[0] :] == row).all()
    for bad in (completed + 1, completed.int(), completed[0, 0, 0], completed[None], completed[:0]):
        with pytest.raises(ValueError, match=r"^pictures to be shown are uint8 or floats in \[0, 1\], .*, not "):
            cvae.show(bad)


@pytest.mark.parametrize("ending", [*figures.ENDINGS, ".PNG"])
def test_formats(tmp_path: Path, ending: str) -> None:
    """The ending says which; lossless but for JPEG, and GIF's 256 colours."""
    path, picture = tmp_path / f"a.b{ending}", figures.as_picture(random_images(1, 40, 50).expand(3, -1, -1))
    figures.write_picture(path, picture)
    if ending == ".pdf":
        assert path.read_bytes().startswith(b"%PDF-")
    else:
        with Image.open(path) as image:
            error = np.abs(pixels(image).astype(int) - pixels(picture))
        assert error.mean() <= (2 if ending in (".jpg", ".jpeg") else 0)


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    """By their format, their name, or their folder, which is a file; nothing is left behind."""
    (tmp_path / "file").touch()
    unfit = [(f"wide.{form}", UsageError, "cannot hold 70000×1 pixels") for form in ("webp", "jpg", "gif", "pdf")]
    unnamed, no_folder = ("a.xyz", UsageError, "pictures are written as"), ("file/a.png", DiskError, "cannot be made")
    for name, error, problem in (*unfit, unnamed, no_folder):
        with pytest.raises(error, match=problem):
            figures.write_picture(tmp_path / name, Image.new("RGB", (70_000, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_single_images(tmp_path: Path) -> None:
    """Pixel for pixel, in a folder that is made; none replaces another file."""
    paths = [tmp_path / "new/folder" / name for name in ("a.png", "b.png")]
    figures.refuse_to_replace(paths)
    for path, image in zip(paths, (torch.rand(5, 4), random_images(3, 5, 4)), strict=True):
        figures.write_picture(path, figures.as_picture(image))
        with Image.open(path) as written:
            assert written.mode == ("L" if image.dim() == 2 else "RGB")
            expected = image.mul(255).round().byte() if image.is_floating_point() else image
            assert (pixels(written) == expected.expand(3, -1, -1).permute(1, 2, 0).numpy()).all()
    with pytest.raises(UsageError, match=r"b\.png exists already and is left as it is"):
        figures.refuse_to_replace(paths[1:])
