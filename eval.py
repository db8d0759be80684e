"""Print the table of conditional log-likelihoods (CLL) of runs on the test images, and draw completions.

    python eval.py                                    # all finished runs below runs/
    python eval.py q1 runs/ablation other/run         # runs and folders of runs, by path or by name below runs/
    python eval.py --runs q1 q2 --samples 100 5000    # the same as without the flag; rows at other numbers of samples
    python eval.py q1 wide --against q1               # and the differences from q1, image by image
    python eval.py s0 s1 s2 --seeds                   # runs that differ in their seeds alone as one column
    python eval.py --format markdown                  # or json, csv
    python eval.py q1 --figure completions.png --digits 3,17,42 --samples-to pictures
    python eval.py q1 --realism                       # and realism and diversity of completions: docs/realism.md
    torchrun --nproc-per-node 2 eval.py               # the images shared by two processes: the same table

One column a run, in nats per image, lower is better, with the standard error over the images beside each number. A run
that cannot be evaluated (not finished, damaged, its images missing or others) is left out with one line, and the exit
code is then 3. The only place that measures on the test images. Exit codes: 0 done, 1 another process of the job has
ended, 2 usage, 3 a run was left out or cannot be compared, or there is none, 5 disk, 130 interrupted by Ctrl-C.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from cvae import context
from cvae.console import command, complain, interruptible, program, say
from cvae.context import Context, Processes
from cvae.data.images import ImageSet
from cvae.data.sources import load_test, named
from cvae.errors import DataError, UsageError
from cvae.model.cvae import noise
from cvae.report import figures, realism, tables
from cvae.report.estimates import Sampling, evaluation_precision, result_of
from cvae.report.results import Column, by_setting
from cvae.report.selection import Subject, compared, find_runs, open_run, short_names, with_reference
from cvae.run.plan import absolute, user_path
from cvae.settings import Settings

RUNS = Path("runs")
NUM_DIGITS, NUM_SAMPLES = 10, 10  # of the figure
MOST_SAMPLES = 1_000_000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    run: dict[str, Any] = {"type": user_path, "metavar": "RUN", "default": []}
    add("named", nargs="*", help="run or folder of runs, as a path or a name below runs/ (default: runs/)", **run)
    add("--runs", nargs="+", action="extend", help="the same; may be repeated", **run)
    add("--unfinished", action="store_true", help="evaluate the best weights so far of runs that are not finished")
    add("--against", type=user_path, metavar="RUN", help="run to compare the others with, image by image")
    add("--seeds", action="store_true", help="runs that differ in their seeds alone as one column, their mean")
    numbers: dict[str, Any] = {"type": positive, "nargs": "+", "default": [100, 1000], "metavar": "S"}
    add("--samples", help="samples of z per image, a row of each estimate for each S (default: 100 1000)", **numbers)
    precisions = ("auto", "fp32", "bf16")
    add(
        "--precision",
        choices=precisions,
        default="auto",
        help="type of matrix products; auto: bf16 on CPUs that have it, else fp32",
    )
    add("--format", choices=tables.FORMATS, default="text", help="format of the table (default: %(default)s)")
    add(
        "--figure",
        type=user_path,
        metavar="PATH",
        help=f"write completions of ten test images, as the ending says ({', '.join(figures.ENDINGS)}); "
        "one file per run where there are several",
    )
    add(
        "--samples-to",
        type=user_path,
        metavar="DIR",
        help="write each completion as a PNG file of its own, in a folder per run if there are several; replaces none",
    )
    digits = "test images for --figure and --samples-to, counted from 0 (default: the first ten)"
    add("--digits", type=indices, metavar="N,N,…", help=digits)
    add("--realism", action="store_true", help="measure realism and diversity of completions too: a second table")
    add("--realism-images", type=positive, metavar="N", help="measure on the first N test images only (default: all)")
    add("--realism-figure", type=user_path, metavar="PATH", help="draw completions of ever more ambiguous images")
    add("--data", metavar="PATH", help="where the images of the runs are now, as for train.py")
    add("--data-root", metavar="DIR", help="where torchvision's data sets are now, as for train.py")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the noise (default: %(default)s)")
    options = parser.parse_intermixed_args(argv)
    options.samples = tuple(sorted(set(options.samples)))
    if (options.realism_images or options.realism_figure) and not options.realism:
        parser.error("--realism-images and --realism-figure need --realism")
    if options.digits and not (options.figure or options.samples_to):
        parser.error("--digits chooses test images for --figure and --samples-to: give one of them")
    try:
        places = {
            "data": options.data and named(options.data),
            "data_root": options.data_root and absolute(options.data_root),
        }
        options.moved = {name: place for name, place in places.items() if place}
        Settings(**options.moved)
        for figure in filter(None, (options.figure, options.realism_figure)):
            figures.ending(figure)
    except (ValueError, UsageError) as error:
        parser.error(str(error))
    return options


def positive(word: str) -> int:
    """A positive whole number, within reason."""
    if not (word.isascii() and word.isdecimal() and 1 <= int(word[:20]) <= MOST_SAMPLES):
        raise argparse.ArgumentTypeError(f"has to be from 1 to {MOST_SAMPLES}, not {word!r}; runs are named before it")
    return int(word)


def indices(word: str) -> list[int]:
    """Whole numbers with commas between them, each once; whether there are such images is seen later."""
    try:
        return list(dict.fromkeys(int(each) for each in word.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"has to be numbers with commas between them, as 3,17,42, not {word!r}"
        ) from None


def open_runs(
    options: argparse.Namespace, device: torch.device, processes: Processes
) -> tuple[dict[str, Subject], list[str]]:
    """The runs to be evaluated, by their names in the table, and a line about each that all processes leave out."""
    folders, problems = processes.on_main(partial(find_runs, options.named + options.runs, RUNS))
    if options.against is not None:
        folders = processes.on_main(partial(with_reference, folders, options.against, RUNS))
    load_images = cache(partial(load_test, show=processes.is_main))  # once for the runs that share them
    found = []
    for folder in folders:
        try:
            opening = partial(open_run, folder, options.unfinished, options.moved, device, load_images)
            found.append(processes.on_all(opening))
        except DataError as error:
            own = str(error).startswith(str(folder))  # it says already which run it is about
            problems.append(str(error) if own else f"{folder}: {error}")
    return dict(zip(short_names([subject.folder for subject in found]), found, strict=True)), problems


def draw(subject: Subject, figure: Path | None, samples: list[Path], options: argparse.Namespace) -> None:
    """Write a run's figure, and its samples to these files, as far as they are asked for.

    The noise for an image is the same whichever others are drawn beside it.
    """
    model, split, device = subject.model, subject.model.split, next(subject.model.parameters()).device
    digits = chosen(subject, options)
    images = subject.test.images[digits]
    x = ImageSet(images, split, device).batch(slice(None)).x
    random = [context.generator(device, options.seed, "figure", digit) for digit in digits]
    eps = torch.cat([noise(NUM_SAMPLES, 1, model, each) for each in random], dim=1)
    guess = model.baseline_net(x).sigmoid()
    rows = figures.completion_rows(images, split, guess, model.completions(x, eps))
    if figure is not None:
        figures.write_picture(figure, figures.as_picture(figures.draw_rows(rows)))
    figures.write_pieces(samples, rows)


def chosen(subject: Subject, options: argparse.Namespace) -> list[int]:
    """Which test images of a run are drawn."""
    return options.digits or list(range(min(NUM_DIGITS, len(subject.test.images))))


def draw_all(subjects: dict[str, Subject], options: argparse.Namespace) -> list[str]:
    """Write the figures and samples that are asked for; a line about each. Raises UsageError and DiskError."""
    if not (options.figure or options.samples_to):
        return []
    several = len(subjects) > 1
    drawings = []
    for name, subject in subjects.items():
        name = name.replace("/", "-")
        figure, folder = options.figure, options.samples_to
        if several:
            figure = figure and figure.with_stem(f"{figure.stem}-{name}")
            folder = folder and folder / name
        samples = figures.name_pieces(folder, name, chosen(subject, options), NUM_SAMPLES) if folder else []
        drawings.append((subject, figure, samples))
        if bad := [digit for digit in options.digits or () if not 0 <= digit < len(subject.test.images)]:
            last = len(subject.test.images) - 1
            raise UsageError(f"--digits {bad[0]}: the test images of {subject.folder} are numbered 0 to {last}")
        figures.refuse_to_replace(samples)
    lines = []
    for subject, figure, samples in drawings:
        draw(subject, figure, samples, options)
        lines += [f"figure: {figure}"] if figure else []
        lines += [f"samples: {samples[0].parent}"] if samples else []
    return lines


@command("eval.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    processes = Processes()
    with processes.one_voice(), interruptible():
        device = context.resolve_device(options.device, processes.local_rank, processes.local_count)
        with context.prepare(device), processes.connected(device):
            subjects, problems = open_runs(options, device, processes)
            against = compared(subjects, options.against, RUNS, problems)
            here = Context(device, processes=processes)
            cases, more = realism.open_cases(subjects if options.realism else {}, options.realism_images, here)
            problems += more
            if processes.is_main:
                for line in problems:
                    complain(f"{program('eval.py')}: {line}")
                if options.format == "text":
                    for line in dict.fromkeys(subject.test.about for subject in subjects.values()):
                        say(line)
            drawn = processes.on_main(partial(draw_all, subjects, options))
            how = Sampling(options.samples, options.seed, evaluation_precision(options.precision, device))
            found = {name: result_of(name, subject, how, processes) for name, subject in subjects.items()}
            judged = {name: realism.judge(name, case, options.seed, here) for name, case in cases.items()}
            if processes.is_main and found:
                results = [each._replace(against=found.get(against.get(name, ""))) for name, each in found.items()]
                columns = by_setting(results) if options.seeds else [Column((result,)) for result in results]
                beside = realism.records(found, judged) if options.realism else {}
                table = tables.render(columns, options.format, beside)
                if judged and options.format in ("text", "markdown"):
                    table += realism.render(judged, subjects, options.format)
                if options.format == "text":
                    table = "\n".join(["", table, *drawn, ""] if drawn else ["", table])
                say(table, end="")
                if options.realism_figure:
                    realism.draw_all(cases, judged, options.realism_figure, options.seed, here)
    return DataError.exit_code if problems else 0


if __name__ == "__main__":
    sys.exit(main())
