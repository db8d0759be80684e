"""The pictures: rows of digits, what was given, what was there, and what the models make of it."""

import io

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvae.data.masks import Split

NOT_GIVEN = (0.36, 0.44, 0.56)  # the colour of a hidden pixel in the row of inputs
PAPER, INK = (255, 255, 255), (40, 40, 40)
GAP = 2


def completions(images: Tensor, split: Split, y_hat: Tensor, samples: Tensor | None = None) -> Tensor:
    """The picture of `completion_rows`, uint8 `[3, height, width]`, on the CPU."""
    return draw_rows(completion_rows(images, split, y_hat, samples))


def completion_rows(
    images: Tensor, split: Split, y_hat: Tensor, samples: Tensor | None = None
) -> list[tuple[str, Tensor]]:  # fmt: skip
    """Labelled rows of completions of these images: input, truth, the baseline's guess, and a CVAE's samples.

    images: uint8 `[N, height, width]`. y_hat: ŷ, in [0, 1], `[N, num_hidden]`. samples: `[S, N, num_hidden]`. Each row
    comes back as its label and its pictures, `[N, 3, height, width]` in [0, 1], on the CPU.
    """
    x, y = split.split(images.cpu().float() / 255)
    given = _colour(split.compose(x, torch.zeros_like(y)))
    given = torch.where(split.observed, given, torch.tensor(NOT_GIVEN)[:, None, None])
    rows = [("input", given), ("truth", _colour(split.compose(x, y)))]
    rows.append(("NN", _colour(split.compose(x, y_hat.detach().cpu().float()))))
    if samples is not None:
        completed = _colour(split.compose(x, samples.detach().cpu().float()))
        rows += [(f"CVAE {i}", sample) for i, sample in enumerate(completed, start=1)]
    return rows


def _colour(images: Tensor) -> Tensor:
    """Grey images `[..., height, width]` as `[..., 3, height, width]`."""
    return images.unsqueeze(-3).expand(*images.shape[:-2], 3, *images.shape[-2:])


def draw_rows(rows: list[tuple[str, Tensor]], zoom: int = 2) -> Tensor:
    """A picture of the labelled rows on white, uint8 `[3, height, width]`; `zoom`: screen pixels per pixel."""
    font = ImageFont.load_default(size=6 * zoom)
    margin = max(int(font.getlength(label)) for label, _ in rows) + 4 * zoom
    count, _, height, width = rows[0][1].shape
    cell_height, cell_width = (height + GAP) * zoom, (width + GAP) * zoom
    picture = Image.new("RGB", (margin + count * cell_width, len(rows) * cell_height + GAP * zoom), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (label, images) in enumerate(rows):
        top = GAP * zoom + i * cell_height
        draw.text((margin - 2 * zoom, top + height * zoom // 2), label, fill=INK, font=font, anchor="rm")
        pixels = images.mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
        for j, image in enumerate(pixels.numpy()):
            tile = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + j * cell_width, top))
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3).permute(2, 0, 1)
    )


def encode_png(picture: Tensor) -> bytes:
    """The PNG file of a picture, uint8 `[3, height, width]`."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
