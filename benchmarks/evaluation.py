"""How fast importance sampling of log p(y|x) is: ours, and Pyro's way.

    python benchmarks/evaluation.py                   # of runs/q1, a finished run; some three minutes on two cores
    python benchmarks/evaluation.py --run runs/q3 --format json

Counted are images × samples of z per second, at S = 100 samples per image, from stored images to nats per image.
Ours is the importance sampling of `cvae/model/likelihood.py`, as `eval.py` prints it, without the table's other rows.
Pyro's way is RenyiELBO with α = 0 and S vectorized particles on the tutorial's model and guide (`tutorial.py`) with the
same weights; α = 0 makes it the same estimator. It is measured twice: with the tutorial's batches of 128 images, to
which `ratio` refers, and with the batch size that suits it best (`--pyro-batch`; of 10, 25, 50 and 128 it was 25).
Pyro has a process of its own, since this one has our settings of memory and denormals. The sides take turns; medians
of the rounds are given.

The images are validation images: eval.py alone measures on the test images. The noise differs, so the two means
differ by chance: their difference is given with its own standard error, over portions of the images, and the two
agree when it is within three of those. Both see the same images, so that is a far sharper test than the standard
errors of the two means, printed beside them.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
import tutorial
from common import DEVICE, OtherProcess, arguments, count, machine, show, spread, turns
from pyro.infer import RenyiELBO
from start import ROOT
from torch import Tensor

from cvae import context
from cvae.data.images import ImageSet
from cvae.data.sources import load_train
from cvae.errors import CvaeError
from cvae.model import likelihood
from cvae.model.cvae import CVAE
from cvae.model.networks import Tutorial
from cvae.model.objectives import log_mean_exp
from cvae.run.folder import read_settings
from cvae.run.load import load

TUTORIAL_BATCH = 128


def load_run(folder: Path, count: int) -> tuple[CVAE, int, Tensor]:
    """The model of a run, its number of quadrants, and validation images uint8 `[count, height, width]`."""
    settings = read_settings(folder)
    images = load_train(settings).validation
    return load(folder, DEVICE), settings.quadrants, images[:count]


@torch.inference_mode()
def ours(cvae: CVAE, images: ImageSet, samples: int, seed: int) -> Tensor:
    """−log p(y|x) by importance sampling, nats `[N]` float64: that part of `likelihood.evaluate` alone."""
    values = []
    for start in range(0, len(images), likelihood.IMAGES_AT_ONCE):
        batch = images.batch(slice(start, start + likelihood.IMAGES_AT_ONCE))
        batch = batch._replace(guess=cvae.baseline_net(batch.x))
        random = context.generator(DEVICE, seed, "evaluation", start)
        draws = (cvae.from_posterior(*batch, eps) for eps in likelihood.portions(samples, batch, cvae, random))
        values.append(-log_mean_exp(torch.cat([draw.log_weights(batch.y) for draw in draws]).double()))
    return torch.cat(values)


def pyro_way(folder: Path, num_images: int, samples: int) -> Callable[[int], tuple[float, Tensor]]:
    """What estimates the same by RenyiELBO, in batches of a size; gives its seconds and the sums of the batches."""
    cvae, num_quadrants, images = load_run(folder, num_images)
    pyro.clear_param_store()
    torch.manual_seed(0)
    net = as_tutorial(cvae)
    objective = RenyiELBO(alpha=0, num_particles=samples, vectorize_particles=True, max_plate_nesting=1)

    def measure(batch_size: int) -> tuple[float, Tensor]:
        sums: list[float] = []
        started = time.perf_counter()
        for batch in tutorial.batches(images, num_quadrants, batch_size, shuffle=False):
            sums.append(objective.loss(net.model, net.guide, batch["input"], batch["output"]))
        return time.perf_counter() - started, torch.tensor(sums, dtype=torch.float64)

    return measure


def as_tutorial(cvae: CVAE) -> tutorial.PyroCVAE:
    """The tutorial's model with the weights of ours, its pixels in raster order. Raises SystemExit for other layers."""
    if type(cvae) is not Tutorial or len(cvae.generation_net.layers) != 3:
        sys.exit("the tutorial's networks have two hidden layers; this run's are others")
    split, state = cvae.split, cvae.state_dict()
    hidden = [state[f"baseline_net.layers.{i}.bias"].shape[1] for i in (0, 1)]
    net = tutorial.PyroCVAE(tutorial.BaselineNet(split.num_pixels, *hidden), *hidden, cvae.latent_dim)
    observed, hidden_pixels = split.order.split([split.num_observed, split.num_hidden])

    def spread(weights: Tensor, places: Tensor, dimension: int) -> Tensor:
        """The weights at the places of their pixels, and zeros at those of pixels that our networks leave out."""
        shape = [split.num_pixels if i == dimension else n for i, n in enumerate(weights.shape)]
        return torch.zeros(shape).index_copy_(dimension, places, weights)

    def copy(layer: torch.nn.Linear, weight: Tensor, bias: Tensor) -> None:
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)

    parts = {  # of the tutorial's: ours, the number of its copy, and the pixels that it sees
        "baseline_net": ("baseline_net", 0, observed),
        "prior_net": ("encoders", Tutorial.PRIOR, split.order),
        "recognition_net": ("encoders", Tutorial.RECOGNITION, split.order),
        "generation_net": ("generation_net", 0, None),
    }
    for name, (ours, number, seen) in parts.items():
        theirs = getattr(net, name)
        weights, biases = (
            [state[f"{ours}.layers.{i}.{kind}"][number] for i in (0, 1, 2)] for kind in ("weight", "bias")
        )
        if seen is not None:
            weights[0] = spread(weights[0], seen, 1)
        copy(theirs.layer_1, weights[0], biases[0])
        copy(theirs.layer_2, weights[1], biases[1])
        if isinstance(theirs, tutorial.Encoder):
            copy(theirs.loc, weights[2].chunk(2)[0], biases[2].chunk(2)[0])
            copy(theirs.log_scale, weights[2].chunk(2)[1], biases[2].chunk(2)[1])
        else:
            copy(theirs.layer_3, spread(weights[2], hidden_pixels, 0), spread(biases[2], hidden_pixels, 0))
    return net


def mean_and_error(sums: Tensor, sizes: Tensor) -> dict[str, float]:
    """The mean per image, from sums over portions of these sizes, and its standard error over the portions."""
    mean = sums.sum() / sizes.sum()
    squares = (sums - mean * sizes).square().sum().item()
    return {"mean": mean.item(), "stderr": math.sqrt(squares * len(sums) / max(len(sums) - 1, 1)) / sizes.sum().item()}


def compare(values: Tensor, pyro_sums: Tensor, batch_size: int) -> dict[str, dict[str, float]]:
    """Means and errors of ours `[N]`, of Pyro's sums over batches, and of their difference."""
    portions = values.split(batch_size)
    sizes = torch.tensor([len(portion) for portion in portions], dtype=torch.float64)
    our_sums = torch.stack([portion.sum() for portion in portions])
    return {
        "ours": mean_and_error(values, torch.ones_like(values)),
        "pyro": mean_and_error(pyro_sums, sizes),
        "difference": mean_and_error(our_sums - pyro_sums, sizes),
    }


def main() -> int:
    """Run the command line; returns 1 if the two do not agree, 3 if the run cannot be read."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "q1", help="a finished run (default: runs/q1)")
    parser.add_argument("--samples", type=count, default=100, metavar="S", help="per image (default: %(default)s)")
    parser.add_argument("--images", type=count, default=1280, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--pyro-batch", type=count, default=25, metavar="N", help="images (default: %(default)s)")
    options = parser.parse_args()
    on = machine()
    context.prepare(DEVICE)
    try:
        cvae, _, images = load_run(options.run, options.images)
    except CvaeError as error:
        print(f"evaluation.py: {error}", file=sys.stderr)
        return error.exit_code
    image_set = ImageSet(images, cvae.split)
    their_turn = OtherProcess(pyro_way, options.run, options.images, options.samples)
    our_values: list[Tensor] = []
    pyro_sums: list[Tensor] = []

    def our_turn() -> float:
        started = time.perf_counter()
        our_values.append(ours(cvae, image_set, options.samples, seed=len(our_values)))
        return time.perf_counter() - started

    def pyro_turn() -> float:
        return their_turn(TUTORIAL_BATCH)[0]

    def best_pyro_turn() -> float:
        seconds, sums = their_turn(options.pyro_batch)
        pyro_sums.append(sums)
        return seconds

    sides = {"ours": our_turn, "pyro": pyro_turn, "pyro_best_batch": best_pyro_turn}
    for warm_up in sides.values():
        warm_up()
    work = len(images) * options.samples
    speeds = {
        name: [work / seconds for seconds in side]
        for name, side in zip(sides, turns(options.rounds, *sides.values()), strict=True)
    }
    rates = {name: median(speed) for name, speed in speeds.items()}

    # The values of all rounds count: each has its own noise.
    nll = compare(torch.stack(our_values).mean(0), torch.stack(pyro_sums).mean(0), options.pyro_batch)
    agree = abs(nll["difference"]["mean"]) <= 3 * nll["difference"]["stderr"]
    result: dict[str, Any] = {
        **rates,
        "ratio": rates["ours"] / rates["pyro"],
        "ratio_best_batch": rates["ours"] / rates["pyro_best_batch"],
        "spread": {name: spread(speed) for name, speed in speeds.items()},
        "nll": nll,
        "agree": agree,
        "samples": options.samples,
        "images": len(images),
        "rounds": options.rounds,
        "batch": {"pyro": TUTORIAL_BATCH, "pyro_best_batch": options.pyro_batch},
        "run": str(options.run),
        "machine": on,
    }

    def nats(name: str, form: str = ".3f") -> list[str]:
        return [format(nll[name][key], form) for key in ("mean", "stderr")]

    rows = [
        ["", "images × samples / s", "ours ÷ this", "nats per image", "± standard error"],
        ["ours", f"{rates['ours']:,.0f}", "", *nats("ours")],
        [f"Pyro, batch {TUTORIAL_BATCH}", f"{rates['pyro']:,.0f}", f"{result['ratio']:.1f}", "", ""],
        [
            f"Pyro, batch {options.pyro_batch}",
            f"{rates['pyro_best_batch']:,.0f}",
            f"{result['ratio_best_batch']:.1f}",
            *nats("pyro"),
        ],
        ["ours − Pyro's", "", "", *nats("difference", ".4f")],
    ]
    notes = [
        f"the values {'agree' if agree else 'DO NOT AGREE'} within three standard errors of their difference",
        f"medians of {options.rounds} rounds over {len(images)} validation images at S = {options.samples}, in turn",
    ]
    show(result, rows, notes, options.format)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
