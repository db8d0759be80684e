"""Train the baseline and then the CVAE to predict the hidden quadrants of images.

    python train.py                                   # one quadrant observed, on MNIST, into runs/q1
    python train.py --quadrants 1 2 3                 # three runs, one after the other: runs/q1, runs/q2, runs/q3
    python train.py --quadrants 1 --device cuda       # each step one CUDA graph
    python train.py --network paper --objective iwae --particles 5 --name iwae
    python train.py --resume q1                       # go on with runs/q1 where it was interrupted
    torchrun --nproc-per-node 2 train.py              # on two processes

Then `tensorboard --logdir runs` shows the learning, and `python eval.py` prints the table.

The baseline is trained first and frozen; the CVAE is trained on top of it. Both go through the same loop, `fit`: AdamW
on minus the objective per image, early stopping on the validation images, the best weights kept. Exit codes: 0 done,
1 another process of the job has ended, 2 usage, 3 data or checkpoint, 4 loss or gradient not finite, 5 disk,
130 / 143 interrupted by Ctrl-C / SIGTERM.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cvae.console import Bar, called, command, say, silence
from cvae.context import Context, Interruption, generator, opened, permutation, seed_dropout
from cvae.data.sources import TrainImages, load_train
from cvae.data.tasks import ImageSet
from cvae.model.cvae import noise
from cvae.model.likelihood import active_units
from cvae.model.objectives import Totals, by_level, log_likelihood, maximised, objective, with_free_nats
from cvae.report.figures import completions
from cvae.report.replay import draw_all
from cvae.run.folder import Progress, find_run, quoted, refuse_existing
from cvae.run.plan import parse, plan
from cvae.run.session import Run
from cvae.settings import Settings
from cvae.training.graphed import GraphedStep
from cvae.training.optimizer import GuardedAdam, WeightAverage
from cvae.training.phase import Phase

REPORT_EVERY = 50  # steps between two looks at the device: the bar's loss, the gradients' health, the other processes
NUM_DIGITS, NUM_SAMPLES = 10, 5  # of each epoch's picture


class Step:
    """One step of AdamW on the loss, minus the objective per image; `totals` are the sums of its terms in an epoch.

    Nothing in it waits for the device, and all its results are updated in place: it can be captured in a CUDA graph.
    """

    def __init__(self, phase: Phase, s: Settings, context: Context):
        self.context, self.images, self.model, self.objective = context, phase.train, phase.model, phase.objective
        self.average = WeightAverage(phase.model, s.average)
        fp16 = context.half == torch.float16
        self.optimizer = GuardedAdam(phase.model, s.learning_rate, s.weight_decay, loss_scaling=fp16, clip=s.clip)
        self.batch_size = min(s.batch_size, len(phase.train))
        self.count = len(phase.train) // self.batch_size  # of an epoch
        self.totals = Totals(context.device)
        self.free_nats = torch.zeros((), device=context.device) if phase.free_nats(s, 0.0) else None

    def __call__(self, rows: Tensor, *eps: Tensor) -> None:
        """Take the step; rows: this process's images of the batch, int64 `[B]`; eps: the noise for them."""
        batch = self.images.batch(rows)
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        with self.context.autocast():
            terms = self.objective(self.model, batch, *eps)  # draws z; nats per image, by name
        loss = with_free_nats(terms, self.free_nats).sum() / -self.batch_size
        self.optimizer.scaled(loss).backward()
        loss, gradients = loss.detach(), self.optimizer.gradients()
        self.context.processes.sum_(loss, *gradients)
        skipped = self.optimizer.step(loss, gradients)
        self.totals.add(terms, skipped)


def fit(phase: Phase, run: Run, last: dict[str, Any]) -> Progress:
    """Train a model until its objective stops improving, and leave it with its best weights.

    last: a checkpoint to go on from, if it is of this phase.
    """
    s, context, processes = run.settings, run.context, run.context.processes
    step, progress = Step(phase, s, context), Progress()
    average, optimizer = step.average, step.optimizer
    parts: dict[str, Any] = {"model": phase.model, "average": average.model, "optimizer": optimizer}
    if last.get("phase") == phase.name:
        progress = run.restore(last, parts)
    graphed = context.device.type == "cuda" and processes.count == 1
    take_step = GraphedStep(step, run.warn) if graphed else step

    while not progress.is_over(phase.epochs, s.patience, phase.unbent(s)):
        started = time.perf_counter()
        progress.epoch += 1
        train_epoch(phase, run, step, take_step, progress.epoch)
        processes.sum_on_host_(step.totals.sums)
        processes.average_(*phase.model.buffers(), *average.model.buffers())
        seconds = time.perf_counter() - started
        with Bar(f"{phase.name}, validation", len(phase.validation) // processes.count, "img") as bar:
            totals = phase.validate(average.model, s.seed, context, bar.update)
        train, validation = step.totals.means(), totals.means()
        if "kl" in validation:
            units = active_units(average.model, phase.validation, s.seed, context)
            validation |= by_level("active_units", [float(active) for active, _ in units])
        train_loss, validation_loss = -maximised(train), -maximised(validation)
        if validation_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = validation_loss, progress.epoch
        progress.seconds += time.perf_counter() - started

        record = {
            "epoch": progress.epoch,
            **{f"train_{name}": mean for name, mean in train.items()},
            **{f"validation_{name}": mean for name, mean in validation.items()},
            "learning_rate": float(optimizer.learning_rate),
            "images_per_second": step.count * step.batch_size / seconds,
            "seconds": time.perf_counter() - started,
            **optimizer.skipped(),
        }
        run.save_epoch(phase, progress, parts, record)
        best = ", the best so far" if progress.epoch == progress.best_epoch else ""
        say(
            f"{phase.where(progress.epoch)}: loss {train_loss:.2f}, on validation images {validation_loss:.2f} "
            f"nats per image, {record['images_per_second']:.0f} images/s, {record['seconds']:.1f} s{best}"
        )

    run.load_best(phase.name, progress, phase.model)
    return progress


def train_epoch(phase: Phase, run: Run, step: Step, take_step: Callable[..., None], epoch: int) -> None:
    """One epoch: a fresh permutation of the images, cut into full batches; the few images left over are not used in it.

    All randomness comes from (seed, phase, epoch) and is the same for any number of processes: each draws the noise of
    the whole batch, and takes its share.
    """
    s, context, optimizer, size = run.settings, run.context, step.optimizer, step.batch_size
    steps, share = step.count, context.processes.share_of_batch(size)
    where = phase.where(epoch)
    random = generator(context.device, s.seed, phase.name, epoch)
    order = permutation(len(step.images), s.seed, phase.name, epoch).to(context.device)
    seed_dropout(s.seed, phase.name, epoch, context.processes.rank)
    step.model.train()
    binary, bend = s.targets == "binary", phase.bend(s, epoch)
    if binary or phase.bend(s, 0) or step.images.task.is_random:  # also in last epochs, without bent images
        with Bar(f"{where}, its images", len(step.images), "img") as bar:
            step.images.redraw(s.seed, phase.name, epoch, binary=binary, bend=bend, done=bar.update)
    optimizer.start_epoch()
    step.totals.sums.zero_()
    with Bar(where, steps * size, "img") as bar:
        for i, rows in enumerate(order[: steps * size].view(steps, size)[:, share]):
            eps = phase.noise(size, random)
            now = epoch - 1 + i / steps
            optimizer.learning_rate.fill_(phase.learning_rate(s, now))
            if step.free_nats is not None:
                step.free_nats.fill_(phase.free_nats(s, now))
            take_step(rows, *(each[:, share] for each in eps))
            step.average.update((epoch - 1) * steps + i, last=i == steps - 1)
            bar.update(size)
            if i % REPORT_EVERY == 0:
                bar.set_postfix_str(f"loss {-maximised(step.totals.means()):.2f}", refresh=False)
                optimizer.check(where)
            if i % REPORT_EVERY == 0 or context.processes.count == 1:
                run.leave_if_interrupted()
    optimizer.check(where)


def train_run(run: Run, load: Callable[[], TrainImages]) -> None:
    """Train the baseline, then the CVAE on top of it, from wherever the run has come to."""
    s, context = run.settings, run.context
    images, held_out, _, record = run.load_images(load)
    cvae, last = run.open(record)
    if last is None:
        return
    task = cvae.task
    train, validation = (ImageSet(part, task, context.device) for part in (images, held_out))
    digits = held_out[:NUM_DIGITS].clone()
    del images, held_out  # the image sets hold all that is needed
    x = ImageSet(digits, task, context.device).batch(slice(None)).x
    baseline = cvae.to(context.device).baseline_net
    if last.get("phase") != "cvae":  # else its weights are among the CVAE's
        phase = Phase(
            "baseline", baseline.requires_grad_(True), log_likelihood, s.baseline_epochs, train, validation, samples=0,
            noise=lambda *_: (),
            picture=lambda model: completions(digits, task, model(x).sigmoid()),
        )  # fmt: skip
        fit(phase, run, last)
        baseline.requires_grad_(False)
    baseline.eval()
    for image_set in (train, validation):  # its guesses are computed once: it is frozen now
        image_set.set_guesses(baseline, context.half)

    eps = noise(NUM_SAMPLES, len(digits), cvae, generator(context.device, s.seed, "picture"))
    phase = Phase(
        "cvae", cvae, objective(s), s.epochs, train, validation, samples=s.particles,
        noise=lambda count, random: (noise(s.particles, count, cvae, random),),
        picture=lambda model: completions(digits, task, baseline(x).sigmoid(), model.completions(x, eps)),
    )  # fmt: skip
    progress = fit(phase, run, last)
    run.finish(progress, draw_all)
    say(f"{run.folder}: trained. Next: {called('eval.py')}, or tensorboard --logdir {quoted(run.folder.parent)}")


@command("train.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, given = parse(argv, __doc__)
    resume, init = options.resume is not None, options.init and find_run(options.init, options.runs)
    with Interruption() as interruption:
        runs = plan(options, given)
        with opened(runs[0][1].device) as context, silence(options.quiet or not context.processes.is_main):
            for folder, *_ in () if resume else runs:  # before the first one is begun
                context.processes.on_main(partial(refuse_existing, folder, options.overwrite))
            read = partial(load_train, runs[0][1])
            load = cache(read) if len(runs) > 1 else read  # several runs differ in what is observed alone
            for folder, s, precision in runs:
                here = context.with_precision(precision)
                with Run(folder, s, here, interruption, resume, options.overwrite, init, options.words) as run:
                    train_run(run, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
