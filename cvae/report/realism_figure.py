"""The picture of realism and diversity: inputs from plain to ambiguous, completions, and how often each class came."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cvae import context
from cvae.data.images import ImageSet
from cvae.model import realism
from cvae.model.cvae import noise
from cvae.report.figures import FONT_SIZE, GAP, INK, PAPER, as_picture, completion_rows, write_picture
from cvae.report.realism import COMPLETIONS, Case, Judged, classified

IMAGES, SHOWN = 10, 8  # images, a row each; completions of each
TILE, CHART, SMALL = 56, 100, 9  # screen pixels: an image's longer side, a chart's width, its digits
MARGIN, HEAD = 44, 2 * FONT_SIZE
OTHER, TRUE = (150, 165, 190), (200, 60, 40)  # the colours of a class's bar, and of the true one's


def chosen(ambiguity: Tensor) -> list[int]:
    """Which images are shown, from plain to ambiguous: those nearest to equal steps of the entropy `[N]`, each once."""
    steps = torch.linspace(float(ambiguity.min()), float(ambiguity.max()), IMAGES, dtype=ambiguity.dtype)
    nearest = (ambiguity.cpu()[:, None] - steps).abs().argmin(0)
    return list(dict.fromkeys(nearest.tolist()))


def draw_all(cases: Mapping[str, Case], judged: Mapping[str, Judged], path: Path, seed: int) -> None:
    """Write the picture of each run, of several one file each. Raises UsageError and DiskError."""
    for name, case in cases.items():
        own = path.with_stem(f"{path.stem}-{name.replace('/', '-')}") if len(cases) > 1 else path
        write_picture(own, draw(case, judged[name], seed))


@torch.inference_mode()
def draw(case: Case, judged: Judged, seed: int) -> Image.Image:
    """The picture of a run. A row is an image: input, truth, and the class probabilities of the classifier that sees
    x only, whose entropy stands in front; the baseline's guess, completions by the CVAE, and how often each class is
    among 50 of them. The true class is red.

    The noise of an image is the same whichever others are drawn beside it.
    """
    ambiguity = judged.values["x_only", "entropy"]
    numbers, device = chosen(ambiguity), next(case.model.parameters()).device
    images, split = case.images[numbers], case.model.split
    x, y, *_ = ImageSet(images, split, device).batch(slice(None))
    random = [context.generator(device, seed, "realism figure", number) for number in numbers]
    means = case.model.completions(x, torch.cat([noise(COMPLETIONS, 1, case.model, each) for each in random], dim=1))
    columns = completion_rows(images, split, case.model.baseline_net(x).sigmoid(), means[:SHOWN])
    charts = {
        "x only": case.judges.x_only(split.compose(x, y)).softmax(-1),
        f"of {COMPLETIONS}": realism.frequencies(classified(case, x, means)[0]),
    }
    parts = [*columns[:2], ("x only", None), *columns[2:], (f"of {COMPLETIONS}", None)]
    canvas = Sheet(len(numbers), [CHART if pictures is None else TILE for _, pictures in parts])
    for column, (label, pictures) in enumerate(parts):
        canvas.head(column, label.split(":")[0])
        for row, number in enumerate(numbers):
            if pictures is None:
                canvas.chart(row, column, charts[label][row], int(case.classes[number]))
            else:
                canvas.image(row, column, pictures[row])
    for row, number in enumerate(numbers):
        canvas.front(row, f"{ambiguity[number]:.2f}")
    return canvas.picture


class Sheet:
    """A white picture of so many rows, with columns of these widths in screen pixels."""

    def __init__(self, rows: int, widths: list[int]):
        self.lefts = [MARGIN + sum(widths[:i]) + i * 2 * GAP for i in range(len(widths) + 1)]
        self.widths = widths
        self.picture = Image.new("RGB", (self.lefts[-1], HEAD + rows * (TILE + 2 * GAP)), PAPER)
        self.pen = ImageDraw.Draw(self.picture)
        self.font, self.small = (ImageFont.load_default(size=size) for size in (FONT_SIZE, SMALL))

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        return self.lefts[column], HEAD + row * (TILE + 2 * GAP)

    def head(self, column: int, label: str) -> None:
        middle = self.lefts[column] + self.widths[column] // 2
        self.pen.text((middle, HEAD // 2), label, fill=INK, font=self.font, anchor="mm")

    def front(self, row: int, text: str) -> None:
        left, top = self._corner(row, 0)
        self.pen.text((left - 2 * GAP, top + TILE // 2), text, fill=INK, font=self.font, anchor="rm")

    def image(self, row: int, column: int, image: Tensor) -> None:
        zoom = TILE / max(image.shape[-2:])
        size = max(1, round(image.shape[-1] * zoom)), max(1, round(image.shape[-2] * zoom))
        resampling = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
        self.picture.paste(as_picture(image).resize(size, resampling), self._corner(row, column))

    def chart(self, row: int, column: int, shares: Tensor, true: int) -> None:
        """Bars as high as these shares `[K]`, in [0, 1]; below them the classes' numbers, if there is room."""
        (left, top), each = self._corner(row, column), CHART / len(shares)
        foot = top + TILE - SMALL - 2
        for k, share in enumerate(shares.tolist()):
            colour, start = TRUE if k == true else OTHER, left + k * each
            height = round(share * (foot - top))
            if height:
                self.pen.rectangle((start + 1, foot - height, start + max(each - 2, 1), foot - 1), fill=colour)
            if each > SMALL:
                place = (start + each / 2, top + TILE)
                self.pen.text(place, str(k), fill=TRUE if k == true else INK, font=self.small, anchor="mb")
        self.pen.line((left, foot, left + CHART - 1, foot), fill=INK)
