"""What a run leaves to look at: its learning as a moving picture, and what it has come to."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from support.inprocess import TINY, call_train, interrupted_after, make_tiny_data
from support.trainings import events
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor

import cvae
from cvae.context import generator
from cvae.data.sources import load_train
from cvae.errors import DataError
from cvae.report import replay
from cvae.report.figures import as_picture, completions
from cvae.run.folder import RunFolder
from train import NUM_DIGITS, NUM_SAMPLES

EPOCHS = [("baseline", 1), ("baseline", 2), ("cvae", 1), ("cvae", 2), ("cvae", 3)]
STEP = 255 / (replay.GREYS - 1)  # between two greys of the palette; Pillow takes one of the two beside a level


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose best epoch is not its last: the images for validation are negatives."""
    place = tmp_path_factory.mktemp("place")
    data = make_tiny_data(place / "data", contrary=True)
    words = ["--data", data, *TINY, "--baseline-epochs", "2", "--epochs", "3", "--precision", "fp32"]
    ended = call_train(*words, "--runs", place, "--name", "done")
    assert (ended.code, ended.err) == (0, "")
    assert (RunFolder(place / "done").summary or {})["best_epoch"] == 1
    return place / "done"


def pixels(file: Path | io.BytesIO) -> Tensor:
    return pil_to_tensor(Image.open(file).convert("RGB"))


def logged(folder: Path) -> dict[tuple[str, int], Tensor]:
    """Return the pictures in a run's events, as TensorBoard has them."""
    found = events(folder)["images"].items()
    return {(tag.split("/")[0], step): pixels(io.BytesIO(png)) for tag, images in found for step, png in images}


def shown(folder: Path) -> list[Tensor]:
    with Image.open(folder / "learning.gif") as replayed:
        return [pil_to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(replayed)]


def is_shown(picture: Tensor, frame: Tensor) -> bool:
    """Return whether a picture is in a frame, below its line, but for the greys that the palette does not have."""
    part = frame[:, replay.HEADER :][:, : picture.shape[1], : picture.shape[2]].int()
    return bool(((part - picture.int()).abs() <= STEP).all())


def test_replay_of_a_finished_run(done: Path) -> None:
    """A frame for each epoch, with the epoch's picture and a line of its own above; the last one stays for longer."""
    pictures, frames = logged(done), shown(done)
    assert list(pictures) == EPOCHS
    assert all(is_shown(pictures[key], frame) for key, frame in zip(EPOCHS, frames, strict=True))
    assert not is_shown(pictures["cvae", 1], frames[-1])
    assert len({frame[:, : replay.HEADER].numpy().tobytes() for frame in frames}) == len(EPOCHS)
    with Image.open(done / "learning.gif") as replayed:
        assert replayed.info["loop"] == 0  # for ever
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(replayed)] == [250] * 4 + [4000]


def test_completions_are_those_of_the_best_weights(done: Path) -> None:
    """They are of the first validation images, by the model as anybody loads it."""
    settings, model = RunFolder(done).settings, cvae.load(done)
    images = load_train(settings).validation[:NUM_DIGITS]
    random = generator(torch.device("cpu"), settings.seed, "picture")
    samples = model.task.asked(model.complete(images, NUM_SAMPLES, random))
    guess = model.guess(model.task.batch(model.task.rows(images))).sigmoid()
    found = pixels(done / "completions.png")
    assert (found.int() - completions(images, model.task, guess, samples).int()).abs().max() <= 1
    assert not torch.equal(found, logged(done)["cvae", 3])


def test_failure_to_draw_is_a_warning(tmp_path: Path) -> None:
    """The run is finished all the same."""
    words = ["--data", make_tiny_data(tmp_path / "data"), *TINY, "--runs", tmp_path]
    with interrupted_after("cvae", 2):
        assert call_train(*words).code == 143
    run = tmp_path / "q1"
    (run / "learning.gif").mkdir()  # no file can take its place
    ended = call_train("--resume", run)
    assert ended.code == 0
    assert f"{run}/learning.gif: cannot be written (" in ended.line
    assert (run / "summary.json").exists()


def test_command_draws_anew_and_as_far_as_a_run_has_come(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A finished run as at its end, one that has its baseline only, and one without an epoch."""
    run = Path(shutil.copytree(done, tmp_path / "run", ignore=lambda *_: {"learning.gif", "completions.png"}))
    assert replay.main([str(run)]) == 0
    assert all((run / name).read_bytes() == (done / name).read_bytes() for name in ("learning.gif", "completions.png"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    best = 1 + (json.loads(lines[0])["validation_log_likelihood"] < json.loads(lines[1])["validation_log_likelihood"])
    assert replay.main([str(run)]) == 0
    assert torch.equal(pixels(run / "completions.png"), logged(run)["baseline", best])
    (run / "metrics.jsonl").write_text("")
    assert replay.main([str(run)]) == 3
    assert replay.main([str(run / "typo")]) == 3
    out, err = capsys.readouterr()
    assert out == 2 * f"{run}: drawn\n"
    assert err.splitlines()[0].endswith("has no epoch yet, of which there would be something to draw")
    assert err.splitlines()[1:] == [f"cvae.report.replay: {run}/typo is no run folder: it has no config.json"]


def test_events_that_are_cut(done: Path, tmp_path: Path) -> None:
    """What can be read is drawn, and what is missing is said."""
    for share in (0, 0.8):
        run = Path(shutil.copytree(done, tmp_path / str(share), ignore=lambda *_: {"learning.gif", "completions.png"}))
        [path] = run.glob("events.*")
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        pictures = list(logged(run).values())
        with pytest.raises(DataError, match=f"the events have pictures of {len(pictures)} of 5 epochs"):
            replay.draw_all(run)
        assert (run / "completions.png").exists() == (run / "learning.gif").exists() == bool(pictures) == bool(share)
        frames = shown(run) if share else []
        assert all(is_shown(picture, frame) for picture, frame in zip(pictures, frames, strict=True))


def made(folder: Path, losses: dict[tuple[str, int], float | None], *logs: dict[tuple[str, int], bytes]) -> Path:
    """Make a folder with a log of these losses, and an event file for each of these sets of PNG files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": {}, "images": {"height": 40, "width": 50}}))
    with (folder / "metrics.jsonl").open("w") as file:
        for (phase, epoch), loss in losses.items():
            record = {"phase": phase, "epoch": epoch, "train_elbo": -1.0, "validation_elbo": loss and -loss}
            file.write(json.dumps({**record, "validation_kl": -99.0}) + "\n")
    for number, pictures in enumerate(logs):
        with SummaryWriter(str(folder), filename_suffix=f".{number}.train") as writer:
            for (phase, epoch), png in pictures.items():
                value = Summary.Value(tag=f"{phase}/completions", image=Summary.Image(encoded_image_string=png))
                writer.file_writer.add_summary(Summary(value=[value]), epoch)  # type: ignore[attr-defined]
    return folder


def grey(level: int) -> bytes:
    """Return a PNG file of this level throughout."""
    buffer = io.BytesIO()
    as_picture(torch.full((3, 40, 50), level, dtype=torch.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_best_epoch_is_the_first_lowest_that_is_a_number(tmp_path: Path) -> None:
    """A damaged picture is left out; of an epoch that was logged twice, by a resumed run, the later one counts."""
    losses = {("cvae", n): loss for n, loss in enumerate((None, 7.0, 6.0, 6.0, None), start=1)}
    first, second = {key: grey(20 * key[1]) for key in losses}, {("cvae", 2): grey(80)[:50], ("cvae", 3): grey(200)}
    run = made(tmp_path / "run", {("baseline", 1): 1.0} | losses, first, second)
    with pytest.raises(DataError, match="the events have pictures of 4 of 6 epochs"):
        replay.draw_all(run)
    assert [int(frame[0, -1, 0]) for frame in shown(run)] == pytest.approx([20, 200, 80, 100], abs=STEP)
    assert pixels(run / "completions.png").unique() == 200


def test_long_training_in_a_hundred_frames(tmp_path: Path) -> None:
    """Every third of 251 epochs, the last one among them; a small file, of few greys."""
    keys = [("baseline", n) for n in range(1, 52)] + [("cvae", n) for n in range(1, 201)]
    levels = [*range(250), 100]  # the last one is unlike those before it
    run = made(tmp_path / "run", dict.fromkeys(keys, 5.0), {key: grey(i) for key, i in zip(keys, levels, strict=True)})
    replay.draw_all(run)
    frames = shown(run)
    assert [int(frame[0, -1, 0]) for frame in frames] == pytest.approx(levels[1::3], abs=STEP)
    assert len(torch.stack(frames).permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0)) <= replay.GREYS + 1
