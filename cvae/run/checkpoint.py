"""Checkpoints that cannot be half-written, and that cannot do harm when they are read. Knows nothing of CVAEs.

A file is what `torch.save` writes, followed by 40 bytes: `SHA-256\\0` and the digest of all before them. `torch.load`
reads it too, since a zip file may have such a tail.
"""

import errno
import hashlib
import io
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cvae.errors import DataError, DiskError, taken_for_damage

FORMAT = 3
TAG = b"SHA-256\0"
TAIL = len(TAG) + hashlib.sha256().digest_size

ALLOWED = (torch.Tensor, int, float, str, bool, type(None))
NEEDED_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")
}


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values (numbers, strings, lists, dicts), wholly or not at all.

    Raises TypeError for anything else, and DiskError if it cannot be written: then what stood at `path` still does.
    """
    with atomic_file(path) as file:
        write(file, content)


def write(file: BinaryIO, content: Mapping[str, Any]) -> None:
    """Write to an open file what `save` does. Raises TypeError as it does, and OSError."""
    _refuse_objects(content, "content")
    hashed = _Hashed(file)
    try:
        torch.save(_on_cpu({"format": FORMAT, **content}), hashed)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise (hashed.error or error) from None  # the writer makes a RuntimeError of a full disk
    file.write(TAG + hashed.sha256.digest())


class _Hashed:
    """A file that takes the digest of what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, its tensors into the CPU's memory, wherever they were.

    Raises DataError, naming the file, if it is missing, damaged, of another format, or holds anything but tensors and
    plain values; nothing in it is ever run.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    body, tail = memoryview(data)[:-TAIL], data[-TAIL:]
    if tail != TAG + hashlib.sha256(body).digest():
        raise DataError(f"{path}: is damaged or no checkpoint of this program (its digest does not match)")
    content = unpickled(path, body, "is no checkpoint of this program")
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] != FORMAT:
        raise DataError(
            f"{path}: is not a checkpoint of format {FORMAT}, the only one that this version reads; train anew"
        )
    return content


def unpickled(path: Path, body: bytes | memoryview, problem: str) -> Any:
    """What `torch.save` wrote, if that is tensors and plain values alone; else a DataError that names the problem."""
    with taken_for_damage(f"{path}: {problem}", Exception):  # a forged file may fail anywhere in the reader
        _refuse_harm(body)
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def kinds(state: object) -> dict[str, tuple[torch.Size, torch.dtype]] | None:
    """The names of a model's tensors, with their shapes and types; None if it is no state of a model."""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return None
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _refuse_objects(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"{where} has a key of {type(key).__name__}")
            _refuse_objects(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_objects(item, where)
    elif not isinstance(value, ALLOWED):
        raise TypeError(f"{where} is of {type(value).__name__}; a checkpoint holds tensors and plain values")


def _on_cpu(value: Any) -> Any:
    """The same with all tensors in the CPU's memory, so that the file opens anywhere."""
    if isinstance(value, Mapping):
        return type(value)((key, _on_cpu(item)) for key, item in value.items())  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _refuse_harm(body: bytes | memoryview) -> None:
    """Raise unless the archive is uncompressed and its pickle names nothing but what tensors and dicts need."""
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        if sum(entry.file_size for entry in entries) > len(body):
            raise ValueError("overlapping entries")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise ValueError("not one pickle")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL" and argument not in NEEDED_NAMES:
                raise ValueError(f"names {argument}")
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"opcode {opcode.name}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file by `atomic_file`. Raises DiskError."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` wholly or not at all, on the disk and not only in a cache.

    It is a temporary one beside it, which takes its place at the end. Raises DiskError; what stood there is intact.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the disk may be read-only, or gone
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DiskError(f"{path}: cannot be written ({error.strerror or error}); what stood there is intact") from None


def temporary_of(path: Path) -> Path:
    """The file that `atomic_file` writes before it takes its place."""
    return path.parent / f".{path.name}.tmp"


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system does that for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):  # not on this file system
            raise
    finally:
        os.close(descriptor)
