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
code is then 3; docs/reliability.md has the others. The only place that measures on the test images.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from cvae.console import command, complain, say, silence
from cvae.context import Context, generator, opened
from cvae.data.sources import TestImages, load_test, named, refuse_others
from cvae.errors import DataError, UsageError
from cvae.report import figures, realism
from cvae.report.evaluation import OF_THE_IMAGES, Subject, evaluate_run, find_runs, render, short_names
from cvae.run.folder import RunFolder, find_run
from cvae.run.load import load_trained
from cvae.run.plan import absolute, user_path
from cvae.settings import Settings

RUNS = Path("runs")
NUM_DIGITS, NUM_SAMPLES = 10, 10  # of the figure


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, path = parser.add_argument, user_path
    add("named", nargs="*", type=path, metavar="RUN", help="run or folder of runs, as above (default: all below runs/)")
    add("--runs", nargs="+", action="extend", type=path, default=[], metavar="RUN", help="the same; may be repeated")
    add("--unfinished", action="store_true", help="evaluate the best weights so far of runs that are not finished")
    add("--against", type=path, metavar="RUN", help="run to compare the others with, image by image")
    add("--seeds", action="store_true", help="runs that differ in their seeds alone as one column, their mean")
    add("--samples", type=int, nargs="+", default=[100, 1000], metavar="S", help="samples of z (default: 100 1000)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CPUs with it, else fp32")
    add("--format", choices=("text", "markdown", "json", "csv"), default="text", help="of the table (default: text)")
    add("--figure", type=path, metavar="PATH", help="write completions as a picture, one for each run")
    add("--samples-to", type=path, metavar="DIR", help="write each completion as a PNG file; replaces none")
    add("--digits", type=numbers, metavar="N,N,…", help="test images for these, from 0 (default: the first ten)")
    add("--realism", action="store_true", help="measure realism and diversity of completions too: a second table")
    add("--realism-images", type=int, metavar="N", help="measure on the first N test images only (default: all)")
    add("--realism-figure", type=path, metavar="PATH", help="draw completions of ever more ambiguous images")
    add("--data", type=named, metavar="PATH", help="where the images of the runs are now, as for train.py")
    add("--data-root", type=absolute, metavar="DIR", help="where torchvision's data sets are now, as for train.py")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the noise (default: %(default)s)")
    options = parser.parse_intermixed_args(argv)
    options.samples = tuple(sorted(set(options.samples)))
    if min(options.samples[0], 1 if options.realism_images is None else options.realism_images) < 1:
        parser.error("--samples and --realism-images have to be at least 1")
    if (options.realism_images or options.realism_figure) and not options.realism:
        parser.error("--realism-images and --realism-figure need --realism")
    if options.digits and not (options.figure or options.samples_to):
        parser.error("--digits chooses test images for --figure and --samples-to: give one of them")
    for figure in filter(None, (options.figure, options.realism_figure)):
        figures.ending(figure)
    return options


def numbers(word: str) -> list[int]:
    """Read whole numbers with commas between them, each once."""
    return list(dict.fromkeys(map(int, word.split(","))))


def open_run(folder: Path, options: Namespace, device: torch.device, load: Callable[..., TestImages]) -> Subject:
    """Read what the evaluation of a run, or of published weights, needs; `load` reads images that runs share once."""
    run = RunFolder(folder)
    moved = {name: place for name in ("data", "data_root") if (place := getattr(options, name))}
    settings, is_finished = replace(run.settings, **moved), run.is_passed_on or run.summary is not None
    if not (is_finished or options.unfinished):
        raise DataError(f"{folder}: is not finished; train.py --resume goes on with it, --unfinished takes it as it is")
    model = load_trained(folder, device).model
    epochs = [] if is_finished else [line.get("epoch") for line in run.metrics() if line.get("phase") == "cvae"]
    test = load(Settings(**{name: getattr(settings, name) for name in OF_THE_IMAGES}))
    refuse_others(folder, run.record, test.record)
    return Subject(folder, settings, model, test, epochs[-1] if epochs else None)


def open_runs(options: Namespace, context: Context) -> tuple[dict[str, Subject], list[str]]:
    """Return the runs by name, none if the one to compare with cannot be evaluated, and a line about each problem."""
    processes, against, found = context.processes, options.against and find_run(options.against, RUNS), []
    folders, problems = processes.on_main(partial(find_runs, options.named + options.runs, RUNS))
    if against and against.resolve() not in map(Path.resolve, folders):
        folders.insert(0, against)
    load = cache(load_test)
    for folder in folders:
        try:
            found.append(processes.on_all(partial(open_run, folder, options, context.device, load)))
        except DataError as error:
            problems.append(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}")
    runs = dict(zip(short_names([run.folder for run in found]), found, strict=True))
    if against:
        base = next((name for name, run in runs.items() if run.folder.resolve() == against.resolve()), None)
        if base is None:
            return {}, [*problems, f"--against {options.against}: cannot be evaluated"]
        asked = runs[base].model.task.asked(runs[base].test.images)
        for name, run in runs.items():
            if torch.equal(run.model.task.asked(run.test.images), asked):  # the images and the mask are the same then
                runs[name] = run._replace(against=base)
            else:
                problems.append(f"{run.folder}: cannot be compared with {against}: the test images or masks differ")
    return runs, problems


def path_of(figure: Path, name: str, runs: Collection[str]) -> Path:
    """Return where the figure of a run is written: of several runs each has a file with its name."""
    return figure.with_stem(f"{figure.stem}-{name.replace('/', '-')}") if len(runs) > 1 else figure


def draw_all(runs: dict[str, Subject], options: Namespace, context: Context) -> list[str]:
    """Write the figures and samples that are asked for, and return a line about each."""
    lines = []
    for name, run in runs.items() if options.figure or options.samples_to else ():
        model, images, name = run.model, run.test.images, name.replace("/", "-")
        folder = options.samples_to and options.samples_to / (name if len(runs) > 1 else "")
        digits = options.digits or list(range(min(NUM_DIGITS, len(images))))
        if not 0 <= min(digits) <= max(digits) < len(images):
            raise UsageError(f"--digits: the test images of {run.folder} are numbered 0 to {len(images) - 1}")
        parts = ["input", "truth", "nn", *(f"sample{i:02d}" for i in range(1, NUM_SAMPLES + 1))]
        pieces = [folder / f"{name}-image{digit}-{part}.png" for part in parts for digit in digits] if folder else []
        figures.refuse_to_replace(pieces)
        images = images[digits]
        random = [generator(context.device, options.seed, "figure", digit) for digit in digits]  # for each digit alone
        samples = torch.cat(list(map(model.complete, images, [NUM_SAMPLES] * len(digits), random)), dim=1)
        guess = model.guess(model.task.batch(model.task.rows(images.to(context.device)))).sigmoid()
        rows = figures.completion_rows(images, model.task, guess, model.task.asked(samples))
        if options.figure:
            figure = path_of(options.figure, name, runs)
            figures.write_picture(figure, figures.draw_rows(rows))
            lines.append(f"figure: {figure}")
        if folder:
            for path, image in zip(pieces, (image for _, row in rows for image in row), strict=True):
                figures.write_picture(path, figures.as_picture(image))
            lines.append(f"samples: {folder}")
    return lines


@command("eval.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate runs and print their table; return the exit code."""
    options = parse(argv)
    with opened(options.device, "fp32") as context, silence(not context.processes.is_main):
        if options.precision != "auto" or context.device.type == "cpu":
            context = context.with_precision(options.precision)
        is_main, is_text = context.processes.is_main, options.format == "text"
        runs, problems = open_runs(options, context)
        cases, more = realism.open_cases(runs if options.realism else {}, options.realism_images, context)
        for line in problems + more if is_main else ():
            complain(line, "eval.py")
        for line in dict.fromkeys(run.test.about for run in runs.values() if is_text):
            say(line)
        drawn = context.processes.on_main(partial(draw_all, runs, options, context))
        found = [evaluate_run(name, run, options.samples, options.seed, context) for name, run in runs.items()]
        judged = {name: realism.judge(name, case, options.seed, context) for name, case in cases.items()}
        if is_main and found:
            beside = {name: {"realism": realism.record(judged.get(name))} for name in runs if options.realism}
            table = render(found, options.format, options.seeds, beside)
            if judged and options.format in ("text", "markdown"):
                table += realism.render(beside, runs, options.format)
            say("\n".join(["", table, *drawn, ""] if drawn else ["", table]) if is_text else table, end="")
            for name, case in cases.items() if options.realism_figure else ():
                ambiguity, path = judged[name]["x_only", "entropy"].cpu(), path_of(options.realism_figure, name, cases)
                figures.write_picture(path, realism.draw(case, ambiguity, options.seed, context))
    return DataError.exit_code if problems or more else 0


if __name__ == "__main__":
    sys.exit(main())
