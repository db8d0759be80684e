"""Checkpoints: what is saved comes back, nothing half-written stands at the path, and nothing harmful is believed."""

import hashlib
import io
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainings import largest_file, plain

from cvae.errors import DataError, DiskError
from cvae.run import checkpoint

CONTENT = {
    "phase": "cvae",
    "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.tensor([1.5, float("nan")]).half()),
    "optimizer": {"count": torch.tensor(3), "scale": None, "flags": torch.tensor([True, False])},
    "progress": {"epoch": 3, "best_loss": 71.25, "finished": False, "note": None, "sizes": [500, 500]},
}


class Payload:
    """An object that, when it is unpickled, writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "was run")


def saved_by_torch(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, CONTENT)
    loaded = checkpoint.load(path)
    assert plain(loaded) == plain({"format": 3, **CONTENT})
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_file_of_version_0_3_has_a_digest_behind_it(tmp_path: Path) -> None:
    body = saved_by_torch({"format": 3, **CONTENT})
    (tmp_path / "best.pt").write_bytes(body + b"SHA-256\0" + hashlib.sha256(body).digest())
    assert plain(checkpoint.load(tmp_path / "best.pt")) == plain({"format": 3, **CONTENT})


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(DataError) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    path, written = tmp_path / "last.pt", tmp_path / "written"
    path.write_bytes(saved_by_torch({"format": 3, "model": Payload(written)}))
    assert "no checkpoint of this program" in refused(path)
    assert not written.exists()
    torch.load(path, weights_only=False)  # the control: it would have been run
    assert written.exists()


@pytest.mark.parametrize("content", [{"format": 2}, {"model": {}}, {"format": torch.ones(2)}, [3], 3], ids=repr)
def test_other_content_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "last.pt").write_bytes(saved_by_torch(content))
    assert "is not a checkpoint of format 3" in refused(tmp_path / "last.pt")


def test_damage_is_refused(tmp_path: Path) -> None:
    path, body = tmp_path / "last.pt", saved_by_torch({"format": 3, **CONTENT})
    assert "cannot be read (No such file or directory)" in refused(path)
    for size in (0, 1, 100, len(body) // 2, len(body) - 60):
        path.write_bytes(body[:size])
        refused(path)


# Writing


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of files")
def test_full_disk_leaves_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": 1})
    with largest_file(1000), pytest.raises(DiskError, match=r"last\.pt: cannot be written \(File too large\)"):
        checkpoint.save(path, {"a": torch.zeros(1000)})
    assert checkpoint.load(path) == {"format": 3, "a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_whatever_ends_a_writer_leaves_what_stood_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_file(path) as file:  # noqa: PT012
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary file of its own: whoever comes last is read, whole."""
    path = tmp_path / ("é" * 127)
    with checkpoint.atomic_file(path) as file:
        file.write(b"first" * 10)
        checkpoint.write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 10
