"""Pictures: labelled rows of images, with what is given, what is true, and what models make of it; and their files."""

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from cvae.data.pictures import in_range
from cvae.data.tasks import Task, described
from cvae.errors import DiskError, UsageError
from cvae.run.checkpoint import write_atomically

# The endings of pictures' names, each with the options by which Pillow writes it
ENDINGS: dict[str, dict[str, Any]] = {
    ".png": {}, ".jpg": {"quality": 95, "subsampling": 0}, ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True}, ".gif": {}, ".bmp": {}, ".tif": {"compression": "tiff_adobe_deflate"},
    ".tiff": {"compression": "tiff_adobe_deflate"}, ".pdf": {"quality": 95},
}  # fmt: skip
NOT_GIVEN = (0.36, 0.44, 0.56)  # the colour of a hidden pixel in the row of inputs
PAPER, INK = (255, 255, 255), (40, 40, 40)
LONGEST_NAME = 20  # of a mask, in letters, in the margin
GAP, FONT_SIZE = 4, 12  # screen pixels
TILE, LARGEST_TILE = 56, 128  # an image's longer side, screen pixels

Rows = list[tuple[str, Tensor]]  # of a picture: a label and images, `[N, 3, height, width]` in [0, 1] on the CPU


def completions(images: Tensor, task: Task, guess: Tensor, samples: Tensor | None = None) -> Tensor:
    """Return the picture of `completion_rows`, uint8 `[3, height, width]`, on the CPU."""
    return draw_rows(completion_rows(images, task, guess, samples))


def completion_rows(images: Tensor, task: Task, guess: Tensor, samples: Tensor | None = None) -> Rows:
    """Return rows of completions: the input (and its mask's name), the truth, the baseline's guess, the samples.

    images: uint8 `[N, height, width]`. guess: ŷ, `[N, y_dim]` in [0, 1]. samples: of y, `[S, N, y_dim]` in [0, 1].
    """
    images = images.cpu().float() / 255
    x = task.batch(task.rows(images)).x
    name = task.name if len(task.name) <= LONGEST_NAME else task.name[: LONGEST_NAME - 1] + "…"
    rows = [(f"input: {name}" if name else "input", as_given(images, task)), ("truth", colour(images))]
    made = {"NN": guess} | {f"CVAE {i}": y for i, y in enumerate(() if samples is None else samples, start=1)}
    return rows + [(label, colour(task.compose(x, y.detach().cpu().float()))) for label, y in made.items()]


def as_given(images: Tensor, task: Task) -> Tensor:
    """Return images `[N, height, width]` in [0, 1] in colours, `[N, 3, height, width]`: what is asked in NOT_GIVEN."""
    x = task.batch(task.rows(images)).x
    black, white = (task.compose(x, x.new_full((len(x), task.y_dim), level)) for level in (0.0, 1.0))
    return torch.where((black != white)[:, None], torch.tensor(NOT_GIVEN)[:, None, None], colour(images))


def colour(images: Tensor) -> Tensor:
    """Return grey images `[..., height, width]` as `[..., 3, height, width]`."""
    return images.unsqueeze(-3).expand(*images.shape[:-2], 3, *images.shape[-2:])


def draw_rows(rows: Rows, tile: int = TILE) -> Tensor:
    """Return a picture of labelled rows on white, uint8 `[3, height, width]`.

    Small images are magnified by a whole number, to about `tile` screen pixels; large ones are shrunk to LARGEST_TILE.
    """
    from torchvision.transforms.functional import pil_to_tensor  # takes a second: no start of a script waits for it
    from torchvision.utils import make_grid

    scaled = [_scaled(as_bytes(images), tile) for _, images in rows]
    height, width = (max(images.shape[side] for images in scaled) for side in (-2, -1))
    tiles = torch.full((len(rows), max(map(len, scaled)), 3, max(height, FONT_SIZE), width), 255, dtype=torch.uint8)
    for place, images in zip(tiles, scaled, strict=True):
        place[: len(images), :, : images.shape[-2], : images.shape[-1]] = images
    grid = as_picture(make_grid(tiles.flatten(0, 1), nrow=tiles.shape[1], padding=GAP, pad_value=255))
    font = ImageFont.load_default(size=FONT_SIZE)
    margin = max(int(font.getlength(label)) for label, _ in rows) + GAP
    picture = Image.new("RGB", (margin + grid.width, grid.height), PAPER)
    picture.paste(grid, (margin, 0))
    for i, (label, _) in enumerate(rows):
        middle = GAP + i * (tiles.shape[-2] + GAP) + height // 2
        ImageDraw.Draw(picture).text((margin, middle), label, fill=INK, font=font, anchor="rm")
    return pil_to_tensor(picture)  # type: ignore[no-any-return]


def _scaled(images: Tensor, tile: int) -> Tensor:
    """Return images, uint8 `[N, 3, height, width]`, in the size in which they are shown."""
    side = max(images.shape[-2:])
    zoom = min(LARGEST_TILE / side, max(1, round(tile / side)))
    size = [max(1, round(length * zoom)) for length in images.shape[-2:]]
    return as_bytes(interpolate(images / 255, size, mode="area"))


def show(pictures: Tensor) -> Image.Image:
    """Return grey pictures beside each other as one Pillow image, which a notebook shows.

    pictures: uint8, or floats in [0, 1]; `[H, W]`, `[N, H, W]`, or `[S, B, H, W]` as `model.complete` gives them, which
    makes a row of S completions for each of the B. Raises ValueError for others.
    """
    known = pictures.dtype == torch.uint8 or pictures.is_floating_point()
    if not (known and 2 <= pictures.dim() <= 4 and pictures.numel() and in_range(pictures)):
        wanted = "uint8 or floats in [0, 1], [H, W], [N, H, W] or [S, B, H, W]"
        raise ValueError(f"pictures to be shown are {wanted}, not {described(pictures)}")
    rows = pictures.transpose(0, 1) if pictures.dim() == 4 else pictures.reshape(1, -1, *pictures.shape[-2:])
    return as_picture(draw_rows([("", colour(row)) for row in rows.detach().cpu()]))


def as_bytes(images: Tensor) -> Tensor:
    """Return images of any shape, in [0, 1] or uint8, as uint8 on the CPU."""
    return images.cpu() if images.dtype == torch.uint8 else images.mul(255).round().to("cpu", torch.uint8)


def as_picture(image: Tensor) -> Image.Image:
    """Return colours `[3, height, width]`, in [0, 1] or uint8, as a Pillow image."""
    return Image.fromarray(as_bytes(image).permute(1, 2, 0).contiguous().numpy())


def ending(path: Path) -> str:
    """Return the ending of a picture's name, one of `ENDINGS`. Raises UsageError for another one."""
    if (suffix := path.suffix.lower()) not in ENDINGS:
        raise UsageError(f"{path}: pictures are written as {', '.join(ENDINGS)}; choose one of these endings")
    return suffix


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format of its name. Raises UsageError if that cannot hold it, and DiskError."""
    suffix, buffer = ending(path), io.BytesIO()
    try:
        picture.save(buffer, Image.registered_extensions()[suffix], **ENDINGS[suffix])
    except (OSError, ValueError, struct.error):
        size = f"{picture.width}×{picture.height} pixels"
        raise UsageError(f"{path}: this format cannot hold {size}; choose .png") from None
    write_atomically(path, buffer.getvalue())


def name_pieces(folder: Path, run: str, numbers: Sequence[int], samples: int) -> list[Path]:
    """Return the files of `write_pieces` for the images of these numbers, row by row: `RUN-imageN-PART.png`."""
    parts = ["input", "truth", "nn", *(f"sample{i:02d}" for i in range(1, samples + 1))]
    return [folder / f"{run}-image{number}-{part}.png" for part in parts for number in numbers]


def refuse_to_replace(paths: Sequence[Path]) -> None:
    """Raise UsageError if there is something already where one of these files is to be written."""
    if there := [path for path in paths if os.path.lexists(path)]:
        raise UsageError(f"{there[0]} exists already and is left as it is; choose another folder")


def make_folders(paths: Sequence[Path]) -> None:
    """Make the folders of these files. Raises DiskError."""
    for folder in {path.parent for path in paths}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{folder}: cannot be made ({error.strerror or error})") from None


def write_pieces(paths: Sequence[Path], rows: Rows) -> None:
    """Write each image of the rows to a file, pixel for pixel; grey but for the inputs. Raises DiskError."""
    make_folders(paths)
    for path, image in zip(paths, (image for _, row in rows for image in row), strict=False):
        write_picture(path, as_picture(image) if path.stem.endswith("-input") else as_picture(image).convert("L"))
