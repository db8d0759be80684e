"""Runs that go on: to the end of an undisturbed one, or not at all, and then nothing was touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inprocess import TINY, Ended, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents, plain

from cvae.data.masks import mask_png
from cvae.run import checkpoint
from cvae.run.folder import RunFolder
from cvae.run.load import load
from cvae.settings import Settings

WORDS = [*TINY, "--epochs", "3", "--baseline-epochs", "2", "--precision", "fp32", "--schedule", "constant"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on images of which no epoch learns anything that is good for those to validate.

    `done` is one; `baseline` and `cvae` are the same when these phases had had two epochs.
    """
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(folder / "data", contrary=True), *WORDS, "--runs", folder, "--name"]
    assert call_train(*words, "done").code == 0
    for phase in ("baseline", "cvae"):
        with interrupted_after(phase, 2):
            assert call_train(*words, phase).code == 143
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a run, to be spoiled."""
    return lambda name: Path(shutil.copytree(place / name, tmp_path / name))


def resume(run: Path, *words: str | Path) -> Ended:
    return call_train("--resume", run, *words)


def assert_refused(run: Path, reason: str, *words: str | Path, code: int = 3) -> None:
    """In one line, and nothing is touched but the file of the lock, which may be made."""
    before = {name: file for name, file in contents(run).items() if name != ".lock"}
    ended = resume(run, *words)
    assert ended.code == code
    assert reason in ended.line
    assert {name: file for name, file in contents(run).items() if name != ".lock"} == before


def configured(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))
    return run


# To the same end


@pytest.mark.parametrize("name", ["baseline", "cvae"])
def test_ends_as_an_undisturbed_one(place: Path, copied: Callable[[str], Path], name: str) -> None:
    run = copied(name)
    assert resume(run).code == 0
    assert results(run) == results(place / "done")
    ended = resume(run)
    assert (ended.code, ended.out.splitlines()[-1]) == (0, f"{run} is finished: nothing is left to do")


def test_more_epochs(place: Path, copied: Callable[[str], Path]) -> None:
    """A finished run goes on as if it had been told at once, and is not finished until it is done again."""
    run = copied("done")
    with interrupted_after("cvae", 4):
        assert resume(run, "--epochs", "9").code == 143
    assert not (run / "summary.json").exists()
    assert "is not finished" in call_eval("--runs", run).line
    assert resume(run).code == 0
    words = ["--data", place / "data", *WORDS, "--runs", run.parent, "--name", "long", "--epochs", "9"]
    assert call_train(*words).code == 0
    assert results(run) == results(run.parent / "long")
    assert_refused(run, "has had 4 epochs; --epochs cannot be less", "--epochs", "3", code=2)


@pytest.mark.parametrize(
    "words",
    [
        "--network paper --objective iwae --particles 3 --bend 0.5 --unbent-epochs 1",
        "--objective hybrid --alpha 0.3 --targets binary --precision bf16", "--precision fp16",
    ],
)  # fmt: skip
def test_any_kind_of_run(place: Path, tmp_path: Path, words: str) -> None:
    """What an epoch draws anew, and what is kept in half precision beside the weights, is made as it was."""
    argv = ["--data", place / "data", *TINY, *words.split(), "--runs", tmp_path, "--name"]
    for phase in ("baseline", "cvae"):
        with interrupted_after(phase, 1):
            assert (call_train(*argv, "parts") if phase == "baseline" else resume(tmp_path / "parts")).code == 143
    assert resume(tmp_path / "parts").code == 0
    assert call_train(*argv, "whole").code == 0
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_mask_is_kept(place: Path, tmp_path: Path) -> None:
    """The picture of it is another one when the run goes on, and gone when it is evaluated."""
    disc = torch.tensor([[(i - 4) ** 2 + (j - 4) ** 2 <= 9 for j in range(9)] for i in range(10)])
    drawn = tmp_path / "my disc.png"
    drawn.write_bytes(mask_png(disc))
    with interrupted_after("cvae", 1):
        ended = call_train("--data", place / "data", *TINY, "--observed", drawn, "--runs", tmp_path)
    assert f"observed: {int(disc.sum())} of 90 pixels, white in {drawn}" in ended.out
    run = tmp_path / "my disc"
    drawn.write_bytes(mask_png(~disc))
    assert resume(run).code == 0
    drawn.unlink()
    assert torch.equal(load(run).task.observed, disc)
    assert call_eval("--runs", run).code == 0
    (run / "observed.png").write_bytes(b"no picture")
    assert_refused(run, f"{run / 'observed.png'}: cannot be read as a picture")


def test_run_of_an_older_version(copied: Callable[[str], Path]) -> None:
    """Settings that there were not yet have their defaults, and are written down with what follows."""
    run = configured(copied("cvae"), lambda config: [config["settings"].pop(name) for name in ("clip", "free_epochs")])
    configured(run, lambda config: config["settings"].update(compile=False))
    assert resume(run).code == 0
    assert RunFolder(run).config["settings"].keys() == Settings().to_dict().keys()


# Which weights are kept


def test_best_weights_are_the_average_of_the_best_epoch(place: Path, copied: Callable[[str], Path]) -> None:
    """Of the first one here, whatever comes after it."""
    run = copied("baseline")
    with interrupted_after("cvae", 1):
        assert resume(run).code == 143
    last, best = checkpoint.load(run / "last.pt"), checkpoint.load(place / "done/best.pt")
    assert (best["epoch"], best["loss"]) == (1, last["progress"]["best_loss"])
    assert plain(best["model"]) == plain(last["average"]) != plain(last["model"])
    assert plain(load(place / "done").state_dict()) == plain(best["model"])


def test_cvae_is_trained_on_top_of_the_best_baseline(place: Path) -> None:
    best, last = (checkpoint.load(place / "baseline" / name) for name in ("best.pt", "last.pt"))
    assert (best["phase"], best["epoch"], last["progress"]["epoch"]) == ("baseline", 1, 2)
    whole = checkpoint.load(place / "done/last.pt")["model"]
    for name, tensor in best["model"].items():
        assert not torch.equal(tensor, last["average"][name])
        assert torch.equal(whole[f"baseline_net.{name}"], tensor)


def test_best_weights_are_made_anew_where_they_are_the_last(place: Path, tmp_path: Path) -> None:
    words = ["--data", make_tiny_data(tmp_path / "data"), *WORDS, "--learning-rate", "1e-4", "--runs", tmp_path]
    assert call_train(*words).code == 0
    run = tmp_path / "q1"
    before = results(run)
    assert before["last"]["progress"]["best_epoch"] == 3
    (run / "best.pt").unlink()
    assert resume(run).code == 0
    assert results(run) == before


# Not at all


def written(name: str, content: bytes | None, more: bool = False) -> Callable[[Path], object]:
    """Writes a file of a run; None: removes it. more: at its end."""

    def spoil(run: Path) -> None:
        before = (run / name).read_bytes() if more else b""
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(before + content)

    return spoil


def saved(name: str, **changed: Any) -> Callable[[Path], object]:
    """Changes a checkpoint."""
    return lambda run: checkpoint.save(
        run / name, {k: v for k, v in {**checkpoint.load(run / name), **changed}.items() if k != "format"}
    )


def settings(**changed: Any) -> Callable[[Path], object]:
    """Changes what `config.json` says of the settings."""
    return lambda run: configured(run, lambda config: config["settings"].update(changed))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run": (written("config.json", None), "is no run folder: it has no config.json"),
    "no last": (written("last.pt", None), "last.pt: is missing, and the run is past its first epoch"),
    "damaged last": (written("last.pt", b"PK"), "last.pt: is damaged, or no checkpoint"),
    "foreign last": (saved("last.pt", progress=3), "last.pt: does not fit the run's settings"),
    "no best": (written("best.pt", None), "best.pt: cannot be read (No such file"),
    "best of another epoch": (saved("best.pt", epoch=2), "best.pt: is of another epoch than the best one of last.pt"),
    "no metrics": (written("metrics.jsonl", None), "metrics.jsonl: cannot be read (No such file"),
    "metrics cut off": (written("metrics.jsonl", b""), "metrics.jsonl: has other epochs than last.pt"),
    "later metrics": (written("metrics.jsonl", b"{}\n{}\n", more=True), "metrics.jsonl: has other epochs than last.pt"),
    "other sizes": (settings(hidden=[8, 8]), "last.pt: does not fit the run's settings"),
    "other optimizer": (saved("last.pt", optimizer={"moments": [1]}), "last.pt: does not fit the run's settings"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_go_on_is_left_as_it_is(copied: Callable[[str], Path], name: str) -> None:
    run = copied("cvae")
    SPOILED[name][0](run)
    assert_refused(run, SPOILED[name][1])
    if name == "damaged last":  # what is said of it is true
        assert resume(run).line.endswith("--init begins a new one with its weights, --overwrite begins it anew")
        words = ["--data", str(RunFolder(run).settings.data), *WORDS, "--epochs", "1", "--runs", run.parent]
        assert call_train(*words, "--init", run, "--name", "new").code == 0


# Elsewhere


def test_images_that_have_moved_or_are_others(place: Path, copied: Callable[[str], Path]) -> None:
    """`config.json` keeps how the run was begun, and says when it went on where, with what."""
    run = copied("cvae")
    begun = RunFolder(run).config
    line = f"{run}: was begun on other train images of the same number and size (their SHA-256 differs); --data says"
    assert_refused(run, line, "--data", make_tiny_data(run.parent / "others"))
    assert_refused(run, "was begun on images of 10×9 pixels", "--data", make_tiny_data(run.parent / "size", 9, 10))
    data = Path(shutil.copytree(place / "data", run.parent / "elsewhere"))
    for path in data.glob("t10k*"):  # what is known of them stays
        path.unlink()
    assert resume(run, "--data", data, "--epochs", "4").code == 0
    config = RunFolder(run).config
    [resumed] = config.pop("resumed")
    assert config == {**begun, "settings": {**begun["settings"], "data": str(data), "epochs": 4}}
    assert resumed["command"] == ["train.py", "--resume", str(run), "--data", str(data), "--epochs", "4"]
    assert (resumed["phase"], resumed["epoch"]) == ("cvae", 2)
    assert resumed["changed"] == {"epochs": [3, 4], "data": [begun["settings"]["data"], str(data)]}
    assert resumed.keys() - {"phase", "epoch", "changed"} == begun.keys() - {"settings", "images"}
    assert resume(run, "--data", place / "data").out.endswith("nothing is left to do\n")


def test_another_machine(copied: Callable[[str], Path]) -> None:
    """What cannot be bit for bit any more is said in one line, once."""

    def elsewhere(config: dict[str, Any]) -> None:
        config["device"].update(type="cuda", name="H", processes=4)
        config["settings"]["device"] = "cuda"

    run = configured(copied("cvae"), elsewhere)
    if not torch.cuda.is_available():
        assert_refused(run, "--device cpu", code=2)
    line = f"{run}: from here on not bit for bit as it began: type cpu in place of cuda, name "
    assert line in resume(run, "--device", "cpu").out
    assert line not in resume(run, "--epochs", "4").out


def test_precision_is_the_one_that_the_run_was_begun_in(place: Path, copied: Callable[[str], Path]) -> None:
    """Whatever `auto` stands for where it goes on, which is never fp16 on a CPU."""

    def elsewhere(config: dict[str, Any]) -> None:
        config["settings"]["precision"] = "auto"
        config["precision"] = "fp16"

    ends = []
    for change in (elsewhere, lambda config: None):
        run = configured(copied("cvae"), change)
        for name in ("last.pt", "best.pt", "metrics.jsonl"):
            (run / name).unlink()  # it has had no epoch yet
        assert resume(run).code == 0
        ends.append((RunFolder(run).config["resumed"][0]["precision"], results(run)))
        shutil.rmtree(run)
    assert [precision for precision, _ in ends] == ["fp16", "fp32"]
    assert ends[0][1] != ends[1][1] == results(place / "done")


@pytest.mark.parametrize(
    "words", ["--quadrants 2", "--observed left", "--preset best", "--hidden 8 8", "--seed 1", "--transpose"]
)
def test_settings_that_cannot_change(place: Path, words: str) -> None:
    run, flag = place / "done", words.split()[0]
    ended = resume(run, *words.split())
    assert (ended.code, ended.line.startswith(f"{run} was begun with")) == (2, True)
    assert ended.line.endswith(", which cannot change now; leave the flag out")
    assert f" {flag}" in ended.line or flag == "--preset"


def test_settings_that_are_given_again(place: Path) -> None:
    words = [*WORDS, "--quadrants", "1", "--data", place / "data"]
    assert resume(place / "done", *words).out.endswith("nothing is left to do\n")
