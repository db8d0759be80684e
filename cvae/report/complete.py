"""Complete pictures of digits with a trained model.

    python -m cvae.report.complete q1 photo.jpg -o out.png              # ten completions of the digit in a picture
    python -m cvae.report.complete q1 photo.jpg --samples 100 --temperature 0.8 -o out.png
    python -m cvae.report.complete q1 photos -o completed               # a folder: one file for each picture below it
    python -m cvae.report.complete q1 photo.jpg --separate -o parts     # each completion a file of its own
    python -m cvae.report.complete q1 digit.png --as-is --ascii         # a picture as MNIST's, shown in the terminal

The model sees the pixels that its run observes, whatever the others hold. A picture may be a photograph, a scan or a
drawing of one digit, dark on light or light on dark: the digit is found, cropped and centred as MNIST's are. The first
image of the output is this digit, and the second one has its hidden pixels coloured. With --as-is nothing of this is
done, for pictures of the model's size: those that are prepared already, show only a part of a digit, or no digit.
Exit codes: 0 done, 2 usage, 3 no such run, or a picture that cannot be read and was left out with one line, 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cvae import context
from cvae.console import command, complain, program, say
from cvae.data.digits import as_digit
from cvae.data.pictures import as_images, pictures_below
from cvae.data.tasks import Task
from cvae.errors import DataError, UsageError
from cvae.report import figures
from cvae.run.load import load
from cvae.run.plan import user_path

MOST_SAMPLES = 1000
IN_A_ROW = 10  # samples of a grid
COLUMNS = 32  # of the terminal, at most, for one picture
BLOCKS = " ▀▄█"  # by which half is bright: none, the upper, the lower, both


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog=program("complete.py"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="run, as a path or a name below runs/")
    add("picture", type=user_path, metavar="PICTURE", help="picture, or folder of pictures")
    add("--samples", type=int, default=10, metavar="S", help="completions of each picture (default: %(default)s)")
    words = "file for the grid of completions; for a folder or with --separate: folder, in which no file is replaced"
    add("-o", "--output", type=user_path, metavar="PATH", help=words)
    add("--separate", action="store_true", help="write each completion as a PNG file of its own, pixel for pixel")
    add("--as-is", action="store_true", help="take the picture as it is; it has to be of the model's size")
    add("--ascii", action="store_true", help="show the completions in the terminal, in blocks")
    add("--temperature", type=float, default=1.0, metavar="T", help="factor of z's noise (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the completions (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    options = parser.parse_args(argv)
    if not 1 <= options.samples <= MOST_SAMPLES:
        parser.error(f"--samples has to be from 1 to {MOST_SAMPLES}, not {options.samples}")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature has to be a number from 0 on, not {options.temperature}")
    if options.output is None and not options.ascii:
        parser.error("-o says where the completions are written, and --ascii shows them: give one of them, or both")
    return options


def plan(options: argparse.Namespace) -> dict[Path, list[Path]]:
    """Return the pictures, each with the files to write: one for the grid, or one for each image, or none.

    Raises UsageError and DataError before anything is written.
    """
    path, output = options.picture, options.output
    is_folder = os.path.isdir(path)
    names = [Path(name) for name in pictures_below(path)[0]] if is_folder else [Path(path.name)]
    pictures = [path / name for name in names] if is_folder else [path]
    if not pictures:
        raise DataError(f"{path}: has no pictures in it")
    if output is None:
        return {picture: [] for picture in pictures}
    if not (is_folder or options.separate):
        figures.ending(output)
        if os.path.realpath(output) == os.path.realpath(path):
            raise UsageError(f"-o {output} is the picture itself; choose another name")
        return {path: [output]}
    # Whole names tell any two pictures apart; without their endings, and on some disks without their case, not all.
    if len({str(name.with_suffix("")).casefold() for name in names}) == len(names):
        names = [name.with_suffix("") for name in names]
    parts = ["-picture", "-given", *(f"-sample{i:02d}" for i in range(1, options.samples + 1))]
    files = [[output / f"{name}{part}.png" for part in (parts if options.separate else [""])] for name in names]
    figures.refuse_to_replace([file for of_picture in files for file in of_picture])
    return dict(zip(pictures, files, strict=True))


def write(files: Sequence[Path], picture: Tensor, completions: Tensor, task: Task) -> None:
    """Write the picture, what is given of it, and its completions: as a grid to the one file, or each to its own."""
    figures.make_folders(files)
    image, samples = picture[None] / 255, figures.colour(completions).split(IN_A_ROW)
    first = torch.cat([figures.colour(image), figures.as_given(image, task)])
    rows = [("picture", first), ("samples", samples[0]), *(("", row) for row in samples[1:])]
    images = torch.cat([first, *samples]) if len(files) > 1 else [figures.draw_rows(rows)]
    for file, each in zip(files, images, strict=True):
        figures.write_picture(file, figures.as_picture(each))


def in_blocks(images: Tensor, columns: int) -> str:
    """Return images `[N, height, width]` in [0, 1] as lines of text: a character is two pixels, bright from ½ on."""
    width = min(images.shape[2], COLUMNS)
    height = max(2, round(images.shape[1] * width / images.shape[2] / 2) * 2)
    bright = (functional.adaptive_avg_pool2d(images[None], (height, width))[0] >= 0.5).int()
    blocks = (bright[:, ::2] + 2 * bright[:, 1::2]).tolist()
    text = [["".join(BLOCKS[i] for i in line) for line in image] for image in blocks]
    fitting = max(1, columns // (width + 1))
    strips = (text[i : i + fitting] for i in range(0, len(text), fitting))
    return "\n\n".join("\n".join(" ".join(line).rstrip() for line in zip(*strip, strict=True)) for strip in strips)


@command("complete.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, code = parse(argv), 0
    with context.opened(options.device) as here:
        model = load(options.run, here.device)
        task = model.task
        for path, files in plan(options).items():
            try:
                picture = as_images(path, task)[0] if options.as_is else as_digit(path, task.height, task.width)
            except (DataError, ValueError) as error:  # the second one for a picture of another size
                named = "" if isinstance(error, DataError) else f"{path}: "
                complain(f"{program('complete.py')}: {named}{error}")
                code = DataError.exit_code
                continue
            completions = model.complete(picture, options.samples, options.seed, options.temperature)[:, 0].cpu()
            if files:
                write(files, picture, completions, task)
                where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
                say(f"{path}: {options.samples} completions in {where}")
            if options.ascii:
                shown = torch.cat([picture[None] / 255, completions])
                say(f"{path}, then completions:\n{in_blocks(shown, shutil.get_terminal_size().columns)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
