"""Print the table of conditional log-likelihoods (CLL) of the finished runs on the test images, and draw completions.

    python eval.py                                    # all finished runs below runs/
    python eval.py --runs runs/q1 --samples 1000      # one run, tighter estimates
    python eval.py --format markdown                  # or json, csv
    torchrun --nproc-per-node 2 eval.py               # the images shared by two processes: the same table

One column a run, in nats per image, lower is better, with the standard error over the images beside each number. The
only place that reads the test images. Exit codes: 0 done, 2 usage, 3 data, checkpoint or no finished run, 5 disk.
"""

if __name__ == "__main__":  # Ctrl-C simply ends: there is nothing to lose
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cvae import runtime
from cvae.data.images import ImageSet
from cvae.data.masks import Quadrants
from cvae.data.sources import load_test
from cvae.distributed import Processes
from cvae.errors import CvaeError, DataError, PeerLost
from cvae.model.likelihood import Likelihoods, evaluate
from cvae.model.networks import CVAE, Baseline
from cvae.report import tables
from cvae.report.figures import completion_rows, draw_rows, encode_png
from cvae.run import checkpoint
from cvae.run.folder import BEST, finished_runs, read_settings
from cvae.settings import Settings

NUM_DIGITS, NUM_SAMPLES = 10, 10  # of the figure
MOST_SAMPLES = 1_000_000


def load_model(folder: Path, settings: Settings, quadrants: Quadrants, device: torch.device) -> CVAE:
    """The CVAE of a finished run. Raises DataError if its weights cannot be read or are not of these settings."""
    state = checkpoint.load(folder / BEST, device)
    with torch.device("meta"):  # no memory is taken before the shapes are known to fit
        sizes = (quadrants.num_observed, quadrants.num_pixels, settings.hidden)
        cvae = CVAE(Baseline(*sizes), *sizes, settings.latent_dim)
    try:
        cvae.load_state_dict(state["model"], assign=True)
        if any(weight.dtype != torch.float32 for weight in cvae.parameters()):
            raise TypeError
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise DataError(f"{folder / BEST}: does not hold the weights of a CVAE of the run's settings") from None
    return cvae.requires_grad_(False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the folder of runs, or one run (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=positive, default=100, metavar="S", help="of z per image and estimate (default: %(default)s)"
    )
    parser.add_argument("--format", choices=tables.FORMATS, default="text", help="of the table (default: %(default)s)")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="PATH",
        help="write completions of ten test digits as PNG; of several runs, one file each",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
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
    settings = read_settings(folder)
    test_images = load_test(Path(settings.data) if settings.data else None)
    quadrants = Quadrants(settings.quadrants, *test_images.shape[1:])
    cvae = load_model(folder, settings, quadrants, device)
    images = ImageSet(test_images, quadrants, device)

    if figure is not None and processes.is_main:
        digits = test_images[:NUM_DIGITS].to(device)
        random = runtime.generator(device, options.seed, "figure")
        eps = torch.randn(NUM_SAMPLES, len(digits), cvae.latent_dim, generator=random, device=device)
        picture = draw_rows(completion_rows(digits, quadrants, cvae, eps))
        checkpoint.write_atomically(figure, encode_png(picture))

    portions = [torch.empty(len(Likelihoods._fields), 0, dtype=torch.float64, device=device)]
    hidden = not (processes.is_main and sys.stderr.isatty())
    with tqdm(desc=str(folder), total=len(images) // processes.count, unit="img", leave=False, disable=hidden) as bar:
        for portion in evaluate(cvae, images, options.samples, options.seed, processes.share):
            portions.append(torch.stack(portion))
            bar.update(portions[-1].shape[1])
    per_image = Likelihoods(*processes.gather(torch.cat(portions, dim=1)))
    return tables.Column(folder.name, settings.quadrants, options.samples, per_image, is_mnist=settings.data is None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    processes = Processes()
    try:
        device = runtime.resolve_device(options.device, processes.local_rank, processes.local_count)
        runtime.prepare(device, tf32=False)
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
