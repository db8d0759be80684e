"""The same model in NumPyro and JAX, written anew for comparison, and how fast its training steps are beside ours.

    pip install -e ".[bench]"
    python benchmarks/numpyro_way.py                              # some three minutes on two cores
    python benchmarks/numpyro_way.py --format json
    python benchmarks/numpyro_way.py --rounds 2 --steps 10        # a trial of the script itself
    python benchmarks/numpyro_way.py --python jax/bin/python      # NumPyro is installed there: it needs no PyTorch

Counted are images/s of training steps on MNIST with one quadrant observed, from the images in memory to the updated
weights, for the baseline and for the CVAE. Ours are measured as `speed.py` does it. NumPyro's way is what its own
example of a VAE does: stax networks in a model and a guide, SVI with Adam, and epochs that are compiled as a whole,
`jax.jit` of a `lax.fori_loop` over the steps, whose state is donated; the compilation is not counted. In float32, on
all cores. Hidden layers 500 and 500 with ReLU after He's initialisation, 200 latent dimensions, batch 128. The KL is
sampled (Trace_ELBO), as is NumPyro's default, or with `--elbo mean-field` in closed form (TraceMeanField_ELBO).

Two variants of it are measured, and all sides take turns, each in a process of its own:

same sizes    As ours: images are vectors with the observed pixels first, 196 of them, and the baseline sees these, the
              prior and the recognition network all 784, and logits are computed for the 588 hidden pixels alone.
masked        As the example of a conditional VAE does it: all networks see and predict images of 784 pixels, and a mask
              on the Bernoulli has the hidden ones count alone. The baseline sees −1 in their place.

In both, the frozen baseline's guess has been computed before, as with ours. Exit code 2 if NumPyro is not installed.
"""

if __name__ == "__main__":
    from start import before_torch

    before_torch()

import argparse
import lzma
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from start import ROOT, serve

HIDDEN, LATENT_DIM, SIDE = 500, 200, 28
NUM_VALIDATION = 10_000  # of the 60,000 images: left out, as in our training
LEARNING_RATE = 1e-3
VARIANTS = ("same-sizes", "masked")
ELBOS = ("sampled", "mean-field")


def load_vectors() -> tuple[Any, Any]:
    """The training images uint8 `[N, 784]`, and which pixels are hidden, bool `[784]`: read without PyTorch."""
    with lzma.open(ROOT / "cvae" / "data" / "mnist" / "train-images-idx3-ubyte.xz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIDE * SIDE)
    observed = np.zeros((SIDE, SIDE), bool)
    observed[SIDE // 2 :, : SIDE // 2] = True
    return pixels[:-NUM_VALIDATION], ~observed.flatten()


def numpyro_way(variant: str, elbo: str, batch_size: int) -> Callable[[str, str, int], float]:
    """NumPyro's trainings; gives the seconds that so many steps of a phase take. Raises ImportError without NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from jax import lax, random
    from jax.example_libraries import stax
    from jax.nn.initializers import he_normal
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

    pixels, hidden = load_vectors()
    masked = variant == "masked"
    if not masked:
        pixels = pixels[:, np.argsort(hidden, kind="stable")]  # the observed ones first
    num_pixels, num_observed = len(hidden), int((~hidden).sum())
    num_seen, num_predicted = (num_pixels, num_pixels) if masked else (num_observed, num_pixels - num_observed)
    num_images = len(pixels)
    steps_of_epoch = num_images // batch_size

    def network(outputs: int) -> Any:
        hidden = partial(stax.Dense, HIDDEN, W_init=he_normal())
        return stax.serial(hidden(), stax.Relu, hidden(), stax.Relu, stax.Dense(outputs))

    def seen(images: Any) -> Any:
        """What the baseline sees of images `[B, 784]` in [0, 1]."""
        return jnp.where(hidden, -1.0, images) if masked else images[:, :num_observed]

    def completed(images: Any, guess: Any) -> Any:
        """The observed pixels with a guess of the hidden ones."""
        return jnp.where(hidden, guess, images) if masked else jnp.concatenate([seen(images), guess], -1)

    def observe(logits: Any, images: Any) -> None:
        """The hidden pixels are Bernoulli's with these logits."""
        pixel = dist.Bernoulli(logits=logits, validate_args=False)  # grey levels are outside of its support
        if masked:
            numpyro.sample("y", pixel.mask(hidden).to_event(1), obs=images)
        else:
            numpyro.sample("y", pixel.to_event(1), obs=images[:, num_observed:])

    def gaussian(name: str, images: Any) -> Any:
        parameters = numpyro.module(name, network(2 * LATENT_DIM), (batch_size, num_pixels))(images)
        loc, log_scale = jnp.split(parameters, 2, axis=-1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def baseline_model(images: Any, guess: Any) -> None:
        logits = numpyro.module("baseline", network(num_predicted), (batch_size, num_seen))(seen(images))
        with numpyro.plate("images", batch_size):
            observe(logits, images)

    def cvae_model(images: Any, guess: Any) -> None:
        prior = gaussian("prior", completed(images, guess))
        generation = numpyro.module("generation", network(num_predicted), (batch_size, LATENT_DIM))
        with numpyro.plate("images", batch_size):
            z = numpyro.sample("z", prior)
            observe(generation(z), images)

    def cvae_guide(images: Any, guess: Any) -> None:
        recognition = gaussian("recognition", images)
        with numpyro.plate("images", batch_size):
            numpyro.sample("z", recognition)

    loss = Trace_ELBO() if elbo == "sampled" else TraceMeanField_ELBO()
    data = jax.device_put(pixels)
    parts: dict[str, tuple[Any, Any]] = {
        "baseline": (baseline_model, lambda images, guess: None),  # no latent variables: maximum likelihood
        "cvae": (cvae_model, cvae_guide),
    }

    class PhaseTraining:
        """The training of one phase."""

        def __init__(self, phase: str):
            svi = SVI(*parts[phase], numpyro.optim.Adam(LEARNING_RATE), loss)
            shape = (num_images if phase == "cvae" else 1, num_predicted)
            first = (data[:batch_size] / 255, jnp.zeros((batch_size, num_predicted)))
            self.state = svi.init(random.PRNGKey(0), *first)
            self.guesses = jnp.full(shape, 0.5)  # of an untrained baseline: any will do
            self.key = random.PRNGKey(1)

            @partial(jax.jit, donate_argnums=0)
            def epoch(state: Any, key: Any, data: Any, guesses: Any, steps: int) -> tuple[Any, Any]:
                permutation = random.permutation(key, num_images)

                def step(i: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                    state, total = carry
                    rows = lax.dynamic_slice_in_dim(permutation, i * batch_size, batch_size)
                    guess = guesses[rows] if phase == "cvae" else None
                    state, value = svi.update(state, data[rows] / 255, guess)
                    return state, total + value

                return lax.fori_loop(0, steps, step, (state, 0.0))

            self.epoch = epoch

        def run(self, steps: int) -> None:
            """So many steps."""
            while steps > 0:
                self.key, key = random.split(self.key)
                now = min(steps, steps_of_epoch)
                self.state, total = self.epoch(self.state, key, data, self.guesses, now)
                if not np.isfinite(float(total)):  # waits for the device
                    raise FloatingPointError("NumPyro's loss became NaN: its time says nothing")
                steps -= now

    trainings: dict[str, PhaseTraining] = {}

    def seconds(phase: str, precision: str, steps: int) -> float:
        """In float32, whatever is asked for."""
        if phase not in trainings:
            trainings[phase] = PhaseTraining(phase)
            trainings[phase].run(1)  # compiles
        started = time.perf_counter()
        trainings[phase].run(steps)
        return time.perf_counter() - started

    return seconds


def not_installed() -> str:
    """What to do about it, in one line."""
    return 'numpyro_way.py: NumPyro and JAX are not installed: pip install -e ".[bench]", or pip install numpyro jax'


def worker(python: str | Path, variant: str, elbo: str, batch_size: int) -> Any:
    """NumPyro's trainings in a process of their own, a `common.Worker`."""
    from common import Worker

    flags = ["--serve", variant, "--elbo", elbo, "--batch-size", str(batch_size)]
    return Worker([python, Path(__file__).resolve(), *flags])


def compare(options: argparse.Namespace) -> int:
    """Measure, and print the table."""
    from statistics import median

    from common import DEVICE, PHASES, PRECISION, compared, machine, ours, ready, show, spread, turns

    from cvae import context

    precision = PRECISION if options.precision == "auto" else context.resolve_precision(options.precision, DEVICE)
    on = machine()
    precisions = list(dict.fromkeys((precision, "fp32")))
    theirs = {name: worker(options.python, name, options.elbo, options.batch_size) for name in VARIANTS}
    own = ours(precision, options.batch_size)
    result: dict[str, Any] = {"precision": precision, "numpyro": {name: side.about for name, side in theirs.items()}}
    rows = [["images/s", "ours", *(text for name in VARIANTS for text in (f"NumPyro, {name}", "ratio", "by rounds"))]]
    for phase in PHASES:
        sides = [partial(own, phase, kind, options.steps) for kind in precisions]
        sides += [partial(side, phase, "fp32", options.steps) for side in theirs.values()]
        for kind in precisions:
            ready(own, kind, [phase])
        for side in theirs.values():
            ready(side, "fp32", [phase])
        seconds = turns(options.rounds, *sides)
        speeds = [[options.steps * options.batch_size / s for s in side] for side in seconds]
        for kind, our_speeds in zip(precisions, speeds, strict=False):
            name = phase if kind == precision else f"{phase}_{kind}"
            others = dict(zip(theirs, speeds[len(precisions) :], strict=True))
            against = {other: compared(our_speeds, speed) for other, speed in others.items()}
            result[name] = {"ours": median(our_speeds), "ours_spread": spread(our_speeds), **against}
            cells = [
                text
                for each in against.values()
                for text in (f"{each['speed']:,.0f}", f"{each['ratio']:.2f}", f"{each['ratio_by_rounds']:.2f}")
            ]
            rows.append([name, f"{median(our_speeds):,.0f}", *cells])
    result |= {name: getattr(options, name) for name in ("elbo", "batch_size", "steps", "rounds")} | {"machine": on}
    notes = [
        f"precision {precision} of ours, float32 of NumPyro's ({next(iter(theirs.values())).about}); "
        f"KL of theirs: {options.elbo}",
        f"medians of {options.rounds} rounds of {options.steps} steps at batch {options.batch_size}, the sides in "
        "turn; ratio: of the medians; by rounds: median of the rounds' ratios",
    ]
    show(result, rows, notes, options.format)
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    parser.add_argument("--elbo", choices=ELBOS, default="sampled", help="KL of NumPyro's (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="the type of our products (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="how many, per round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="that has NumPyro (default: the one that runs this)"
    )
    parser.add_argument("--serve", choices=VARIANTS, help="do steps on request, as worker.py does")
    options = parser.parse_args()
    if options.serve is None:
        return compare(options)
    try:
        import jax
        import numpyro
    except ImportError:
        print(not_installed(), file=sys.stderr)
        return 2
    about = f"numpyro {numpyro.__version__}, jax {jax.__version__}"
    serve(numpyro_way(options.serve, options.elbo, options.batch_size), about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
