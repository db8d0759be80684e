"""What the page shows, as HTML: completions with their mean and spread, and log-likelihoods. Each image is in it as
PNG, pixel for pixel, so that nothing is written and one answer of the server has all of them."""

import base64
import io
from functools import lru_cache
from html import escape
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cvae.data.digits import as_digit
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.report import figures

MOST_SAMPLES = 25  # completions
WEIGHTS = 100  # samples of z for each estimate of a log-likelihood
PNG = "data:image/png;base64,"
MARKS = {
    "own": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "baseline": "M-5.5-5.5h11v11h-11z",
    "cvae": "M0-8L8 0L0 8L-8 0z",
}
"""On the axis of log-likelihoods: a circle, a square, and a diamond."""
WIDTH, MARGIN = 600, 24  # of the axis of log-likelihoods, in its own units


class Shown(NamedTuple):
    """A model on the page: its name, and that of its mask.

    test: the test images of its run, uint8 `[N, height, width]`; None where they are not here, and then `missing` says
    why.
    """

    name: str
    mask: str
    model: CVAE
    test: Tensor | None
    missing: str


@lru_cache(maxsize=8)
def drawn_digit(data: str, height: int, width: int) -> Tensor:
    """The digit that was drawn or photographed, uint8 `[height, width]`, as `as_digit` makes it of the pad's content.

    data: the content as a data URL of a PNG or JPEG file. Raises DataError if there is no digit in it.
    """
    if not data:
        raise DataError("Draw a digit, or open a photograph of one.")
    try:
        content = io.BytesIO(base64.b64decode(data.partition(",")[2]))
        with Image.open(content, formats=["PNG", "JPEG"]) as picture:
            return as_digit(picture, height, width)
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise DataError("This picture cannot be read.") from None
    except DataError:
        raise DataError("No digit is seen in this picture.") from None


def complete(model: CVAE, picture: Tensor, samples: int, seed: int, temperature: float) -> Tensor:
    """Completions `[samples, height, width]` in [0, 1], on the CPU: the first ones are the same however many there are.

    picture: uint8 `[height, width]`.
    """
    return model.complete(picture, MOST_SAMPLES, seed, temperature)[:samples, 0].cpu()


def completions(model: CVAE, picture: Tensor, found: Tensor) -> str:
    """The picture, what the model sees of it, and the completions `found` with their mean and standard deviation."""
    split, image = model.split, picture / 255
    x = split.split(image[None])[0].to(next(model.parameters()).device)
    with torch.no_grad():
        guess = split.compose(x, model.baseline_net(x).sigmoid())[0].cpu()
    spread = found.std(0, correction=0)
    given = figures.as_given(image, split)
    words = f"of {len(found)} completions"
    shown = [
        ("picture", "The picture", "the picture", figures.colour(image)),
        ("given", "What the model sees", "the picture with its hidden pixels coloured", given),
        ("guess", "Guess of the baseline", "the picture as the baseline guesses it", figures.colour(guess)),
        ("mean", "Mean", f"the mean {words}", figures.colour(found.mean(0))),
        ("spread", f"Spread, up to {spread.max():.2f}", f"the spread {words}", figures.colour(2 * spread)),
    ]
    first = "".join(_figure(*each) for each in shown)
    rest = "".join(
        _image("sample", f"completion {i} of {len(found)}", figures.colour(each)) for i, each in enumerate(found, 1)
    )
    title = f"{len(found)} completion{'s' * (len(found) > 1)}"
    return f'<div class="shown">{first}</div><h2>{title}</h2><div class="samples">{rest}</div>'


def _figure(name: str, caption: str, words: str, image: Tensor) -> str:
    return f"<figure>{_image(name, words, image)}<figcaption>{caption}</figcaption></figure>"


def _image(name: str, words: str, image: Tensor) -> str:
    buffer = io.BytesIO()
    figures.as_picture(image).save(buffer, "PNG")
    return f'<img class="{name}" alt="{words}" src="{PNG}{base64.b64encode(buffer.getvalue()).decode()}">'


class Likelihoods(NamedTuple):
    """Log-likelihoods of the hidden pixels given the observed ones, in nats, higher is more likely: `[1 + S]`, float64,
    of a picture and of S completions of it.

    cvae: log p(y|x) by importance sampling. baseline: of y under the baseline's guess. highest: minus the entropy of
    y's grey levels, which neither can exceed.
    """

    cvae: Tensor
    baseline: Tensor
    highest: Tensor


@torch.no_grad()
def weigh(model: CVAE, picture: Tensor, found: Tensor) -> Likelihoods:
    """The log-likelihoods of a picture, uint8 `[height, width]`, and of completions `[S, height, width]` in [0, 1]."""
    images = torch.cat([picture[None] / 255, found])
    x, y = (part.to(next(model.parameters()).device) for part in model.split.split(images))
    estimates = model.log_likelihood(images, WEIGHTS, seed=0)
    rest = bernoulli_log_prob(y, model.baseline_net(x)), -bernoulli_entropy(y)
    return Likelihoods(estimates.cpu(), *(each.double().cpu() for each in rest))


def likelihoods(found: Likelihoods) -> str:
    """An axis with the log-likelihoods as marks, and a table of them."""
    own, highest = found.cvae[1:], found.highest[1:]
    columns = "".join(f'<th scope="col">{word}</th>' for word in ("log-likelihood", "highest possible", "distance"))
    rows = [
        _row("cvae", "The picture, CVAE", found.cvae[0], found.highest[0]),
        _row("baseline", "The picture, baseline", found.baseline[0], found.highest[0]),
        _row("own", f"{len(own)} completions, mean", own.mean(), highest.mean()),
    ]
    table = f'<thead><tr><th class="what">nats</th>{columns}</tr></thead><tbody>{"".join(rows)}</tbody>'
    return f"<h2>How likely is the picture?</h2>{_axis(found)}<table>{table}</table>"


def _row(name: str, words: str, log_p: Tensor, highest: Tensor) -> str:
    values = "".join(f"<td>{_nats(value)}</td>" for value in (log_p, highest, highest - log_p))
    return f'<tr><th scope="row" class="what"><i class="mark {name}"></i>{words}</th>{values}</tr>'


def _nats(value: Tensor) -> str:
    return f"{value:.1f}".replace("-", "−")


def _axis(found: Likelihoods) -> str:
    """Where the log-likelihoods lie between the lowest and the highest of them, as a drawing."""
    marks = [("own", each) for each in found.cvae[1:].tolist()]
    marks += [("baseline", found.baseline[0].item()), ("cvae", found.cvae[0].item())]
    low, high = min(value for _, value in marks), max(value for _, value in marks)
    scale = (WIDTH - 2 * MARGIN) / max(high - low, 1e-6)
    drawn = "".join(
        f'<path class="{name}" d="{MARKS[name]}" transform="translate({MARGIN + (value - low) * scale:.1f} 14)"/>'
        for name, value in marks
    )
    ends = "".join(
        f'<text x="{x}" y="40" text-anchor="{anchor}">{_nats(torch.tensor(value))}{unit}</text>'
        for x, anchor, value, unit in ((2, "start", low, ""), (WIDTH - 2, "end", high, " nats"))
    )
    words = escape("the log-likelihoods of the table below on one axis, more likely to the right")
    return (
        f'<svg viewBox="0 0 {WIDTH} 46" role="img" aria-label="{words}">'
        f'<line x1="0" x2="{WIDTH}" y1="14" y2="14"/>{drawn}{ends}</svg>'
    )
