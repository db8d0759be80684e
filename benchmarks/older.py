"""The trainings of an older checkout, in a process of their own: started by other benchmarks, which ask it for steps.

    git worktree add ../older 214ba6c
    echo "cvae bf16 100" | python benchmarks/older.py ../older 128      # the seconds of 100 steps at batch 128

For checkouts such as commit 214ba6c, in which `Ours` of benchmarks/speed.py is the loop of `train.py`; a later one has
a `worker.py` of its own. Nothing of this checkout but `start.serve` is used. Input and output are as in `worker.py`.
"""

import sys
from functools import lru_cache
from pathlib import Path

from start import ROOT, serve

for name in [name for name in sys.modules if name.partition(".")[0] == "cvae"]:
    del sys.modules[name]
FOLDER = Path(sys.argv[1]).resolve()
sys.path[:] = [str(FOLDER / "benchmarks"), str(FOLDER)] + [
    path for path in sys.path if path not in (str(ROOT), str(ROOT / "benchmarks"))
]

import speed  # noqa: E402
import torch  # noqa: E402
from cvae.quadrants import Quadrants  # noqa: E402

from cvae import runtime  # noqa: E402
from cvae.data import ImageSet, load_train  # noqa: E402
from cvae.model import CVAE, Baseline  # noqa: E402

LATE = 100  # epochs: as in `common.Training`


def main() -> None:
    """Run the command line."""
    batch_size = int(sys.argv[2])
    assert Path(speed.__file__).parent.parent == Path(runtime.__file__).parent.parent == FOLDER
    runtime.prepare(torch.device("cpu"))
    images, _ = load_train()
    quadrants = Quadrants(speed.NUM_QUADRANTS)
    sizes = (quadrants.num_observed, quadrants.num_pixels)

    @lru_cache
    def training(phase: str, precision: str) -> speed.Ours:
        image_set, model = ImageSet(images, quadrants), Baseline(*sizes)
        if phase == "cvae":
            image_set.set_guesses(model.guess, runtime.HALF.get(precision))
            model = CVAE(model, *sizes)
        made = speed.Ours(model, image_set, batch_size, precision)
        made.epoch = LATE
        return made

    serve(lambda phase, precision, steps: training(phase, precision).run(steps), "as OpenMP chooses")


if __name__ == "__main__":
    main()
