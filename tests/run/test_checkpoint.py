"""Checkpoints: what is saved comes back, nothing half-written stands at the path, and nothing harmful is believed."""

import ast
import copy
import hashlib
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import largest_file
from support.scripts import ROOT
from torch import Tensor

from cvae.errors import DataError, DiskError
from cvae.run import checkpoint

CONTENT = {
    "phase": "cvae",
    "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.tensor([1.5, float("nan")])),
    "progress": {"epoch": 3, "best_loss": 71.25, "finished": False, "note": None, "sizes": [500, 500]},
}


def sign(body: bytes) -> bytes:
    """A body with the tail that the format asks for, computed here anew."""
    return body + b"SHA-256\0" + hashlib.sha256(body).digest()


def saved_by_torch(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repacked(body: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint's archive with its entries changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def equal(left: Any, right: Any) -> bool:
    """Whether two contents are the same, tensors bit for bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def refusal(path: Path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(DataError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "best.pt"
    checkpoint.save(file, CONTENT)
    return file


# What is saved comes back


def test_round_trip(path: Path) -> None:
    loaded = checkpoint.load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert equal(loaded, CONTENT)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    content = {"tensor": tensor, "flags": tensor > 50}
    checkpoint.save(tmp_path / "a.pt", content)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert equal({key: loaded[key] for key in content}, content)


def test_plain_torch_reads_it_too(path: Path) -> None:
    assert equal(dict(torch.load(path, weights_only=True)), {"format": checkpoint.FORMAT, **CONTENT})


def test_tail_is_the_digest_of_all_before_it(path: Path) -> None:
    content = path.read_bytes()
    assert content == sign(content[:-40])


def test_same_content_makes_the_same_file(path: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "again.pt", copy.deepcopy(CONTENT))
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "value",
    [Path("a"), {1, 2}, object(), b"bytes", 1j, torch.float32, torch.Size, [{"deep": ({"deeper": range(3)},)}]],
    ids=lambda value: type(value).__name__,
)
def test_nothing_but_tensors_and_plain_values_is_saved(path: Path, value: object) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError, match="model"):
        checkpoint.save(path, {"model": {"good": 1, "bad": value}})
    assert path.read_bytes() == before


class Elsewhere(Tensor):
    """A tensor whose numbers are in another memory: a file with it in it could not be opened without that memory."""

    def cpu(self, *arguments: Any) -> Tensor:  # type: ignore[override]
        return torch.arange(3.0)


def test_tensors_are_saved_from_the_memory_of_the_cpu(path: Path) -> None:
    """All of them, however deep: so that the file opens anywhere."""
    tensor = torch.zeros(3).as_subclass(Elsewhere)
    assert b"Elsewhere" in saved_by_torch(tensor)
    content = {"model": OrderedDict(a=tensor), "optimizer": {"moments": [tensor, tensor], "scale": tensor}}
    checkpoint.save(path, content)
    loaded = checkpoint.load(path)
    found = [*loaded["model"].values(), *loaded["optimizer"]["moments"], loaded["optimizer"]["scale"]]
    assert [each.tolist() for each in found] == [[0, 1, 2]] * 4


def test_tensors_come_back_in_the_memory_of_the_cpu(path: Path) -> None:
    """Whatever the file says of where they were."""
    on_cpu, on_gpu = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"

    def move(name: str, old: bytes) -> bytes:
        return old.replace(on_cpu, on_gpu) if name.endswith("data.pkl") else old

    body = repacked(path.read_bytes()[:-40], move)
    assert on_gpu in body
    path.write_bytes(sign(body))
    loaded = checkpoint.load(path)
    assert all(tensor.device.type == "cpu" for tensor in loaded["model"].values())
    assert equal(loaded["model"], CONTENT["model"])


def test_keys_are_plain_too(path: Path) -> None:
    with pytest.raises(TypeError, match="key of tuple"):
        checkpoint.save(path, {"model": {(1, 2): 3}})


# Written wholly or not at all


def test_killed_between_write_and_replace(path: Path) -> None:
    """The process dies at the very moment at which the new file would take its place."""
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save(path, {"phase": "new", "model": torch.ones(1000)})
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2, "the kill came before the temporary file was written"
    checkpoint.save(path, {"phase": "newer"})
    assert checkpoint.load(path)["phase"] == "newer"
    assert [file.name for file in path.parent.iterdir()] == ["best.pt"]


def test_killed_at_any_moment_the_file_is_whole(path: Path) -> None:
    moments = random.Random(0)
    versions = [{"phase": name, "model": torch.full((200_000,), value)} for name, value in (("a", 1.0), ("b", 2.0))]
    seen: set[str] = set()
    kills = 0
    while kills < 40 or not {"a", "b"} <= seen:  # on a busy machine it may take longer to come to the second version
        kills += 1
        assert kills <= 400, "no second version was ever whole"
        child = os.fork()
        if child == 0:
            while True:
                for version in versions:
                    checkpoint.save(path, version)
        time.sleep(moments.uniform(0.001, 0.05) * max(1, kills / 40))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = checkpoint.load(path)
        seen.add(loaded["phase"])
        if loaded["phase"] != "cvae":
            assert loaded["model"].unique().tolist() == [{"a": 1.0, "b": 2.0}[loaded["phase"]]]


@pytest.mark.parametrize("limit", [0, 1, 4096, 50_000])
def test_full_disk_keeps_the_previous_file(path: Path, limit: int) -> None:
    before = path.read_bytes()
    with largest_file(limit), pytest.raises(DiskError) as caught:
        checkpoint.save(path, {"model": torch.zeros(100_000)})
    assert str(caught.value).startswith(f"{path}: cannot be written (File too large)")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["best.pt"]


def test_folder_that_was_removed(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file or directory"):
        checkpoint.save(tmp_path / "gone" / "best.pt", CONTENT)


@pytest.mark.parametrize("name", ["folder", "."])
def test_folder_in_the_place_of_the_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        checkpoint.save(Path(name), CONTENT)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


# Damaged, foreign and forged files


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "best.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder.pt")


def test_every_flipped_byte_is_seen(path: Path) -> None:
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert "is damaged" in refusal(path)


def test_every_truncation_is_seen(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(0, len(content), 31), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "is damaged" in refusal(path)


@pytest.mark.parametrize("body", [b"", b"PK", b"PK\x05\x06" + bytes(18), pickle.dumps({"format": 1}), b"\0" * 1000])
def test_right_digest_of_no_archive(path: Path, body: bytes) -> None:
    path.write_bytes(sign(body))
    assert "is no checkpoint" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        {"format": checkpoint.FORMAT + 1},
        {"format": 2, "phase": "cvae", "model": {}},  # of the version before this one
        {"format": 0},
        {"format": True},
        {"format": "1"},
        {"format": torch.tensor([1, 1])},
        {"model": 1},
        [1, 2],
        torch.zeros(3),
    ],
    ids=repr,
)
def test_other_format(path: Path, content: object) -> None:
    path.write_bytes(sign(saved_by_torch(content)))
    assert f"is not a checkpoint of format {checkpoint.FORMAT}" in refusal(path)


class Payload:
    """Unpickled, it calls a function on some arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", ["os.mkdir", "exec", "subprocess.check_call"])
def test_malicious_pickle_does_not_run(path: Path, tmp_path: Path, protocol: int, call: str) -> None:
    trace = tmp_path / "it-ran"
    payload = {
        "os.mkdir": Payload(os.mkdir, str(trace)),
        "exec": Payload(exec, f"import os; os.mkdir({str(trace)!r})"),
        "subprocess.check_call": Payload(subprocess.check_call, ["mkdir", str(trace)]),
    }[call]
    evil = pickle.dumps({"format": checkpoint.FORMAT, "model": payload}, protocol)
    archive = repacked(path.read_bytes()[:-40], lambda name, old: evil if name.endswith("data.pkl") else old)
    for forged in (sign(archive), sign(evil), archive, evil):
        path.write_bytes(forged)
        refusal(path)
        assert not trace.exists()
    if call == "os.mkdir":  # the payload is a live one
        subprocess.run(
            [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=evil, check=True
        )
        assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(2, 2).to_sparse(),
        torch.float64,
        {1, 2},
        torch.device("cpu"),
        1j,
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'layout', '')}",
)
def test_names_that_tensors_do_not_need_are_refused(path: Path, value: object) -> None:
    """Some of these `weights_only` itself would take."""
    path.write_bytes(sign(saved_by_torch({"format": checkpoint.FORMAT, "model": value})))
    assert "is no checkpoint" in refusal(path)


def test_tensor_larger_than_its_data(path: Path) -> None:
    """Four numbers in the file, 200 in what the pickle says of them: the memory behind the four stays unread."""
    body = saved_by_torch({"format": checkpoint.FORMAT, "model": torch.arange(4.0)})
    four, many = b"K\x04", b"K\xc8"

    def storage(name: str, old: bytes) -> bytes:
        return old.replace(four + b"t", many + b"t") if name.endswith("data.pkl") else old

    def view(name: str, old: bytes) -> bytes:
        return old.replace(four + b"\x85", many + b"\x85") if name.endswith("data.pkl") else old

    path.write_bytes(sign(repacked(body, lambda name, old: old)))
    assert checkpoint.load(path)["model"].tolist() == [0, 1, 2, 3]
    for changes in ([storage], [view], [storage, view]):
        forged = body
        for change in changes:
            assert repacked(forged, change) != repacked(forged, lambda name, old: old)
            forged = repacked(forged, change)
        path.write_bytes(sign(forged))
        assert "is no checkpoint" in refusal(path)


# Bombs


def peak_memory(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_refused(path: Path, compression: int) -> None:
    body = saved_by_torch({"format": checkpoint.FORMAT, "model": torch.zeros(4 << 20)})
    path.write_bytes(sign(repacked(body, lambda name, old: old, compression)))
    assert path.stat().st_size < len(body) / 100
    assert peak_memory(lambda: refusal(path)) < 1 << 20


def test_overlapping_entries_are_refused(path: Path) -> None:
    """A thousand names for the same megabyte: a bomb without compression."""
    buffer = io.BytesIO(saved_by_torch({"format": checkpoint.FORMAT, "model": torch.zeros(1 << 18)}))
    with zipfile.ZipFile(buffer, "a") as archive:
        (data,) = (entry for entry in archive.filelist if entry.filename.endswith("data/0"))
        for number in range(1, 1000):
            twin = copy.copy(data)
            twin.filename = data.filename[:-1] + str(number)
            archive.filelist.append(twin)
        archive.comment = b" "  # has the directory written anew
    path.write_bytes(sign(buffer.getvalue()))
    with zipfile.ZipFile(path) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > 500 * path.stat().st_size
    assert "is no checkpoint" in refusal(path)


# The source loads nothing in any other way

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pandas"}


def unsafe_loads(source: str) -> list[str]:
    """The places in a source that could unpickle objects, as `line: what`."""
    tree = ast.parse(source)
    found = []
    names = {}  # what the names of this file stand for: {"np": "numpy", "load": "torch.load"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            what = dotted(node)
            module, _, last = what.rpartition(".")
            if module.split(".")[0] in UNPICKLERS and last in ("load", "loads", "Unpickler", "open", "read_pickle"):
                found.append(f"{node.lineno}: {what}")
        if isinstance(node, ast.Call):
            what = dotted(node.func)
            module, _, last = what.rpartition(".")
            words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            safe_torch = what == "torch.load" and words.get("weights_only") is True
            if module.split(".")[0] == "torch" and last in ("load", "legacy_load") and not safe_torch:
                found.append(f"{node.lineno}: {what}")
            if "allow_pickle" in words and words["allow_pickle"] is not False:
                found.append(f"{node.lineno}: {what} with allow_pickle")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import torch as t\nt.load(p)",
        "from torch import load\nload(p)",
        "from torch import load as read\nread(p, 'cpu')",
        "import torch\ntorch.jit.load(p)",
        "from torch import serialization\nserialization.load(p)",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import Unpickler as U\nU(f).load()",
        "from pickle import loads\nf = loads",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import marshal\nmarshal.load(f)",
    ],
)
def test_search_finds_unsafe_loads(source: str) -> None:
    assert unsafe_loads(source)


def test_no_source_unpickles_objects() -> None:
    folders = ("cvae", "benchmarks", "tests")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    assert {"train.py", "eval.py", "checkpoint.py"} <= {file.name for file in files}
    sources = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    found = {name: loads for name, source in sources.items() if (loads := unsafe_loads(source))}
    for name in ("cvae/report/formats.py", "tests/report/test_export.py"):  # which read what they have just written
        [load] = found.pop(name)
        assert load.endswith("torch.export.load")
    assert found == {}
    assert "torch.load(" in sources["cvae/run/checkpoint.py"], "the search passed over the one load that there is"
