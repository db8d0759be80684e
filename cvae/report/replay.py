"""Draw how a run has learned: its pictures, an epoch a frame, its curves, and what it has come to.

    python -m cvae.report.replay q1                # runs/q1
    python -m cvae.report.replay runs other/run    # runs and folders of runs; where none is named, all below runs/

Into each run's folder: `learning.gif`, the same images with the same noise after each epoch, the baseline's guess
first; `curves.png`, the objectives and their terms; `completions.png`, the images after the best epoch. All of them
are validation images. A training leaves these files when it is finished. They are made from what it has logged, its
TensorBoard events and `metrics.jsonl`: of older runs too, and of one that is not finished as far as it has come. Exit
codes: 0 done, 2 usage, 3 a run or a part of its log is missing or damaged, 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from warnings import catch_warnings, simplefilter

from PIL import Image

from cvae.console import command, complain, program, say
from cvae.errors import DataError
from cvae.report.curves import Canvas, Phases, Record, best_epoch, draw_curves, terms
from cvae.report.figures import FONT_SIZE, NOT_GIVEN, PAPER, write_picture
from cvae.report.selection import find_runs
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import COMPLETIONS, CURVES, LEARNING, METRICS, read_metrics
from cvae.run.log import read_pictures
from cvae.run.plan import user_path

RUNS = Path("runs")
WIDTH = 560  # at least, screen pixels: the longest line fits
HEADER, TITLE_SIZE = 28, FONT_SIZE + 2  # height and letters of what stands above the images, screen pixels
FRAME_MS, LAST_FRAME_MS = 250, 4000
MOST_FRAMES = 100  # of a longer training, every second epoch is shown, or every third, …
GREYS = 32  # of the palette: a quarter of the bytes that 256 take
RED, GREEN, BLUE = (round(255 * part) for part in NOT_GIVEN)  # its one colour


def read_epochs(folder: Path) -> Phases:
    """What a run has logged of each epoch. Raises DataError if there is none, or it cannot be read."""
    phases: dict[str, dict[int, Record]] = {"baseline": {}, "cvae": {}}
    for record in read_metrics(folder / METRICS):
        phase, epoch = record.get("phase"), record.get("epoch")
        if isinstance(phase, str) and phase in phases and type(epoch) is int and terms(record):
            phases[phase][epoch] = record
    if not any(phases.values()):
        raise DataError(f"{folder / METRICS}: has no epoch yet, of which there would be something to draw")
    return {phase: dict(sorted(epochs.items())) for phase, epochs in phases.items() if epochs}


def draw_all(folder: Path) -> list[str]:
    """Write the figures of a run; returns a line about each thing that is missing in them.

    Raises DataError if it has had no epoch, or its metrics cannot be read, and DiskError.
    """
    phases = read_epochs(folder)
    write_picture(folder / CURVES, draw_curves(phases))
    epochs = [(phase, epoch) for phase, records in phases.items() for epoch in records]
    logged = read_pictures(folder)
    pictures = {key: picture for key in epochs if (picture := _decoded(logged.get(key, b""))) is not None}
    if not pictures:
        return [f"{folder}: its events have no pictures; {LEARNING} and {COMPLETIONS} are not drawn"]
    _write_frames(folder / LEARNING, list(frames(phases, pictures)))
    lines = []
    if len(pictures) < len(epochs):
        lines.append(
            f"{folder}: its events have pictures of {len(pictures)} of {len(epochs)} epochs; others are not shown"
        )
    last = epochs[-1][0]
    if (best := pictures.get((last, best_epoch(phases[last])))) is not None:
        write_picture(folder / COMPLETIONS, best)
    else:
        lines.append(f"{folder}: its events have no picture of the best epoch; {COMPLETIONS} is not drawn")
    return lines


def _decoded(png: bytes) -> Image.Image | None:
    """The picture in a PNG file; None for what is none, or is made to fill the memory."""
    try:
        with catch_warnings():
            simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")
    except Exception:  # a damaged file may fail anywhere in the reader
        return None


def frames(phases: Phases, pictures: Mapping[tuple[str, int], Image.Image]) -> Iterator[Image.Image]:
    """The pictures, all of one size and palette, each below a line that says which epoch it is, and how good.

    pictures: by phase and epoch, in order.
    """
    width = max(WIDTH, *(picture.width for picture in pictures.values()))
    height = max(picture.height for picture in pictures.values())
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(round(i * 255 / (GREYS - 1)) for i in range(GREYS) for _ in range(3)), RED, GREEN, BLUE])
    shown = list(pictures)[:: -math.ceil(len(pictures) / MOST_FRAMES)][::-1]  # the last one among them
    for i, (phase, epoch) in enumerate(shown, start=1):
        name, loss = next(iter(terms(phases[phase][epoch]).items()))
        header = Canvas(width, HEADER, TITLE_SIZE)
        words = f"{phase}, epoch {epoch} of {max(phases[phase])}: {name} {loss:.2f} nats per image on validation images"
        header.text(FONT_SIZE, HEADER / 2 - 2, words, "lm")
        header.line([(0, HEADER - 4), (width * i / len(shown), HEADER - 4)], (RED, GREEN, BLUE), 2)
        frame = Image.new("RGB", (width, HEADER + height), PAPER)
        frame.paste(header.shrunk(), (0, 0))
        frame.paste(pictures[phase, epoch], (0, HEADER))
        yield frame.quantize(palette=palette, dither=Image.Dither.NONE)


def _write_frames(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write a moving picture that begins anew at its end, wholly or not at all. Raises DiskError."""
    first, *rest = pictures
    buffer = io.BytesIO()
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())


@command("cvae.report.replay")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cvae.report.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = "run or folder of runs, as a path or a name below runs/ (default: runs/)"
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help=words)
    folders, problems = find_runs(parser.parse_args(argv).runs, RUNS)
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
