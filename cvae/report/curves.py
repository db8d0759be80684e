"""The curves of a run: each term of the objectives by epoch, on training and on validation images."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from cvae.report.figures import FONT_SIZE, INK, PAPER

Record = Mapping[str, Any]
Phases = Mapping[str, Mapping[int, Record]]
"""The records of `metrics.jsonl`, by phase and epoch."""

TRAIN, VALIDATION, GRID = (224, 146, 64), (38, 92, 168), (225, 225, 225)
COLOURS = {"train": TRAIN, "validation": VALIDATION}
LARGEST = 1e30  # nats
AS_LOGGED = ("kl", "active_units")  # the beginnings of what is drawn as it is logged: by level too
ENOUGH = 5  # epochs, or values: of so many, the axis has room for the last nine tenths only; the first are far off
FAR, FEW = 10, 0.1  # nor for values beyond the quartiles by more than FAR times their difference, if these are FEW
COLUMNS, PANEL, LEGEND = 2, (420, 230), 30  # a row's panels; width and height of one, and height, in screen pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 26, 26  # around the axes of a panel
SCALE = 3  # drawn so many times as large, and shrunk: the lines are smooth then


class Panel(NamedTuple):
    """One term of a phase: `lines` by part, its values by epoch; and the best epoch, where it is what is maximised."""

    title: str
    lines: dict[str, dict[int, float]]
    best: int | None


def terms(record: Record, part: str = "validation") -> dict[str, float]:
    """The terms of an epoch as they are printed, lower is better, nats per image; the first is minus the maximised one.

    part: of the images, `train` or `validation`. What is no number, or too large to be drawn, is NaN.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        prefix, _, name = key.partition("_")
        if prefix == part:
            known = value if type(value) is float and abs(value) < LARGEST else math.nan
            words = name.replace("_", " ")
            found |= {words: known} if name.startswith(AS_LOGGED) else {f"-{words}": -known}
    return found


def best_epoch(epochs: Mapping[int, Record]) -> int:
    """The epoch of a phase whose weights are kept: the first one with the lowest validation loss."""
    losses = {epoch: next(iter(terms(record).values())) for epoch, record in epochs.items()}
    return min(losses, key=lambda epoch: math.inf if math.isnan(losses[epoch]) else losses[epoch])


def panels(phases: Phases) -> Iterator[Panel]:
    """What there is to draw, the terms of the baseline first; not the active units by level, which hardly change."""
    for phase, epochs in phases.items():
        for i, name in enumerate(terms(next(iter(epochs.values())))):
            lines = {part: _line(epochs, name, part) for part in COLOURS}
            if any(lines.values()) and not name.startswith("active units "):
                yield Panel(f"{phase}: {name}", lines, None if i else best_epoch(epochs))


def _line(epochs: Mapping[int, Record], name: str, part: str) -> dict[int, float]:
    values = {epoch: terms(record, part).get(name, math.nan) for epoch, record in epochs.items()}
    return {epoch: value for epoch, value in values.items() if not math.isnan(value)}


def draw_curves(phases: Phases) -> Image.Image:
    """A picture of all curves, in nats per image by epoch, a panel for each term."""
    drawn = [_draw_panel(panel) for panel in panels(phases)]
    width, height = PANEL
    rows = math.ceil(len(drawn) / COLUMNS)
    picture = Image.new("RGB", (COLUMNS * width, LEGEND + rows * height), PAPER)
    picture.paste(_draw_legend(COLUMNS * width), (0, 0))
    for i, panel in enumerate(drawn):
        picture.paste(panel, (i % COLUMNS * width, LEGEND + i // COLUMNS * height))
    return picture


class Canvas:
    """A picture that is drawn in screen pixels, on one `SCALE` times as large."""

    def __init__(self, width: float, height: float, font_size: int = FONT_SIZE):
        self.size = round(width), round(height)
        self.picture = Image.new("RGB", (self.size[0] * SCALE, self.size[1] * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.picture)
        self._font = ImageFont.load_default(size=font_size * SCALE)

    def line(self, points: Iterable[tuple[float, float]], colour: tuple[int, int, int], width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")

    def dot(self, x: float, y: float, colour: tuple[int, int, int], radius: float) -> None:
        self._draw.circle((x * SCALE, y * SCALE), radius * SCALE, fill=colour)

    def text(self, x: float, y: float, words: str, anchor: str) -> float:
        """anchor: as Pillow's. Returns the width."""
        self._draw.text((x * SCALE, y * SCALE), words, fill=INK, font=self._font, anchor=anchor)
        return self._font.getlength(words) / SCALE

    def shrunk(self) -> Image.Image:
        return self.picture.resize(self.size, Image.Resampling.BOX)


def _draw_legend(width: int) -> Image.Image:
    canvas, x = Canvas(width, LEGEND), float(LEFT)
    middle = LEGEND / 2
    x += canvas.text(x, middle, "nats per image, by epoch", "lm") + 30
    for part, colour in COLOURS.items():
        canvas.line([(x, middle), (x + 22, middle)], colour, 2)
        x += 28 + canvas.text(x + 28, middle, "training images" if part == "train" else "validation images", "lm") + 24
    canvas.dot(x, middle, VALIDATION, 4)
    canvas.text(x + 10, middle, "best epoch", "lm")
    return canvas.shrunk()


def _draw_panel(panel: Panel) -> Image.Image:
    canvas = Canvas(*PANEL)
    width, height = PANEL[0] - LEFT - RIGHT, PANEL[1] - TOP - BOTTOM
    first, last, low, high = _ranges(panel)

    def place(epoch: float, value: float) -> tuple[float, float]:
        return width * (epoch - first + 0.5) / (last - first + 1), height * (high - value) / (high - low)

    axes = Canvas(width, height)  # what leaves them is not seen
    counts = all(value == round(value) for line in panel.lines.values() for value in line.values())
    for value in ticks(low, high, 5, whole=counts):
        y = place(0, value)[1]
        axes.line([(0, y), (width, y)], GRID)
        canvas.text(LEFT - 6, TOP + y, f"{value:g}", "rm")
    for epoch in ticks(first, last, 8, whole=True):
        canvas.text(LEFT + place(epoch, low)[0], TOP + height + 6, f"{epoch:g}", "mt")
    for part, line in panel.lines.items():
        for piece in _unbroken(line):
            axes.line([place(epoch, line[epoch]) for epoch in piece], COLOURS[part], 1.8)
            if len(piece) == 1:
                axes.dot(*place(piece[0], line[piece[0]]), COLOURS[part], 2)
    title = panel.title
    if panel.best in panel.lines["validation"]:
        value = panel.lines["validation"][panel.best]
        axes.dot(*place(panel.best, value), VALIDATION, 4)
        title += f", {value:.2f} in epoch {panel.best}"
    canvas.picture.paste(axes.picture, (LEFT * SCALE, TOP * SCALE))
    canvas.line([(LEFT, TOP), (LEFT, TOP + height), (LEFT + width, TOP + height)], INK)
    canvas.text(LEFT, TOP / 2, title, "lm")
    return canvas.shrunk()


def _ranges(panel: Panel) -> tuple[float, float, float, float]:
    """The first and the last epoch, and the ends of the other axis."""
    first, last = _ends(epoch for line in panel.lines.values() for epoch in line)
    count = last - first + 1
    begin = first + (math.ceil(count / 10) if count >= ENOUGH else 0)
    seen = [value for line in panel.lines.values() for epoch, value in line.items() if epoch >= begin]
    if len(seen) >= ENOUGH:
        lower, _, upper = quantiles(seen)
        room = FAR * (upper - lower)
        near = [value for value in seen if lower - room <= value <= upper + room]
        seen = near if len(near) >= (1 - FEW) * len(seen) else seen
    if panel.best in panel.lines["validation"]:
        seen.append(panel.lines["validation"][panel.best])
    low, high = _ends(seen)
    margin = 0.06 * (high - low) or max(1.0, abs(high)) * 0.06
    return first, last, low - margin, high + margin


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _unbroken(line: Mapping[int, float]) -> list[list[int]]:
    """The epochs of a line, in pieces that have no gap in them."""
    pieces: list[list[int]] = []
    for epoch in sorted(line):
        if not pieces or pieces[-1][-1] != epoch - 1:
            pieces.append([])
        pieces[-1].append(epoch)
    return pieces


def ticks(low: float, high: float, most: int, whole: bool = False) -> Sequence[float]:
    """Round numbers from low to high, at most so many: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    if whole:
        power = max(power, 1.0)
    for step in (power * factor for factor in (1, 2, 5, 10, 20, 50)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(i * step, 10) for i in range(first, last + 1)]
