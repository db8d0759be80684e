"""The same model in NumPyro and JAX, written anew for comparison: a side of `speed.py --numpyro`.

    pip install -e ".[bench]"
    echo "cvae fp32 100" | python benchmarks/numpyro_way.py       # the seconds of 100 steps

NumPyro's way is what its own example of a VAE does: stax networks in a model and a guide, SVI with Adam and a sampled
KL (Trace_ELBO), and epochs that are compiled as a whole, `jax.jit` of a `lax.fori_loop` over the steps, whose state is
donated; the compilation is not counted. In float32, on all cores. The sizes are ours: vectors with the observed pixels
first, 196 of them, logits for the 588 hidden ones alone, hidden layers 500 and 500 with ReLU after He's initialisation,
200 latent dimensions. The frozen baseline's guess has been computed before, as with ours. It needs no PyTorch, so that
`speed.py --python` can name another environment. Exit code 2 if NumPyro is not installed.
"""

import argparse
import lzma
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Worker, serve
from start import ROOT

HIDDEN, LATENT_DIM, SIDE = 500, 200, 28
NUM_VALIDATION = 10_000  # of the 60,000 images: left out, as in our training
LEARNING_RATE = 1e-3


def load_vectors() -> tuple[Any, Any]:
    """Return the training images uint8 `[N, 784]`, and which pixels are hidden, bool `[784]`: read without PyTorch."""
    with lzma.open(ROOT / "cvae" / "data" / "mnist" / "train-images-idx3-ubyte.xz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIDE * SIDE)
    observed = np.zeros((SIDE, SIDE), bool)
    observed[SIDE // 2 :, : SIDE // 2] = True
    return pixels[:-NUM_VALIDATION], ~observed.flatten()


def numpyro_way(batch_size: int) -> Callable[[str, str, int], float]:
    """Return what does so many steps of a phase and returns their seconds. Raises ImportError without NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from jax import lax, random
    from jax.example_libraries import stax
    from jax.nn.initializers import he_normal
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    pixels, hidden = load_vectors()
    pixels = pixels[:, np.argsort(hidden, kind="stable")]  # the observed ones first
    num_pixels, num_observed = len(hidden), int((~hidden).sum())
    num_predicted = num_pixels - num_observed
    num_images = len(pixels)
    steps_of_epoch = num_images // batch_size

    def network(outputs: int) -> Any:
        hidden = partial(stax.Dense, HIDDEN, W_init=he_normal())
        return stax.serial(hidden(), stax.Relu, hidden(), stax.Relu, stax.Dense(outputs))

    def observe(logits: Any, images: Any) -> None:
        """Say that the hidden pixels are Bernoulli's with these logits."""
        pixel = dist.Bernoulli(logits=logits, validate_args=False)  # grey levels are outside of its support
        numpyro.sample("y", pixel.to_event(1), obs=images[:, num_observed:])

    def gaussian(name: str, images: Any) -> Any:
        parameters = numpyro.module(name, network(2 * LATENT_DIM), (batch_size, num_pixels))(images)
        loc, log_scale = jnp.split(parameters, 2, axis=-1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def baseline_model(images: Any, guess: Any) -> None:
        logits = numpyro.module("baseline", network(num_predicted), (batch_size, num_observed))(
            images[:, :num_observed]
        )
        with numpyro.plate("images", batch_size):
            observe(logits, images)

    def cvae_model(images: Any, guess: Any) -> None:
        prior = gaussian("prior", jnp.concatenate([images[:, :num_observed], guess], -1))
        generation = numpyro.module("generation", network(num_predicted), (batch_size, LATENT_DIM))
        with numpyro.plate("images", batch_size):
            z = numpyro.sample("z", prior)
            observe(generation(z), images)

    def cvae_guide(images: Any, guess: Any) -> None:
        recognition = gaussian("recognition", images)
        with numpyro.plate("images", batch_size):
            numpyro.sample("z", recognition)

    data = jax.device_put(pixels)
    parts: dict[str, tuple[Any, Any]] = {
        "baseline": (baseline_model, lambda images, guess: None),  # no latent variables: maximum likelihood
        "cvae": (cvae_model, cvae_guide),
    }

    class PhaseTraining:
        """The training of one phase."""

        def __init__(self, phase: str):
            svi = SVI(*parts[phase], numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO())
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
            """Take so many steps."""
            while steps > 0:
                self.key, key = random.split(self.key)
                now = min(steps, steps_of_epoch)
                self.state, total = self.epoch(self.state, key, data, self.guesses, now)
                if not np.isfinite(float(total)):  # waits for the device
                    raise FloatingPointError("NumPyro's loss became NaN: its time says nothing")
                steps -= now

    trainings: dict[str, PhaseTraining] = {}

    def seconds(phase: str, precision: str, steps: int) -> float:
        """Return the seconds of so many steps, in float32 whatever is asked for."""
        if phase not in trainings:
            trainings[phase] = PhaseTraining(phase)
            trainings[phase].run(1)  # compiles
        started = time.perf_counter()
        trainings[phase].run(steps)
        return time.perf_counter() - started

    return seconds


def worker(python: str | Path, batch_size: int) -> Any:
    """Return NumPyro's trainings in a process of their own, a `common.Worker`."""
    return Worker([python, Path(__file__).resolve(), "--batch-size", batch_size])


def main() -> int:
    """Run the command line: do steps on request, as worker.py does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args()
    try:
        import jax
        import numpyro
    except ImportError:
        print('numpyro_way.py: NumPyro and JAX are not installed: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    serve(numpyro_way(options.batch_size), f"numpyro {numpyro.__version__}, jax {jax.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
