"""Whole runs with masks that people draw, and with black or white targets: trained, resumed, evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.inprocess import TINY, Ended, call_eval, call_train, interrupted_after, make_tiny_data, results
from torch import Tensor

from cvae.data.images import ImageSet
from cvae.data.mask_pictures import mask_png
from cvae.data.masks import MASKS, Split
from cvae.errors import DataError
from cvae.report import figures
from cvae.run.folder import read_json
from cvae.run.load import load

DISC = torch.tensor([[(i - 4) ** 2 + (j - 4) ** 2 <= 9 for j in range(9)] for i in range(10)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def evaluated(ended: Ended) -> list[dict[str, Any]]:
    assert (ended.code, ended.err) == (0, "")
    columns: list[dict[str, Any]] = json.loads(ended.out)
    return columns


def test_run_keeps_the_mask_that_it_was_begun_with(tmp_path: Path, data: Path) -> None:
    """The picture is another one when the run goes on, and gone when it is evaluated."""
    drawn, runs = tmp_path / "my disc.png", tmp_path / "runs"
    large = DISC.repeat_interleave(3, 0).repeat_interleave(3, 1)
    words = ["--data", data, *TINY, "--observed", drawn, "--runs", runs]
    drawn.write_bytes(mask_png(large))
    with interrupted_after("cvae", 1):
        assert call_train(*words).code == 143
    drawn.write_bytes(mask_png(~large))
    resumed = call_train("--runs", runs, "--resume", "my disc")
    assert resumed[::2] == (0, "")
    drawn.write_bytes(mask_png(DISC))
    whole = call_train(*words, "--name", "whole", "--quiet")
    assert whole == (0, "", "")
    drawn.unlink()
    assert results(runs / "my disc") == results(runs / "whole")
    assert torch.equal(load(runs / "my disc").split.observed, DISC)
    columns = evaluated(call_eval("--runs", runs, "--format", "json"))
    assert [(column["run"], column["observed"], column["quadrants"]) for column in columns] == [
        ("my disc", "my disc", None), ("whole", "my disc", None)
    ]  # fmt: skip
    assert columns[0] == {**columns[1], "run": "my disc"}
    assert "whole (my disc)" in call_eval("--runs", runs / "whole").out

    kept = runs / "whole" / "observed.png"
    with Image.open(kept) as image:
        assert image.size == (9, 10)
    for spoil, said in (
        (
            lambda: kept.write_bytes(mask_png(large)),
            "has 30×27 pixels, and the images that it is the mask of have 10×9",
        ),
        (lambda: kept.write_bytes(kept.read_bytes()[:40]), "cannot be read as a picture"),
        (lambda: kept.unlink(), "there is no such file"),
    ):
        spoil()
        with pytest.raises(DataError, match=said):
            load(runs / "whole")
        assert call_train("--resume", runs / "whole").line.startswith(f"{kept}: ")


def test_how_a_picture_is_read_is_said_in_one_line(tmp_path: Path, data: Path) -> None:
    drawn = tmp_path / "disc.png"
    large = Image.fromarray(DISC.numpy()).convert("L").resize((36, 40), Image.Resampling.NEAREST)
    large.resize((35, 41), Image.Resampling.BILINEAR).save(drawn)
    ended = call_train("--data", data, *TINY, "--observed", drawn, "--runs", tmp_path / "runs")
    assert ended[::2] == (0, "")
    lines = [line for line in ended.out.splitlines() if line.startswith("observed: ")]
    count = load(tmp_path / "runs/disc").split.num_observed
    assert lines == [
        f"observed: {count} of 90 pixels, white in {drawn}; scaled from 41×35 to 10×9 (nearest); "
        "grey levels from 128 on = white"
    ]


def test_what_is_no_mask_leaves_no_run(tmp_path: Path, data: Path) -> None:
    drawn, words = tmp_path / "mask.png", ["--data", data, *TINY, "--runs", tmp_path / "runs"]
    for image, said in (
        (Image.new("L", (9, 10), 255), "all is white, and so nothing is hidden"),
        (Image.linear_gradient("L"), "is no mask in black and white"),
    ):
        image.save(drawn)
        ended = call_train(*words, "--observed", drawn)
        assert ended.code == 3
        assert ended.line.startswith(f"{drawn}: {said}")
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["border", "checkerboard"])
def test_named_masks_are_trained_and_evaluated(tmp_path: Path, data: Path, name: str) -> None:
    words = ["--data", data, *TINY, "--epochs", "1", "--runs", tmp_path]
    assert call_train(*words, "--observed", name)[::2] == (0, "")
    assert not (tmp_path / name / "observed.png").exists()
    assert torch.equal(load(name, runs=tmp_path).split.observed, MASKS[name](10, 9))
    assert evaluated(call_eval("--runs", tmp_path, "--format", "json"))[0]["observed"] == name


# Targets


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[object, ...], tuple[Tensor, Tensor | None]]:
    """What each draw left: its key, the vectors, the guesses."""
    seen: dict[tuple[object, ...], tuple[Tensor, Tensor | None]] = {}
    redraw = ImageSet.redraw

    def noted(self: ImageSet, *key: object, binary: bool, bend: float, **more: Any) -> None:
        assert binary
        assert bend == 0
        redraw(self, *key, binary=binary, bend=bend, **more)
        seen[key] = self.vectors.clone(), None if self.guesses is None else self.guesses.clone()

    monkeypatch.setattr(ImageSet, "redraw", noted)
    return seen


@pytest.mark.parametrize("network", ["tutorial", "paper"])
def test_binary_run_resumes_with_the_draws_of_its_epochs(
    tmp_path: Path, data: Path, drawn: dict[tuple[object, ...], tuple[Tensor, Tensor | None]], network: str
) -> None:
    words = ["--data", data, *TINY, "--runs", tmp_path, "--targets", "binary", "--network", network, "--seed", "3"]
    assert call_train(*words, "--name", "whole")[::2] == (0, "")
    whole, keys = dict(drawn), [(3, "baseline", 1), (3, "cvae", 1), (3, "cvae", 2)]
    assert list(whole) == keys
    drawn.clear()
    for phase in ("baseline", "cvae"):
        again = [*words, "--name", "parts"] if phase == "baseline" else ["--runs", tmp_path, "--resume", "parts"]
        with interrupted_after(phase, 1):
            assert call_train(*again).code == 143
    assert call_train("--runs", tmp_path, "--resume", "parts")[::2] == (0, "")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert list(drawn) == keys
    baseline = load(tmp_path / "whole").baseline_net
    for key, (vectors, guesses) in whole.items():
        assert torch.equal(drawn[key][0], vectors)
        assert vectors.unique().tolist() == [0, 255]
        if key[1] == "cvae":
            assert guesses is not None
            split = load(tmp_path / "whole").split
            torch.testing.assert_close(guesses.float(), baseline(vectors[:, : split.num_observed] / 255), **CLOSE)
    assert len({vectors.numpy().tobytes() for vectors, _ in whole.values()}) == 3


CLOSE = {"rtol": 0.01, "atol": 0.01}  # the guesses may be kept in half precision


def test_evaluation_and_pictures_are_of_the_drawn_images(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One draw for all runs, whatever they were trained on; grey runs see grey levels."""
    shown: dict[str, set[int]] = {}
    rows = figures.completion_rows

    def noted(images: Tensor, *more: Any) -> Any:
        shown.setdefault(name, set()).update(images.unique().tolist())
        return rows(images, *more)

    monkeypatch.setattr(figures, "completion_rows", noted)
    for targets in ("grey", "binary", "binary-fixed"):
        name = targets
        words = ["--data", data, *TINY, "--epochs", "1", "--runs", tmp_path / "runs", "--targets", targets]
        assert call_train(*words, "--name", targets)[::2] == (0, "")
        run = tmp_path / "runs" / targets
        assert call_eval("--runs", run, "--figure", tmp_path / "figure.png").code == 0
    assert len(shown.pop("grey")) > 200
    assert shown == {"binary": {0, 255}, "binary-fixed": {0, 255}}

    columns = evaluated(call_eval("--runs", tmp_path / "runs", "--format", "json"))
    floors = {column["run"]: column["floor"]["mean"] for column in columns}
    assert floors.pop("grey") > 10
    assert floors == {"binary": 0, "binary-fixed": 0}
    records = {name: read_json(tmp_path / "runs" / name / "config.json")["images"] for name in ("grey", *floors)}
    for part, same in (("train", "grey"), ("validation", "binary-fixed"), ("test", "binary-fixed")):
        assert records["binary"][part] == records[same][part]
        assert records["grey"][part] != records["binary-fixed"][part]


@pytest.mark.parametrize(
    ("name", "label"),
    [("", "input"), ("every-second-row", "input: every-second-row"), ("a" * 300, f"input: {'a' * 19}…")],
)
def test_pictures_carry_the_name_of_the_mask(name: str, label: str) -> None:
    """In the margin, whose width has to stay within reason."""
    split = Split(DISC, name)
    rows = figures.completion_rows(torch.zeros(2, 10, 9, dtype=torch.uint8), split, torch.rand(2, split.num_hidden))
    assert [name for name, _ in rows] == [label, "truth", "NN"]
    assert figures.draw_rows(rows).shape[2] < 500
