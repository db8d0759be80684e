"""Print the table of conditional log-likelihoods (CLL) of the finished runs on the test images, and draw completions.

    python eval.py                                    # all finished runs below runs/
    python eval.py --runs runs/q1 --samples 1000      # one run, tighter estimates
    python eval.py --format markdown                  # or json, csv
    torchrun --nproc-per-node 2 eval.py               # the images shared by two processes: the same table

One column a run, in nats per image, lower is better, with the standard error over the images beside each number. The
only place that reads the test images. Exit codes: 0 done, 1 another process of the job
has ended, 2 usage, 3 data, checkpoint or no finished run, 5 disk.
"""

if __name__ == "__main__":
    from cvae.startup import before_torch

    before_torch()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cvae import runtime
from cvae.data.images import ImageSet
from cvae.data.sources import load_test
from cvae.distributed import Processes
from cvae.errors import CvaeError, DataError, PeerLost
from cvae.model.likelihood import Likelihoods, evaluate, noise
from cvae.report import tables
from cvae.report.figures import completions, encode_png
from cvae.run import checkpoint
from cvae.run.folder import finished_runs, read_settings
from cvae.run.load import load

NUM_DIGITS, NUM_SAMPLES = 10, 10  # of the figure
MOST_SAMPLES = 1_000_000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of runs, or one run (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=100,
        metavar="S",
        help="samples of z per image and estimate (default: %(default)s)",
    )
    parser.add_argument(
        "--format", choices=tables.FORMATS, default="text", help="format of the table (default: %(default)s)"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="PATH",
        help="write completions of ten test digits as PNG; of several runs, one file each",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the noise (default: %(default)s)"
    )
    return parser.parse_args(argv)


def positive(word: str) -> int:
    """A positive whole number, within reason."""
    if not 1 <= (value := int(word)) <= MOST_SAMPLES:
        raise argparse.ArgumentTypeError(f"has to be from 1 to {MOST_SAMPLES}, not {value}")
    return value


def evaluate_run(
    folder: Path, figure: Path | None, options: argparse.Namespace, device: torch.device, processes: Processes
) -> tables.Column:
    """The column of a run; draws its figure if one is asked for."""
    settings, model = read_settings(folder), load(folder, device)
    test_images = load_test(settings).images
    if test_images.shape[1:] != model.split.observed.shape:
        sizes = ["×".join(map(str, shape)) for shape in (test_images.shape[1:], model.split.observed.shape)]
        raise DataError(f"{folder}: was trained on images of {sizes[1]} pixels; the test images have {sizes[0]}")
    images = ImageSet(test_images, model.split, device)

    if figure is not None and processes.is_main:
        random = runtime.generator(device, options.seed, "figure")
        x = images.batch(slice(NUM_DIGITS)).x
        samples = model.complete(x, noise(NUM_SAMPLES, len(x), model, random))
        picture = completions(test_images[:NUM_DIGITS], model.split, model.baseline_net(x).sigmoid(), samples)
        checkpoint.write_atomically(figure, encode_png(picture))

    portions = [torch.empty(len(Likelihoods._fields), 0, dtype=torch.float64, device=device)]
    hidden = not (processes.is_main and sys.stderr.isatty())
    with tqdm(desc=str(folder), total=len(images) // processes.count, unit="img", leave=False, disable=hidden) as bar:
        for portion in evaluate(model, images, options.samples, options.seed, processes.share):
            portions.append(torch.stack(portion))
            bar.update(portions[-1].shape[1])
    per_image = Likelihoods(*processes.gather(torch.cat(portions, dim=1)))
    return tables.Column(folder.name, settings, options.samples, per_image)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    processes = Processes()
    try:
        device = runtime.resolve_device(options.device, processes.local_rank, processes.local_count)
        runtime.prepare(device)
        processes.connect(device)
        folders = finished_runs(options.runs)
        figures = {folder: figure_path(options.figure, folder, len(folders)) for folder in folders}
        columns = [evaluate_run(folder, figures[folder], options, device, processes) for folder in folders]
        if processes.is_main:
            print(tables.render(columns, options.format), end="")
            if options.figure and options.format == "text":
                print("\n" + "\n".join(f"figure: {path}" for path in figures.values()))
    except CvaeError as error:
        if processes.is_main or isinstance(error, PeerLost):
            print(f"eval.py: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        processes.disconnect()
    return 0


def figure_path(wanted: Path | None, folder: Path, count: int) -> Path | None:
    """Where the figure of a run goes: of several runs, each gets the run's name into its own."""
    return wanted.with_stem(f"{wanted.stem}-{folder.name}") if wanted is not None and count > 1 else wanted


if __name__ == "__main__":
    sys.exit(main())
