"""Run folders: read, made, begun anew whatever fails amid it, and held by one training at a time."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.inprocess import TINY, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents

from cvae.errors import DataError, DiskError, UsageError
from cvae.run.claim import create_run, hold
from cvae.run.folder import RunFolder, find_run
from cvae.settings import Settings

CONFIG = {"settings": Settings(hidden=(8, 7)).to_dict(), "images": {"height": 10, "width": 9}, "precision": "bf16"}
NEW = {"config.json": json.dumps({**CONFIG, "seed": "new"}).encode(), "observed.png": b"new", "init.pt": b"new"}


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
    run = RunFolder(tmp_path)
    with pytest.raises(DataError, match="is no run folder: it has no config"):
        _ = run.settings
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert (run.settings.hidden, run.summary, run.last()) == ((8, 7), None, {})
    (tmp_path / "config.json").unlink()  # it was read once
    assert (run.task.observed.shape, run.precision) == ((10, 9), "bf16")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "is no valid JSON"),
        ([], "the settings are missing"),
        ({**CONFIG, "settings": {"hidden": "8"}}, "hidden has to be"),
        ({**CONFIG, "settings": {"network": "wide"}}, "this version knows no network 'wide'"),
        ({**CONFIG, "settings": {"observed": "corner"}}, "this version knows no observed 'corner'"),
        ({**CONFIG, "settings": {"shades": 2}}, "this version knows no setting 'shades'"),
        ({**CONFIG, "images": None}, "does not say the size of the images"),
        ({**CONFIG, "images": {"height": 10, "width": True}}, "does not say the size of the images"),
        ({**CONFIG, "images": {"height": 10, "width": 9, "test": 3}}, "does not say the size of the images"),
    ],
)
def test_config_that_is_none(tmp_path: Path, config: Any, reason: str) -> None:
    (tmp_path / "config.json").write_text("{" if config is None else json.dumps(config))
    with pytest.raises(DataError, match=reason) as caught:
        _ = RunFolder(tmp_path).task
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


class Killed(BaseException):
    """The end of a process, which mends nothing."""


def create_until(run: Path, fatal: int, error: BaseException, overwrite: bool) -> bool:
    """Create a run whose rename of this number fails; returns whether there were so many."""
    rename, seen = os.rename, 0

    def fail_at_last(source: Path, target: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == fatal:
            raise error
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", fail_at_last)
        if isinstance(error, Killed):
            patch.setattr("cvae.run.claim.settle", lambda folder: None)
        try:
            lock = create_run(run, NEW, overwrite, pytest.fail)
        except (Killed, DiskError):
            return True
    with lock:
        return False


def files(run: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in contents(run).items() if name != ".lock"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Killed()], ids=repr)
def test_replacement_that_ends_amid_it(done: Path, tmp_path: Path, error: BaseException) -> None:
    """At any rename: after an error all is as before, after a kill the next one that comes puts it back."""
    for fatal in range(1, 99):
        run = Path(shutil.copytree(done, tmp_path / f"{fatal}"))
        if not create_until(run, fatal, error, True):
            break
        if isinstance(error, Killed):
            with pytest.raises(UsageError, match="exists already"):
                create_run(run, NEW, False, pytest.fail)
        assert files(run) == files(done)
    assert fatal > len(files(done)) + len(NEW)
    assert files(run) == NEW


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Killed()], ids=repr)
def test_new_folder_that_ends_amid_it(tmp_path: Path, error: BaseException) -> None:
    """It is gone after an error, and free after a kill."""
    for fatal in range(1, 1 + len(NEW)):
        run = tmp_path / f"{fatal}"
        assert create_until(run, fatal, error, False)
        assert run.exists() == isinstance(error, Killed)
        assert not create_until(run, 99, OSError(), False)
        assert files(run) == NEW


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
        with hold(tmp_path, pytest.fail), pytest.raises(UsageError, match="is held by another training"):
            hold(tmp_path, pytest.fail)
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A training does without, and says so in one line."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    warnings: list[str] = []
    hold(tmp_path, warnings.append)
    reason = f"cannot be locked on this file system ({os.strerror(number)}): see that no other training uses it"
    assert warnings == [f"{tmp_path} {reason}"]


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DiskError, match=r"cannot be written to \(Is a directory\)"):
        hold(tmp_path, pytest.fail)
