"""`python -m cvae.report.page`: driven in a browser as by a person; and what it refuses."""

import base64
import http.client
import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import photograph
from support.inprocess import call
from support.trainings import ENVIRONMENT, contents, start

import cvae
from cvae.data.masks import quadrants
from cvae.data.sources import load_test
from cvae.data.tasks import FixedMask
from cvae.errors import DataError
from cvae.model.networks import build
from cvae.report import page
from cvae.report.export import export_folder
from cvae.run.load import Trained
from cvae.settings import Settings

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    None in (BROWSER, DRIVER, find_spec("gradio"), find_spec("selenium")),
    reason="needs gradio, selenium, chromium and chromedriver",
)
PATIENCE = 60  # seconds for what takes one, however busy the machine is
WATCH = """
import sys
calls = "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"
sys.addaudithook(lambda event, words: event in calls and print(event, words, file=sys.stderr, flush=True))
"""  # what Python would do in the network, it says


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of random weights, `runs/q1` and `runs/q2`."""
    folder = tmp_path_factory.mktemp("page")
    for count in (1, 2):
        settings = Settings(quadrants=count, hidden=(32, 32), latent_dim=4)
        torch.manual_seed(count)
        model = build(FixedMask(quadrants(count), f"{count} quadrants"), settings).requires_grad_(False)
        export_folder(folder / f"runs/q{count}", Trained(model, settings, {"height": 28, "width": 28}))
    (folder / "temporary").mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    return folder


@pytest.fixture(scope="module")
def url(here: Path) -> Iterator[str]:
    """The page, which ends quietly with Ctrl-C, has left no file and asked nothing of the network."""
    before, path = contents(here), f"{here}:{ENVIRONMENT['PYTHONPATH']}"
    more = {"TMPDIR": str(here / "temporary"), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "cvae.report.page", "q1", "q2", "--no-browser", "--device", "cpu"]
    with page.listen(None):
        process: Any = start(command, here, {**ENVIRONMENT, **more})
        lines = [process.stdout.readline() for _ in range(2)]
    try:
        assert lines[0] == "starting the page of q1, q2, which takes some seconds\n"
        assert lines[1].endswith(" has the page; Ctrl-C ends it\n")
        yield lines[1].split()[0]
        assert list((here / "temporary").glob("cvae-page-*"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, err, contents(here)) == (130, "", before)
    assert not list((here / "temporary").glob("cvae-page-*"))


class Person:
    """Somebody before the page, in Chromium."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def open(self, url: str, width: int = 1000) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)
        self.until(lambda: self.all("#likelihoods td") and self.all("#completions img"))
        assert self.driver.execute_script("return document.documentElement.scrollWidth") <= width

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.driver.page_source[-2000:]
            time.sleep(0.02)

    def all(self, selector: str) -> Any:
        return self.driver.find_elements("css selector", selector)

    def click(self, selector: str, text: str = "") -> None:
        """Click the one element of those that has this text and is seen."""
        (element,) = (each for each in self.all(selector) if text in each.text and each.is_displayed())
        element.click()

    def images(self, place: str) -> list[np.ndarray]:
        """The grey levels, or else the colours, of the pictures that the browser was given there."""
        script = "return [...document.querySelectorAll(arguments[0])].map(each => each.src.split(',')[1])"
        return [as_levels(png) for png in self.driver.execute_script(script, f"{place} img")]

    def after(self, action: Callable[[], Any]) -> list[np.ndarray]:
        """The completions that are seen after an action, once they are others, and the likelihoods too."""
        script = """return ['#completions', '#likelihoods'].map(
            place => [...document.querySelectorAll(`${place} :is(img, td)`)].map(e => e.src ?? e.innerText).join())"""
        before = self.driver.execute_script(script)
        action()
        self.until(lambda: not {*before, ""} & set(self.driver.execute_script(script)))
        return self.images("#completions")

    def slide(self, label: str, key: str) -> list[np.ndarray]:
        (slider,) = self.all(f"input[type=range][aria-label*='{label}']")
        return self.after(lambda: slider.send_keys(key))

    def problem(self) -> str:
        """What is said to be wrong, once there is no picture."""
        self.until(lambda: not self.all("#views img") and self.all("#problem")[0].text)
        return str(self.all("#problem")[0].text)


def as_levels(png: str) -> np.ndarray:
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    return levels[..., 0] if (levels == levels[..., :1]).all() else levels


def rounded(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).numpy()


def same(left: list[np.ndarray], right: list[np.ndarray] | np.ndarray) -> bool:
    return len(left) == len(right) and all((a == b).all() for a, b in zip(left, right, strict=True))


@in_a_browser
def test_in_the_browser(here: Path, url: str, tmp_path: Path) -> None:
    """On all three tabs what is seen is what the library computes; nothing goes elsewhere, and it fits a phone."""
    person = Person(tmp_path / "profile")
    try:
        person.open(url)
        look_at_test_digits(person, here / "runs")
        person.click("button[role=tab]", "Draw")
        draw_and_clear(person)
        person.click("button[role=tab]", "Photograph")
        open_photographs(person, tmp_path)
        assert not [entry for entry in person.driver.get_log("browser") if entry["level"] == "SEVERE"]
        person.open(url, width=390)  # which stops gradio in the middle of its drawing
        events = [json.loads(entry["message"])["message"] for entry in person.driver.get_log("performance")]
        places = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert len(places) > 5
        assert not [place for place in places if not place.startswith((url, "data:", "blob:", "chrome://"))]
        policy = "return fetch('/').then(answer => answer.headers.get('content-security-policy'))"
        assert person.driver.execute_script(policy) == page.POLICY
    finally:
        person.driver.quit()


def look_at_test_digits(person: Person, runs: Path) -> None:
    """The pictures and the table are the library's; the controls do what they say."""
    from selenium.webdriver.common.keys import Keys

    model, test = cvae.load("q1", runs=runs), load_test(Settings()).images
    observed, image = model.task.observed.numpy(), test[0].numpy()
    expected = model.complete(test[0], 16, seed=0)[:, 0]
    assert same(person.images("#completions"), rounded(expected))
    picture, given, guess, mean, spread = person.images("#views")
    x, y, *_ = model.task.batch(model.task.rows(torch.cat([test[:1] / 255, expected])))
    probability = model.baseline_net(x[:1]).double().sigmoid()
    assert (picture == image).all()
    assert (given[observed] == image[observed][:, None]).all()
    assert len(np.unique(given[~observed], axis=0)) == 1
    assert (abs(guess[~observed] - 255 * probability[0].numpy()) < 0.51).all()
    assert (mean == rounded(expected.mean(0))).all()
    assert (spread == rounded(2 * expected.std(0, correction=0))).all()

    nats = model.log_likelihood(torch.cat([test[:1] / 255, expected]), 100, seed=0)
    baseline = (y[:1] * probability.log() + (1 - y[:1]) * (1 - probability).log()).sum()
    highest = (y.xlogy(y) + (1 - y).xlogy(1 - y)).sum(1).double()
    rows = torch.stack([nats[0], highest[0], baseline, highest[0], nats[1:].mean(), highest[1:].mean()]).view(3, 2)
    cells = [float(cell.text.replace("−", "-")) for cell in person.all("#likelihoods td:not(:first-child)")]
    table = torch.tensor(cells, dtype=torch.float64).view(3, 3)
    torch.testing.assert_close(table[:, :2], rows, atol=0.051, rtol=0)  # one decimal is printed
    torch.testing.assert_close(table[:, 2], rows[:, 1] - rows[:, 0], atol=0.051, rtol=0)

    assert same(person.slide("Random seed", Keys.ARROW_RIGHT), rounded(model.complete(test[0], 16, seed=1)[:, 0]))
    assert same(person.slide("Number of completions", Keys.END), rounded(model.complete(test[0], 25, seed=1)[:, 0]))
    alike = person.slide("Temperature", Keys.HOME)
    assert same(alike, [alike[0]] * 25)
    person.slide("Number of the digit", Keys.ARROW_RIGHT)
    assert (person.images("#views")[0] == test[1].numpy()).all()
    person.click("#run input")
    completions = person.after(lambda: person.click("#run [role=option]", "2 quadrants (q2)"))
    assert same(completions, rounded(cvae.load("q2", runs=runs).complete(test[1], 25, 1, temperature=0)[:, 0]))


def draw_and_clear(person: Person) -> None:
    """The drawing is shown as `cvae.as_digit` makes a digit of it."""
    from selenium.webdriver import ActionChains

    assert person.problem() == "Draw one digit."
    person.until(lambda: person.all("#pad [aria-label='Color']") or len(person.all("#pad .quite-round")) > 2)
    pad = person.all("#pad canvas")[0]
    pen = ActionChains(person.driver, duration=20).move_to_element_with_offset(pad, -50, -80).click_and_hold()
    for across, down in ((100, 0), (-60, 80), (-10, 80)):
        pen.move_by_offset(across, down)
    assert len(person.after(pen.release().perform)) == 25
    expected = cvae.as_digit(Image.fromarray(as_levels(pad.screenshot_as_base64)).convert("L")).numpy().astype(int)
    assert abs(person.images("#views")[0] - expected).mean() < 16  # the screenshot is a little larger
    person.click("#pad [aria-label='Clear canvas']")
    assert person.problem() == "Draw one digit."


def open_photographs(person: Person, folder: Path) -> None:
    """A photograph is shown as `cvae.as_digit` makes a digit of it; another file is said to be none."""
    photograph(folder / "seven.jpg")
    (folder / "text.jpg").write_text("no picture")
    person.until(lambda: person.all("#photograph input[type=file]"))
    person.all("#photograph input[type=file]")[0].send_keys(str(folder / "seven.jpg"))
    person.until(lambda: person.images("#views"))
    assert (person.images("#views")[0] == cvae.as_digit(folder / "seven.jpg").numpy()).all()
    person.all("#photograph input[type=file]")[0].send_keys(str(folder / "text.jpg"))
    assert person.problem().startswith("text.jpg: cannot be read as a picture")


@in_a_browser
def test_other_websites_and_large_uploads_are_refused(here: Path, url: str) -> None:
    """On every route; nothing of what they send is kept."""
    address, upload = url.removeprefix("http://"), "/gradio_api/upload"
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="secret.png"\r\n\r\nsecret\r\n--x--\r\n'

    def answer(path: str, **more: str) -> int:
        with closing(http.client.HTTPConnection(address, timeout=PATIENCE)) as connection:
            headers = {"Host": address, "Content-Type": "multipart/form-data; boundary=x"}
            headers |= {key.replace("_", "-"): value for key, value in more.items()}
            is_chunked = "Transfer-Encoding" in headers
            method, body = ("POST", iter([form]) if is_chunked else form) if "api" in path else ("GET", b"")
            connection.request(method, path, body, headers, encode_chunked=is_chunked)
            return connection.getresponse().status

    for path in ("/", "/config", upload, "/gradio_api/queue/join", "/nowhere"):
        for origin in ("http://evil.example", "null", "https://" + address, "http://127.0.0.1:1"):
            assert answer(path, Origin=origin) == 403
        for host in ("evil.example", address.replace("127.0.0.1", "evil.example"), "127.0.0.1.evil.example"):
            assert answer(path, Host=host) == answer(path, Host=host, Origin=f"http://{host}") == 403
    assert answer(upload, Content_Length=str(page.LARGEST_REQUEST + 1)) == 413
    assert answer(upload, Transfer_Encoding="chunked") == 413
    assert not list((here / "temporary").rglob("secret*"))
    assert answer("/", Host=address.replace("127.0.0.1", "localhost")) == 200
    assert answer(upload, Origin=url) == 200
    assert len(list((here / "temporary").rglob("secret.png"))) == 1


def test_ports_and_runs_at_hand(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first free port; all runs, those that come with the program too. One that is damaged costs one line."""
    shutil.copytree(here / "runs", tmp_path / "runs")
    (tmp_path / "runs/q2/model.safetensors").write_bytes(b"nothing")
    shutil.copytree(here / "runs/q2", tmp_path / "program/reference/q2")
    monkeypatch.setattr(page, "COME_WITH", (tmp_path / "program",))
    monkeypatch.chdir(tmp_path)
    models = page.read([], Path("runs"), torch.device("cpu"))
    masks = {name: model.task.name for name, (model, *_) in models.items()}
    assert masks == {"q1": "1 quadrant", "reference/q2": "2 quadrants"}
    with pytest.raises(DataError, match="nowhere"):
        page.chosen(models["q1"]._replace(settings=Settings(data="nowhere")), page.TEST, 0, None, None)
    assert torch.equal(*(page.chosen(models["q1"], page.TEST, number, None, None) for number in (0, 10_000)))
    monkeypatch.setattr(page, "COME_WITH", ())
    (tmp_path / "empty").mkdir()
    with page.listen(None) as first, page.listen(None) as second:
        (host, taken), (_, other) = first.getsockname(), second.getsockname()
        assert (host, page.PORT <= taken < other) == ("127.0.0.1", True)
        for words, code, reason in (
            (["q1", "q2"], 3, "runs/q2/model.safetensors: "),
            (["nothing"], 3, "runs/nothing is no run folder"),
            (["--runs", "empty"], 3, "empty: has no run to be shown; python train.py trains one"),
            (["--port", str(taken)], 2, f"no port from {taken} to {taken} is free"),
            (["--port", "70000"], 2, "no port from 70000 to 70000 is free"),
        ):
            ended = call(page, *words, "--device", "cpu", "--no-browser")
            assert (ended.code, ended.err.count("\n")) == (code, 1)
            assert ended.err.startswith(f"page.py: {reason}"), ended.err
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    assert call(page) == (2, "", "page.py: the page needs gradio: pip install gradio\n")
