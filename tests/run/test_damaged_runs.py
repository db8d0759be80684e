"""Run folders with something missing or wrong: what cannot go on without loss is left as it is, to the last byte."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.inprocess import TINY, Ended, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents, epochs_logged

from cvae.errors import DataError
from cvae.run import checkpoint
from cvae.run.folder import read_json, read_record

WORDS = [*TINY, "--epochs", "3", "--baseline-epochs", "2"]
STATES = {"done": ("cvae", 3), "cvae": ("cvae", 2), "baseline": ("baseline", 2)}
"""How far the runs have come."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs below `improving`, where each epoch is the best so far, and `contrary`, where the first one stays it.

    `done`, a finished run, is gone on with to a fourth epoch: `longer` is the same without a break. `other` is a
    finished run of another seed.
    """
    folder = tmp_path_factory.mktemp("place")
    for data in ("improving", "contrary"):
        images = make_tiny_data(folder / data / "data", contrary=data == "contrary")
        words = ["--data", images, *WORDS, "--runs", folder / data, "--schedule", "constant", "--patience", "9"]
        for name, state in STATES.items():
            with interrupted_after(*(state if name != "done" else ("", 0))):
                assert call_train(*words, "--name", name).code == (0 if name == "done" else 143)
        assert call_train(*words, "--name", "longer", "--epochs", "4").code == 0
        assert call_train(*words, "--name", "other", "--seed", "1").code == 0
        best = read_json(folder / data / "longer/summary.json")["best_epoch"]
        assert best == (1 if data == "contrary" else 4)
    return folder


def without_lock(run: Path) -> dict[str, Any]:
    return {name: content for name, content in contents(run).items() if name != ".lock"}


def resume(run: Path, *words: str | Path) -> Ended:
    """Go on with a run. If it is refused, then in one line, and nothing has changed."""
    before = without_lock(run)
    ended = call_train("--resume", run, *words)
    if ended.code != 0:
        assert ended.code == 3, ended
        assert str(run) in ended.line
        assert without_lock(run) == before
    return ended


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    content, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[:middle] + b"\xff" * 9 + content[middle + 9 :])


def exchange(path: Path) -> None:
    """For that of the other run; see `place`."""
    data = Path(read_json(path.parent / "config.json")["settings"]["data"])
    [other] = data.parent.glob("other/" + ("events*" if path.name.startswith("events") else path.name))
    shutil.copyfile(other, path)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, garble, exchange], ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("data", ["improving", "contrary"])
def test_each_file(place: Path, tmp_path: Path, data: str, name: str, spoil: Callable[[Path], None]) -> None:
    """It goes on to the end of an undisturbed run, or is refused, and what is advised then works."""
    files = sorted(path.name for path in (place / data / name).iterdir() if path.name[0] != ".")
    assert len(files) == (9 if name == "done" else 5)
    for file in files if data == "improving" else ["best.pt"]:  # all others are as needed or not with either
        run = Path(shutil.copytree(place / data / name, tmp_path / file))
        spoil(run / file)
        if file == "config.json" and spoil is exchange:
            continue  # a run of other settings that nothing contradicts
        epochs = epochs_logged(place / data / name)
        ended = resume(run, "--epochs", "4")
        is_needed = file in ("config.json", "last.pt", "metrics.jsonl") or (file == "best.pt" and data == "contrary")
        assert (ended.code == 3) == is_needed, (file, ended)
        if ended.code == 0:
            assert epochs_logged(run)[: len(epochs)] == epochs
            assert results(run) == results(place / data / "longer"), file
            assert (run / "summary.json").exists()
            is_short = file.startswith("events") and spoil is not garble
            assert (f"{run}: an event file is missing or cut off; " in ended.out) == is_short or spoil is exchange
        else:
            assert_advice_is_good(run, place / data / "data", ended.line, file)


def advised(line: str) -> list[list[str]]:
    """The commands that a line names as what can be done, without `python`."""
    _, found, ways = line.partition(". The run cannot go on and is left as it is. What can be done: ")
    assert found
    return [shlex.split(way.partition(", python ")[2]) for way in ways.split("; or ")]


def assert_advice_is_good(run: Path, data: Path, line: str, file: str) -> None:
    """What the line says that can still be done can be done, as it is pasted."""
    *evaluation, (script, *words) = advised(line)
    is_evaluated = file != "config.json" and (run / "summary.json").exists() and checkpoint_is_whole(run / "best.pt")
    assert evaluation == [["eval.py", "--runs", str(run)]] * is_evaluated
    for _, *each in evaluation:
        assert call_eval(*each).code == 0
    assert [script, *words[:4]] == ["train.py", "--init", str(run), "--name", "NEW"]
    if file == "config.json":
        assert " ".join(words[4:]) == "and the flags that it was begun with"
        words[4:] = ["--data", str(data), *WORDS]
    ended = call_train(*words, "--runs", run.parent, "--epochs", "1")
    assert (ended.code, ended.err) == (0, "")
    taken = read_json(run.parent / "NEW/config.json")["init"]
    is_read = checkpoint_is_whole(run / "best.pt")
    assert (taken["run"], taken["file"]) == (str(run), "best.pt" if is_read else "last.pt")
    assert taken["not_fitting"] in ("", "encoders, generation_net")  # the second: of a baseline
    shutil.rmtree(run.parent / "NEW")


def test_advice_where_no_weights_are_left(place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "it's a run"))
    for name in ("last.pt", "best.pt"):
        (run / name).write_bytes(b"")
    ended = call_train("--resume", run)
    [[script, *words]] = advised(ended.line)
    assert (script, call_train(*words).code) == ("train.py", 0)
    assert results(run) == results(place / "improving/done")


def test_mask_that_is_lost(place: Path, tmp_path: Path) -> None:
    """A run whose mask was a picture: with that picture, it can be begun anew as long as there is one."""
    picture = tmp_path / "mask.png"
    Image.fromarray((torch.rand(10, 9) < 0.5).byte().mul(255).numpy()).save(picture)
    words = ["--data", place / "improving/data", *WORDS, "--observed", picture, "--runs", tmp_path, "--name"]
    with interrupted_after("cvae", 1):
        assert call_train(*words, "run").code == 143
    run = tmp_path / "run"
    kept = run / "observed.png"
    kept.rename(tmp_path / "away.png")
    [[_, *begin]] = advised(resume(run).line)
    assert str(picture) in begin
    assert call_train(*begin, "--runs", tmp_path).code == 0
    picture.unlink()
    assert resume(run).line.endswith(" --name NEW and the flags that it was begun with")
    (tmp_path / "away.png").rename(kept)
    (run / "last.pt").unlink()
    [[_, *begin]] = advised(resume(run).line)
    assert str(kept) in begin
    ended = call_train(*begin, "--runs", tmp_path, "--overwrite")
    assert (ended.code, "do not fit" in ended.out) == (0, False)


def checkpoint_is_whole(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except DataError:
        return False
    return True


def test_best_weights_of_a_finished_run_are_made_anew(place: Path, tmp_path: Path) -> None:
    """If they are the last ones; without more epochs to do."""
    run = Path(shutil.copytree(place / "improving/done", tmp_path / "run"))
    (run / "best.pt").unlink()
    ended = resume(run)
    assert f"{run}/best.pt: is missing or damaged, and is made anew from last.pt\n" in ended.out
    assert results(run) == results(place / "improving/done")
    assert resume(run).out.endswith(f"{run} is finished: nothing is left to do\n")


@pytest.mark.parametrize("name", STATES)
def test_older_checkpoint(place: Path, tmp_path: Path, name: str) -> None:
    """That of an earlier epoch, beside metrics and best weights of later ones; one epoch may be between them."""
    run = Path(shutil.copytree(place / "improving" / name, tmp_path / "run"))
    assert resume(run, "--epochs", "4").code == 0
    shutil.copyfile(place / f"improving/{name}/last.pt", run / "last.pt")
    assert "summary.json" in resume(run).line or name != "done"
    (run / "summary.json").unlink()
    ended = resume(run)
    assert ended.code == (0 if name == "done" else 3)
    if name != "done":
        later = {"cvae": 2, "baseline": 4}[name]
        assert f"metrics.jsonl: has {later} epochs more than last.pt, which is of an earlier time" in ended.line


def test_no_checkpoint_of_either_kind(place: Path, tmp_path: Path) -> None:
    """The epochs that it has had are not thrown away; with one, it may have ended before there was a checkpoint."""
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    for name in ("last.pt", "best.pt"):
        (run / name).unlink()
    assert "last.pt: is missing, and the run has had 4 epochs" in resume(run).line
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").unlink()
    assert "there are events of a training" in resume(run).line
    (run / "metrics.jsonl").write_bytes(lines[0])
    assert resume(run).code == 0
    assert results(run) == results(place / "improving/done")


@pytest.mark.parametrize(("setting", "value"), [("hidden", [8, 8]), ("network", "paper"), ("quadrants", 2)])
def test_checkpoint_that_does_not_fit_the_settings(place: Path, tmp_path: Path, setting: str, value: Any) -> None:
    """Found when the model takes it, and still before the first write."""
    for name in STATES:
        if (setting, name) == ("network", "baseline"):
            continue  # their baselines are the same
        run = Path(shutil.copytree(place / "improving" / name, tmp_path / name))
        config = read_json(run / "config.json")
        config["settings"][setting] = value
        (run / "config.json").write_text(json.dumps(config))
        assert f"{run}/last.pt: does not fit the run's settings" in resume(run, "--epochs", "4").line


def test_optimizer_that_does_not_fit(place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    last = checkpoint.load(run / "last.pt")
    last["optimizer"]["moments"][0] = torch.zeros(1)
    del last["format"]
    checkpoint.save(run / "last.pt", last)
    assert f"{run}/last.pt: does not fit the run's settings (ValueError)" in resume(run).line


# The images


def test_other_images(place: Path, tmp_path: Path) -> None:
    """They have the same number and size: only their digests tell."""
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    ended = resume(run, "--data", place / "contrary/data")
    assert ended.line == (
        f"{run}: was begun on other train images of the same number and size (their SHA-256 differs); "
        "--data says where those are that it was begun on"
    )


def test_images_that_have_moved(place: Path, tmp_path: Path) -> None:
    """`config.json` keeps how the run was begun, and says when it went on where, with what."""
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    begun = read_json(run / "config.json")
    data = Path(shutil.copytree(place / "improving/data", tmp_path / "elsewhere"))
    assert resume(run, "--data", data, "--epochs", "4").code == 0
    assert results(run) == results(place / "improving/longer")
    config = read_json(run / "config.json")
    assert {name: value for name, value in config.items() if name != "resumed"} == {
        **begun,
        "settings": {**begun["settings"], "data": str(data), "epochs": 4},
    }
    [resumed] = config["resumed"]
    assert resumed["command"] == ["train.py", "--resume", str(run), "--data", str(data), "--epochs", "4"]
    assert (resumed["phase"], resumed["epoch"]) == ("cvae", 2)
    assert resumed["changed"] == {"epochs": [3, 4], "data": [begun["settings"]["data"], str(data)]}
    assert resumed.keys() - {"phase", "epoch", "changed"} == begun.keys() - {"settings", "images"}
    assert resume(run, "--data", place / "improving/data").out.endswith("nothing is left to do\n")
    records = read_json(run / "config.json")["resumed"]
    assert [(each["epoch"], {*each["changed"]}) for each in records] == [(2, {"epochs", "data"}), (4, {"data"})]


def forget_the_images(run: Path) -> Any:
    """Leave their size only, as version 0.2 did; returns what else there was."""
    config = read_json(run / "config.json")
    recorded = config["images"]
    config["images"] = {side: recorded[side] for side in ("height", "width")}
    (run / "config.json").write_text(json.dumps(config))
    return recorded


def test_run_that_has_the_size_of_its_images_only(place: Path, tmp_path: Path) -> None:
    """It would go on with other validation images than it was begun on."""
    for name in STATES:
        run = Path(shutil.copytree(place / "improving" / name, tmp_path / name))
        forget_the_images(run)
        for words in ([], ["--data", "mnist"]):
            line = resume(run, "--epochs", "4", *words).line
            assert ("config.json: does not say on which images it was begun, as version 0.2 " in line) == (not words)
            assert ("this version divides all but MNIST in another way. The run cannot go on" in line) == (not words)


def test_run_of_mnist_that_has_the_size_of_its_images_only(tmp_path: Path) -> None:
    """MNIST is as it was, and it is recorded then."""
    words = [*TINY, "--train-limit", "60", "--runs", tmp_path]
    with interrupted_after("baseline", 1):
        assert call_train(*words).code == 143
    run = tmp_path / "q1"
    recorded = forget_the_images(run)
    assert f"{run}: does not say on which images it was begun; MNIST is taken for them\n" in resume(run).out
    assert read_record(run) == recorded


@pytest.mark.parametrize("part", [3, [], {}, {"count": "60", "sha256": ""}, {"count": 60}], ids=repr)
def test_record_of_images_that_is_none(place: Path, tmp_path: Path, part: Any) -> None:
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    config = read_json(run / "config.json")
    config["images"]["validation"] = part
    (run / "config.json").write_text(json.dumps(config))
    assert resume(run).line.startswith(f"{run}/config.json: does not say what the validation images are")


# The machine


def test_another_machine(place: Path, tmp_path: Path) -> None:
    """What cannot be bit for bit any more is said in one line."""
    run = Path(shutil.copytree(place / "improving/cvae", tmp_path / "run"))
    config = read_json(run / "config.json")
    now = config["device"]
    config["device"] = {**now, "name": "H", "threads": 99, "processes": 4}
    config["versions"]["torch"] = "1.0"
    (run / "config.json").write_text(json.dumps(config))
    ended = resume(run)
    differences = [f"cpu ({now['name']}) in place of cpu (H)", f"PyTorch {torch.__version__} in place of 1.0"]
    differences += [f"{now['threads']} threads in place of 99", "1 processes in place of 4"]
    line = f"{run}: from here on not bit for bit as it began: "
    [said] = [each.removeprefix(line) for each in ended.out.splitlines() if each.startswith(line)]
    assert [each for each in said.split(", ") if "emulation" not in each] == differences
    assert line not in resume(run, "--epochs", "4").out  # it is the same machine as the last time


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_begun_on_a_gpu_that_is_not_here(
    place: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own precision, whatever is fast here. Without `--device` it is refused, and the flag is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--data", place / "improving/data", *WORDS, "--runs", tmp_path, "--precision", precision, "--name"]
    assert call_train(*words, "whole").code == 0
    with interrupted_after("cvae", 2):
        assert call_train(*words, "run").code == 143
    run = tmp_path / "run"
    config = read_json(run / "config.json")
    config["settings"] |= {"device": "cuda", "precision": "auto"}
    config["device"] |= {"type": "cuda", "name": "NVIDIA"}
    (run / "config.json").write_text(json.dumps(config))
    before = without_lock(run)
    ended = call_train("--resume", run)
    assert ended.code == 2
    assert "--device cpu" in ended.line
    assert without_lock(run) == before
    ended = resume(run, "--device", "cpu")
    assert f"{run}: from here on not bit for bit as it began: cpu (" in ended.out
    assert ("fp16 by slow emulation" in ended.out) == (precision == "fp16")
    assert results(run) == results(tmp_path / "whole")
