"""`python -m cvae.report.page`: driven in a browser as by a person; and what it refuses before it comes to that."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from support.inprocess import TINY, call, call_train
from support.scripts import small_mnist
from support.trainings import ENVIRONMENT, contents, start

import cvae
from cvae.data.sources import load_test
from cvae.errors import UsageError
from cvae.report import page
from cvae.run.load import load_trained
from cvae.run.weights_file import as_safetensors
from cvae.settings import Settings

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    None in (BROWSER, DRIVER, find_spec("gradio"), find_spec("selenium")),
    reason="needs gradio, selenium, chromium and chromedriver",
)
PATIENCE = 60  # seconds for what takes one, however busy the machine is
Levels = np.ndarray[Any, np.dtype[np.uint8]]


WATCH = """
import sys

def look(event, words):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print(event, words, file=sys.stderr, flush=True)

sys.addaudithook(look)
"""  # what Python would do in the network, it says


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `runs/q1` and `runs/q2`; in `watch`, what tells of Python's use of the network."""
    folder = tmp_path_factory.mktemp("page")
    data = small_mnist(folder / "data")
    words = [*TINY, "--hidden", "32", "32", "--runs", folder / "runs"]
    assert call_train("--data", data, "--quadrants", "1", "2", *words).code == 0
    for name in ("empty", "watch"):
        (folder / name).mkdir()
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    return folder


def start_page(here: Path) -> "subprocess.Popen[str]":
    """The page under way, with the folder `empty` for temporary files."""
    path = os.pathsep.join([str(here / "watch"), ENVIRONMENT["PYTHONPATH"]])
    environment = {**ENVIRONMENT, "TMPDIR": str(here / "empty"), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "cvae.report.page", "--no-browser", "--device", "cpu"]
    return start(line, here, environment)


def address(process: "subprocess.Popen[str]") -> str:
    """Where the page is, as it says where another one has its port."""
    assert process.stdout is not None
    first, second = process.stdout.readline(), process.stdout.readline()
    assert first.startswith("starting the page of q1, q2"), process.communicate()
    assert second.startswith("http://127.0.0.1:"), process.communicate()
    assert second.endswith(f" has the page (port {page.PORT} is taken); Ctrl-C ends it\n")
    return second.split()[0]


class Person:
    """Somebody before the page, in Chromium."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))

    def open(self, url: str, width: int = 1000) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)
        self.until(lambda: self.all("#likelihoods table") and self.all("#completions img"))

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.driver.page_source[-2000:]
            time.sleep(0.02)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def the(self, selector: str, text: str = "") -> Any:
        """The one element, of those that have this text, that is seen."""
        (element,) = (each for each in self.all(selector) if text in each.text and each.is_displayed())
        return element

    def shown(self, name: str) -> list[Levels]:
        """The images of the result that have a name, grey levels or colours, as the browser was given them."""
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.src)"
        sources = self.driver.execute_script(script, f"#completions img.{name}")
        return [picture_in(each) for each in sources]

    def after(self, action: Callable[[], Any]) -> list[Levels]:
        """The completions that are seen after an action, once they are others, and the likelihoods too."""
        script = """return [
            [...document.querySelectorAll('#completions img')].map(each => each.src).join(),
            document.querySelector('#likelihoods table')?.outerHTML ?? '',
        ]"""
        before = self.driver.execute_script(script)
        action()
        self.until(lambda: not set(before) & set(self.driver.execute_script(script)))
        return self.shown("sample")

    def slide(self, label: str, *keys: str) -> list[Levels]:
        return self.after(lambda: self.the(f"input[type=range][aria-label*='{label}']").send_keys(*keys))

    def nats(self) -> list[list[float]]:
        """The table of log-likelihoods."""
        rows = [
            [cell.text for cell in row.find_elements("tag name", "td")] for row in self.all("#likelihoods tbody tr")
        ]
        return [[float(text.replace("−", "-")) for text in row] for row in rows]


def picture_in(url: str) -> Levels:
    """The levels of a PNG in a data URL, of one channel where it is grey."""
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as picture:
        levels = np.asarray(picture)
    return levels[..., 0] if (levels == levels[..., :1]).all() else levels


def levels(images: torch.Tensor) -> Levels:
    return (images * 255).round().to(torch.uint8).numpy()


def same(left: list[Levels], right: list[Levels] | Levels) -> bool:
    return len(left) == len(right) and all((a == b).all() for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def url(here: Path) -> Iterator[str]:
    """The page, which ends quietly with Ctrl-C, has written nothing and asked nothing of the network."""
    before = contents(here)
    with page.listen(None):
        process = start_page(here)
        try:
            url = address(process)
        except BaseException:
            process.kill()
            raise
    try:
        yield url
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert contents(here) == before
    assert not list((here / "empty").iterdir())


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    person = Person(tmp_path_factory.mktemp("profile"))
    yield person
    person.driver.quit()


@in_a_browser
def test_digit_and_sliders(here: Path, url: str, person: Person) -> None:
    """What is seen is what the library computes; the sliders do what they say."""
    from selenium.webdriver.common.keys import Keys

    person.open(url)
    model, test = cvae.load(here / "runs/q1"), load_test(Settings(data=str(here / "data"))).images
    observed = model.split.observed.numpy()
    found = model.complete(test[0], 25, seed=0)[:, 0]
    first = person.shown("sample")
    assert same(first, levels(found[:16]))
    assert (person.shown("picture")[0] == test[0].numpy()).all()
    given = person.shown("given")[0]
    assert (given[observed] == test[0].numpy()[observed][:, None]).all()
    assert len(np.unique(given[~observed], axis=0)) == 1
    assert (person.shown("mean")[0] == levels(found[:16].mean(0))).all()
    assert (person.shown("spread")[0] == levels(2 * found[:16].std(0, correction=0))).all()
    x, y = model.split.split(torch.cat([test[:1] / 255, found[:16]]))
    cvae_nats = model.log_likelihood(torch.cat([test[:1] / 255, found[:16]]), 100, seed=0)
    guess = model.baseline_net(x[:1]).double().sigmoid()
    nn_nats = (y[:1] * guess.log() + (1 - y[:1]) * (1 - guess).log()).sum().item()
    highest = (y.xlogy(y) + (1 - y).xlogy(1 - y)).sum(1)
    assert torch.tensor(person.nats())[:, 0].tolist() == pytest.approx(
        [cvae_nats[0].item(), nn_nats, cvae_nats[1:].mean().item()], abs=0.051
    )
    for log_p, most, distance in person.nats():
        assert distance >= 0
        assert distance == pytest.approx(most - log_p, abs=0.11)
    assert person.nats()[0][1] == person.nats()[1][1] == pytest.approx(highest[0].item(), abs=0.051)

    other = person.slide("Random seed", Keys.ARROW_RIGHT)
    assert not same(other, first)
    assert all((each[observed] == test[0].numpy()[observed]).all() for each in other)
    assert same(person.slide("Random seed", Keys.ARROW_LEFT), first)
    most = person.slide("Number of completions", Keys.END)
    assert same(most, levels(found))
    alike = person.slide("Temperature", Keys.HOME)
    assert same(alike, [alike[0]] * 25)
    assert not person.shown("spread")[0].any()
    assert (person.shown("mean")[0] == alike[0]).all()
    assert same(person.slide("Number of completions", Keys.HOME), alike[:1])
    person.slide("Number of the digit", Keys.ARROW_RIGHT)
    assert (person.shown("picture")[0] == test[1].numpy()).all()


@in_a_browser
def test_another_mask_is_another_model(here: Path, url: str, person: Person) -> None:
    """A model is only ever given what it was trained for."""
    person.open(url)
    found = person.after(lambda: person.the("label", "2 quadrants (left half)").click())
    model = cvae.load(here / "runs/q2")
    test = load_test(Settings(data=str(here / "data"))).images
    assert same(found, levels(model.complete(test[0], 25, seed=0)[:16, 0]))
    assert person.the("input[aria-label='Model trained for it']").get_attribute("value") == "q2"
    given, observed = person.shown("given")[0], model.split.observed.numpy()
    assert (given[observed] == test[0].numpy()[observed][:, None]).all()
    assert not (given[~observed] == test[0].numpy()[~observed][:, None]).all(1).any()


@in_a_browser
def test_drawing_and_photograph(here: Path, url: str, person: Person, tmp_path: Path) -> None:
    """Both are shown as `cvae.as_digit` makes a digit of them; what is no digit is said to be none."""
    from selenium.webdriver import ActionChains

    person.open(url)
    person.the("button[role=tab]", "Draw").click()
    person.until(lambda: person.all("#completions .problem"))
    assert "Draw a digit" in person.the("#completions .problem").text
    pad = person.the("#pad canvas")

    def draw() -> None:
        pen = ActionChains(person.driver, duration=20).move_to_element_with_offset(pad, -50, -80).click_and_hold()
        for across, down in ((100, 0), (-60, 80), (-10, 80)):
            pen.move_by_offset(across, down)
        pen.release().perform()

    found = person.after(draw)
    assert len(found) == 16
    with Image.open(io.BytesIO(base64.b64decode(pad.screenshot_as_base64))) as screen:
        assert np.asarray(screen.convert("L")).min() < 50
    content = person.driver.execute_script("return document.querySelector('#pad canvas').toDataURL('image/png')")
    digit = cvae.as_digit(Image.fromarray(picture_in(content)))
    assert (person.shown("picture")[0] == digit.numpy()).all()
    person.the("#pad .clear").click()
    person.until(lambda: person.all("#completions .problem"))

    sheet = Image.new("RGB", (300, 400), (230, 225, 210))
    ImageDraw.Draw(sheet).line([(90, 120), (190, 120), (120, 290)], fill=(30, 30, 60), width=14, joint="curve")
    sheet.save(tmp_path / "seven.jpg", quality=95)
    (tmp_path / "text.jpg").write_text("no picture")
    (opened,) = person.all("#pad input[type=file]")
    opened.send_keys(str(tmp_path / "seven.jpg"))
    person.until(lambda: person.shown("picture"))
    expected = cvae.as_digit(tmp_path / "seven.jpg").numpy()
    assert abs(person.shown("picture")[0].astype(int) - expected).mean() < 1  # browsers decode JPEG in their own way
    opened.send_keys(str(tmp_path / "text.jpg"))
    person.until(lambda: person.all("#completions .problem"))
    assert "cannot be read" in person.the("#completions .problem").text


@in_a_browser
def test_nothing_leaves_the_machine(url: str, person: Person) -> None:
    """No request goes elsewhere, nothing fails, and it fits a phone."""
    for width in (1000, 390):
        person.driver.get_log("performance")
        person.open(url, width)
        assert person.driver.execute_script("return document.documentElement.scrollWidth") <= width
        asked = [json.loads(each["message"])["message"] for each in person.driver.get_log("performance")]
        places = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
        assert len(places) > 5
        assert not [each for each in places if not each.startswith((url, "data:", "blob:"))]
    assert not [each for each in person.driver.get_log("browser") if each["level"] == "SEVERE"]
    policies = person.driver.execute_script(
        "return fetch('/').then(answer => answer.headers.get('content-security-policy'))"
    )
    assert policies == page.POLICY


@in_a_browser
def test_new_samples_are_seen_soon(url: str, person: Person) -> None:
    """From the slider's movement until all 16 images are decoded and painted; the time is for the reader."""
    from selenium.webdriver.common.keys import Keys

    person.open(url)
    person.driver.execute_script("""
        window.times = [];
        const images = () => [...document.querySelectorAll("#completions img.sample")];
        document.addEventListener("input", () => {
            const begun = performance.now(), before = images().map(image => image.src).join();
            const look = async () => {
                if (images().map(image => image.src).join() === before) return requestAnimationFrame(look);
                await Promise.all(images().map(image => image.decode()));
                requestAnimationFrame(() => requestAnimationFrame(() => window.times.push(performance.now() - begun)));
            };
            look();
        }, true);
    """)
    for _ in range(5):
        person.slide("Random seed", Keys.ARROW_RIGHT)
    person.until(lambda: person.driver.execute_script("return window.times.length") == 5)
    times = sorted(person.driver.execute_script("return window.times"))
    print(f"\n16 completions are seen after {times[2]:.0f} ms, at most {times[-1]:.0f} ms")
    assert times[2] < 2000


def test_ports() -> None:
    """The first one that is free, unless one is named."""
    with page.listen(None) as first, page.listen(None) as second:
        assert first.getsockname()[0] == second.getsockname()[0] == "127.0.0.1"
        taken, other = first.getsockname()[1], second.getsockname()[1]
        assert page.PORT <= taken < other
        with pytest.raises(UsageError, match=f"--port {taken} cannot be used"):
            page.listen(taken)
    with page.listen(0) as any_free:
        assert any_free.getsockname()[1] > 0


def test_what_is_refused(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is shown."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(page, "COME_WITH", ())
    monkeypatch.setattr(page, "find_spec", lambda name: True)

    def refusal(*words: str | Path) -> tuple[int, str]:
        ended = call(page, *words, "--device", "cpu", "--no-browser")
        assert ended.err.startswith("page.py: ")
        assert ended.err.count("\n") == 1
        return ended.code, ended.err.removeprefix("page.py: ").rstrip("\n")

    assert refusal("q1", "nothing") == (3, "runs/nothing is no run folder: it has no config.json")
    assert refusal("none.safetensors")[0] == 3
    none = f"{tmp_path}: has no run to be shown; python train.py trains one"
    assert refusal("--runs", tmp_path) == (3, none)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal("--port", str(port))[0] == 2
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert refusal() == (2, "the page needs gradio: pip install gradio")


def test_runs_at_hand(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that come with the program too. A damaged one is left out with one line, and not one without its images."""
    monkeypatch.setattr(page, "COME_WITH", (tmp_path / "program",))
    passed_on = tmp_path / "program/reference/q2/model.safetensors"
    passed_on.parent.mkdir(parents=True)
    passed_on.write_bytes(as_safetensors(load_trained(here / "runs/q2")))
    shutil.copytree(here / "runs", tmp_path / "runs")
    (tmp_path / "runs/q2/best.pt").write_bytes(b"nothing")
    config = json.loads((tmp_path / "runs/q1/config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "gone")
    (tmp_path / "runs/q1/config.json").write_text(json.dumps(config))
    models = page.read([], tmp_path / "runs", torch.device("cpu"))
    assert {name: shown.mask for name, shown in models.items()} == {
        "q1": "1 quadrant (bottom left)",
        "reference/q2": "2 quadrants (left half)",
    }
    assert capsys.readouterr().err.count("\n") == 1
    assert models["q1"].test is None
    assert "gone: there is no such folder" in models["q1"].missing


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        page.parse(["--port", "70000"])
    assert "--port has to be from 0" in capsys.readouterr().err
