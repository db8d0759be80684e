"""Train the baseline and then the CVAE to predict the hidden quadrants of images.

    python train.py                                   # one quadrant observed, on MNIST, into runs/q1
    python train.py --quadrants 1 2 3                 # three runs, one after the other: runs/q1, runs/q2, runs/q3
    python train.py --quadrants 1 --device cuda       # in mixed precision, each step one CUDA graph
    python train.py --resume q1                       # go on with runs/q1 where it was interrupted
    torchrun --nproc-per-node 2 train.py              # on two processes

Then `tensorboard --logdir runs` shows the learning, and `python eval.py` prints the table.

The baseline is trained first and frozen; the CVAE is trained on top of it. Both go through the same loop, `fit`: Adam on
−ELBO per image, early stopping on the validation images, the best weights kept. Exit codes: 0 done, 2 usage, 3 data or
checkpoint, 4 loss or gradient not finite, 5 disk, 130 / 143 interrupted by Ctrl-C / SIGTERM.
"""

if __name__ == "__main__":  # until a run's own handlers are in place, Ctrl-C simply ends
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cvae import runtime
from cvae.data import ImageSet, load_train
from cvae.distributed import Processes
from cvae.errors import CvaeError, UsageError
from cvae.figures import completion_rows, draw_rows
from cvae.model import CVAE, Baseline
from cvae.objectives import means
from cvae.optimizer import GuardedAdam
from cvae.quadrants import Quadrants
from cvae.run import Progress, Run
from cvae.run_folder import read_settings
from cvae.settings import PRECISIONS, SCHEDULES, Settings

REPORT_EVERY = 50  # steps between two looks at the device: the bar's loss, the gradients' health, the other processes
VALIDATION_BATCH = 1000
NUM_DIGITS, NUM_SAMPLES = 10, 5  # of each epoch's picture


def fit(
    phase: str, model: Baseline | CVAE, train: ImageSet, validation: ImageSet, draw: Callable[[], Tensor],
    run: Run, last: dict[str, Any],
) -> Progress:  # fmt: skip
    """Train a model on −ELBO per image until it stops improving, and leave it with its best weights.

    phase: "baseline" or "cvae". draw: makes the picture of an epoch. last: the checkpoint to go on from, if it is of this
    phase.

    An epoch is a fresh permutation of the images, cut into full batches; the few images left over sit this epoch out.
    All randomness comes from (seed, phase, epoch) and is the same for any number of processes: each draws the noise of
    the whole batch, and takes its share.
    """
    s, device, processes = run.settings, run.device, run.processes
    epochs = s.baseline_epochs if phase == "baseline" else s.epochs
    batch_size = min(s.batch_size, len(train))
    share = processes.share_of_batch(batch_size)
    steps = len(train) // batch_size

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = GuardedAdam(trained, s.learning_rate, loss_scaling=run.precision == "fp16")
    progress = Progress()
    if last.get("phase") == phase:
        progress = run.restore(last, model, optimizer)

    objective = torch.compile(model) if s.compile else model
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch's log-likelihoods, KLs and images
    fixed_noise = noise(s.particles, len(validation), model, runtime.generator(device, s.seed, "validation"))

    def step(rows: Tensor, eps: Tensor) -> None:
        """One step of Adam on −ELBO per image of the batch, of which `rows` are this process's share."""
        with runtime.autocast(run.precision, device):
            terms = objective(*train.batch(rows), eps)
        loss = -terms.elbo.sum() / batch_size
        optimizer.backward(loss)
        processes.sum_gradients(trained, loss := loss.detach())
        accepted = optimizer.step(loss)
        totals.add_(torch.where(accepted, terms.sums().detach(), 0.0))

    take_step = runtime.GraphedStep(step) if device.type == "cuda" and processes.count == 1 else step

    while not progress.is_over(epochs, s.patience):
        started = time.perf_counter()
        progress.epoch += 1
        where = f"{phase}, epoch {progress.epoch}/{epochs}"
        random = runtime.generator(device, s.seed, phase, progress.epoch)
        permutation = torch.randperm(len(train), generator=random, device=device)
        optimizer.start_epoch()
        totals.zero_()

        with progress_bar(where, steps * batch_size, run) as bar:
            for i in range(steps):
                rows = permutation[i * batch_size : (i + 1) * batch_size]
                eps = noise(s.particles, batch_size, model, random)
                optimizer.learning_rate.fill_(scheduled_rate(s, progress.epoch - 1 + i / steps, epochs))
                take_step(rows[share], eps[:, share])

                bar.update(batch_size)
                if i % REPORT_EVERY == 0:
                    bar.set_postfix_str(f"{means(totals)['neg_elbo']:.2f} nats", refresh=False)
                    optimizer.check(where)
                if i % REPORT_EVERY == 0 or processes.count == 1:
                    run.leave_if_interrupted()
        optimizer.check(where)
        processes.sum_(totals)
        seconds = time.perf_counter() - started
        achieved = means(validate(objective, validation, fixed_noise, run))
        if achieved["neg_elbo"] < progress.best:
            progress.best, progress.best_epoch = achieved["neg_elbo"], progress.epoch
        progress.seconds += time.perf_counter() - started

        record = {
            "epoch": progress.epoch,
            **{f"train_{name}": value for name, value in means(totals).items()},
            **{f"validation_{name}": value for name, value in achieved.items()},
            "learning_rate": float(optimizer.learning_rate),
            "images_per_second": steps * batch_size / seconds,
            "seconds": time.perf_counter() - started,
            **optimizer.skipped(),
        }
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        processes.on_main(lambda: run.save_epoch(phase, progress, state, record, draw()))
        run.say(describe(where, progress, record))

    model.load_state_dict(run.load_best())
    return progress


def noise(particles: int, count: int, model: Baseline | CVAE, random: torch.Generator) -> Tensor:
    """eps ~ N(0, 1), `[L, B, Z]`, from and on the generator's device."""
    return torch.randn(particles, count, model.latent_dim, generator=random, device=random.device)


def scheduled_rate(s: Settings, epoch: float, epochs: int) -> float:
    """The learning rate at a moment, in epochs: a linear warm-up, then constant, or half a cosine down to zero."""
    if epoch < s.warmup_epochs:
        return s.learning_rate * (epoch + 0.01) / (s.warmup_epochs + 0.01)
    if s.schedule == "constant":
        return s.learning_rate
    return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - s.warmup_epochs) / (epochs - s.warmup_epochs)))


@torch.no_grad()
def validate(objective: Callable[..., Any], images: ImageSet, eps: Tensor, run: Run) -> Tensor:
    """`Terms.sums` over the images, each process taking its share; eps `[L, N, Z]`, the same in every epoch."""
    mine = run.processes.share(len(images))
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    for start in range(mine.start, mine.stop, VALIDATION_BATCH):
        rows = slice(start, min(start + VALIDATION_BATCH, mine.stop))
        with runtime.autocast(run.precision, run.device):
            totals += objective(*images.batch(rows), eps[:, rows]).sums()
    run.processes.sum_(totals)
    return totals


def progress_bar(where: str, total: int, run: Run) -> tqdm:  # type: ignore[type-arg]
    """A bar over the images of an epoch; on a terminal only."""
    hidden = run.quiet or not run.processes.is_main or not sys.stderr.isatty()
    return tqdm(desc=where, total=total, unit="img", unit_scale=True, leave=False, disable=hidden)


def describe(where: str, progress: Progress, record: dict[str, Any]) -> str:
    """One line for an epoch."""
    kl = f" (KL {record['validation_kl']:.2f})" if record["validation_kl"] else ""
    best = ", the best so far" if progress.epoch == progress.best_epoch else ""
    return (
        f"{where}: train {record['train_neg_elbo']:.2f}, validation {record['validation_neg_elbo']:.2f}{kl} nats per image, "
        f"{record['images_per_second']:.0f} images/s, {record['seconds']:.1f} s{best}"
    )


def train_run(run: Run, resume: bool, overwrite: bool) -> None:
    """Train the baseline, then the CVAE on top of it, from wherever the run has come to."""
    s, device = run.settings, run.device
    images, validation_images = load_train(Path(s.data) if s.data else None)
    last = run.claim(resume, overwrite)
    if run.is_finished(last):
        run.say(f"{run.folder} is finished: nothing is left to do")
        return
    run.open_log(last)
    quadrants = Quadrants(s.quadrants, *images.shape[1:])
    train = ImageSet(images[: s.train_limit], quadrants, device)
    validation = ImageSet(validation_images, quadrants, device)
    digits = validation_images[:NUM_DIGITS].to(device)

    torch.manual_seed(runtime.derive_seed(s.seed, "baseline weights"))
    baseline = Baseline(quadrants.num_observed, quadrants.num_pixels, s.hidden).to(device)
    if last.get("phase") != "cvae":
        draw = lambda: draw_rows(completion_rows(digits, quadrants, baseline))  # noqa: E731
        fit("baseline", baseline, train, validation, draw, run, last)

    torch.manual_seed(runtime.derive_seed(s.seed, "cvae weights"))
    cvae = CVAE(baseline, quadrants.num_observed, quadrants.num_pixels, s.hidden, s.latent_dim).to(device)
    if last.get("phase") == "cvae":
        cvae.load_state_dict(last["model"])  # the baseline among it
    for image_set in (train, validation):  # ŷ is computed once: the baseline is frozen now
        image_set.y_hat = torch.cat([baseline.guess(batch.x) for batch in image_set.batches(VALIDATION_BATCH)])
    eps = noise(NUM_SAMPLES, len(digits), cvae, runtime.generator(device, s.seed, "picture"))
    draw = lambda: draw_rows(completion_rows(digits, quadrants, baseline, cvae, eps))  # noqa: E731
    progress = fit("cvae", cvae, train, validation, draw, run, last)
    run.processes.on_main(lambda: run.finish(progress))
    run.say(
        f"{run.folder}: trained in {progress.seconds:.0f} s. Next: python eval.py, tensorboard --logdir {run.folder.parent}"
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the settings that are given on it, by name."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    setting = parser.add_argument_group("settings")

    def add(flag: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")

        def check(word: str) -> Any:
            value = kind(word)
            try:
                replace(default, **{name: (value,) if name == "hidden" else value})
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
            return value

        check.__name__ = kind.__name__
        shown = getattr(default, name)
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        setting.add_argument(flag, type=check, help=f"{text} (default: {shown})", **more)

    add(
        "--quadrants",
        int,
        "how many quadrants are observed: 1, 2 or 3; several numbers make several runs",
        nargs="+",
        metavar="N",
    )
    add("--device", str, "auto, cpu, cuda or cuda:n")
    add("--precision", str, "auto, fp32, bf16 or fp16; auto is fp32 on a CPU, mixed on CUDA")
    add("--epochs", int, "at most so many epochs of the CVAE", metavar="N")
    add("--baseline-epochs", int, "at most so many epochs of the baseline", metavar="N")
    add("--patience", int, "stop after so many epochs without improvement on the validation images", metavar="N")
    add("--batch-size", int, "images per step, over all processes", metavar="N")
    add("--learning-rate", float, "the peak learning rate of Adam", metavar="RATE")
    add("--schedule", str, f"of the learning rate: {' or '.join(SCHEDULES)}")
    add("--warmup-epochs", float, "epochs over which the learning rate grows to its peak", metavar="X")
    add("--hidden", int, "sizes of the hidden layers", nargs="+", metavar="N")
    add("--latent-dim", int, "dimensions of z", metavar="N")
    add("--particles", int, "samples of z per image and step", metavar="L")
    add("--seed", int, "of everything random", metavar="N")
    add("--data", str, "a folder with the four IDX files of another data set; none: the embedded MNIST", metavar="DIR")
    add("--train-limit", int, "use the first N training images only", metavar="N")
    setting.add_argument(
        "--compile", action="store_true", help="torch.compile the model: on a CPU a minute for a tenth"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders are (default: runs)"
    )
    parser.add_argument(
        "--name", default=None, help="of the run folder (default: q1, q2, q3); with several runs -q1, … is added"
    )
    parser.add_argument(
        "--resume", type=Path, default=None, metavar="RUN", help="go on with a run, by its name or folder"
    )
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace an existing run folder")
    parser.add_argument("--quiet", action="store_true", default=False, help="print nothing but errors")
    options = parser.parse_args(argv)
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if "hidden" in given:
        given["hidden"] = tuple(given["hidden"])
    return options, given


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings]]:
    """The runs to make or to go on with: their folders and settings. Raises UsageError or DataError."""
    if options.resume is not None:
        folder = options.resume if options.resume.is_dir() else options.runs / options.resume
        settings = read_settings(folder)
        for name, value in given.items():
            value = value[0] if name == "quadrants" and len(value) == 1 else value
            if name != "epochs" and value != getattr(settings, name):
                raise UsageError(
                    f"{folder} was begun with {name.replace('_', '-')} {getattr(settings, name)}, which cannot change now; leave the flag out"
                )
        return [(folder, replace(settings, epochs=given.get("epochs", settings.epochs)))]
    several = given.pop("quadrants", [1])
    if len(set(several)) != len(several):
        raise UsageError("--quadrants names a number twice")
    names = {k: f"q{k}" if options.name is None else options.name + f"-q{k}" * (len(several) > 1) for k in several}
    if options.name is not None and (Path(options.name).name != options.name or options.name.startswith(".")):
        raise UsageError(f"--name {options.name!r} is no plain name of a folder; --runs says where it is to be")
    return [(options.runs / names[k], Settings(quadrants=k, **given)) for k in several]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, given = parse(argv)
    processes = Processes()
    with runtime.Interruption() as interruption:
        try:
            runs = plan(options, given)
            device = runtime.resolve_device(runs[0][1].device, processes.local_rank)
            runtime.prepare(device)
            processes.connect(device)
            for folder, settings in runs:
                precision = runtime.resolve_precision(settings.precision, device)
                run = Run(folder, settings, device, precision, processes, interruption, options.quiet)
                with run:
                    train_run(run, options.resume is not None, options.overwrite)
        except CvaeError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            processes.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
