"""What the page shows of a model: completions of a picture with their mean and spread, and log-likelihoods."""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvae.console import Bar, called, complain, program
from cvae.data.digits import as_digit
from cvae.data.sources import difference, load_test
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.report import figures
from cvae.report.evaluation import OF_THE_IMAGES, find_runs
from cvae.run.folder import COME_WITH, REFERENCE, RunFolder
from cvae.run.load import load_trained
from cvae.settings import Settings

MOST_SAMPLES, ESTIMATE_SAMPLES = 25, 100  # completions, and samples of z for each estimate of a log-likelihood
TEST, DRAWING, PHOTOGRAPH = "Test digit", "Draw", "Photograph"
PLACES = {"1 quadrant": " (bottom left)", "2 quadrants": " (left half)", "3 quadrants": " (all but bottom right)"}
_read_digit = lru_cache(maxsize=8)(as_digit)  # the page names a file by the digest of its content


class Shown(NamedTuple):
    """A model on the page, and the test images of its run, uint8 `[N, height, width]`, or None and why not."""

    model: CVAE
    test: Tensor | None
    missing: str = ""

    @property
    def mask(self) -> str:
        """The name of what is observed."""
        return self.model.task.name + PLACES.get(self.model.task.name, "")

    def completed(
        self, source: str, number: int, drawing: dict[str, Any] | None, photograph: str | None,
        samples: int, seed: int, temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the picture that is chosen, uint8 `[height, width]`, and completions `[samples, height, width]`.

        The first completions are the same however many there are. Raises DataError where there is no picture.
        """
        size = self.model.task.height, self.model.task.width
        if source == TEST:
            if self.test is None:
                raise DataError(self.missing)
            picture = self.test[int(number) % len(self.test)]
        elif source == DRAWING:
            sheet = None if drawing is None else drawing["composite"]
            if sheet is None or sheet.getextrema() == (255, 255):
                raise DataError("Draw one digit.")
            picture = as_digit(sheet, *size)
        else:
            if photograph is None:
                raise DataError("Open a photograph of one digit.")
            try:
                picture = _read_digit(photograph, *size)
            except DataError as error:
                raise DataError(str(error).replace(photograph, Path(photograph).name)) from None
        return picture, self.model.complete(picture, MOST_SAMPLES, int(seed), temperature)[: int(samples), 0].cpu()

    @torch.no_grad()
    def views(self, picture: Tensor, completions: Tensor) -> dict[str, Tensor]:
        """Return the picture and what is made of it, by caption: grey or colours, in [0, 1]."""
        task, image = self.model.task, picture / 255
        batch = task.batch(task.rows(image[None].to(next(self.model.parameters()).device)))
        spread = completions.std(0, correction=0)
        return {
            "The picture": image,
            "What the model sees": figures.as_given(image[None], task)[0],
            "Guess of the baseline": task.compose(batch.x, self.model.guess(batch).sigmoid())[0].cpu(),
            "Mean": completions.mean(0),
            f"Spread, up to {spread.max():.2f}": 2 * spread,
        }

    @torch.no_grad()
    def nats(self, picture: Tensor, completions: Tensor) -> Tensor:
        """Return log-likelihoods and the highest possible ones, nats, higher is more likely, float64 `[2 + S, 2]`.

        Rows: the picture by the CVAE, the picture by the baseline, and the completions, as pictures, by the CVAE.
        """
        images = torch.cat([picture[None] / 255, completions])
        batch = self.model.task.batch(self.model.task.rows(images.to(next(self.model.parameters()).device)))
        estimates = self.model.log_likelihood(images, ESTIMATE_SAMPLES, seed=0)
        baseline = bernoulli_log_prob(batch.y, self.model.guess(batch)).double()
        highest = -bernoulli_entropy(batch.y).double()
        of_cvae = torch.stack([estimates, highest], dim=1)
        return torch.cat([of_cvae[:1], torch.stack([baseline[:1], highest[:1]], dim=1), of_cvae[1:]]).cpu()


def read(named: Sequence[Path], runs: Path, device: torch.device) -> dict[str, Shown]:
    """Return the models of the runs that are named, or of all below a folder and all that come with the program.

    A run that cannot be read is left out with one line, unless it is named. Raises DataError for one that is, and where
    there is none at all.
    """
    models: dict[str, Shown] = {}
    read_test = cache(load_test)  # to be seen, and not measured with
    words = {str(word): word for word in named}
    if not named:
        words = {folder.name: folder for folder in find_runs([], runs)[0]}
        come_with = [RunFolder(path) for place in COME_WITH for path in sorted(place.glob(f"{REFERENCE}/*"))]
        words |= {f"{REFERENCE}/{run.path.name}": run.path for run in come_with if run.is_passed_on}
    with Bar("runs", len(words), "run") as bar:
        for name, word in words.items():
            try:
                model, s, images = load_trained(word, device, runs)
            except DataError as error:
                if named:
                    raise
                complain(f"{program('page.py')}: left out: {error}")
                continue
            try:
                test = read_test(Settings(**{setting: getattr(s, setting) for setting in OF_THE_IMAGES}))
                if (other := difference(images, test.record)) is not None:
                    raise DataError(f"{name} was trained beside {other}")
                models[name] = Shown(model, test.images)
            except DataError as error:
                models[name] = Shown(model, None, f"The test images of this run are not here: {error}")
            bar.update()
    if not models:
        raise DataError(f"{runs}: has no run to be shown; {called('train.py')} trains one")
    return models
