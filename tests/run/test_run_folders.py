"""Making run folders and beginning them anew, the lock on them, and runs that begin with the weights of another."""

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.inprocess import TINY, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.scripts import ROOT
from support.trainings import contents

from cvae.errors import DiskError, UsageError
from cvae.run import checkpoint
from cvae.run.folder import hold, read_json, read_settings
from cvae.run.load import load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in float32."""
    runs = tmp_path_factory.mktemp("runs")
    assert call_train("--data", data, *TINY, "--precision", "fp32", "--runs", runs, "--name", "done").code == 0
    return runs / "done"


# Where a new run is made, and what it replaces


def test_empty_folder_is_taken(data: Path, tmp_path: Path) -> None:
    """Whoever made it, even with hidden files; one with anything in it is not, with and without --overwrite."""
    (tmp_path / "q1").mkdir()
    (tmp_path / "q1/.gitkeep").touch()
    assert call_train("--data", data, *TINY, "--runs", tmp_path).code == 0
    assert (tmp_path / "q1/.gitkeep").exists()
    (tmp_path / "q2").mkdir()
    (tmp_path / "q2/notes").touch()
    (tmp_path / "q3").write_text("a file")
    for name in ("q2", "q3"):
        for words in ([], ["--overwrite"]):
            ended = call_train("--data", data, *TINY, "--runs", tmp_path, "--name", name, *words)
            assert ended.code == 2
            assert ended.line == f"{tmp_path / name} is no run folder and is left as it is; choose another --name"
    assert sorted(contents(tmp_path / "q2")) == ["notes"]


@pytest.mark.parametrize("name", ["observed.png", "init.pt"])
def test_file_with_the_name_of_one_of_ours(data: Path, tmp_path: Path, name: str) -> None:
    """It is somebody else's, unless a process was killed as it made a run: its config.json is unfinished then."""
    run = tmp_path / "q1"
    run.mkdir()
    (run / name).write_text("irreplaceable")
    words = ["--data", data, *TINY, "--runs", tmp_path]
    for more in ([], ["--overwrite"]):
        ended = call_train(*words, *more)
        assert (ended.code, "is no run folder and is left as it is" in ended.line) == (2, True)
        assert contents(run).keys() - {".lock"} == {name}
    (run / ".config.json.tmp").touch()
    assert call_train(*words).code == 0
    assert name not in contents(run)


def test_overwrite_takes_the_run_and_nothing_else(done: Path, data: Path, tmp_path: Path) -> None:
    """What somebody has put beside it stays, and so does a link by which the folder is found."""
    real = Path(shutil.copytree(done, tmp_path / "disk/run"))
    (real / "notes.txt").write_text("irreplaceable")
    (tmp_path / "runs").mkdir()
    link = tmp_path / "runs/q1"
    link.symlink_to(real)
    words = ["--data", data, *TINY, "--runs", tmp_path / "runs"]
    assert "runs/q1 exists already: --resume " in call_train(*words).line
    ended = call_train(*words, "--overwrite", "--seed", "7")
    assert ended.code == 0
    assert f"{link} is a link: the run is replaced to which it leads, {real}\n" in ended.out
    assert link.is_symlink()
    assert read_settings(real).seed == 7
    assert (real / "notes.txt").read_text() == "irreplaceable"
    assert len(list(real.glob("events.*"))) == 1
    assert results(real) != results(done)
    assert call_eval("--runs", link).code == 0


def test_link_to_nothing(data: Path, tmp_path: Path) -> None:
    (tmp_path / "q1").symlink_to(tmp_path / "nowhere")
    for words in ([], ["--overwrite"]):
        assert call_train("--data", data, *TINY, "--runs", tmp_path, *words).code == 2
    assert os.readlink(tmp_path / "q1") == str(tmp_path / "nowhere")


def test_config_of_another_program(data: Path, tmp_path: Path) -> None:
    """Many of them have a config.json; a damaged one is ours if the metrics are beside it."""
    (tmp_path / "q1").mkdir()
    (tmp_path / "q1/config.json").write_text('{"model_type": "bert"}')
    words = ["--data", data, *TINY, "--runs", tmp_path, "--overwrite"]
    assert "is no run folder" in call_train(*words).line
    (tmp_path / "q1/config.json").write_text('{"settings')
    assert "is no run folder" in call_train(*words).line
    (tmp_path / "q1/metrics.jsonl").touch()
    assert call_train(*words).code == 0


def test_old_run_stays_if_there_is_no_room_for_the_new_one(
    done: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(done, tmp_path / "q1"))
    (run / ".config.json.tmp").mkdir()  # nothing can be written in its place
    before = contents(run)
    ended = call_train("--data", data, *TINY, "--runs", tmp_path, "--overwrite")
    assert ended.code == 5
    assert ended.line.startswith(f"{run}/config.json: cannot be written (")
    assert contents(run) == before
    (run / ".config.json.tmp").rmdir()
    (run / ".init.pt.tmp").mkdir()
    ended = call_train("--data", data, *TINY, "--runs", tmp_path, "--overwrite", "--init", done)
    assert ended.code == 5
    assert ended.line.startswith(f"{run}/init.pt: cannot be written (")
    assert contents(run) == before
    assert call_train("--data", data, *TINY, "--runs", run / "config.json").code == 5
    assert call_train("--data", data, *TINY, "--runs", Path("/proc/nowhere")).code == 5


@pytest.mark.parametrize("letter", ["x", "é"])
def test_long_names(data: Path, tmp_path: Path, letter: str) -> None:
    """File systems take 255 bytes, and not 256."""
    name = letter * (255 // len(letter.encode())) + "x" * (255 % len(letter.encode()))
    words = ["--data", data, *TINY, "--runs", tmp_path]
    assert call_train(*words, "--name", name).code == 0
    assert call_train("--resume", tmp_path / name, "--epochs", "3").code == 0
    assert call_train(*words, "--name", name, "--overwrite").code == 0
    ended = call_train(*words, "--name", f"{name}x")
    assert (ended.code, "File name too long" in ended.line) == (5, True)
    ended = call_train("--resume", tmp_path / f"{name}x")
    assert (ended.code, "is no run folder" in ended.line) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_commands_can_be_pasted(data: Path, tmp_path: Path) -> None:
    """Where a name has spaces or quotes in it, too."""
    words = ["--data", data, *TINY, "--runs", tmp_path / "my runs", "--name", "it's q1"]
    run = tmp_path / "my runs" / "it's q1"
    with interrupted_after("cvae", 1):
        assert call_train(*words).code == 143
    pasted = f"'{tmp_path}/my runs/it'\"'\"'s q1'"
    assert f"--resume {pasted} goes on with it" in call_train(*words).line
    (run / "last.pt").write_bytes(b"")
    assert f"python train.py --init {pasted} --name NEW" in call_train("--resume", run).line


def test_quadrants_of_a_run_with_a_mask(data: Path, tmp_path: Path) -> None:
    """--quadrants 1, the default of a run that was given none, is another thing to ask for."""
    assert call_train("--data", data, *TINY, "--runs", tmp_path, "--observed", "left").code == 0
    ended = call_train("--resume", tmp_path / "left", "--quadrants", "1")
    assert (ended.code, ended.line) == (2, f"{tmp_path}/left was begun with --observed left; leave --quadrants out")


# The lock


HOLDER = """
import os, sys, time
from pathlib import Path
from cvae.run.folder import hold
lock = hold(Path(sys.argv[1]), print)
if os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""
"""A process that holds a folder, with a child that it has forked since."""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_lock_ends_with_its_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """However it ends, and whatever children it has left; its file stays, and is no lock."""
    with pytest.raises(UsageError, match="is held by another training"):
        hold(tmp_path, pytest.fail)
    holder.kill()
    holder.wait()
    lock = hold(tmp_path, pytest.fail)
    assert lock is not None
    with pytest.raises(UsageError, match="is held by another training"):
        hold(tmp_path, pytest.fail)
    lock.release()
    assert (tmp_path / ".lock").exists()
    again = hold(tmp_path, pytest.fail)
    assert again is not None
    again.release()


NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_file_system_without_locks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A training does without, and says so in one line, each time it begins or goes on."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    words = ["--data", data, *TINY, "--runs", tmp_path, "--quiet"]
    run = tmp_path / "q1"
    reason = f"cannot be locked on this file system ({os.strerror(number)}): see that no other training uses it"
    for more in ([], ["--overwrite"]):
        ended = call_train(*words, *more)
        assert (ended.code, ended.err) == (0, f"train.py: {run} {reason}\n")
    ended = call_train("--resume", run, "--epochs", "3", "--quiet")
    assert (ended.code, ended.err) == (0, f"train.py: {run} {reason}\n")


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DiskError, match=r"cannot be written to \(Is a directory\)"):
        hold(tmp_path, pytest.fail)


# Another run's weights


def test_begins_with_the_weights_of_another_run(done: Path, data: Path, tmp_path: Path) -> None:
    """At a rate that changes nothing, all validations are those of the other's best weights."""
    words = ["--data", data, *TINY, "--precision", "fp32", "--learning-rate", "1e-30", "--runs", tmp_path]
    best = [record for record in results(done)["metrics"] if record["phase"] == "baseline"][-1:]
    best += [record for record in results(done)["metrics"] if record["phase"] == "cvae"][
        read_json(done / "summary.json")["best_epoch"] - 1 :
    ][:1]
    for number, init in enumerate((done, Path(os.path.relpath(done)))):
        ended = call_train(*words, "--init", init, "--name", f"{number}")
        assert (ended.code, ended.err) == (0, "")
        assert f"begins with the weights of {init}/best.pt\n" in ended.out
        metrics = results(tmp_path / f"{number}")["metrics"]
        assert metrics[0]["validation_log_likelihood"] == pytest.approx(best[0]["validation_log_likelihood"], rel=1e-6)
        for record in metrics[1:]:
            assert record["validation_elbo"] == pytest.approx(best[1]["validation_elbo"], rel=1e-6)
        assert read_json(tmp_path / f"{number}/config.json")["init"] == {
            "run": str(done),
            "file": "best.pt",
            "sha256": hashlib.sha256((done / "best.pt").read_bytes()).hexdigest(),
            "not_fitting": "",
        }
    plain = call_train("--data", data, *TINY, "--runs", tmp_path, "--name", "plain")
    assert plain.code == 0
    assert "init" not in read_json(tmp_path / "plain/config.json")


def test_name_of_several_parts(done: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the folder of runs, for all that take the name of a run."""
    shutil.copytree(done, tmp_path / "runs/group/done")
    monkeypatch.chdir(tmp_path)
    assert call_train("--resume", "group/done").out.endswith("runs/group/done is finished: nothing is left to do\n")
    assert call_train("--data", data, *TINY, "--init", "group/done", "--name", "new").code == 0
    assert load("group/done").latent_dim == 4
    assert call_eval("group/done").code == 0
    assert call_train("--resume", "group/none").line.startswith("group/none is no run folder")


def test_by_name(done: Path, data: Path) -> None:
    words = ["--data", data, *TINY, "--runs", done.parent]
    assert call_train(*words, "--init", "done", "--name", "by-name").code == 0
    assert read_json(done.parent / "by-name/config.json")["init"]["run"] == str(done)
    with interrupted_after("baseline", 1):  # resumed, it does not begin with them once more
        assert call_train(*words, "--init", "done", "--name", "ended").code == 143
    (done.parent / "done").rename(done.parent / "away")
    try:
        assert call_train("--resume", done.parent / "ended").code == 0
    finally:
        (done.parent / "away").rename(done.parent / "done")
    assert results(done.parent / "ended") == results(done.parent / "by-name")


MISFITS = {
    "--hidden 8 9": "baseline_net.layers.1, baseline_net.layers.2.weight, encoders.layers.1, encoders.layers.2.weight, "
    "generation_net.layers.1, generation_net.layers.2.weight",
    "--latent-dim 5": "encoders.layers.2, generation_net.layers.0.weight",
    "--quadrants 2": "baseline_net.layers.0.weight, baseline_net.layers.2, encoders.layers.0.weight, "
    "generation_net.layers.2; the mask is another, and so nothing fits that is as large as a part of the image "
    "(40, 50, 90)",
    "--network paper": "generation_of_x, generation_of_z, generation_net",
}


@pytest.mark.parametrize("words", MISFITS)
def test_what_does_not_fit_is_named(done: Path, data: Path, tmp_path: Path, words: str) -> None:
    """The layers that depend on what is another; all others have the other run's weights."""
    ended = call_train("--data", data, *TINY, *words.split(), "--init", done, "--runs", tmp_path, "--name", "new")
    assert (ended.code, ended.err) == (0, "")
    [line] = [line for line in ended.out.splitlines() if line.startswith("begins with")]
    assert line == f"begins with the weights of {done}/best.pt; drawn anew, as these do not fit: {MISFITS[words]}"


def test_mask_of_as_many_pixels(data: Path, tmp_path: Path) -> None:
    """All weights fit by their shape, and half of them would stand for other pixels."""
    words = ["--data", data, *TINY, "--runs", tmp_path, "--observed"]
    assert call_train(*words, "top").code == 0
    facing = "baseline_net.layers.0.weight, baseline_net.layers.2, encoders.layers.0.weight, generation_net.layers.2"
    for mask, misfit in (("bottom", facing), ("top", "")):
        assert call_train(*words, mask, "--init", tmp_path / "top", "--name", f"new-{mask}").code == 0
        assert read_json(tmp_path / f"new-{mask}/config.json")["init"]["not_fitting"] == misfit
    (tmp_path / "top/config.json").unlink()
    ended = call_train(*words, "top", "--init", tmp_path / "top", "--name", "unknown")
    assert "/best.pt; its mask cannot be read, and is taken for the same\n" in ended.out


def test_own_beginning_without_weights(done: Path, data: Path, tmp_path: Path) -> None:
    """A run that began with another's does not begin with fresh ones when it is resumed."""
    with interrupted_after("baseline", 1):
        assert call_train("--data", data, *TINY, "--init", done, "--runs", tmp_path).code == 143
    run = tmp_path / "q1"
    for content in ({}, {"model": None}, {"model": 3}, {"model": {"weight": 3}}):
        checkpoint.save(run / "init.pt", content)
        ended = call_train("--resume", run)
        assert ended.code == 3
        assert ended.line.startswith(f"{run}/init.pt: does not hold the weights that the run began with")


def test_weights_that_cannot_be_begun_with(done: Path, data: Path, tmp_path: Path) -> None:
    """One line, and no folder."""
    words = ["--data", data, *TINY, "--runs", tmp_path / "runs", "--name", "new", "--init"]
    damaged = Path(shutil.copytree(done, tmp_path / "damaged"))
    for name in ("best.pt", "last.pt"):
        (damaged / name).write_bytes(b"damaged")
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.save(other / "best.pt", {"phase": "cvae", "model": {"weight": torch.zeros(3)}})
    for run, reason in {
        tmp_path / "nowhere": "best.pt: cannot be read (No such file or directory)",
        damaged: "best.pt: is damaged or no checkpoint of this program (its digest does not match)",
        other: "best.pt: has no weights that fit this network; leave --init out, or give that run's settings",
    }.items():
        ended = call_train(*words, run)
        assert (ended.code, ended.line) == (3, f"{run}/{reason}")
    assert not (tmp_path / "runs").exists()


def test_weights_of_a_baseline(data: Path, tmp_path: Path) -> None:
    """Those of a run that has come no further go into the baseline."""
    words = ["--data", data, *TINY, "--runs", tmp_path, "--name"]
    with interrupted_after("baseline", 1):
        assert call_train(*words, "begun").code == 143
    ended = call_train(*words, "new", "--init", tmp_path / "begun")
    assert (
        f"weights of {tmp_path}/begun/best.pt; drawn anew, as these do not fit: encoders, generation_net\n" in ended.out
    )
