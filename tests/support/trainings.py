"""What the tests of whole trainings share: small ones, what they leave behind, ways to start, to wait and to kill."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cvae.run import checkpoint
from cvae.run.checkpoint import read_json
from cvae.run.folder import RunFolder
from support.images import mnist
from support.scripts import PATIENCE, ROOT, small_mnist, write_contrary

SMALL = [
    "--hidden", "32", "32", "--latent-dim", "8", "--train-limit", "300", "--batch-size", "32",
    "--epochs", "3", "--baseline-epochs", "2",
]  # nine steps an epoch  # fmt: skip

ENDLESS = [*SMALL, "--epochs", "5000", "--patience", "5000", "--schedule", "constant"]  # for minutes, until it is ended
TIMED = {"seconds", "images_per_second"}  # what differs between two trainings that are the same
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def make_data(folder: Path) -> Path:
    """600 images of MNIST, 100 of them for validation, and 60 for the test."""
    return small_mnist(folder, 600, 60)


def make_contrary_data(folder: Path) -> Path:
    """The same, but the images for validation are negatives, so that no epoch after the first is the best so far."""
    return write_contrary(folder, mnist("train")[:600], mnist("t10k")[:60])


# What a training leaves behind


def plain(value: Any) -> Any:
    """Tensors as their bits, so that == compares them bit for bit (and NaN with NaN)."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMED}


def checkpoints(folder: Path) -> dict[str, Any]:
    """All of `last.pt` but the sizes of the log's files, and all of `best.pt`."""
    last = plain(checkpoint.load(folder / "last.pt"))
    del last["log"]
    return {"last": {**last, "progress": untimed(last["progress"])}, "best": plain(checkpoint.load(folder / "best.pt"))}


def events(folder: Path) -> dict[str, Any]:
    """TensorBoard's view of a run: per tag the steps in the order it finds them, and values where they are no times."""
    view = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = view.Tags()
    scalars = {
        tag: [(e.step, None if tag.split("/")[-1] in TIMED else e.value) for e in view.Scalars(tag)]
        for tag in tags["scalars"]
    }
    images = {tag: [(e.step, e.encoded_image_string) for e in view.Images(tag)] for tag in tags["images"]}
    texts = {tag: [(e.step, e.tensor_proto.string_val[0]) for e in view.Tensors(tag)] for tag in tags["tensors"]}
    plugins = {tag: metadata.plugin_data.plugin_name for tag, metadata in view.summary_metadata.items()}
    return {"scalars": scalars, "images": images, "texts": texts, "plugins": plugins}


def leavings(folder: Path) -> dict[str, Any]:
    """All that a finished training leaves, apart from times, and the names of event files."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events."))
    summary = folder / "summary.json"
    return {
        "names": names,
        "settings": read_json(folder / "config.json")["settings"],
        "metrics": [untimed(record) for record in RunFolder(folder).metrics()],
        "summary": untimed(read_json(summary)) if summary.exists() else None,
        "figures": {path.name: path.read_bytes() for ending in ("png", "gif") for path in folder.glob(f"*.{ending}")},
        **checkpoints(folder),
        **events(folder),
    }


def assert_same(left: Path, right: Path, apart_from: str = "") -> None:
    """That two trainings left the same; what differs is named."""
    a, b = leavings(left), leavings(right)
    if apart_from:
        del a[apart_from], b[apart_from]
    assert a.keys() == b.keys()
    different = {
        key: [inner for inner in a[key] if a[key][inner] != b[key].get(inner)] if isinstance(a[key], dict) else a[key]
        for key in a
        if a[key] != b[key]
    }
    assert not different


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file in a folder, with the time of its last change: to see that nothing was touched."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def epochs_logged(folder: Path) -> list[tuple[str, int]]:
    """The epochs in `metrics.jsonl`, which may not be there yet."""
    records = RunFolder(folder).metrics() if (folder / "metrics.jsonl").exists() else []
    return [(record["phase"], record["epoch"]) for record in records]


def said(output: str) -> str:
    """What a training on IDX files printed, without the line that says which they are."""
    first, rest = output.split("\n", 1)
    assert first.startswith("IDX files in ")
    return rest


# Starting, waiting, killing


def start(command: list[str | Path], cwd: Path, environment: dict[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    """A command under way, in a process group of its own."""
    return subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def running(*command: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command under way; whatever is left of it at the end is killed."""
    process = start(list(command), cwd)
    try:
        yield process
    finally:
        stop(process)


def train_command(*words: str | Path) -> list[str | Path]:
    return [sys.executable, ROOT / "train.py", *words]


def torchrun(script: str, *words: str | Path) -> list[str | Path]:
    """A script on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, ROOT / script, *words]


def finish(process: subprocess.Popen[str], timeout: float = PATIENCE) -> tuple[int, str, str]:
    """Exit code (negative: the signal that ended it), stdout and stderr. Nothing is left running after a timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(process)
        raise
    return process.returncode, out, err


def stop(process: subprocess.Popen[str]) -> None:
    """End a command and what it started; torchrun passes on the signal to its children, which are in other groups."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = PATIENCE) -> None:
    """Wait for something that a process is to bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@cache
def forking() -> subprocess.Popen[str]:
    """The process of `forked_scripts.py`, one for all tests."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_scripts.py"))],
        env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def fork(script: str, *words: str | Path, cwd: Path, **more: Any) -> list[dict[str, Any]]:
    """What became of a script in forked children; `more` as `forked_scripts.py` says."""
    stdin, stdout = forking().stdin, forking().stdout
    assert stdin is not None
    assert stdout is not None
    asked = {"environments": [{}], "file_size": None, "memory": None, "watched": False, "kill_at": None, **more}
    stdin.write(json.dumps({"script": script, "argv": list(map(str, words)), "cwd": str(cwd), **asked}) + "\n")
    stdin.flush()
    answers: list[dict[str, Any]] = json.loads(stdout.readline())
    return answers


def fork_script(
    script: str, *words: str | Path, cwd: Path, file_size: int | None = None, memory: int | None = None
) -> subprocess.CompletedProcess[str]:
    """As `run_script`, many times as fast: `main` with these words, without the imports."""
    (answer,) = fork(script, *words, cwd=cwd, file_size=file_size, memory=memory)
    return subprocess.CompletedProcess([sys.executable, script, *words], answer["code"], answer["out"], answer["err"])


class Forked:
    """Forked trainings in a folder."""

    def __init__(self, cwd: Path):
        self.cwd = cwd

    def __call__(self, *argv: str | Path, kill_at: int | None = None, watched: bool = False) -> dict[str, Any]:
        """What became of `train.py` with these words; `output`: all that it printed."""
        (answer,) = fork("train.py", *argv, cwd=self.cwd, kill_at=kill_at, watched=watched)
        return {**answer, "output": answer["out"] + answer["err"]}


def fork_two(script: str, *words: str | Path, cwd: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of a script on each of two processes, which no torchrun started."""
    answers = fork(script, *words, cwd=cwd, environments=two_ranks())
    return [(answer["code"], answer["out"], answer["err"]) for answer in answers]


def two_ranks() -> list[dict[str, str]]:
    """What torchrun says to each of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow over this size: the kernel refuses, as it does on a full disk. Windows has no such limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
