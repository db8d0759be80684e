"""Train the baseline and then the CVAE to predict the hidden quadrants of images.

    python train.py                                   # one quadrant observed, on MNIST, into runs/q1
    python train.py --quadrants 1 2 3                 # three runs, one after the other: runs/q1, runs/q2, runs/q3
    python train.py --quadrants 1 --device cuda       # each step one CUDA graph
    python train.py --resume q1                       # go on with runs/q1 where it was interrupted
    torchrun --nproc-per-node 2 train.py              # on two processes

Then `tensorboard --logdir runs` shows the learning, and `python eval.py` prints the table.

The baseline is trained first and frozen; the CVAE is trained on top of it. Both go through the same loop, `fit`: AdamW
on −ELBO per image, early stopping on the validation images, the best weights kept. Exit codes: 0 done, 2 usage, 3 data
or checkpoint, 4 loss or gradient not finite, 5 disk, 130 / 143 interrupted by Ctrl-C / SIGTERM.
"""

if __name__ == "__main__":  # until a run's own handlers are in place, Ctrl-C simply ends
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cvae import runtime
from cvae.data.images import ImageSet
from cvae.data.masks import Quadrants
from cvae.data.sources import load_train
from cvae.distributed import Processes
from cvae.errors import CvaeError, PeerLost, UsageError
from cvae.model.networks import CVAE, Baseline
from cvae.model.objectives import means
from cvae.report.figures import completion_rows, draw_rows
from cvae.run.folder import read_precision, read_settings, refuse_existing
from cvae.run.session import Progress, Run
from cvae.settings import Settings
from cvae.training.gradients import Gradients, by_autograd, by_hand
from cvae.training.optimizer import GuardedAdam
from cvae.training.weights import WeightAverage, Weights

REPORT_EVERY = 50  # steps between two looks at the device: the bar's loss, the gradients' health, the other processes
VALIDATION_BATCH = 1000
NUM_DIGITS, NUM_SAMPLES = 10, 5  # of each epoch's picture


def fit(
    phase: str, model: Baseline | CVAE, train: ImageSet, validation: ImageSet, draw: Callable[[Any], Tensor],
    run: Run, last: dict[str, Any],
) -> Progress:  # fmt: skip
    """Train a model on −ELBO per image until it stops improving, and leave it with its best weights.

    phase: "baseline" or "cvae". draw: makes the picture of a model. last: a checkpoint to go on from, if of this phase.

    An epoch is a fresh permutation of the images, cut into full batches; the few images left over sit this epoch out.
    All randomness comes from (seed, phase, epoch) and is the same for any number of processes: each draws the noise of
    the whole batch, and takes its share.
    """
    s, device, processes = run.settings, run.device, run.processes
    epochs = s.baseline_epochs if phase == "baseline" else s.epochs
    batch_size = min(s.batch_size, len(train))
    share = processes.share_of_batch(batch_size)
    steps = len(train) // batch_size

    weights = Weights(model.parameters(), None if s.compile else runtime.HALF.get(run.precision))
    average = WeightAverage(model, weights, s.average)  # what is validated and kept
    optimizer = GuardedAdam(weights, s.learning_rate, s.weight_decay, loss_scaling=run.precision == "fp16")
    progress = Progress()
    if last.get("phase") == phase:
        progress = run.restore(last, model, average.model, optimizer)

    gradients = by_autograd(torch.compile(model), optimizer, run.precision) if s.compile else by_hand(model, optimizer)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch's log-likelihoods, KLs and images
    fixed_noise = noise(s.particles, len(validation), model, runtime.generator(device, s.seed, "validation"))

    step = partial(training_step, gradients, train, optimizer, totals, batch_size, processes)
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
                average.update((progress.epoch - 1) * steps + i, last=i == steps - 1)

                bar.update(batch_size)
                if i % REPORT_EVERY == 0:
                    bar.set_postfix_str(f"{means(totals)['neg_elbo']:.2f} nats", refresh=False)
                    optimizer.check(where)
                if i % REPORT_EVERY == 0 or processes.count == 1:
                    run.leave_if_interrupted()
        optimizer.check(where)
        processes.sum_(totals)
        seconds = time.perf_counter() - started
        achieved = means(validate(average.model, validation, fixed_noise, run))
        if achieved["neg_elbo"] < progress.best:
            progress.best, progress.best_epoch = achieved["neg_elbo"], progress.epoch
        progress.seconds += time.perf_counter() - started

        record = {
            "epoch": progress.epoch,
            **named("train", means(totals), model),
            **named("validation", achieved, model),
            "learning_rate": float(optimizer.learning_rate),
            "images_per_second": steps * batch_size / seconds,
            "seconds": time.perf_counter() - started,
            **optimizer.skipped(),
        }
        state = {
            "model": model.state_dict(),
            "average": average.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        processes.on_main(partial(run.save_epoch, phase, progress, state, record, partial(draw, average.model)))
        best = ", the best so far" if progress.epoch == progress.best_epoch else ""
        run.say(
            f"{where}: train {means(totals)['neg_elbo']:.2f}, validation {achieved['neg_elbo']:.2f} nats per image, "
            f"{record['images_per_second']:.0f} images/s, {record['seconds']:.1f} s{best}"
        )

    run.load_best(phase, progress, model)
    model.zero_grad()  # frees the memory of the gradients
    return progress


def training_step(
    gradients: Gradients, images: ImageSet, optimizer: GuardedAdam, totals: Tensor, batch_size: int,
    processes: Processes, rows: Tensor, eps: Tensor,
) -> None:  # fmt: skip
    """One step of Adam on −ELBO per image of a batch, of which `rows` are this process's share; adds to the totals.

    Nothing in it waits for the device, and all its results are updated in place: it can be captured in a CUDA graph.
    """
    terms = gradients(images.batch(rows), eps, optimizer.loss_scale / batch_size)
    loss = -terms.elbo.sum() / batch_size
    processes.sum_(optimizer.gradient, loss)
    accepted = optimizer.step(loss)
    totals.add_(torch.where(accepted, terms.sums(), 0.0))


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
def validate(model: Baseline | CVAE, images: ImageSet, eps: Tensor, run: Run) -> Tensor:
    """`Terms.sums` over the images, each process taking its share, in the training's precision.

    eps `[L, N, Z]`: the noise, the same in every epoch.
    """
    mine = run.processes.share(len(images))
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    for start in range(mine.start, mine.stop, VALIDATION_BATCH):
        rows = slice(start, min(start + VALIDATION_BATCH, mine.stop))
        with runtime.autocast(run.precision, run.device):
            totals += model(*images.batch(rows), eps[:, rows]).sums()
    run.processes.sum_(totals)
    return totals


def progress_bar(where: str, total: int, run: Run) -> Any:
    """A bar over the images of an epoch; on a terminal only."""
    hidden = run.quiet or not run.processes.is_main or not sys.stderr.isatty()
    return tqdm(desc=where, total=total, unit="img", unit_scale=True, leave=False, disable=hidden)


def named(part: str, values: dict[str, float], model: Baseline | CVAE) -> dict[str, float]:
    """The means under the names of the log; without a z, all there is to say is the negative log-likelihood."""
    return {
        f"{part}_{name}": value for name, value in (values if model.latent_dim else {"nll": values["neg_elbo"]}).items()
    }


def train_run(run: Run, resume: bool, overwrite: bool) -> None:
    """Train the baseline, then the CVAE on top of it, from wherever the run has come to."""
    s, device = run.settings, run.device
    images, validation_images = load_train(Path(s.data) if s.data else None)
    run.processes.share_of_batch(min(s.batch_size, len(images[: s.train_limit])))  # refused before a folder is made
    last = run.claim(resume, overwrite)
    if run.is_finished(last):
        run.say(f"{run.folder} is finished: nothing is left to do")
        return
    run.open_log(last)
    quadrants = Quadrants(s.quadrants, *images.shape[1:])
    train = ImageSet(images[: s.train_limit], quadrants, device)
    validation = ImageSet(validation_images, quadrants, device)
    digits = validation_images[:NUM_DIGITS].clone().to(device)
    del images, validation_images  # the image sets hold all that is needed

    def draw(eps: Tensor | None, model: Baseline | CVAE) -> Tensor:
        return draw_rows(completion_rows(digits, quadrants, model, eps))

    torch.manual_seed(runtime.derive_seed(s.seed, "baseline weights"))
    baseline = Baseline(quadrants.num_observed, quadrants.num_pixels, s.hidden).to(device)
    if last.get("phase") != "cvae":
        fit("baseline", baseline, train, validation, partial(draw, None), run, last)

    torch.manual_seed(runtime.derive_seed(s.seed, "cvae weights"))
    cvae = CVAE(baseline, quadrants.num_observed, quadrants.num_pixels, s.hidden, s.latent_dim).to(device)
    if last.get("phase") == "cvae":
        run.load_last(last, cvae)  # the baseline among it
    for image_set in (train, validation):  # ŷ is computed once: the baseline is frozen now
        image_set.set_guesses(baseline.guess, runtime.HALF.get(run.precision))
    eps = noise(NUM_SAMPLES, len(digits), cvae, runtime.generator(device, s.seed, "picture"))
    progress = fit("cvae", cvae, train, validation, partial(draw, eps), run, last)
    run.processes.on_main(lambda: run.finish(progress))
    run.say(f"{run.folder}: trained. Next: python eval.py, or tensorboard --logdir {run.folder.parent}")


FLAGS = {  # the settings, as flags of the same names
    "quadrants": (int, "how many quadrants are observed, 1, 2 or 3; several numbers make several runs"),
    "device": (str, "auto, cpu, cuda or cuda:n"),
    "precision": (str, "fp32, bf16, fp16, or auto: bf16 where it is native, else fp16 on CUDA and fp32 on a CPU"),
    "epochs": (int, "at most so many epochs of the CVAE"),
    "baseline_epochs": (int, "at most so many epochs of the baseline"),
    "patience": (int, "stop after so many epochs without improvement on the validation images"),
    "batch_size": (int, "images per step, over all processes"),
    "learning_rate": (float, "the highest learning rate of Adam"),
    "schedule": (str, "of the learning rate after the warm-up, cosine or constant"),
    "warmup_epochs": (float, "epochs in which the learning rate grows to its highest"),
    "weight_decay": (float, "of AdamW: a step takes this share of the weights, times the learning rate, off them"),
    "average": (int, "keep an average of the weights over about so many steps; 0: the last ones"),
    "hidden": (int, "sizes of the hidden layers"),
    "latent_dim": (int, "dimensions of z"),
    "particles": (int, "samples of z per image and step"),
    "seed": (int, "of everything random"),
    "data": (str, "a folder with the four IDX files of another data set"),
    "train_limit": (int, "use the first so many training images only"),
}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the settings given on it, by name; `quadrants` is a list still."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = parser.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    for name, (kind, text) in FLAGS.items():
        default = getattr(Settings(), name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        settings.add_argument(
            "--" + name.replace("_", "-"), type=kind, nargs="+" if name in ("quadrants", "hidden") else None,
            metavar={int: "N", float: "X"}.get(kind, "NAME"), help=f"{text} (default: {shown})",
        )  # fmt: skip
    settings.add_argument("--compile", action="store_true", help="torch.compile the networks; on a CPU seldom worth it")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="the folder of runs (default: runs)"
    )
    parser.add_argument("--name", help="of the run's folder (default: q1, q2 or q3; of several runs, -q1, … is added)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run, given by its name or folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run's folder if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(argv)
    if options.resume is not None and (options.name is not None or options.overwrite):
        parser.error("--resume goes on with a run as it is: leave --name and --overwrite out")

    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    if "hidden" in given:
        given["hidden"] = tuple(given["hidden"])
    if "data" in given:
        given["data"] = str(Path(given["data"]).resolve())
    try:
        for quadrants in given.get("quadrants", [1]):
            Settings(**{**given, "quadrants": quadrants})
    except ValueError as error:
        parser.error(str(error))
    return options, given


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[tuple[Path, Settings]]:
    """The runs to make or to go on with: their folders and settings. Raises UsageError or DataError."""
    quadrants = given.pop("quadrants", None)
    if options.resume is not None:
        folder = options.resume if os.path.isdir(options.resume) else options.runs / options.resume
        settings = read_settings(folder)
        wanted = (
            given if quadrants is None else given | {"quadrants": quadrants[0] if len(quadrants) == 1 else quadrants}
        )
        for name, value in wanted.items():
            if name != "epochs" and value != getattr(settings, name):
                flag, own = "--" + name.replace("_", "-"), getattr(settings, name)
                raise UsageError(f"{folder} was begun with {flag} {own}, which cannot change now; leave the flag out")
        return [(folder, replace(settings, epochs=given.get("epochs", settings.epochs)))]

    quadrants = quadrants or [Settings.quadrants]
    if len(set(quadrants)) < len(quadrants):
        raise UsageError("--quadrants names a number twice")
    name = options.name
    if name is not None and (not name or name.startswith(".") or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not the plain name of a folder; --runs says where it is to be")
    suffixes = [f"-q{k}" if len(quadrants) > 1 else "" for k in quadrants]
    names = [f"q{k}" if name is None else name + suffix for k, suffix in zip(quadrants, suffixes, strict=True)]
    return [(options.runs / name, Settings(quadrants=k, **given)) for name, k in zip(names, quadrants, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, given = parse(argv)
    processes = Processes()
    with runtime.Interruption() as interruption:
        try:
            runs = plan(options, given)
            device = runtime.resolve_device(runs[0][1].device, processes.local_rank, processes.local_count)
            runtime.prepare(device)
            processes.connect(device)
            for folder, _ in runs if options.resume is None else []:  # before the first one is begun
                processes.on_main(partial(refuse_existing, folder, options.overwrite))
            for folder, settings in runs:
                wanted = settings.precision if options.resume is None else read_precision(folder)
                precision = processes.on_main(partial(runtime.resolve_precision, wanted, device))
                with Run(folder, settings, device, precision, processes, interruption, options.quiet) as run:
                    train_run(run, options.resume is not None, options.overwrite)
        except CvaeError as error:
            if processes.is_main or isinstance(error, PeerLost):
                print(f"train.py: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            processes.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
