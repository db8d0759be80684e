"""Draw how a run has learned: its pictures, an epoch a frame, and what it has come to.

    python -m cvae.report.replay q1                # runs/q1
    python -m cvae.report.replay runs other/run    # runs and folders of runs; where none is named, all below runs/

Into each run's folder: `learning.gif`, the same validation images with the same noise after each epoch, the baseline's
guess first; `completions.png`, the images after the best epoch. A training leaves them when it is finished. They are
made from TensorBoard's events and `metrics.jsonl`: of a run that is not finished, as far as it has come. Exit codes:
0 done, 2 usage, 3 a run or a part of its log is missing or damaged, 5 disk.
"""

import argparse
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cvae.console import command, complain, program, say
from cvae.errors import DataError
from cvae.report.evaluation import find_runs
from cvae.report.figures import FONT_SIZE, INK, NOT_GIVEN, PAPER, write_picture
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import COMPLETIONS, LEARNING, METRICS, RunFolder
from cvae.run.log import read_pictures
from cvae.run.plan import user_path

WIDTH, HEADER = 560, 28  # the least of a frame, so that the longest line fits; the height of that line: screen pixels
FRAME_MS, LAST_FRAME_MS = 250, 4000
MOST_FRAMES = 100  # of a longer training, every second epoch is shown, or every third, …
GREYS = 32  # of the palette: a quarter of the bytes that 256 take
BLUE = tuple(round(255 * part) for part in NOT_GIVEN)  # its one colour

Epoch = tuple[str, int]
"""A phase, `baseline` or `cvae`, and the number of an epoch in it."""


def read_losses(folder: Path) -> dict[Epoch, tuple[str, float]]:
    """Return what is minimised in each epoch of a run, in order: its name, and the loss on the validation images.

    The loss is in nats per image, infinite where it is no number. Raises DataError if there is no epoch.
    """
    losses = {}
    for record in RunFolder(folder).metrics():
        name = next((key for key in record if key.startswith("validation_")), "")  # the objective is the first one
        phase, epoch, value = record.get("phase"), record.get("epoch"), record.get(name)
        if phase in ("baseline", "cvae") and type(epoch) is int and name:
            words = name.removeprefix("validation_").replace("_", " ")
            losses[phase, epoch] = f"-{words}", -value if type(value) is float else math.inf
    if not losses:
        raise DataError(f"{folder / METRICS}: has no epoch yet, of which there would be something to draw")
    return dict(sorted(losses.items()))


def draw_all(folder: Path) -> list[str]:
    """Write the figures of a run, and return a line if something is missing in them.

    Raises DataError if it has had no epoch, or its metrics cannot be read, and DiskError.
    """
    losses, logged, pictures = read_losses(folder), read_pictures(folder), {}
    for epoch in losses:
        with suppress(Exception):  # a damaged picture may fail anywhere in the reader
            pictures[epoch] = Image.open(io.BytesIO(logged.get(epoch, b"")), formats=("PNG",)).convert("RGB")
    if pictures:
        first, *rest = frames(losses, pictures)
        buffer, durations = io.BytesIO(), [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        write_atomically(folder / LEARNING, buffer.getvalue())
    last, _ = max(losses)
    best = min((epoch for epoch in losses if epoch[0] == last), key=lambda epoch: losses[epoch][1])
    if best in pictures:
        write_picture(folder / COMPLETIONS, pictures[best])
    if len(pictures) == len(losses):
        return []
    found = f"{folder}: its events have pictures of {len(pictures)} of {len(losses)} epochs"
    return [f"{found}; {LEARNING} shows these, and {COMPLETIONS} is {'' if best in pictures else 'not '}drawn"]


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
        words = f"{phase}, epoch {epoch} of {last}: {name} {loss:.2f} nats per image on validation images"
        frame = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(frame)
        draw.text((FONT_SIZE, HEADER / 2 - 2), words, fill=INK, font=font, anchor="lm")
        draw.line([(0, HEADER - 4), (width * i / len(shown), HEADER - 4)], fill=BLUE, width=2)
        frame.paste(pictures[phase, epoch], (0, HEADER))
        yield frame.quantize(palette=palette, dither=Image.Dither.NONE)


@command("cvae.report.replay")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cvae.report.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = "run or folder of runs, as a path or a name below runs/ (default: runs/)"
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help=words)
    folders, problems = find_runs(parser.parse_args(argv).runs, Path("runs"))
    for folder in folders:
        try:
            problems += (missing := draw_all(folder))
            say(f"{folder}: {'drawn as far as its log goes' if missing else 'drawn'}")
        except DataError as error:
            problems.append(str(error))
    for line in problems:
        complain(f"{program('cvae.report.replay')}: {line}")
    return DataError.exit_code if problems else 0


if __name__ == "__main__":
    sys.exit(main())
