"""Show trained models in the browser: completions of a test digit, or of one that is drawn or photographed there.

    python -m cvae.report.page                    # all runs below runs/, and those that come with the program
    python -m cvae.report.page q1 reference/q1    # these; also .safetensors files
    python -m cvae.report.page --port 8000 --no-browser

The page is on this machine alone (127.0.0.1), at port 7860 or the next free one, and is opened in the browser; Ctrl-C
ends it. It needs gradio, the extra `page`. It asks nothing of the network, and leaves no file. docs/page.md says what
it shows. Exit codes: 2 usage, a port that is taken, or gradio is missing; 3 no such run; 130 Ctrl-C, 143 SIGTERM.
"""

import base64
import io
import os
import signal
import socket
import sys
import webbrowser
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cvae import context
from cvae.console import called, command, complain, say
from cvae.data.pictures import as_digit
from cvae.data.sources import load_test
from cvae.data.tasks import Batch
from cvae.errors import DataError, UsageError
from cvae.model.cvae import CVAE
from cvae.model.densities import bernoulli_entropy, bernoulli_log_prob
from cvae.report import figures
from cvae.report.evaluation import OF_THE_IMAGES, find_runs, short_names
from cvae.run.folder import COME_WITH, REFERENCE
from cvae.run.load import Trained, load_trained
from cvae.run.plan import user_path
from cvae.settings import Settings

HOST, PORT = "127.0.0.1", 7860
LARGEST_REQUEST = 32 << 20  # bytes: enough for a photograph
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # nothing from elsewhere, whatever gradio asks
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
MOST_SAMPLES, ESTIMATE_SAMPLES = 25, 100  # completions, and samples of z for each estimate of a log-likelihood
TEST, DRAWING, PHOTOGRAPH = "Test digit", "Draw", "Photograph"
TAKE_BRUSH = "setTimeout(() => document.querySelector('#pad [aria-label=Brush]')?.click(), 500)"
INTRODUCTION = """# What could the rest of the picture be?
A conditional VAE sees a part of a picture and samples the rest. All is computed on this machine; nothing leaves it."""
ABOUT = """The spread is the standard deviation of each pixel: 0.5, the highest there can be, is white. Log-likelihoods
are of the hidden pixels, given what the model sees; higher is more likely. Grey levels count as probabilities of white:
no prediction gets above minus their entropy, the highest possible value, which is lower for a blurred completion than
for a sharp picture. What can be compared is the distance to it."""
_read_test = cache(load_test)  # to be seen, and not measured with
_read_digit = lru_cache(maxsize=8)(as_digit)  # the page names a file by the digest of its content


def read(named: Sequence[Path], runs: Path, device: torch.device) -> dict[str, Trained]:
    """Return the runs that are named, or all below a folder and all that come with the program, by their names.

    A run that cannot be read is left out with one line; DataError is raised if it is named, or if no run is left.
    """
    if named:
        return {str(word): load_trained(word, device, runs) for word in named}
    models, folders = {}, find_runs([runs, *(place / REFERENCE for place in COME_WITH)], runs)[0]
    for name, folder in zip(short_names(folders), folders, strict=True):
        try:
            models[name] = load_trained(folder, device)
        except DataError as error:
            complain(f"left out: {error}", "page.py")
    if not models:
        raise DataError(f"{runs}: has no run to be shown; {called('train.py')} trains one")
    return models


def chosen(run: Trained, source: str, number: int, drawing: Any, photograph: str | None) -> Tensor:
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
def views(model: CVAE, images: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return the picture, the first of the images, and what is made of it, by caption: grey or colours, in [0, 1]."""
    spread = images[1:].std(0, correction=0)
    return {
        "The picture": images[0],
        "What the model sees": figures.as_given(images[:1], model.task)[0],
        "Guess of the baseline": model.task.compose(batch.x, model.guess(batch).sigmoid())[0].cpu(),
        "Mean": images[1:].mean(0),
        f"Spread, up to {spread.max():.2f}": 2 * spread,
    }


@torch.no_grad()
def likelihoods(model: CVAE, images: Tensor, batch: Batch) -> str:
    """Return a Markdown table of log-likelihoods and the highest possible ones, in nats: higher is more likely."""
    estimates, highest = model.log_likelihood(images, ESTIMATE_SAMPLES, seed=0), -bernoulli_entropy(batch.y).double()
    rows = {
        "The picture, CVAE": (estimates[0], highest[0]),
        "The picture, baseline": (bernoulli_log_prob(batch.y, model.guess(batch))[0], highest[0]),
        f"{len(images) - 1} completions, mean": (estimates[1:].mean(), highest[1:].mean()),
    }
    lines = [f"| {name} | {p:.1f} | {most:.1f} | {most - p:.1f} |" for name, (p, most) in rows.items()]
    head = ["| nats | log-likelihood | highest possible | distance |", "|---|---:|---:|---:|"]
    return "\n".join(head + lines).replace(" -", " −")


def as_html(pictures: dict[str, Tensor]) -> str:
    """Return pictures, `[height, width]` or `[3, height, width]` in [0, 1], by caption: gradio would write files."""
    parts = []
    for caption, picture in pictures.items():
        buffer = io.BytesIO()
        figures.as_picture(picture).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append(f'<figure><img src="{url}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return f'<div class="pictures">{"".join(parts)}</div>'


def build(models: dict[str, Trained]) -> Any:
    """Return the server of a page of these models."""
    import gradio  # takes seconds, and is missing where nobody needs the page
    import uvicorn
    from fastapi import FastAPI

    def completed(run: str, samples: int, seed: int, temperature: float, *choice: Any) -> tuple[CVAE, Tensor, Batch]:
        model, picture = models[run].model, chosen(models[run], *choice)
        completions = model.complete(picture, MOST_SAMPLES, seed, temperature)  # of which the first ones always stay
        images = torch.cat([picture[None].to(completions.device) / 255, completions[:samples, 0]])
        return model, images.cpu(), model.task.batch(model.task.rows(images))

    def show(*choice: Any) -> tuple[str, str, str]:
        try:
            model, images, batch = completed(*choice)
        except (DataError, ValueError) as error:  # the second one for test images of another size than the model's
            return str(error), "", ""
        numbered = {f"completion {i}": completion for i, completion in enumerate(images[1:], start=1)}
        return "", as_html(views(model, images, batch)), as_html(numbered)

    def weigh(*choice: Any) -> str:
        with suppress(DataError, ValueError):
            return likelihoods(*completed(*choice))
        return ""

    quick: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    with gradio.Blocks(title="Completions by a CVAE", fill_width=True, delete_cache=(60, 3600)) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                source = gradio.Textbox(TEST, visible="hidden")
                with gradio.Tab(TEST) as test_tab:
                    number = gradio.Slider(0, 9999, 0, step=1, label="Number of the digit")
                with gradio.Tab(DRAWING) as drawing_tab:
                    drawing = gradio.Sketchpad(
                        image_mode="L", type="pil", format="png", layers=False, transforms=(), canvas_size=(280, 280),
                        brush=gradio.Brush(10, ["#111111"], color_mode="fixed"), show_label=False, elem_id="pad",
                    )  # fmt: skip
                with gradio.Tab(PHOTOGRAPH) as photograph_tab:
                    photograph = gradio.Image(
                        label="One digit, with some paper around it", sources=["upload", "clipboard"], height=300,
                        type="filepath", elem_id="photograph",
                    )  # fmt: skip
                    photograph.preprocess = lambda file: file and file.path  # as it is; `as_digit` reads it
                choices = [(f"{model.task.name} ({name})", name) for name, (model, *_) in models.items()]
                run = gradio.Dropdown(choices, label="What is observed, and the model", elem_id="run")
                samples = gradio.Slider(1, MOST_SAMPLES, 16, step=1, label="Number of completions")
                seed = gradio.Slider(0, 999, 0, step=1, label="Random seed")
                temperature = gradio.Slider(0, 1.5, 1, step=0.05, label="Temperature of z (1: samples, 0: the mean)")
            with gradio.Column(scale=3, min_width=320):
                problem = gradio.Markdown(elem_id="problem")
                pictures, completions = gradio.HTML(elem_id="views"), gradio.HTML(elem_id="completions")
                gradio.Markdown("### How likely is the picture?")
                table = gradio.Markdown(elem_id="likelihoods")
                gradio.Markdown(ABOUT)
        for tab, name in ((test_tab, TEST), (drawing_tab, DRAWING), (photograph_tab, PHOTOGRAPH)):
            tab.select(None, None, source, js=f"() => {{ {TAKE_BRUSH}; return {name!r}; }}", **quick)
        controls = [run, samples, seed, temperature, source, number, drawing, photograph]
        changes = [page.load, *(control.change for control in controls)]
        shown = gradio.on(changes, show, controls, [problem, pictures, completions], **quick)
        shown.then(weigh, controls, table, **quick)  # which takes longer
    looks: Any = {"css_paths": Path(__file__).with_suffix(".css"), "footer_links": [], "run_history": False}
    application = gradio.mount_gradio_app(FastAPI(openapi_url=None), page, "/", ssr_mode=False, **looks)
    quiet: Any = {"log_config": None, "log_level": "critical", "timeout_graceful_shutdown": 1, "ws": "none"}
    return uvicorn.Server(uvicorn.Config(guarded(application), headers=[("Content-Security-Policy", POLICY)], **quiet))


def listen(port: int | None) -> socket.socket:
    """Return a socket at this port, or at the first free one of the hundred from `PORT` on. Raises UsageError."""
    first, last = (PORT, PORT + 99) if port is None else (port, port)
    for number in range(1 << 16)[first : last + 1]:
        with suppress(OSError):
            return socket.create_server((HOST, number))
    raise UsageError(f"no port from {first} to {last} is free; choose another one with --port")


def guarded(application: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ASGI application that refuses what another website sends, and what is too large."""

    async def guard(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        headers = dict(scope.get("headers", ()))
        host, length = headers.get(b"host", b""), headers.get(b"content-length", b"0")
        page = b"http://" + host  # a foreign website is told by `Origin`, or by `Host` if its name leads here
        is_own = host.partition(b":")[0] in (HOST.encode(), b"localhost") and headers.get(b"origin", page) == page
        is_small = b"transfer-encoding" not in headers and length.isdigit() and int(length) <= LARGEST_REQUEST
        if scope["type"] == "lifespan" or (is_own and is_small):
            await application(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 413 if is_own else 403, "headers": []})
            await send({"type": "http.response.body", "body": b"too large" if is_own else b"not from this page"})

    return guard


@command("page.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    words = "run, as a path or a name below the folder of runs, or a .safetensors file (default: all runs)"
    add("named", nargs="*", type=user_path, metavar="RUN", help=words)
    add("--runs", type=user_path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--port", type=int, metavar="N", help=f"port of the page (default: {PORT}, or the next free one)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    add("--no-browser", action="store_true", help="do not open the page in the browser")
    options = parser.parse_args(argv)
    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install gradio")
    with context.opened(options.device) as here, listen(options.port) as connection:
        models = read(options.named, options.runs, here.device)
        for number in signal.Signals:  # each ends the page as Ctrl-C does, and nothing stays on the disk
            if number.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: sys.exit(128 + number))
        with TemporaryDirectory(prefix="cvae-page-", ignore_cleanup_errors=True) as place:
            os.environ.update(SILENT, GRADIO_TEMP_DIR=place)
            say(f"starting the page of {', '.join(models)}, which takes some seconds")
            server = build(models)
            url = f"http://{HOST}:{connection.getsockname()[1]}"
            say(f"{url} has the page; Ctrl-C ends it")
            is_desktop = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            if is_desktop and not options.no_browser:  # a browser in the terminal would take its place
                webbrowser.open(url)
            server.run(sockets=[connection])
    return 0


if __name__ == "__main__":
    sys.exit(main())
