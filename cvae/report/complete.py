"""Complete pictures of digits with a trained model.

    python -m cvae.report.complete q1 photo.jpg --samples 10 -o out.png   # completions of the digit in a picture
    python -m cvae.report.complete q1 photos -o completed                 # a folder: a file for each picture below it
    python -m cvae.report.complete q1 photo.jpg --separate -o parts       # each completion a file of its own
    python -m cvae.report.complete q1 digit.png --as-is --ascii           # a picture as MNIST's, shown in the terminal

A picture may be a photograph, a scan or a drawing of one digit, dark on light or light on dark: the digit is found,
cropped and centred as MNIST's are. The first image of the output is this digit, and in the second one all is coloured
that the model does not see. --as-is takes a picture of the model's size as it is, whatever it shows. Exit codes: 0
done, 2 usage, 3 no such run, or a picture was left out with one line, 5 disk.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cvae import context
from cvae.console import command, complain, say
from cvae.data.pictures import as_digit, as_images, pictures_below
from cvae.errors import DataError, UsageError
from cvae.report import figures
from cvae.run.load import load
from cvae.run.plan import user_path

COLUMNS = 32  # of the terminal, at most, for one picture
BLOCKS = " ▀▄█"  # by which half is bright: none, the upper, the lower, both


def in_blocks(images: Tensor, columns: int) -> str:
    """Return images `[N, height, width]` in [0, 1] as lines of text: a character is two pixels, bright from ½ on."""
    width = min(images.shape[2], COLUMNS)
    height = max(2, round(images.shape[1] * width / images.shape[2] / 2) * 2)
    bright = (adaptive_avg_pool2d(images[None], (height, width))[0] >= 0.5).int()
    blocks = (bright[:, ::2] + 2 * bright[:, 1::2]).tolist()
    text = [["".join(BLOCKS[i] for i in line) for line in image] for image in blocks]
    fitting = max(1, columns // (width + 1))
    strips = (text[i : i + fitting] for i in range(0, len(text), fitting))
    return "\n\n".join("\n".join(" ".join(line).rstrip() for line in zip(*strip, strict=True)) for strip in strips)


def plan(path: Path, output: Path | None, separate: int) -> dict[Path, list[Path]]:
    """Return the pictures, each with the files to write: one for the grid, or one for each image.

    separate: How many completions have files of their own. Raises UsageError and DataError before anything is written.
    """
    if output is not None and not (path.is_dir() or separate):
        figures.ending(output)
        if output.resolve() == path.resolve():
            raise UsageError(f"-o {output} is the picture itself; choose another name")
        return {path: [output]}
    folder, names = (path, pictures_below(path)[0]) if path.is_dir() else (path.parent, [path.name])
    if not names:
        raise DataError(f"{path}: has no pictures in it")
    if output is None:
        return {folder / name: [] for name in names}
    stems = [str(Path(name).with_suffix("")) for name in names]
    if len({stem.casefold() for stem in stems}) < len(stems):  # whole names tell any two pictures apart
        stems = names
    parts = ["-picture", "-given", *(f"-sample{i:02d}" for i in range(1, separate + 1))] if separate else [""]
    files = [[output / f"{stem}{part}.png" for part in parts] for stem in stems]
    figures.refuse_to_replace([file for of_picture in files for file in of_picture])
    return {folder / name: of_picture for name, of_picture in zip(names, files, strict=True)}


@command("complete.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="run, as a path or a name below runs/")
    add("picture", type=user_path, metavar="PICTURE", help="picture, or folder of pictures")
    words = "file for the grid of completions; for a folder or with --separate: folder, in which no file is replaced"
    add("-o", "--output", type=user_path, metavar="PATH", help=words)
    add("--samples", type=int, default=10, metavar="S", help="completions of each picture (default: %(default)s)")
    add("--separate", action="store_true", help="write each completion as a PNG file of its own, pixel for pixel")
    add("--as-is", action="store_true", help="take the picture as it is; it has to be of the model's size")
    add("--ascii", action="store_true", help="show the completions in the terminal, in blocks")
    add("--temperature", type=float, default=1.0, metavar="T", help="factor of z's noise (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the completions (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    options = parser.parse_args(argv)
    if not (options.samples >= 1 and 0 <= options.temperature < float("inf")):
        parser.error("--samples has to be at least 1, and --temperature a number from 0 on")
    if options.output is None and not options.ascii:
        parser.error("-o says where the completions are written, and --ascii shows them: give one of them, or both")
    code = 0
    with context.opened(options.device) as here:
        model = load(options.run, here.device)
        task = model.task
        for path, files in plan(options.picture, options.output, options.separate and options.samples).items():
            try:
                picture = as_images(path, task)[0] if options.as_is else as_digit(path, task.height, task.width)
            except (DataError, ValueError) as error:  # the second one for a picture of another size
                complain(f"{path}: {str(error).removeprefix(f'{path}: ')}", "complete.py")
                code = DataError.exit_code
                continue
            completions = model.complete(picture, options.samples, options.seed, options.temperature)[:, 0].cpu()
            given = figures.as_given(picture[None] / 255, task)
            first = torch.cat([(picture / 255).expand_as(given), given])
            if options.separate:
                images = [figures.as_picture(image) for image in (*first, *completions)]
            else:
                labels = ["picture", "samples", *[""] * len(completions)]
                images = [figures.draw_rows([*zip(labels, [first, *completions.split(10)], strict=False)])]
            for file, image in zip(files, images, strict=False):  # no file: they are shown alone
                figures.write_picture(file, image)
            if files:
                where = f"{files[0].parent} ({len(files)} files)" if options.separate else files[0]
                say(f"{path}: {options.samples} completions in {where}")
            if options.ascii:
                shown = in_blocks(torch.cat([picture[None] / 255, completions]), shutil.get_terminal_size().columns)
                say(f"{path}, then completions:\n{shown}")
    return code


if __name__ == "__main__":
    sys.exit(main())
