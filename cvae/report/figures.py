"""The pictures: rows of digits, what was given, what was there, and what the models make of it."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvae.data.given import in_range
from cvae.data.masks import Split, described
from cvae.errors import DiskError, UsageError
from cvae.run.checkpoint import write_atomically


class Format(NamedTuple):
    """A format that Pillow writes: its name there, the longest side of a picture, and how it is written."""

    name: str
    longest: int
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


ENDINGS = {
    ".png": Format("PNG", 1 << 31),
    ".jpg": Format("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".jpeg": Format("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".webp": Format("WEBP", 16_383, {"lossless": True}),
    ".gif": Format("GIF", 65_535),
    ".bmp": Format("BMP", 1 << 31),
    ".tif": Format("TIFF", 1 << 31, {"compression": "tiff_adobe_deflate"}),
    ".tiff": Format("TIFF", 1 << 31, {"compression": "tiff_adobe_deflate"}),
    ".pdf": Format("PDF", 65_500, {"quality": 95}),
}
"""What the ending of a picture's name stands for."""

NOT_GIVEN = (0.36, 0.44, 0.56)  # the colour of a hidden pixel in the row of inputs
LONGEST_NAME = 20  # of a mask, in letters, in the margin
PAPER, INK = (255, 255, 255), (40, 40, 40)
GAP, FONT_SIZE = 4, 12  # screen pixels
TILE, LARGEST_TILE = 56, 128  # an image's longer side


def completions(images: Tensor, split: Split, y_hat: Tensor, samples: Tensor | None = None) -> Tensor:
    """The picture of `completion_rows`, uint8 `[3, height, width]`, on the CPU."""
    return draw_rows(completion_rows(images, split, y_hat, samples))


def completion_rows(
    images: Tensor, split: Split, y_hat: Tensor, samples: Tensor | None = None
) -> list[tuple[str, Tensor]]:  # fmt: skip
    """Labelled rows of completions of these images: input (and of which mask), truth, the baseline's guess, samples.

    images: uint8 `[N, height, width]`. y_hat: ŷ, in [0, 1], `[N, num_hidden]`. samples: `[S, N, num_hidden]`. Each row
    comes back as its label and its pictures, `[N, 3, height, width]` in [0, 1], on the CPU.
    """
    images = images.cpu().float() / 255
    x = split.split(images)[0]
    name = split.name if len(split.name) <= LONGEST_NAME else split.name[: LONGEST_NAME - 1] + "…"
    rows = [(f"input: {name}" if name else "input", as_given(images, split)), ("truth", colour(images))]
    rows.append(("NN", colour(split.compose(x, y_hat.detach().cpu().float()))))
    if samples is not None:
        completed = colour(split.compose(x, samples.detach().cpu().float()))
        rows += [(f"CVAE {i}", sample) for i, sample in enumerate(completed, start=1)]
    return rows


def as_given(images: Tensor, split: Split) -> Tensor:
    """Grey images `[…, height, width]` in [0, 1] in colours `[…, 3, height, width]`, hidden pixels in NOT_GIVEN."""
    return torch.where(split.observed, colour(images), torch.tensor(NOT_GIVEN)[:, None, None])


def colour(images: Tensor) -> Tensor:
    """Grey images `[..., height, width]` as `[..., 3, height, width]`."""
    return images.unsqueeze(-3).expand(*images.shape[:-2], 3, *images.shape[-2:])


def draw_rows(rows: list[tuple[str, Tensor]]) -> Tensor:
    """A picture of the labelled rows on white, uint8 `[3, height, width]`.

    Small images are magnified by a whole number, to about 56 screen pixels; large ones are shrunk to `LARGEST_TILE`.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    margin = max(int(font.getlength(label)) for label, _ in rows) + 2 * FONT_SIZE // 3
    _, _, height, width = rows[0][1].shape
    count = max(len(images) for _, images in rows)
    side = max(height, width)
    zoom = min(LARGEST_TILE / side, max(1, round(TILE / side)))
    tile = max(1, round(width * zoom)), max(1, round(height * zoom))
    row_height = max(tile[1], FONT_SIZE) + GAP
    picture = Image.new("RGB", (margin + count * (tile[0] + GAP), len(rows) * row_height + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    resampling = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    for i, (label, images) in enumerate(rows):
        top = GAP + i * row_height
        draw.text((margin - GAP, top + tile[1] // 2), label, fill=INK, font=font, anchor="rm")
        for j, image in enumerate(images):
            picture.paste(as_picture(image).resize(tile, resampling), (margin + j * (tile[0] + GAP), top))
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3).permute(2, 0, 1)
    )


def show(pictures: Tensor) -> Image.Image:
    """Grey pictures beside each other as one Pillow image, which a notebook shows.

    pictures: `[H, W]`, `[N, H, W]`, or `[S, B, H, W]` as `model.complete` gives them: a row for each of B, with its S
    completions; uint8, or floats in [0, 1]. Raises ValueError for others.
    """
    levels = pictures.dtype == torch.uint8 or pictures.is_floating_point()
    if not 2 <= pictures.dim() <= 4 or not pictures.numel() or not levels or not in_range(pictures):
        wanted = "uint8 or floats in [0, 1], [H, W], [N, H, W] or [S, B, H, W]"
        raise ValueError(f"pictures to be shown are {wanted}, not {described(pictures)}")
    rows = pictures.transpose(0, 1) if pictures.dim() == 4 else pictures.reshape(1, -1, *pictures.shape[-2:])
    return as_picture(draw_rows([("", row) for row in colour(rows.detach().cpu())]))


def as_picture(image: Tensor) -> Image.Image:
    """A picture of colours `[3, height, width]`, in [0, 1] or uint8."""
    pixels = image if image.dtype == torch.uint8 else image.mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def ending(path: Path) -> str:
    """The ending of a picture's name, one of `ENDINGS`. Raises UsageError for another one."""
    if (suffix := path.suffix.lower()) not in ENDINGS:
        raise UsageError(f"{path}: pictures are written as {', '.join(ENDINGS)}; choose one of these endings")
    return suffix


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format that its name says, wholly or not at all.

    Raises UsageError for a format that there is not, or that cannot hold so many pixels, and DiskError.
    """
    form = ENDINGS[ending(path)]
    if max(picture.size) > form.longest:
        size = "×".join(map(str, picture.size))
        raise UsageError(f"{path}: {form.name} holds {form.longest} pixels a side, not {size}; choose .png")
    buffer = io.BytesIO()
    picture.save(buffer, form.name, **form.options)
    write_atomically(path, buffer.getvalue())


def name_pieces(folder: Path, run: str, numbers: Sequence[int], samples: int) -> list[Path]:
    """The names of `write_pieces`, for the images of these numbers: `RUN-imageN-PART.png`, row by row."""
    parts = ["input", "truth", "nn", *(f"sample{i:02d}" for i in range(1, samples + 1))]
    return [folder / f"{run}-image{number}-{part}.png" for part in parts for number in numbers]


def refuse_to_replace(paths: Sequence[Path]) -> None:
    """Raises UsageError if there is something already where one of these files is to be written."""
    for path in paths:
        if os.path.lexists(path):
            raise UsageError(f"{path} exists already and is left as it is; choose another folder")


def make_folders(paths: Sequence[Path]) -> None:
    """Make the folders of these files. Raises DiskError."""
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made ({error.strerror or error})") from None


def write_pieces(paths: Sequence[Path], rows: list[tuple[str, Tensor]]) -> None:
    """Write each image of the rows to a file of its own, pixel for pixel; grey but for the row of inputs.

    Raises DiskError, also where the folder cannot be made.
    """
    make_folders(paths)
    images = [(label, image) for label, row in rows for image in row]
    for path, (label, image) in zip(paths, images, strict=True) if paths else ():
        picture = as_picture(image)
        write_picture(path, picture if label.startswith("input") else picture.convert("L"))
