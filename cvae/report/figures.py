"""Pictures of images and of what models make of them, and their files."""

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence

from cvae.data.pictures import in_range
from cvae.data.tasks import Task, described
from cvae.errors import UsageError
from cvae.run.checkpoint import telling_of_disk, write_atomically

# The endings of pictures' names, each with the options by which Pillow writes it
ENDINGS: dict[str, dict[str, Any]] = {
    ".png": {}, ".gif": {}, ".webp": {"lossless": True}, ".pdf": {"quality": 95},
    ".jpg": {"quality": 95, "subsampling": 0}, ".jpeg": {"quality": 95, "subsampling": 0},
}  # fmt: skip
NOT_GIVEN = (0.36, 0.44, 0.56)  # the colour of a hidden pixel in the row of inputs
PAPER, INK = (255, 255, 255), (40, 40, 40)
GAP, FONT_SIZE = 4, 12  # screen pixels
TILE, LARGEST_TILE = 56, 128  # an image's longer side, screen pixels
Rows = list[tuple[str, Tensor]]  # labels; images, grey `[N, H, W]` or colours `[N, 3, H, W]`, uint8 or in [0, 1]


def completions(images: Tensor, task: Task, guess: Tensor, samples: Tensor | None = None) -> Tensor:
    """Return the picture of `completion_rows` for TensorBoard, uint8 `[3, height, width]`."""
    picture = draw_rows(completion_rows(images, task, guess, samples))
    return torch.tensor(np.asarray(picture)).movedim(-1, 0)


def completion_rows(images: Tensor, task: Task, guess: Tensor, samples: Tensor | None = None) -> Rows:
    """Return rows of completions: the input (and its mask's name), the truth, the baseline's guess, the samples.

    images: uint8 `[N, height, width]`. guess: ŷ, `[N, y_dim]` in [0, 1]. samples: of y, `[S, N, y_dim]` in [0, 1].
    """
    images = images.cpu().float() / 255
    x = task.batch(task.rows(images)).x
    rows = [(f"input: {task.name:.20}" if task.name else "input", as_given(images, task)), ("truth", images)]
    made = {"NN": guess} | {f"CVAE {i}": y for i, y in enumerate(() if samples is None else samples, start=1)}
    return rows + [(label, task.compose(x, y.detach().cpu().float())) for label, y in made.items()]


def as_given(images: Tensor, task: Task) -> Tensor:
    """Return images `[N, height, width]` in [0, 1] in colours, `[N, 3, height, width]`: what is asked in NOT_GIVEN."""
    x = task.batch(task.rows(images)).x
    black, white = (task.compose(x, x.new_full((len(x), task.y_dim), level)) for level in (0.0, 1.0))
    return torch.where((black != white)[:, None], torch.tensor(NOT_GIVEN)[:, None, None], images[:, None])


def draw_rows(rows: Rows, tile: int = TILE) -> Image.Image:
    """Return a picture of labelled rows on white.

    Small images are magnified by a whole number, to about `tile` screen pixels; large ones are shrunk to LARGEST_TILE.
    """
    from torchvision.utils import make_grid  # takes a second: no start of a script waits for it

    scaled = []
    for _, images in rows:
        zoom = min(LARGEST_TILE / max(images.shape[-2:]), max(1, round(tile / max(images.shape[-2:]))))
        size = [max(1, round(length * zoom)) for length in images.shape[-2:]]
        levels = images / 255 if images.dtype == torch.uint8 else images
        colours = levels.view(len(levels), -1, *levels.shape[-2:]).expand(-1, 3, -1, -1)
        scaled.append(interpolate(colours, size, mode="area"))
    height, width = (max(FONT_SIZE, *(images.shape[side] for images in scaled)) for side in (-2, -1))
    padded = [pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), value=1.0) for images in scaled]
    tiles = pad_sequence(padded, batch_first=True, padding_value=1.0)
    grid = as_picture(make_grid(tiles.flatten(0, 1), nrow=tiles.shape[1], padding=GAP, pad_value=1.0))
    font = ImageFont.load_default(size=FONT_SIZE)
    margin = max(int(font.getlength(label)) for label, _ in rows) + GAP
    picture = Image.new("RGB", (margin + grid.width, grid.height), PAPER)
    picture.paste(grid, (margin, 0))
    for i, (label, _) in enumerate(rows):
        middle = GAP + i * (height + GAP) + height // 2
        ImageDraw.Draw(picture).text((margin, middle), label, fill=INK, font=font, anchor="rm")
    return picture


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
    return draw_rows([("", row) for row in rows.detach().cpu()])


def as_picture(image: Tensor) -> Image.Image:
    """Return a grey image `[height, width]` or colours `[3, height, width]`, uint8 or in [0, 1], as a Pillow image."""
    levels = (image if image.dtype == torch.uint8 else image.mul(255).round().byte()).cpu()
    return Image.fromarray((levels.movedim(0, -1) if levels.dim() == 3 else levels).contiguous().numpy())


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
        raise UsageError(f"{path}: cannot hold {picture.width}×{picture.height} pixels; choose .png") from None
    with telling_of_disk(f"{path.parent}: cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def refuse_to_replace(paths: Sequence[Path]) -> None:
    """Raise UsageError if there is something already where one of these files is to be written."""
    if there := [path for path in paths if os.path.lexists(path)]:
        raise UsageError(f"{there[0]} exists already and is left as it is; choose another folder")
