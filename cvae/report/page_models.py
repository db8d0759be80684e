"""What the page shows of a model: completions of a picture with their mean and spread, and log-likelihoods."""

import base64
import io
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvae.console import called, complain, program
from cvae.data.digits import as_digit
from cvae.data.sources import load_test
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.report import figures
from cvae.report.evaluation import OF_THE_IMAGES, find_runs, short_names
from cvae.run.folder import COME_WITH, REFERENCE
from cvae.run.load import load_trained
from cvae.run.weights_file import Trained
from cvae.settings import Settings

TEST, DRAWING, PHOTOGRAPH = "Test digit", "Draw", "Photograph"
ESTIMATE_SAMPLES = 100  # of z, for each estimate of a log-likelihood
HEAD = "| nats | log-likelihood | highest possible | distance |\n|---|---:|---:|---:|\n"
_read_test = cache(load_test)  # to be seen, and not measured with
_read_digit = lru_cache(maxsize=8)(as_digit)  # the page names a file by the digest of its content


def read(named: Sequence[Path], runs: Path, device: torch.device) -> dict[str, Trained]:
    """Return the runs that are named, or all below a folder and all that come with the program, by their names.

    A run that cannot be read is left out with one line, unless it is named. Raises DataError for one that is, and where
    there is none at all.
    """
    if named:
        return {str(word): load_trained(word, device, runs) for word in named}
    models, folders = {}, find_runs([runs, *(place / REFERENCE for place in COME_WITH)], runs)[0]
    for name, folder in zip(short_names(folders), folders, strict=True):
        try:
            models[name] = load_trained(folder, device)
        except DataError as error:
            complain(f"{program('page.py')}: left out: {error}")
    if not models:
        raise DataError(f"{runs}: has no run to be shown; {called('train.py')} trains one")
    return models


def chosen(
    run: Trained, source: str, number: int, drawing: dict[str, Any] | None, photograph: str | None
) -> Tensor:  # fmt: skip
    """Return the picture that is chosen on the page, uint8 `[height, width]`; raise DataError where there is none."""
    task = run.model.task
    if source == TEST:
        images = _read_test(Settings(**{name: getattr(run.settings, name) for name in OF_THE_IMAGES})).images
        return images[number % len(images)]
    if source == DRAWING:
        sheet = None if drawing is None else drawing["composite"]
        if sheet is None or sheet.getextrema() == (255, 255):
            raise DataError("Draw one digit.")
        return as_digit(sheet, task.height, task.width)
    if photograph is None:
        raise DataError("Open a photograph of one digit.")
    try:
        return _read_digit(photograph, task.height, task.width)
    except DataError as error:
        raise DataError(str(error).replace(photograph, Path(photograph).name)) from None


@torch.no_grad()
def views(model: CVAE, picture: Tensor, completions: Tensor) -> dict[str, Tensor]:
    """Return the picture and what is made of it, by caption: grey or colours, in [0, 1]."""
    image, spread = picture[None] / 255, completions.std(0, correction=0)
    batch = model.task.batch(model.task.rows(image.to(next(model.parameters()).device)))
    return {
        "The picture": image[0],
        "What the model sees": figures.as_given(image, model.task)[0],
        "Guess of the baseline": model.task.compose(batch.x, model.guess(batch).sigmoid())[0].cpu(),
        "Mean": completions.mean(0),
        f"Spread, up to {spread.max():.2f}": 2 * spread,
    }


@torch.no_grad()
def likelihoods(model: CVAE, picture: Tensor, completions: Tensor) -> str:
    """Return a Markdown table of log-likelihoods and the highest possible ones, in nats: higher is more likely."""
    images = torch.cat([picture[None] / 255, completions])
    batch = model.task.batch(model.task.rows(images.to(next(model.parameters()).device)))
    estimates, highest = model.log_likelihood(images, ESTIMATE_SAMPLES, seed=0), -bernoulli_entropy(batch.y).double()
    rows = {
        "The picture, CVAE": (estimates[0], highest[0]),
        "The picture, baseline": (bernoulli_log_prob(batch.y, model.guess(batch))[0], highest[0]),
        f"{len(completions)} completions, mean": (estimates[1:].mean(), highest[1:].mean()),
    }
    lines = [f"| {name} | {p:.1f} | {most:.1f} | {most - p:.1f} |" for name, (p, most) in rows.items()]
    return HEAD + "\n".join(lines).replace(" -", " −")


def as_html(pictures: dict[str, Tensor]) -> str:
    """Return pictures, `[height, width]` or `[3, height, width]` in [0, 1], by caption: gradio would write files."""
    parts = []
    for caption, picture in pictures.items():
        buffer = io.BytesIO()
        figures.as_picture(picture).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append(f'<figure><img src="{url}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return f'<div class="pictures">{"".join(parts)}</div>'
