"""Run folders: read, made, begun anew whatever fails amid it, and held by one training at a time."""

import errno
import fcntl
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.inprocess import TINY, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents

from cvae.errors import DataError, DiskError, UsageError
from cvae.run.checkpoint import write_json
from cvae.run.folder import RunFolder, create, find_run, hold
from cvae.settings import Settings

CONFIG = {"settings": Settings(hidden=(8, 7)).to_dict(), "images": {"height": 10, "width": 9}, "precision": "bf16"}
NEW_CONFIG = {**CONFIG, "is": "new"}
NEW = dict.fromkeys(("config.json", "observed.png", "init.pt"), partial(write_json, value=NEW_CONFIG))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its data."""
    place = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(place / "data"), *TINY, "--precision", "fp32", "--runs", place, "--name", "done"]
    assert call_train(*words).code == 0
    return place / "done"


@pytest.fixture
def words(done: Path, tmp_path: Path) -> list[str | Path]:
    """A small training in `tmp_path`."""
    return ["--data", done.parent / "data", *TINY, "--runs", tmp_path]


# What is read


def test_what_a_run_folder_says(done: Path, tmp_path: Path) -> None:
    run = RunFolder(done)
    assert (run.settings.hidden, run.settings.data) == ((8, 7), str(done.parent / "data"))
    assert run.task.observed.shape == (10, 9)
    assert (run.precision, run.is_passed_on) == ("fp32", False)
    assert [run.record[part]["count"] for part in ("train", "validation", "test")] == [60, 12, 12]
    assert run.summary is not None
    assert run.summary["epoch"] == 2
    assert [(line["phase"], line["epoch"]) for line in run.metrics()] == [("baseline", 1), ("cvae", 1), ("cvae", 2)]
    assert run.last()["phase"] == "cvae"
    with pytest.raises(DataError, match="is no run folder: it has no config"):
        RunFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = RunFolder(tmp_path)
    assert (run.settings.hidden, run.summary, run.last()) == ((8, 7), None, {})
    assert (run.task.observed.shape, run.precision) == ((10, 9), "bf16")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "is no valid JSON"),
        ([], "does not describe a run"),
        ({**CONFIG, "settings": {"hidden": "8"}}, "hidden has to be"),
        ({**CONFIG, "settings": {"network": "wide"}}, "network has to be one of tutorial, paper, deep, not 'wide'"),
        ({**CONFIG, "settings": {"shades": 2}}, "this version knows no setting 'shades'"),
        ({**CONFIG, "images": None}, "does not describe a run"),
        ({**CONFIG, "images": {"height": 10}}, "does not describe a run"),
    ],
)
def test_config_that_is_none(tmp_path: Path, config: Any, reason: str) -> None:
    (tmp_path / "config.json").write_text("{" if config is None else json.dumps(config))
    with pytest.raises(DataError, match=reason) as caught:
        RunFolder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(caught.value)


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, or else a name below the folder of runs; the runs that come with the program, from anywhere."""
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "runs/here", "runs/group/q1"):
        (tmp_path / folder).mkdir(parents=True)
    found = {run: find_run(run, "runs") for run in ("here", "group/q1", "q9", "group/q9", "reference/q1")}
    assert found.pop("reference/q1").is_dir()
    assert list(map(str, found.values())) == ["here", "runs/group/q1", "runs/q9", "group/q9"]


# What a new run replaces


def test_folder_with_anything_in_it_is_not_taken(words: list[str | Path], tmp_path: Path) -> None:
    """Hidden files are nothing, and stay; nothing else is touched, with and without --overwrite."""
    (tmp_path / "q1").mkdir()
    (tmp_path / "q1/.gitkeep").touch()
    assert call_train(*words, "--epochs", "1").code == 0
    assert (tmp_path / "q1/.gitkeep").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/observed.png").touch()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    before = contents(tmp_path)
    for name in ("notes", "file", "bert"):
        for more in ([], ["--overwrite"]):
            ended = call_train(*words, "--name", name, *more)
            assert ended.code == 2
            assert ended.line == f"{tmp_path / name} is no run folder and is left as it is; choose another --name"
    assert call_train(*words).line.startswith(f"{tmp_path}/q1 exists already: --resume {tmp_path}/q1 goes on with it")
    assert contents(tmp_path) == before


def test_overwrite_takes_the_run_and_nothing_else(done: Path, words: list[str | Path], tmp_path: Path) -> None:
    """What somebody has put beside it stays, and so does a link by which the folder is found."""
    real = Path(shutil.copytree(done, tmp_path / "disk/run"))
    (real / "notes.txt").write_text("irreplaceable")
    for name in ("model.safetensors", "init.pt", "learning.gif.old"):
        (real / name).touch()
    (tmp_path / "q1").symlink_to(real)
    assert call_train(*words, "--overwrite", "--seed", "7").code == 0
    assert (tmp_path / "q1").is_symlink()
    assert RunFolder(real).settings.seed == 7
    assert (real / "notes.txt").read_text() == "irreplaceable"
    assert len(list(real.glob("events.*"))) == 1
    assert not {"model.safetensors", "init.pt"} & {path.name for path in real.iterdir()}
    assert not list(real.glob(".new*"))
    assert results(real) != results(done)
    assert call_eval("--runs", tmp_path / "q1").code == 0


def files(run: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in contents(run).items() if not name.startswith(".")}


def create_until(run: Path, function: str, fatal: int) -> bool:
    """Begin a run anew; returns False if this call of a function of `os`, by its number, ended that."""
    call, seen = getattr(os, function), 0

    def fail_at_last(*paths: Any, **more: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == fatal:
            raise OSError(errno.EIO, "Input/output error")
        call(*paths, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail_at_last)
        try:
            create(run, NEW, True).close()
        except DiskError:
            return False
    return True


def test_overwrite_that_ends_amid_it(done: Path, tmp_path: Path) -> None:
    """While new files are written nothing is touched; later no old weights go on with other settings."""
    for function, least in (("fsync", len(NEW)), ("unlink", len(files(done))), ("replace", 2 * len(NEW))):
        for fatal in range(1, 99):
            run = Path(shutil.copytree(done, tmp_path / f"{function}{fatal}"))
            if create_until(run, function, fatal):
                break
            if function == "fsync":
                assert files(run) == files(done)
            elif "is" in RunFolder(run).config:
                assert not {"best.pt", "last.pt", "metrics.jsonl"} & files(run).keys()
            assert create_until(run, function, 99)
            assert files(run).keys() == NEW.keys()
            assert RunFolder(run).config == NEW_CONFIG
        assert fatal > least
    with pytest.raises(UsageError, match="exists already"):
        create(run, NEW, False)


def test_folders_that_cannot_be_made(words: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert call_train(*words, "--runs", tmp_path / "file").code == 5
    assert "File name too long" in call_train(*words, "--name", "x" * 256).line
    with interrupted_after("cvae", 1):
        assert call_train(*words, "--name", "it's q1").code == 143
    pasted = f"""'{tmp_path}/it'"'"'s q1'"""
    assert f"--resume {pasted} goes on with it" in call_train(*words, "--name", "it's q1").line


# The lock


def test_one_training_holds_a_folder(tmp_path: Path) -> None:
    """Until it ends; the file of the lock stays, and is no lock."""
    for _ in range(2):
        with hold(tmp_path), pytest.raises(UsageError, match="is held by another training"):
            hold(tmp_path)
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """A training does without, and says so in one line."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    hold(tmp_path)
    assert capsys.readouterr().err.startswith(f"{tmp_path} cannot be locked here (")


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DiskError, match=r"cannot be written to \(Is a directory\)"):
        hold(tmp_path)
