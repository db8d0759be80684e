"""Show trained models in the browser: completions of a test digit, or of one that is drawn or photographed there.

    python -m cvae.report.page                    # all runs below runs/, and those that come with the program
    python -m cvae.report.page q1 reference/q1    # these; also .safetensors files
    python -m cvae.report.page --port 8000 --no-browser

The page is on this machine alone (127.0.0.1), at port 7860 or the next free one, and is opened in the browser; Ctrl-C
ends it. It needs gradio, the extra `page`. It asks nothing of the network, and leaves no file. docs/page.md says what
it shows. Exit codes: 2 usage, a port that is taken, or gradio is missing; 3 no such run; 130 Ctrl-C, 143 SIGTERM.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import os
import random
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from cvae import context
from cvae.console import command, say
from cvae.errors import DataError, UsageError
from cvae.model.cvae import CVAE
from cvae.report.page_models import DRAWING, PHOTOGRAPH, TEST, as_html, chosen, likelihoods, read, views
from cvae.run.plan import user_path
from cvae.run.weights_file import Trained

HOST, PORT = "127.0.0.1", 7860
LARGEST_REQUEST = 32 << 20  # bytes: enough for a photograph
MOST_SAMPLES = 25
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # nothing from elsewhere, whatever gradio asks
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
INTRODUCTION = """# What could the rest of the picture be?
A conditional VAE sees a part of a picture and samples the rest. All is computed on this machine; nothing leaves it."""
ABOUT = """Spread: the standard deviation of each pixel; 0.5, the highest there can be, is white.

Log-likelihoods are of the hidden pixels, given what the model sees; higher is more likely. Grey levels count as
probabilities of white: no prediction gets above minus their entropy, the highest possible value, which is lower for a
blurred completion than for a sharp picture. What can be compared is the distance to it."""
TAKE_BRUSH = "setTimeout(() => document.querySelector('#pad [aria-label=Brush]')?.click(), 500)"


def listen(port: int | None) -> socket.socket:
    """Return a socket at this port, or at the first free one of the hundred from `PORT` on. Raises UsageError."""
    first, last = (PORT, PORT + 99) if port is None else (port, port)
    for number in range(1 << 16)[first : last + 1]:
        with suppress(OSError):
            return socket.create_server((HOST, number))
    raise UsageError(f"no port from {first} to {last} is free; choose another one with --port")


def guarded(application: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ASGI application that refuses what another website sends, and what is too large.

    A browser says in `Origin` which website sends a request, and in `Host` by which name it knows this server: a
    foreign name is how a website would pass for this page.
    """

    async def guard(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        headers = dict(scope.get("headers", ()))
        host, length = headers.get(b"host", b""), headers.get(b"content-length", b"0")
        own = b"http://" + host
        is_own = host.partition(b":")[0] in (HOST.encode(), b"localhost") and headers.get(b"origin", own) == own
        is_small = b"transfer-encoding" not in headers and length.isdigit() and int(length) <= LARGEST_REQUEST
        if scope["type"] == "lifespan" or (is_own and is_small):
            await application(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 413 if is_own else 403, "headers": []})
            await send({"type": "http.response.body", "body": b"too large" if is_own else b"not from this page"})

    return guard


def build(models: dict[str, Trained]) -> Any:
    """Return the page of these models as an ASGI application."""
    import gradio  # takes seconds, and is missing where nobody needs the page
    from fastapi import FastAPI

    def completed(run: str, samples: int, seed: int, temperature: float, *choice: Any) -> tuple[CVAE, Tensor, Tensor]:
        model, picture = models[run].model, chosen(models[run], *choice)
        completions = model.complete(picture, MOST_SAMPLES, seed, temperature)  # of which the first ones always stay
        return model, picture, completions[:samples, 0].cpu()

    def show(*choice: Any) -> tuple[str, str, str]:
        try:
            model, picture, completions = completed(*choice)
        except DataError as error:
            return str(error), "", ""
        numbered = {f"completion {i}": completion for i, completion in enumerate(completions, start=1)}
        return "", as_html(views(model, picture, completions)), as_html(numbered)

    def weigh(*choice: Any) -> str:
        with suppress(DataError):
            return likelihoods(*completed(*choice))
        return ""

    quick: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gradio.Blocks(title="Completions by a CVAE", fill_width=True, delete_cache=(60, 3600)) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                source = gradio.Textbox(TEST, visible="hidden")
                with gradio.Tab(TEST) as test_tab:
                    number = gradio.Slider(0, 9999, 0, step=1, label="Number of the digit")
                    another = gradio.Button("Another digit")
                with gradio.Tab(DRAWING) as drawing_tab:
                    brush = gradio.Brush(default_size=10, colors=["#111111"], color_mode="fixed")
                    drawing = gradio.Sketchpad(
                        image_mode="L", type="pil", format="png", layers=False, transforms=(), canvas_size=(280, 280),
                        brush=brush, show_label=False, elem_id="pad",
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
                words = "Temperature of z (1: as the model has it, 0: the mean of z)"
                temperature = gradio.Slider(0, 1.5, 1, step=0.05, label=words)
            with gradio.Column(scale=3, min_width=320):
                problem = gradio.Markdown(elem_id="problem")
                pictures, completions = gradio.HTML(elem_id="views"), gradio.HTML(elem_id="completions")
                gradio.Markdown("### How likely is the picture?")
                table = gradio.Markdown(elem_id="likelihoods")
                gradio.Markdown(ABOUT)
        for tab, name in ((test_tab, TEST), (drawing_tab, DRAWING), (photograph_tab, PHOTOGRAPH)):
            tab.select(None, None, source, js=f"() => {{ {TAKE_BRUSH}; return {name!r}; }}", **quick)
        another.click(lambda: random.randrange(10_000), None, number, **quick)
        controls = [run, samples, seed, temperature, source, number, drawing, photograph]
        quick["trigger_mode"] = "always_last"
        shown = [problem, pictures, completions]
        shown = gradio.on([page.load, *(control.change for control in controls)], show, controls, shown, **quick)
        shown.then(weigh, controls, table, **quick)
    hidden: Any = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False}
    css = Path(__file__).with_suffix(".css")
    return gradio.mount_gradio_app(FastAPI(openapi_url=None), page, "/", css_paths=css, **hidden)


@command("page.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            import uvicorn  # comes with gradio

            quiet: Any = {"log_config": None, "log_level": "critical", "timeout_graceful_shutdown": 1, "ws": "none"}
            headers = [("Content-Security-Policy", POLICY)]
            server = uvicorn.Server(uvicorn.Config(guarded(build(models)), headers=headers, **quiet))
            url = f"http://{HOST}:{connection.getsockname()[1]}"
            say(f"{url} has the page; Ctrl-C ends it")
            is_desktop = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            if is_desktop and not options.no_browser:  # a browser in the terminal would take its place
                webbrowser.open(url)
            server.run(sockets=[connection])
    return 0


if __name__ == "__main__":
    sys.exit(main())
