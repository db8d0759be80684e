"""The page's controls and what they set going, in gradio. Each function of it takes all that the controls say, and
nothing else: the same settings show the same."""

import random
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio
from torch import Tensor

from cvae.errors import DataError
from cvae.report import page_views
from cvae.report.page_views import Shown

ASSETS = Path(__file__).with_name("page_assets")
TEST, PAD = "Test digit", "Draw or photograph"
INTRODUCTION = """# What could the rest of the picture be?
A conditional VAE sees a part of a picture and samples the rest. All is computed on this machine; nothing is stored."""
ABOUT = f"""The spread is the standard deviation of each pixel, from 0 (black) to 0.5 (white).

The log-likelihood is that of the hidden pixels, given what the model sees; higher is more likely. The CVAE's,
log p(y|x), is estimated by importance sampling with {page_views.WEIGHTS} samples of z, and on average lies below the
true value. Grey levels count as probabilities of white: no prediction gets above minus their entropy, the highest
possible value. Completions are means of p(y|x,z), blurred where the model is unsure, and so their highest value is
another one than the picture's; what can be compared is the distance to it."""


class Choice(NamedTuple):
    """What the controls say, in the order of the functions' arguments. drawing: as `drawn_digit` takes it."""

    source: str
    number: int
    drawing: str
    run: str
    samples: int
    seed: int
    temperature: float


def picture_of(shown: Shown, choice: Choice) -> Tensor:
    """The picture that is chosen, uint8 `[height, width]`. Raises DataError where there is none."""
    if choice.source == PAD:
        return page_views.drawn_digit(choice.drawing, *shown.model.split.observed.shape)
    if shown.test is None:
        raise DataError(shown.missing)
    return shown.test[int(choice.number) % len(shown.test)]


def show(models: dict[str, Shown], weigh: bool, *values: Any) -> str:
    """The completions, or with `weigh` the log-likelihoods, as HTML."""
    choice = Choice(*values)
    shown = models[choice.run]
    try:
        picture = picture_of(shown, choice)
    except DataError as error:
        return "" if weigh else f'<p class="problem">{escape(str(error))}</p>'
    found = page_views.complete(shown.model, picture, int(choice.samples), int(choice.seed), choice.temperature)
    if weigh:
        return page_views.likelihoods(page_views.weigh(shown.model, picture, found))
    return page_views.completions(shown.model, picture, found)


def build(models: dict[str, Shown]) -> gradio.Blocks:
    """The page of these models, by name."""
    first = next(iter(models.values()))
    with gradio.Blocks(title="Completions by a CVAE", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                source, number, drawing, another = _picture(first)
                mask, run = _model(models, first)
                with gradio.Group():
                    samples = gradio.Slider(1, page_views.MOST_SAMPLES, 16, step=1, label="Number of completions")
                    temperature = gradio.Slider(
                        0, 1.5, 1, step=0.05, label="Temperature of z", info="1: as the model has it, 0: the mean of z"
                    )
                    seed = gradio.Slider(0, 999, 0, step=1, label="Random seed")
                other = gradio.Button("Other samples")
            with gradio.Column(scale=3, min_width=320):
                pictures = gradio.HTML(elem_id="completions", elem_classes="results", apply_default_css=False)
                weights = gradio.HTML(elem_id="likelihoods", elem_classes="results", apply_default_css=False)
                gradio.Markdown(ABOUT, elem_id="about")
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        mask.input(partial(runs_of, models), mask, run, **quick)
        run.change(partial(numbers_of, models), [run, number], number, **quick)
        another.click(partial(any_number, models), run, number, **quick)
        other.click(lambda: random.randrange(1000), None, seed, **quick)
        controls = [source, number, drawing, run, samples, seed, temperature]
        changes = [
            page.load,
            drawing.input,
            *(each.change for each in (source, number, run, samples, seed, temperature)),
        ]
        shown = gradio.on(
            changes, partial(show, models, False), controls, pictures, trigger_mode="always_last", **quick
        )
        shown.then(partial(show, models, True), controls, weights, trigger_mode="always_last", **quick)
    return page


def _picture(first: Shown) -> tuple[gradio.Textbox, gradio.Slider, gradio.HTML, gradio.Button]:
    """The controls that choose the picture."""
    source = gradio.Textbox(TEST, visible="hidden")
    with gradio.Tabs():
        with gradio.Tab(TEST) as test:
            number = gradio.Slider(value=0, step=1, label="Number of the digit", **_numbers(first))
            another = gradio.Button("Another digit")
        with gradio.Tab(PAD) as pad:
            html, script = (ASSETS.joinpath(f"pad.{kind}").read_text("utf-8") for kind in ("html", "js"))
            drawing = gradio.HTML("", html_template=html, js_on_load=script, apply_default_css=False, elem_id="pad")
    for tab, name in ((test, TEST), (pad, PAD)):
        tab.select(None, None, source, js=f"() => {name!r}", show_progress="hidden", api_visibility="private")
    return source, number, drawing, another


def _model(models: dict[str, Shown], first: Shown) -> tuple[gradio.Radio, gradio.Dropdown]:
    """The controls that choose the model, by what is observed."""
    masks = list(dict.fromkeys(shown.mask for shown in models.values()))
    with gradio.Group():
        mask = gradio.Radio(masks, value=first.mask, label="What is observed")
        run = gradio.Dropdown(_names(models, first.mask), value=first.name, label="Model trained for it")
    return mask, run


def _names(models: dict[str, Shown], mask: str) -> list[str]:
    return [name for name, shown in models.items() if shown.mask == mask]


def _numbers(shown: Shown) -> dict[str, Any]:
    count = 1 if shown.test is None else len(shown.test)
    return {"minimum": 0, "maximum": max(count - 1, 1), "interactive": count > 1}


def runs_of(models: dict[str, Shown], mask: str) -> gradio.Dropdown:
    """The choice among the models that are trained for a mask."""
    names = _names(models, mask)
    return gradio.Dropdown(choices=names, value=names[0])


def numbers_of(models: dict[str, Shown], run: str, number: int) -> gradio.Slider:
    """The choice among the test images of a run: the same number, if there are so many."""
    found = _numbers(models[run])
    return gradio.Slider(value=min(number, found["maximum"]), **found)


def any_number(models: dict[str, Shown], run: str) -> int:
    """The number of a test image of a run, by chance."""
    test = models[run].test
    return 0 if test is None else random.randrange(len(test))


def looks() -> dict[str, Any]:
    """How the page looks, with fonts that are there: as `gradio.mount_gradio_app` takes it."""
    subdued = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    theme = gradio.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ).set(**subdued)
    return {"theme": theme, "css_paths": ASSETS / "page.css"}
