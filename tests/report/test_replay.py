"""What a run leaves to look at: its replay, its curves, and what it has come to; and the command that draws them."""

import io
import json
import math
import shutil
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence
from support.inprocess import TINY, Ended, call, call_train, interrupted_after, make_tiny_data
from support.trainings import contents, events
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cvae.context import generator
from cvae.data.masks import Split, quadrants
from cvae.data.names import mnist
from cvae.data.sources import load_train
from cvae.model.likelihood import noise
from cvae.report import replay
from cvae.report.curves import VALIDATION, best_epoch, draw_curves, panels, terms, ticks
from cvae.report.figures import completions
from cvae.run.folder import read_json, read_settings
from cvae.run.load import load
from train import NUM_DIGITS, NUM_SAMPLES

FIGURES = {"learning.gif", "curves.png", "completions.png"}
EPOCHS = [("baseline", 1), ("baseline", 2), ("cvae", 1), ("cvae", 2), ("cvae", 3)]
STEP = 255 / 31  # between two greys of the replay


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose best epoch is not its last: the images for validation are negatives."""
    place = tmp_path_factory.mktemp("place")
    data = make_tiny_data(place / "data", contrary=True)
    words = ["--data", data, *TINY, "--baseline-epochs", "2", "--epochs", "3", "--precision", "fp32"]
    ended = call_train(*words, "--runs", place, "--name", "done")
    assert (ended.code, ended.err) == (0, "")
    assert read_json(place / "done/summary.json")["best_epoch"] == 1
    return place / "done"


def call_replay(*words: str | Path) -> Ended:
    return call(replay, *words)


def said(ended: Ended) -> list[str]:
    """What it complained of."""
    assert all(line.startswith("cvae.report.replay: ") for line in ended.err.splitlines())
    return [line.removeprefix("cvae.report.replay: ") for line in ended.err.splitlines()]


def logged(folder: Path) -> dict[tuple[str, int], Tensor]:
    """The pictures in a run's events, uint8 `[height, width, 3]`, as TensorBoard has them."""
    return {
        (tag.split("/")[0], step): pixels(Image.open(io.BytesIO(png)))
        for tag, images in events(folder)["images"].items()
        for step, png in images
    }


def pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3
    )


def shown(folder: Path) -> list[Tensor]:
    with Image.open(folder / "learning.gif") as replayed:
        return [pixels(frame) for frame in ImageSequence.Iterator(replayed)]


def is_shown(picture: Tensor, frame: Tensor) -> bool:
    """Whether it is in a frame, below its line, but for the greys that the palette does not have."""
    height, width = picture.shape[:2]
    part = frame[replay.HEADER :][:height, :width].int()
    return bool(((part - picture.int()).abs() <= STEP).all())


# What a finished run leaves


def test_replay_of_a_finished_run(done: Path) -> None:
    """A frame for each epoch, with the epoch's picture and a line of its own above; the last one stays for longer."""
    pictures, frames = logged(done), shown(done)
    assert list(pictures) == EPOCHS
    assert len(frames) == len(EPOCHS)
    assert all(is_shown(pictures[key], frame) for key, frame in zip(EPOCHS, frames, strict=True))
    assert not is_shown(pictures["cvae", 1], frames[-1])
    headers = [frame[: replay.HEADER] for frame in frames]
    assert not any(torch.equal(one, other) for i, one in enumerate(headers) for other in headers[:i])
    with Image.open(done / "learning.gif") as replayed:
        assert replayed.info["loop"] == 0  # for ever
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(replayed)]
    assert times[-1] > 5 * times[0]
    assert len(set(times[:-1])) == 1


def test_completions_are_those_of_the_best_weights(done: Path) -> None:
    """They are of the first validation images, by the model as anybody loads it."""
    settings, model = read_settings(done), load(done)
    images = load_train(settings).validation[:NUM_DIGITS]
    x, _ = model.split.split(images / 255)
    eps = noise(NUM_SAMPLES, len(images), model, generator(torch.device("cpu"), settings.seed, "picture"))
    expected = completions(images, model.split, model.baseline_net(x).sigmoid(), model.completions(x, eps))
    found = pixels(Image.open(done / "completions.png")).permute(2, 0, 1)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(found, logged(done)["cvae", 3].permute(2, 0, 1))


def test_command_draws_the_same_again(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "again"))
    before = {name: content for name, (content, _) in contents(run).items()}
    for name in FIGURES:
        (run / name).unlink()
    for word in (run, tmp_path):
        ended = call_replay(word)
        assert (ended.code, ended.out, ended.err) == (0, f"{run}: drawn\n", "")
        assert {name: content for name, (content, _) in contents(run).items()} == before


def test_failure_to_draw_is_a_warning(done: Path, tmp_path: Path) -> None:
    """The run is finished all the same."""
    data = make_tiny_data(tmp_path / "data")
    words = ["--data", data, *TINY, "--runs", tmp_path]
    with interrupted_after("cvae", 2):
        assert call_train(*words).code == 143
    run = tmp_path / "q1"
    assert not contents(run).keys() & FIGURES
    (run / ".curves.png.tmp").mkdir()  # nothing can be written in its place
    ended = call_train("--resume", run)
    assert ended.code == 0
    assert ended.line.startswith(f"{run}: its figures are not all drawn ({run}/curves.png: cannot be written (")
    assert (run / "summary.json").exists()
    ended = call_replay(run)
    assert (ended.code, said(ended)[0].startswith(f"{run}/curves.png: cannot be written (")) == (5, True)


def test_overwrite_takes_the_figures_too(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "q1"))
    assert contents(run).keys() >= FIGURES
    with interrupted_after("baseline", 1):
        words = ["--data", read_settings(done).data or "", *TINY, "--runs", tmp_path, "--overwrite"]
        assert call_train(*words).code == 143
    assert not contents(run).keys() & FIGURES


# Of what there is


def cut_metrics(run: Path, lines: int) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def spoil_events(run: Path, spoil: str) -> None:
    [path] = run.glob("events.*")
    content = path.read_bytes()
    half = len(content) // 2
    if spoil == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": content[:half], "text": b"no events", "flip": content[:half] + b"\xff" * 9 + content[half + 9 :]}[
                spoil
            ]
        )


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_run_that_is_not_finished(done: Path, tmp_path: Path, epochs: int) -> None:
    """Its baseline alone, or an epoch of the CVAE; the log may be ahead by an epoch's events."""
    run = Path(shutil.copytree(done, tmp_path / "run", ignore=lambda *_: [*FIGURES, "summary.json"]))
    cut_metrics(run, epochs)
    ended = call_replay(run)
    assert (ended.code, ended.err) == (0, "")
    pictures, frames = logged(run), shown(run)
    assert len(frames) == epochs
    assert all(is_shown(pictures[key], frame) for key, frame in zip(EPOCHS, frames, strict=False))
    best = ("baseline", 1) if epochs < 3 else ("cvae", 1)
    assert torch.equal(pixels(Image.open(run / "completions.png")), pictures[best])


@pytest.mark.parametrize("spoil", ["missing", "cut", "flip", "text"])
def test_events_that_are_damaged(done: Path, tmp_path: Path, spoil: str) -> None:
    """What can be read is drawn, and what is missing is said; the curves need no events."""
    run = Path(shutil.copytree(done, tmp_path / "run", ignore=lambda *_: FIGURES))
    spoil_events(run, spoil)
    ended = call_replay(run)
    assert (ended.code, ended.out) == (3, f"{run}: drawn as far as its log goes\n")
    assert (run / "curves.png").read_bytes() == (done / "curves.png").read_bytes()
    first, *rest = said(ended)
    if spoil in ("missing", "text"):
        assert first == f"{run}: its events have no pictures; learning.gif and completions.png are not drawn"
        assert rest == []
        assert contents(run).keys() & FIGURES == {"curves.png"}
    else:
        count = len(shown(run))
        assert 1 <= count < len(EPOCHS)
        assert first == f"{run}: its events have pictures of {count} of 5 epochs; others are not shown"
        assert (run / "completions.png").exists() == (not rest)


@pytest.mark.parametrize("content", ["", None, "{}\n", '{"phase": "cvae", "epoch": "x"}\n', "no JSON\n", "[1]\n"])
def test_metrics_with_nothing_to_draw(done: Path, tmp_path: Path, content: str | None) -> None:
    """Other runs are drawn."""
    for name in ("one", "two"):
        shutil.copytree(done, tmp_path / name, ignore=lambda *_: FIGURES)
    metrics = tmp_path / "one/metrics.jsonl"
    metrics.unlink() if content is None else metrics.write_text(content)
    ended = call_replay(tmp_path, "nowhere")
    assert (ended.code, ended.out) == (3, f"{tmp_path}/two: drawn\n")
    nowhere, one = said(ended)
    assert nowhere.startswith("runs/nowhere: there is no such folder")
    assert one.startswith(str(metrics))
    assert not contents(tmp_path / "one").keys() & FIGURES


def made(folder: Path, losses: dict[tuple[str, int], float | None], *logs: dict[tuple[str, int], Any]) -> Path:
    """A folder with a log of these losses, and an event file for each of these sets of pictures.

    A picture: uint8 `[3, height, width]`, or what is to be in the place of its PNG file.
    """
    folder.mkdir()
    (folder / "config.json").touch()
    terms = {"baseline": "log_likelihood", "cvae": "elbo"}
    records = [
        {
            "phase": phase,
            "epoch": epoch,
            **{f"{part}_{terms[phase]}": loss and -loss for part in ("train", "validation")},
        }
        for (phase, epoch), loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for number, pictures in enumerate(logs):
        with SummaryWriter(str(folder), filename_suffix=f".{number}.train") as writer:
            for (phase, epoch), picture in pictures.items():
                if isinstance(picture, bytes):
                    value = Summary.Value(tag=f"{phase}/completions", image=Summary.Image(encoded_image_string=picture))
                    writer.file_writer.add_summary(Summary(value=[value]), epoch)  # type: ignore[attr-defined]
                else:
                    writer.add_image(f"{phase}/completions", picture, epoch)
    return folder


def grey(level: int) -> Tensor:
    return torch.full((3, 40, 50), level, dtype=torch.uint8)


def test_epoch_that_was_logged_twice_counts_once(tmp_path: Path) -> None:
    """As by a run that was cut in an epoch and resumed: its later picture, from the later file."""
    losses: dict[tuple[str, int], float | None] = {("cvae", n): 9.0 - n for n in (1, 2, 3)}
    first, second = ({("cvae", n): grey(level + n) for n in epochs} for level, epochs in ((100, (1, 2)), (200, (2, 3))))
    run = made(tmp_path / "run", losses, first, second)
    assert call_replay(run).code == 0
    levels = [int(frame[-1, 0, 0]) for frame in shown(run)]
    assert levels == pytest.approx([101, 202, 203], abs=STEP)
    assert pixels(Image.open(run / "completions.png"))[0, 0, 0] == 203


@pytest.mark.parametrize("what", ["cut", "monstrous", "no picture"])
def test_damaged_and_monstrous_pictures_are_left_out(tmp_path: Path, what: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()).save(buffer, "PNG")
    png = buffer.getvalue()
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    monstrous = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    bad = {"cut": png[: len(png) // 2], "monstrous": monstrous, "no picture": b"GIF89a"}[what]
    losses: dict[tuple[str, int], float | None] = {("cvae", n): 9.0 - n for n in (1, 2)}
    run = made(tmp_path / "run", losses, {("cvae", 1): png, ("cvae", 2): bad})
    ended = call_replay(run)
    assert ended.code == 3
    assert said(ended) == [
        f"{run}: its events have pictures of 1 of 2 epochs; others are not shown",
        f"{run}: its events have no picture of the best epoch; completions.png is not drawn",
    ]
    assert len(shown(run)) == 1


def test_long_training_in_a_hundred_frames(tmp_path: Path) -> None:
    keys = [("baseline", n) for n in range(1, 52)] + [("cvae", n) for n in range(1, 201)]
    run = made(tmp_path / "run", dict.fromkeys(keys, 5.0), {key: grey(i) for i, key in enumerate(keys)})
    assert call_replay(run).code == 0
    levels = [int(frame[-1, 0, 0]) for frame in shown(run)]
    assert len(levels) == 84
    assert levels == pytest.approx(list(range(1, 251, 3)), abs=STEP)


def test_size_of_a_replay(tmp_path: Path) -> None:
    """40 epochs on MNIST, each with other completions: less than 1.5 MB, at the width of a README."""
    split = Split(quadrants(1))
    images = mnist("t10k")[:700] / 255
    blurred = torch.nn.functional.avg_pool2d(images[:, None], 3, stride=1, padding=1)[:, 0]
    y = split.split(blurred)[1]
    digits, y_hat = (images[:10] * 255).byte(), y[:10]
    pictures = {("baseline", n): completions(digits, split, y[n : n + 10]) for n in range(1, 11)}
    pictures |= {("cvae", n): completions(digits, split, y_hat, y[20 * n :][:50].view(5, 10, -1)) for n in range(1, 31)}
    run = made(tmp_path / "run", dict.fromkeys(pictures, 99.123), pictures)
    assert call_replay(run).code == 0
    assert 100_000 < (run / "learning.gif").stat().st_size < 1_500_000
    with Image.open(run / "learning.gif") as replayed:
        assert replayed.n_frames == 40  # type: ignore[attr-defined]
        assert 600 < replayed.width < 840


# Curves


def test_terms_are_printed_as_losses() -> None:
    record = {
        "epoch": 3,
        "train_elbo": -4.0,
        "validation_elbo": -5.5,
        "validation_log_likelihood": -3.0,
        "seconds": 1.0,
    }
    record |= {"validation_kl": 2.5}
    assert terms(record) == {"-elbo": 5.5, "-log likelihood": 3.0, "kl": 2.5}
    assert terms(record, "train") == {"-elbo": 4.0}
    assert math.isnan(terms({"validation_iwae": None})["-iwae"])


def test_best_epoch_is_the_first_lowest_that_is_a_number() -> None:
    losses = {1: None, 2: -7.0, 3: -6.0, 4: -6.0, 5: None}
    assert best_epoch({epoch: {"validation_gsnn": value, "validation_kl": 1.0} for epoch, value in losses.items()}) == 3


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_and_not_too_many(seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    low, width = (10 ** (6 * torch.rand(2, generator=dice) - 3)).tolist()
    found = ticks(low, low + width, 5)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-9 <= tick <= low + width + 1e-9 for tick in found)
    step = found[1] - found[0]
    assert all(b - a == pytest.approx(step) for a, b in pairwise(found))
    assert float(f"{step:.0e}") == pytest.approx(step)  # one digit
    assert f"{step:.0e}"[0] in "125"
    assert all(tick / step == pytest.approx(round(tick / step), abs=1e-6) for tick in found)
    assert low - found[0] > -step - 1e-9
    assert low + width - found[-1] < step + 1e-9


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 2), (1, 30), (7, 1000)])
def test_ticks_of_epochs_are_whole(low: int, high: int) -> None:
    found = ticks(low, high, 8, whole=True)
    assert 1 <= len(found) <= 8
    assert all(tick == int(tick) for tick in found)


def heights(picture: Image.Image) -> list[float | None]:
    """Where the line of the validation images is in each column of the only panel, None where it is not."""
    panel = pixels(picture.crop((50, 60, 405, 230))).int()
    is_line = (panel - torch.tensor(VALIDATION)).abs().sum(-1) < 60
    return [float(rows.nonzero().float().mean()) if rows.any() else None for rows in is_line.T]


def curve(*losses: float | None) -> Image.Image:
    records = {n: {"validation_elbo": loss and -loss} for n, loss in enumerate(losses, start=1)}
    return draw_curves({"cvae": records})


def test_line_goes_as_the_losses_do() -> None:
    """Straight where they fall evenly; higher losses are higher up; a NaN leaves a gap."""
    found = [height for height in heights(curve(4.0, 3.0, 2.0)) if height is not None][5:-12]  # without its ends
    slope = (found[-1] - found[0]) / (len(found) - 1)
    assert slope > 0.3
    assert found == pytest.approx([found[0] + slope * i for i in range(len(found))], abs=1.5)
    broken = [height is None for height in heights(curve(4.0, 3.0, None, 2.5, 1.0))]
    gap = broken[broken.index(False) :]
    assert any(gap[: len(gap) - gap[::-1].index(False)])


@pytest.mark.parametrize(("value", "lines"), [(16.0, 1), (16.25, 4)])
def test_counts_have_whole_numbers_at_their_axis(value: float, lines: int) -> None:
    """A line at 16 alone; or at 15.5, 16, 16.5 and 17."""
    picture = draw_curves({"cvae": {n: {"validation_active_units": value} for n in (1, 2, 3)}})
    is_line = pixels(picture)[60:228, 60].ne(255).any(-1)  # left of the first epoch
    assert int((is_line[1:] & ~is_line[:-1]).sum()) == lines


@pytest.mark.parametrize("losses", [(1.0,), (2.0, 2.0), (None,), (1e29, 3.0), (1e300, 1.0), (5.0, *[1e-9] * 8)])
def test_any_losses_can_be_drawn(losses: tuple[float | None, ...]) -> None:
    assert curve(*losses).width == 840


def test_first_epochs_do_not_flatten_the_rest() -> None:
    """The axis of thirty epochs is that of the last 27."""
    rest = [10 - n / 10 for n in range(27)]
    assert (
        pixels(curve(500.0, 200.0, 100.0, *rest))[60:].ne(pixels(curve(50.0, 40.0, 30.0, *rest))[60:]).float().mean()
        < 0.01
    )


def test_an_epoch_that_diverged_does_not_flatten_the_rest() -> None:
    """All others are where they are without it."""
    losses = [70 - n / 10 for n in range(30)]
    spike = heights(curve(*losses[:15], 2400.0, *losses[16:]))
    plain = heights(curve(*losses))
    differs = [a != b for a, b in zip(spike, plain, strict=True)]
    assert 0 < sum(differs) < 30  # of 355 columns: the two sides of the spike


def test_active_units_by_level_are_not_drawn() -> None:
    record = {f"validation_{name}": 8.0 for name in ("elbo", "active_units", "active_units_1", "active_units_2")}
    assert [panel.title for panel in panels({"cvae": {1: record}})] == ["cvae: -elbo", "cvae: active units"]


def test_signs_of_the_terms() -> None:
    """What is maximised is drawn as minus it; divergences and counts, by level too, as they are."""
    names = ("elbo", "log_likelihood", "kl", "kl_1", "kl_2", "active_units", "active_units_2")
    record: dict[str, Any] = {f"validation_{name}": float(i) for i, name in enumerate(names, start=1)}
    expected = {
        "-elbo": -1.0, "-log likelihood": -2.0, "kl": 3.0, "kl 1": 4.0, "kl 2": 5.0,
        "active units": 6.0, "active units 2": 7.0,
    }  # fmt: skip
    assert terms(record) == expected
