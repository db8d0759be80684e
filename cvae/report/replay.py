"""Draw how runs have learned, an epoch a frame, and what they have come to; a finished training does it by itself.

python -m cvae.report.replay q1     # anew, or as far as an unfinished run has come; RUN: a path or a name below runs/
"""

import io
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cvae.console import command, say
from cvae.errors import DataError
from cvae.report.figures import FONT_SIZE, INK, NOT_GIVEN, PAPER, write_picture
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import COMPLETIONS, LEARNING, METRICS, RunFolder, find_run
from cvae.run.log import read_pictures
from cvae.run.plan import user_path

WIDTH, HEADER = 560, 28  # the least of a frame, so that the longest line fits; the height of that line: screen pixels
FRAME_MS, LAST_FRAME_MS = 250, 4000
MOST_FRAMES = 100  # of a longer training, every second epoch is shown, or every third, …
GREYS = 32  # of the palette: a quarter of the bytes that 256 take
BLUE = tuple(round(255 * part) for part in NOT_GIVEN)  # its one colour
Epoch = tuple[str, int]  # a phase, `baseline` or `cvae`, and the number of an epoch in it


def draw_all(folder: Path) -> None:
    """Write the figures of a run from TensorBoard's events and `metrics.jsonl`.

    `learning.gif`: the same validation images with the same noise after each epoch. `completions.png`: the images after
    the best epoch of the last phase. Raises DataError if a picture is missing, once the others are drawn; DiskError.
    """
    losses, pictures, records = {}, {}, RunFolder(folder).metrics()
    logged = read_pictures(folder)
    for record in records:
        epoch = record["phase"], record["epoch"]
        name, value = next(item for item in record.items() if item[0].startswith("validation_"))  # the objective
        losses[epoch] = name.removeprefix("validation_").replace("_", " "), math.inf if value is None else -value
        with suppress(Exception):  # a damaged picture may fail anywhere in the reader
            pictures[epoch] = Image.open(io.BytesIO(logged[epoch]), formats=("PNG",)).convert("RGB")
    if not losses:
        raise DataError(f"{folder / METRICS}: has no epoch yet, of which there would be something to draw")
    if pictures:
        first, *rest = frames(losses, pictures)
        buffer, durations = io.BytesIO(), [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        write_atomically(folder / LEARNING, buffer.getvalue())
    phase, _ = max(losses)
    best = min((epoch for epoch in losses if epoch[0] == phase), key=lambda epoch: losses[epoch][1])
    if best in pictures:
        write_picture(folder / COMPLETIONS, pictures[best])
    if len(pictures) < len(losses):
        raise DataError(f"{folder}: the events have pictures of {len(pictures)} of {len(losses)} epochs")


def frames(losses: Mapping[Epoch, tuple[str, float]], pictures: Mapping[Epoch, Image.Image]) -> Iterator[Image.Image]:
    """Yield the pictures in one size and palette, each below a line that says which epoch it is, and how good."""
    width = max(WIDTH, *(picture.width for picture in pictures.values()))
    height = HEADER + max(picture.height for picture in pictures.values())
    palette, font = Image.new("P", (1, 1)), ImageFont.load_default(size=FONT_SIZE + 2)
    palette.putpalette([*(round(i * 255 / (GREYS - 1)) for i in range(GREYS) for _ in range(3)), *BLUE])
    shown = list(pictures)[:: -math.ceil(len(pictures) / MOST_FRAMES)][::-1]  # the last one among them
    for i, (phase, epoch) in enumerate(shown, start=1):
        name, loss = losses[phase, epoch]
        last = max(number for each, number in losses if each == phase)
        words = f"{phase}, epoch {epoch} of {last}: -{name} {loss:.2f} nats per image on validation images"
        frame = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(frame)
        draw.text((FONT_SIZE, HEADER / 2 - 2), words, fill=INK, font=font, anchor="lm")
        draw.line([(0, HEADER - 4), (width * i / len(shown), HEADER - 4)], fill=BLUE, width=2)
        frame.paste(pictures[phase, epoch], (0, HEADER))
        yield frame.quantize(palette=palette, dither=Image.Dither.NONE)


@command("cvae.report.replay")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("python -m cvae.report.replay", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN")
    for folder in (find_run(word, "runs") for word in parser.parse_args(argv).runs):
        draw_all(folder)
        say(f"{folder}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
