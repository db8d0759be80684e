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
import base64
import io
import os
import random
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from torch import Tensor

from cvae import context
from cvae.console import command, program, say
from cvae.errors import DataError, Interrupted, UsageError
from cvae.report import figures
from cvae.report.page_models import DRAWING, ESTIMATE_SAMPLES, MOST_SAMPLES, PHOTOGRAPH, TEST, Shown, read
from cvae.run.plan import user_path

HOST, PORT, PORTS = "127.0.0.1", 7860, 100  # the first port, and how many are tried
LARGEST_REQUEST = 32 << 20  # bytes: enough for a photograph
KEPT_S = 3600  # how long a drawing or a photograph is kept, in seconds
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""The browser loads nothing from elsewhere, whatever gradio asks for."""
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
INTRODUCTION = """# What could the rest of the picture be?
A conditional VAE sees a part of a picture and samples the rest. All is computed on this machine; nothing leaves it."""
ABOUT = f"""The spread is the standard deviation of each pixel, from 0 (black) to 0.5 (white).

The log-likelihood is that of the hidden pixels, given what the model sees; higher is more likely. The CVAE's is
estimated with {ESTIMATE_SAMPLES} samples of z, and on average lies below the true value. Grey levels count as
probabilities of white: no prediction gets above minus their entropy, the highest possible value. That of a blurred
completion is another one than the picture's; what can be compared is the distance to it."""
LIKELY, HIGHEST = "log-likelihood", "highest possible"
COLOURS = {"The picture, CVAE": "#2563eb", "The picture, baseline": "#d97706", "Completions": "#94a3b8"}
TAKE_BRUSH = "setTimeout(() => document.querySelector('#pad [aria-label=Brush]')?.click(), 500)"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog=program("page.py"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    words = "run, as a path or a name below the folder of runs, or a .safetensors file (default: all runs)"
    add("named", nargs="*", type=user_path, metavar="RUN", help=words)
    add("--runs", type=user_path, default=Path("runs"), metavar="DIR", help="folder of runs (default: %(default)s)")
    add("--port", type=int, metavar="N", help=f"port of the page (default: {PORT}, or the next free one)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:n (default: %(default)s)")
    add("--no-browser", action="store_true", help="do not open the page in the browser")
    options = parser.parse_args(argv)
    if options.port is not None and not 0 <= options.port < 1 << 16:
        parser.error(f"--port has to be from 0 (any that is free) to 65535, not {options.port}")
    return options


def listen(port: int | None) -> socket.socket:
    """Return a socket at this port, or at the first free one from `PORT` on. Raises UsageError."""
    for number in range(PORT, PORT + PORTS) if port is None else [port]:
        with suppress(OSError):
            return socket.create_server((HOST, number))
    tried = f"no port from {PORT} to {PORT + PORTS - 1} is free" if port is None else f"--port {port} cannot be used"
    raise UsageError(f"{tried}; name another one with --port")


def guarded(application: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ASGI application that refuses what another website sends, and what is too large.

    A browser says in `Origin` which website sends a request, and in `Host` by which name it knows this server: a
    foreign name is how a website would pass for this page.
    """

    async def guard(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        host, length = headers.get(b"host", ""), headers.get(b"content-length", "0")
        is_own = (
            host.partition(":")[0] in (HOST, "localhost")
            and headers.get(b"origin", f"http://{host}") == f"http://{host}"
        )
        is_small = b"transfer-encoding" not in headers and length.isdecimal() and int(length) <= LARGEST_REQUEST
        if scope["type"] == "lifespan" or (is_own and is_small):
            await application(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 413 if is_own else 403, "headers": []})
            await send({"type": "http.response.body", "body": b"too large" if is_own else b"not from this page"})

    return guard


@contextmanager
def serving(application: Callable[..., Any], connection: socket.socket) -> Iterator[None]:
    """Serve an application within the block, in a thread of its own, where the server leaves the signals alone."""
    import uvicorn  # comes with gradio

    quiet: Any = {"log_config": None, "log_level": "critical", "timeout_graceful_shutdown": 1, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(application, headers=[("Content-Security-Policy", POLICY)], **quiet))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [connection]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def build(models: dict[str, Shown]) -> Any:
    """Return the page of these models as an ASGI application."""
    import gradio
    import pandas  # comes with gradio
    from fastapi import FastAPI
    from gradio.components.gallery import GalleryData, GalleryImage
    from gradio.data_classes import ImageData

    def inline(pictures: dict[str, Tensor]) -> Any:  # in the answer itself: gradio would write a file for each
        urls = {caption: data_url(picture) for caption, picture in pictures.items()}
        return GalleryData(root=[GalleryImage(image=ImageData(url=url), caption=name) for name, url in urls.items()])

    def show(run: str, *choice: Any) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
        try:
            picture, completions = models[run].completed(*choice)
        except DataError as error:
            return str(error), {}, {}
        numbered = {f"completion {i}": completion for i, completion in enumerate(completions, start=1)}
        return "", models[run].views(picture, completions), numbered

    def weigh(run: str, *choice: Any) -> tuple[Any, str]:
        try:
            picture, completions = models[run].completed(*choice)
        except DataError:
            return None, ""
        nats = models[run].nats(picture, completions)
        plotted = pandas.DataFrame(nats.tolist(), columns=[LIKELY, HIGHEST])
        plotted["of"] = [*list(COLOURS)[:2], *["Completions"] * len(completions)]
        return plotted, as_table(nats)

    def names(mask: str) -> list[str]:
        return [name for name, shown in models.items() if shown.mask == mask]

    def numbers(run: str) -> dict[str, Any]:
        test = models[run].test
        return {"maximum": 1 if test is None else max(len(test) - 1, 1), "interactive": test is not None}

    first = next(iter(models))
    with gradio.Blocks(title="Completions by a CVAE", fill_width=True, delete_cache=(60, KEPT_S)) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                source = gradio.Textbox(TEST, visible="hidden")
                with gradio.Tab(TEST) as test_tab:
                    number = gradio.Slider(0, value=0, step=1, label="Number of the digit", **numbers(first))
                    another = gradio.Button("Another digit")
                with gradio.Tab(DRAWING) as drawing_tab:
                    brush = gradio.Brush(default_size=10, colors=["#111111"], color_mode="fixed")
                    drawing = gradio.Sketchpad(
                        image_mode="L", type="pil", format="png", layers=False, transforms=(), canvas_size=(280, 280),
                        brush=brush, buttons=[], show_label=False, elem_id="pad",
                    )  # fmt: skip
                with gradio.Tab(PHOTOGRAPH) as photograph_tab:
                    photograph = gradio.Image(
                        label="One digit, with some paper around it", type="filepath", height=300,
                        sources=["upload", "clipboard"], buttons=[], elem_id="photograph",
                    )  # fmt: skip
                    photograph.preprocess = lambda file: file and file.path  # as it is; `as_digit` reads it
                with gradio.Group():
                    masks = list(dict.fromkeys(shown.mask for shown in models.values()))
                    mask = gradio.Radio(masks, value=models[first].mask, label="What is observed")
                    run = gradio.Dropdown(names(models[first].mask), value=first, label="Model trained for it")
                with gradio.Group():
                    samples = gradio.Slider(1, MOST_SAMPLES, 16, step=1, label="Number of completions")
                    label = "Temperature of z (1: as the model has it, 0: the mean of z)"
                    temperature = gradio.Slider(0, 1.5, 1, step=0.05, label=label)
                    seed = gradio.Slider(0, 999, 0, step=1, label="Random seed")
                other = gradio.Button("Other samples")
            with gradio.Column(scale=3, min_width=320):
                problem = gradio.Markdown(elem_id="problem")
                plain = {"elem_classes": "pictures", "show_label": False, "container": False, "interactive": False,
                         "buttons": [], "allow_preview": False, "fit_columns": False}  # fmt: skip
                views = gradio.Gallery(columns=5, elem_id="views", **plain)
                completions = gradio.Gallery(columns=8, elem_id="completions", **plain)
                views.postprocess = completions.postprocess = inline
                gradio.Markdown("### How likely is the picture?")
                table = gradio.Markdown(elem_id="likelihoods")
                plot = gradio.ScatterPlot(
                    x=LIKELY, y=HIGHEST, color="of", color_title=" ", color_map=COLOURS, tooltip="all", height=220,
                    x_title="log-likelihood, nats", buttons=[], show_label=False, elem_id="plot",
                )  # fmt: skip
                gradio.Markdown(ABOUT, elem_id="about")
        quick: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for tab, name in ((test_tab, TEST), (drawing_tab, DRAWING), (photograph_tab, PHOTOGRAPH)):
            tab.select(None, None, source, js=f"() => {{ {TAKE_BRUSH}; return {name!r}; }}", **quick)
        mask.input(lambda mask: gradio.Dropdown(names(mask), value=names(mask)[0]), mask, run, **quick)
        run.change(lambda run: gradio.Slider(**numbers(run)), run, number, **quick)
        another.click(lambda run: random.randint(0, numbers(run)["maximum"]), run, number, **quick)
        other.click(lambda: random.randrange(1000), None, seed, **quick)
        controls = [run, source, number, drawing, photograph, samples, seed, temperature]
        quick["trigger_mode"] = "always_last"
        changes = [page.load, *(control.change for control in controls)]
        shown = gradio.on(changes, show, controls, [problem, views, completions], **quick)
        shown.then(weigh, controls, [plot, table], **quick)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    theme = gradio.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    hidden: Any = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False}
    css = Path(__file__).with_suffix(".css")
    return gradio.mount_gradio_app(FastAPI(openapi_url=None), page, "/", theme=theme, css_paths=css, **hidden)


def data_url(picture: Tensor) -> str:
    """Return a picture, `[height, width]` or colours `[3, height, width]` in [0, 1], as a PNG in a URL."""
    buffer = io.BytesIO()
    figures.as_picture(picture).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_table(nats: Tensor) -> str:
    """Return the log-likelihoods as `Shown.nats` gives them as a Markdown table."""
    names, rows = [*list(COLOURS)[:2], f"{len(nats) - 2} completions, mean"], [*nats[:2], nats[2:].mean(0)]
    lines = [f"| nats | {LIKELY} | {HIGHEST} | distance |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {p:.1f} | {most:.1f} | {most - p:.1f} |" for name, (p, most) in zip(names, rows, strict=True)
    ]
    return "\n".join(lines).replace(" -", " −")


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise Interrupted, as the handler of a signal."""
    raise Interrupted("interrupted", number)


@command("page.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio: pip install gradio")
    numbers = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
    before = {n: signal.signal(n, interrupt) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    folder = TemporaryDirectory(prefix="cvae-page-", ignore_cleanup_errors=True)
    try:
        with folder as place, context.opened(options.device) as here, listen(options.port) as connection:
            os.environ.update(SILENT, GRADIO_TEMP_DIR=place)
            models = read(options.named, options.runs, here.device)
            say(f"starting the page of {', '.join(models)}, which takes some seconds")
            with serving(guarded(build(models)), connection):
                port = connection.getsockname()[1]
                taken = f" (port {PORT} is taken)" if options.port is None and port != PORT else ""
                say(f"http://{HOST}:{port} has the page{taken}; Ctrl-C ends it")
                is_desktop = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
                if is_desktop and not options.no_browser:  # a browser in the terminal would take its place
                    webbrowser.open(f"http://{HOST}:{port}")
                threading.Event().wait()
    except Interrupted as end:
        return end.exit_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
