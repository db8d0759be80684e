"""Show trained models in the browser: completions of a test digit, or of one that is drawn there.

    python -m cvae.report.page                    # all runs below runs/, and those that come with the program
    python -m cvae.report.page q1 reference/q1    # these; also .safetensors files
    python -m cvae.report.page --port 8000 --no-browser

The page is on this machine alone (127.0.0.1), at port 7860 or the next free one, and is opened in the browser; Ctrl-C
ends it. It needs gradio, the extra `page`. It asks nothing of the network, and writes nothing. docs/page.md says what
it shows. Exit codes: 2 usage, a port that is taken, or gradio is missing; 3 no such run; 130 Ctrl-C.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cvae import context
from cvae.console import Bar, called, command, complain, interruptible, program, say
from cvae.data.masks import mask_name
from cvae.data.sources import TestImages, difference, load_test
from cvae.errors import DataError, Interrupted, UsageError, first_line
from cvae.report.page_views import Shown
from cvae.report.selection import OF_THE_IMAGES, find_runs
from cvae.run.folder import COME_WITH, REFERENCE
from cvae.run.load import is_passed_on, load_trained
from cvae.run.plan import user_path
from cvae.settings import Settings

HOST, PORT, PORTS = "127.0.0.1", 7860, 100  # the first port, and how many are tried
PLACES = {1: "bottom left", 2: "left half", 3: "all but bottom right"}
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""With it the browser loads nothing from elsewhere, whatever gradio asks for."""
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
NEEDED = "the page needs gradio: pip install gradio"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
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


def at_hand(runs: Path) -> dict[str, Path]:
    """The runs below a folder, and those that come with the program, by name."""
    found = {folder.name: folder for folder in find_runs([], runs)[0]}
    for place in COME_WITH:
        for folder in sorted(place.glob(f"{REFERENCE}/*")):
            if is_passed_on(folder):
                found.setdefault(f"{REFERENCE}/{folder.name}", folder)
    return found


def read(named: Sequence[Path], runs: Path, device: torch.device) -> dict[str, Shown]:
    """The models of the runs that are named, or of all at hand, by name.

    A run that cannot be read is left out with one line, unless it is named. Raises DataError for one that is, and where
    there is none at all.
    """
    words = {str(word): word for word in named} or at_hand(runs)
    models = {}
    with Bar("runs", len(words), "run") as bar:
        for name, word in words.items():
            try:
                models[name] = _read(name, word, runs, device)
            except DataError as error:
                if named:
                    raise
                complain(f"{program('page.py')}: left out: {error}")
            bar.update()
    if not models:
        raise DataError(f"{runs}: has no run to be shown; {called('train.py')} trains one")
    return models


def _read(name: str, word: Path, runs: Path, device: torch.device) -> Shown:
    model, s, images = load_trained(word, device, runs)
    mask = mask_name(s) if s.observed else f"{mask_name(s)} ({PLACES[s.quadrants]})"
    try:
        test = _test_images(Settings(**{each: getattr(s, each) for each in OF_THE_IMAGES}))
        if (other := difference(images, test.record)) is not None:
            raise DataError(f"{name} was trained beside {other}")
    except DataError as error:
        return Shown(name, mask, model, None, f"The test images of this run are not here: {error}")
    return Shown(name, mask, model, test.images, "")


@cache
def _test_images(s: Settings) -> TestImages:
    """To be seen, and not measured with."""
    return load_test(s)


def listen(port: int | None) -> socket.socket:
    """A socket at this port, or at the first free one from `PORT` on. Raises UsageError."""
    for each in range(PORT, PORT + PORTS) if port is None else [port]:
        try:
            return socket.create_server((HOST, each))
        except OSError as error:
            problem = os.strerror(error.errno) if error.errno else error
    if port is None:
        raise UsageError(f"no port from {PORT} to {PORT + PORTS - 1} is free; --port names another one")
    raise UsageError(f"--port {port} cannot be used ({problem}); name another one, or leave --port out")


def make(models: dict[str, Shown]) -> Any:
    """The page as an application for a server, ASGI's. Raises UsageError where gradio cannot be imported."""
    try:
        import gradio
        from fastapi import FastAPI

        from cvae.report.page_layout import build, looks
    except ImportError as error:
        raise UsageError(f"{NEEDED} ({first_line(error)})") from None
    hidden: dict[str, Any] = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False}
    return gradio.mount_gradio_app(FastAPI(openapi_url=None), build(models), "/", **hidden, **looks())


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Within it, gradio and PyTorch are imported, with no way to the network; the empty folders that they make go."""
    with TemporaryDirectory(prefix="cvae-page-") as place:
        os.environ.update(SILENT, GRADIO_TEMP_DIR=place, TORCHINDUCTOR_CACHE_DIR=place)
        yield


def serve(application: Any, connection: socket.socket) -> None:
    """Serve an application in a thread of its own, where the server leaves the signals alone; returns once it does."""
    import uvicorn  # comes with gradio

    headers = [("Content-Security-Policy", POLICY)]
    server = uvicorn.Server(uvicorn.Config(application, headers=headers, log_config=None, log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [connection]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)


def open_browser(url: str) -> None:
    """Open the page where there is a desktop; a browser in the terminal would take its place."""
    if sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(url)


@command("page.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    if find_spec("gradio") is None:
        raise UsageError(NEEDED)
    device = context.resolve_device(options.device)
    try:
        with interruptible(), context.prepare(device), listen(options.port) as connection:
            with leaving_nothing():
                models = read(options.named, options.runs, device)
                say(f"starting the page of {', '.join(models)}, which takes some seconds")
                application = make(models)
            port = connection.getsockname()[1]
            taken = f" (port {PORT} is taken)" if options.port is None and port != PORT else ""
            serve(application, connection)
            say(f"http://{HOST}:{port} has the page{taken}; Ctrl-C ends it")
            if not options.no_browser:
                open_browser(f"http://{HOST}:{port}")
            threading.Event().wait()
    except (Interrupted, KeyboardInterrupt):  # the second one where something else has chosen what Ctrl-C does
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
