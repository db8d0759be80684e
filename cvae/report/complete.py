"""Complete pictures of digits with a trained model.

    python -m cvae.report.complete q1 photo.jpg -o out.png              # ten completions of the digit in a picture
    python -m cvae.report.complete q1 photo.jpg --samples 100 --temperature 0.8 -o out.png
    python -m cvae.report.complete q1 photos -o completed               # a folder: one file for each picture below it
    python -m cvae.report.complete q1 photo.jpg --separate -o parts     # each completion a file of its own
    python -m cvae.report.complete q1 digit.png --as-is --ascii         # a picture as MNIST's, shown in the terminal

The model sees the pixels that its run observes, whatever the others hold. A picture may be a photograph, a scan or a
drawing of one digit, dark on light or light on dark: it is found, cropped and centred as MNIST's are, and what became
of it is the first image of the output, with its hidden pixels coloured in the second one. With --as-is nothing of this
is done, for pictures of the model's size: those that are prepared already, show only a part of a digit, or no digit.

A picture that cannot be read is left out with one line, and the exit code is then 3. Exit codes: 0 done, 2 usage, 3 no
such run, or a picture left out, 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cvae import context
from cvae.console import command, complain, program, say
from cvae.data.digits import as_digit
from cvae.data.masks import Split
from cvae.data.pictures import pictures_below, read_picture
from cvae.errors import DataError, UsageError
from cvae.report import figures
from cvae.run.load import load
from cvae.run.plan import user_path

MOST_SAMPLES = 1000
IN_A_ROW = 10  # samples of a grid
COLUMNS = 32  # of the terminal, at most, for one picture
BLOCKS = " ▀▄█"  # by which half is bright: none, the upper, the lower, both


class Job(NamedTuple):
    """A picture and the files to write: one with a grid; or one for each image of it, row by row; or none."""

    picture: Path
    files: list[Path]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("complete.py"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="run, as a path or a name below runs/")
    add("picture", type=user_path, metavar="PICTURE", help="picture, or folder of pictures")
    add("--samples", type=int, default=10, metavar="S", help="completions of each picture (default: %(default)s)")
    add(
        "-o",
        "--output",
        type=user_path,
        metavar="PATH",
        help="file for the grid of completions; for a folder or with --separate: folder, in which no file is replaced",
    )
    add("--separate", action="store_true", help="write each completion as a PNG file of its own, pixel for pixel")
    add("--as-is", action="store_true", help="take the picture as it is; it has to be of the model's size")
    add("--ascii", action="store_true", help="show the completions in the terminal, in blocks")
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="factor of z's noise: less than 1 for likelier, less diverse completions (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed of the completions (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    options = parser.parse_args(argv)
    if not 1 <= options.samples <= MOST_SAMPLES:
        parser.error(f"--samples has to be from 1 to {MOST_SAMPLES}, not {options.samples}")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature has to be a number from 0 on, not {options.temperature}")
    if options.output is None and not options.ascii:
        parser.error(
            "-o says where the completions are written, and --ascii shows them here: give one of them, or both"
        )
    return options


def plan(options: argparse.Namespace) -> list[Job]:
    """The pictures and what is written for each. Raises UsageError and DataError before anything is written."""
    path, output = options.picture, options.output
    is_folder = os.path.isdir(path)
    names = pictures_below(path) if is_folder else [path.name]
    if not names:
        raise DataError(f"{path}: has no pictures in it")
    pictures = [path / name for name in names] if is_folder else [path]
    if output is None:
        return [Job(picture, []) for picture in pictures]
    if not (is_folder or options.separate):
        figures.ending(output)
        if os.path.realpath(output) == os.path.realpath(path):
            raise UsageError(f"-o {output} is the picture itself; choose another name")
        return [Job(path, [output])]
    parts = ["-picture", "-given", *(f"-sample{i:02d}" for i in range(1, options.samples + 1))]
    jobs = [
        Job(picture, [output / f"{name}{part}.png" for part in (parts if options.separate else [""])])
        for picture, name in zip(pictures, _output_names(names), strict=True)
    ]
    figures.refuse_to_replace([file for job in jobs for file in job.files])
    return jobs


def _output_names(names: Sequence[str]) -> list[str]:
    """The names of pictures without their endings, where these do not tell two of them apart."""
    stems = [os.path.splitext(name)[0] for name in names]
    count = Counter(stems)
    return [stem if count[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


def read(path: Path, split: Split, as_is: bool) -> Tensor:
    """A picture as the model is to see it, uint8 `[height, width]`. Raises DataError, naming the file."""
    if not as_is:
        return as_digit(path, split.height, split.width)
    levels = torch.tensor(read_picture(path))
    if levels.shape != split.observed.shape:
        sizes = [f"{height}×{width}" for height, width in (levels.shape, split.observed.shape)]
        raise DataError(f"{path}: has {sizes[0]} pixels, and the model's pictures have {sizes[1]}: leave --as-is out")
    return levels


def rows_of(picture: Tensor, completions: Tensor, split: Split) -> list[tuple[str, Tensor]]:
    """The grid, in labelled rows: the picture and what is given of it, and then the completions.

    picture: uint8 `[height, width]`. completions: `[S, height, width]`, in [0, 1].
    """
    image = picture[None] / 255
    first = torch.cat([figures.colour(image), figures.as_given(image, split)])
    rows = figures.colour(completions).split(IN_A_ROW)
    return [("picture", first), ("samples", rows[0]), *(("", row) for row in rows[1:])]


def write(files: Sequence[Path], rows: list[tuple[str, Tensor]]) -> None:
    """Write the grid to the one file, or its images to these files. Raises UsageError and DiskError."""
    figures.make_folders(files)
    images = [figures.draw_rows(rows)] if len(files) == 1 else torch.cat([row for _, row in rows])
    for file, image in zip(files, images, strict=True):
        figures.write_picture(file, figures.as_picture(image))


def in_blocks(images: Tensor, columns: int) -> str:
    """Images `[N, height, width]` in [0, 1] as text: a character stands for two pixels, bright from ½ on.

    columns: how wide a line of text may be; images that do not fit beside each other follow below.
    """
    width = min(images.shape[2], COLUMNS)
    height = round(images.shape[1] * width / images.shape[2] / 2) * 2
    bright = (functional.adaptive_avg_pool2d(images[None], (max(height, 2), width))[0] >= 0.5).int()
    text = [
        ["".join(BLOCKS[i] for i in line) for line in image]
        for image in (bright[:, ::2] + 2 * bright[:, 1::2]).tolist()
    ]
    fitting = max(1, columns // (width + 1))
    strips = (text[i : i + fitting] for i in range(0, len(text), fitting))
    return "\n\n".join("\n".join(" ".join(line).rstrip() for line in zip(*strip, strict=True)) for strip in strips)


@command("complete.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    device = context.resolve_device(options.device)
    problems = 0
    with context.prepare(device):
        model = load(options.run, device)
        for job in plan(options):
            try:
                picture = read(job.picture, model.split, options.as_is)
            except DataError as error:
                complain(f"{program('complete.py')}: {error}")
                problems += 1
                continue
            completions = model.complete(picture, options.samples, options.seed, options.temperature)[:, 0].cpu()
            if job.files:
                write(job.files, rows_of(picture, completions, model.split))
                where = job.files[0] if len(job.files) == 1 else f"{job.files[0].parent} ({len(job.files)} files)"
                say(f"{job.picture}: {options.samples} completions in {where}")
            if options.ascii:
                shown = torch.cat([picture[None] / 255, completions])
                say(f"{job.picture}, then completions:\n{in_blocks(shown, shutil.get_terminal_size().columns)}")
    return DataError.exit_code if problems else 0


if __name__ == "__main__":
    sys.exit(main())
