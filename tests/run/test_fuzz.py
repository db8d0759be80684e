"""Every reader against ten thousand damaged and forged files: a DataError of one line, or the right answer."""

import gzip
import io
import json
import lzma
import math
import signal
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.scripts import PACKERS, PATIENCE, idx_bytes
from test_checkpoint import repacked, saved_by_torch, sign

from cvae.data.idx import MAX_COMPRESSION, read_idx
from cvae.data.masks import MASKS
from cvae.errors import DataError
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.run import checkpoint
from cvae.run.folder import (
    CONFIG,
    LARGEST_SIDE,
    METRICS,
    read_json,
    read_metrics,
    read_settings,
    read_size,
    read_split,
)
from cvae.settings import Settings

EXAMPLES = {"idx": 4000, "checkpoint": 2500, "settings": 2000, "size": 500, "metrics": 1000, "json": 1000}


def test_ten_thousand_inputs() -> None:
    assert sum(EXAMPLES.values()) >= 10_000


# Mutations

NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
EDITS = st.tuples(
    st.sampled_from(["truncate", "flip", "insert", "duplicate", "delete", "number", "swap"]),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.binary(min_size=1, max_size=6),
)


def edited(content: bytes, edit: tuple[str, int, int, bytes]) -> bytes:
    """The content after one mutation."""
    kind, first, second, new = edit
    at = first % (len(content) + 1)
    length = 1 + second % 64
    before, after = content[:at], content[at:]
    match kind:
        case "truncate":
            return before
        case "flip":
            return before + bytes([after[0] ^ (1 << second % 8)]) + after[1:] if after else content
        case "insert":
            return before + new + after
        case "duplicate":
            return before + after[:length] * (1 + second % 3) + after
        case "delete":
            return before + after[length:]
        case "number":  # what a header's field may be forged to, at the start where headers are
            at %= 24
            order = "<" if second % 2 else ">"
            return content[:at] + struct.pack(order + "I", NUMBERS[second % len(NUMBERS)]) + content[at + 4 :]
        case _:
            return after + before


def mutations(seeds: list[Any]) -> st.SearchStrategy[tuple[Any, list[tuple[str, int, int, bytes]]]]:
    return st.tuples(st.sampled_from(seeds), st.lists(EDITS, min_size=1, max_size=4))


@contextmanager
def time_limit() -> Iterator[None]:
    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the reader hangs: {PATIENCE} s and more")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)  # for one example, of milliseconds in truth
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(read: Callable[[], Any], path: Path) -> Any:
    """What the reader makes of a file: the result, or None for a refusal in one line that names the file."""
    try:
        with time_limit():
            return read()
    except DataError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 1000
        return None


def fuzz(kind: str, seeds: list[Any], check: Callable[[Path, Any, list[tuple[str, int, int, bytes]]], bool]) -> None:
    """Have `check` look at so many mutations; it says of each whether the file was read. Both have to happen."""
    read = refused = 0
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=EXAMPLES[kind],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(mutations(seeds))
        def run(mutation: tuple[Any, list[tuple[str, int, int, bytes]]]) -> None:
            nonlocal read, refused
            if check(Path(folder), *mutation):
                read += 1
            else:
                refused += 1

        run()
    assert read + refused >= EXAMPLES[kind]
    assert min(read, refused) >= EXAMPLES[kind] / 50, f"{read} read, {refused} refused"


# The readers

IMAGES = idx_bytes(torch.arange(60, dtype=torch.uint8).view(3, 4, 5))
LABELS = idx_bytes(torch.tensor([5, 0, 4], dtype=torch.uint8))
UNPACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}


def test_idx() -> None:
    """Mutated outside and inside its compression. What is read is what the standard library and `struct` make of it."""

    def check(folder: Path, seed: tuple[bytes, int, str, bool], edits: list[tuple[str, int, int, bytes]]) -> bool:
        content, num_dims, suffix, inside = seed
        packed = content if inside else PACKERS[suffix](content)
        for edit in edits:
            packed = edited(packed, edit)
        packed = PACKERS[suffix](packed) if inside else packed
        path = folder / f"file{suffix}"
        path.write_bytes(packed)
        array = outcome(lambda: read_idx(path, num_dims), path)
        if array is None:
            return False
        unpacked = UNPACKERS[suffix](packed)
        start = 4 + 4 * num_dims
        assert unpacked[:4] == bytes([0, 0, 8, num_dims])
        assert tuple(array.shape) == struct.unpack(f">{num_dims}I", unpacked[4:start])
        assert bytes(array.flatten().tolist()) == unpacked[start:]
        return True

    seeds = [
        (content, num_dims, suffix, inside)
        for content, num_dims in ((IMAGES, 3), (LABELS, 1))
        for suffix in PACKERS
        for inside in (True, False)
    ]
    fuzz("idx", seeds, check)


CHECKPOINT = {
    "format": checkpoint.FORMAT,
    "phase": "cvae",
    "model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)},
    "progress": {"epoch": 3, "best_loss": 71.25, "none": None, "sizes": [500, (1, True)]},
}


def test_checkpoint() -> None:
    """Mutated as it is, and with a digest that is right: then the archive and the pickle in it are really read."""
    body = saved_by_torch(CHECKPOINT)

    def check(folder: Path, seed: str, edits: list[tuple[str, int, int, bytes]]) -> bool:
        def change(content: bytes) -> bytes:
            for edit in edits:
                content = edited(content, edit)
            return content

        path = folder / "best.pt"
        if seed == "file":
            path.write_bytes(change(sign(body)))
        elif seed == "archive":
            path.write_bytes(sign(change(body)))
        else:
            path.write_bytes(
                sign(repacked(body, lambda name, old: change(old) if name.removeprefix("archive/") == seed else old))
            )
        content = outcome(lambda: checkpoint.load(path), path)
        if content is None:
            return False
        assert content["format"] == checkpoint.FORMAT
        assert seed != "file" or path.read_bytes() == sign(body)
        assert_plain(content)
        return True

    fuzz("checkpoint", ["file", "archive", *["data.pkl"] * 3, "data/0", "byteorder", "version"], check)


def assert_plain(value: Any) -> None:
    """Tensors whose every byte lies within the file's few, and plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert_plain(key)
            assert_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            assert_plain(item)
    elif isinstance(value, torch.Tensor):
        assert value.untyped_storage().nbytes() <= 24
        value.clone()
    else:
        assert isinstance(value, int | float | str | bytes | None)


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)  # NaN is NaN


BEFORE = {
    each.name: list(value) if isinstance(value := each.metadata["before"], tuple) else value
    for each in fields(Settings)
}
"""What a setting is taken to be where it is missing, as JSON writes it."""

CONFIGS = [
    {
        "settings": Settings().to_dict(),
        "images": {"height": 28, "width": 28},
        "git_revision": "0" * 500,
        "versions": {"python": "3.11"},
    },
    {
        "settings": Settings(
            quadrants=3, network="paper", objective="hybrid", data="a", hidden=(7,), train_limit=5, compile=True
        ).to_dict(),
        "images": {"height": 17, "width": 21},
        "more": ["x"] * 99,
    },
]
WRONG = [None, True, 0, -1, 2.5, math.inf, math.nan, 10**30, "", "x", "\ud800", [], [[]], [0], {}, {"a": 1}]


def test_settings() -> None:
    def check(folder: Path, seed: tuple[dict[str, Any], bool], edits: list[tuple[str, int, int, bytes]]) -> bool:
        config, by_value = seed
        if by_value:  # well-formed JSON with values that make no sense
            values = dict(config["settings"])
            for kind, first, second, new in edits:
                name = sorted(values)[first % len(values)] if values else "x"
                if kind == "delete":
                    values.pop(name, None)
                elif kind == "insert":
                    values[new.hex()] = WRONG[second % len(WRONG)]
                else:
                    values[name] = WRONG[second % len(WRONG)]
            content = json.dumps({**config, "settings": values}).encode()
        else:
            content = json.dumps(config).encode()
            for edit in edits:
                content = edited(content, edit)
        path = folder / CONFIG
        path.write_bytes(content)
        result = outcome(lambda: read_settings(folder), folder)
        if result is None:
            return False
        found = json.loads(content)["settings"]
        assert found.keys() <= BEFORE.keys()  # no unknown setting was passed over
        assert same(result.to_dict(), {name: found.get(name, BEFORE[name]) for name in BEFORE})
        assert result == Settings.from_dict(result.to_dict())
        assert result.network in NETWORKS
        assert result.objective in OBJECTIVES
        assert result.observed is None or result.observed in MASKS
        assert result.quadrants in (1, 2, 3)
        assert min(result.epochs, result.batch_size, result.latent_dim, *result.hidden) >= 1
        assert 0 < result.learning_rate < math.inf
        return True

    fuzz("settings", [(config, by_value) for config in CONFIGS for by_value in (True, False)], check)


def test_size_of_the_images() -> None:
    """Read before anything is made of it: two whole numbers within reason, or a refusal."""

    def check(folder: Path, sides: list[bytes], edits: list[tuple[str, int, int, bytes]]) -> bool:
        sides = list(sides)
        for i, edit in enumerate(edits):
            sides[i % 2] = edited(sides[i % 2], edit)
        content = b'{"images": {"height": %s, "width": %s}}' % tuple(sides)
        path = folder / CONFIG
        path.write_bytes(content)
        size = outcome(lambda: read_size(folder), folder)
        if size is None:
            return False
        found = json.loads(content)["images"]
        assert size == (found["height"], found["width"])
        assert all(type(side) is int and 2 <= side <= LARGEST_SIDE for side in size)
        return True

    fuzz("size", [[b"28", b"28"], [b"170", b"213"], [b"9999", b"2"]], check)


@pytest.mark.parametrize("side", [*WRONG, 1, LARGEST_SIDE + 1, 28.0, "28"], ids=repr)
@pytest.mark.parametrize("name", ["height", "width"])
def test_sizes_that_no_image_has(tmp_path: Path, name: str, side: object) -> None:
    config = {**CONFIGS[0], "images": {"height": 28, "width": 28, name: side}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert outcome(lambda: read_split(tmp_path), tmp_path) is None
    for images in (side, [28, 28], {name: 28}):
        (tmp_path / CONFIG).write_text(json.dumps({**CONFIGS[0], "images": images}))
        assert outcome(lambda: read_split(tmp_path), tmp_path) is None


RECORDS = "".join(
    json.dumps({"phase": phase, "epoch": epoch, "train_elbo": -70.5 / epoch, "validation_kl": None}) + "\n"
    for phase in ("baseline", "cvae")
    for epoch in (1, 2, 3)
).encode()


def test_metrics() -> None:
    def check(folder: Path, content: bytes, edits: list[tuple[str, int, int, bytes]]) -> bool:
        for edit in edits:
            content = edited(content, edit)
        path = folder / METRICS
        path.write_bytes(content)
        records = outcome(lambda: read_metrics(path), path)
        if records is None:
            return False
        assert all(isinstance(record, dict) for record in records)
        assert same(records, [json.loads(line) for line in content.split(b"\n")[:-1]])
        return True

    fuzz("metrics", [RECORDS, b"", RECORDS[:-10], RECORDS.replace(b"\n", b"\r\n")], check)


def test_json() -> None:
    results = [{"run": "q1", "quadrants": 1, "nn_nll": {"mean": 100.4, "stderr": 0.3}, "gap": 35.25, "name": "\u2212é"}]

    def check(folder: Path, content: bytes, edits: list[tuple[str, int, int, bytes]]) -> bool:
        for edit in edits:
            content = edited(content, edit)
        path = folder / "cll.json"
        path.write_bytes(content)
        value = outcome(lambda: (read_json(path),), path)
        if value is None:
            return False
        assert same(value[0], json.loads(content))
        return True

    texts = [json.dumps(results, ensure_ascii=False), json.dumps({"a": list(range(40)), "b": "x" * 60}), '"' + "a" * 50]
    fuzz("json", [*(text.encode() for text in texts), json.dumps(results).encode("utf-16")], check)


# What chance would not find


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"\0", b""])
def test_json_made_to_break_the_parser(tmp_path: Path, content: bytes) -> None:
    for name in (CONFIG, METRICS):
        (tmp_path / name).write_bytes(content + b"\n")
    for read in (lambda: read_json(tmp_path / CONFIG), lambda: read_settings(tmp_path)):
        result = outcome(read, tmp_path)
        assert result is None
    assert outcome(lambda: read_metrics(tmp_path / METRICS), tmp_path / METRICS) is None


@pytest.mark.parametrize("name", ["hidden", "quadrants", "precision", "data"])
def test_settings_nested_to_any_depth(tmp_path: Path, name: str) -> None:
    for depth in [*range(1, 60, 7), *range(60, 1100, 13)]:
        text = json.dumps({"settings": {**Settings().to_dict(), name: "HERE"}})
        (tmp_path / CONFIG).write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
        assert outcome(lambda: read_settings(tmp_path), tmp_path) is None


def test_settings_of_a_network_of_a_million_layers(tmp_path: Path) -> None:
    config = {"settings": {**Settings().to_dict(), "hidden": [1] * 1_000_000}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert outcome(lambda: read_settings(tmp_path), tmp_path) is None


def test_settings_with_a_value_of_a_megabyte(tmp_path: Path) -> None:
    config = {"settings": {**Settings().to_dict(), "precision": "x" * 1_000_000}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert outcome(lambda: read_settings(tmp_path), tmp_path) is None


# Memory: what a file takes depends on what it holds, not on what it says


def peak_memory(path: Path, num_dims: int = 3) -> int:
    """Bytes at the height of refusing a file, the decompressors' own among them."""
    tracemalloc.start()
    try:
        assert outcome(lambda: read_idx(path, num_dims), path) is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_measure_of_memory_sees_the_decompressors(tmp_path: Path) -> None:
    """The control: a buffer and xz's dictionary both show in the measure."""
    tracemalloc.start()
    bytearray(5 << 20)
    lzma.decompress(lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 20 << 20}]))
    assert tracemalloc.get_traced_memory()[1] > 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "dims", [(2**31, 1, 1), (2**31, 28, 28), (2**31 - 1, 1, 1), (2**32 - 1,) * 3, (60_000, 28, 28)]
)
@pytest.mark.parametrize("suffix", PACKERS)
def test_sixteen_bytes_that_announce_gigabytes(tmp_path: Path, suffix: str, dims: tuple[int, int, int]) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(PACKERS[suffix](struct.pack(">HBB3I", 0, 8, 3, *dims)))
    assert peak_memory(path) < 16 << 20


def packed_zeros(header: bytes, count: int, suffix: str) -> bytes:
    """A compressed file of a header and so many zero bytes, made without holding them."""
    packer = lzma.LZMACompressor(preset=0) if suffix == ".xz" else zlib.compressobj(9, wbits=31)
    parts = [packer.compress(header)]
    block = bytes(1 << 20)
    parts += [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("dims", [(1, 2, 2), (100, 28, 28)])
def test_bomb_behind_a_modest_header(tmp_path: Path, suffix: str, dims: tuple[int, int, int]) -> None:
    size = 256 << 20
    path = tmp_path / f"file{suffix}"
    path.write_bytes(packed_zeros(struct.pack(">HBB3I", 0, 8, 3, *dims), size, suffix))
    assert path.stat().st_size < size / 500
    assert peak_memory(path) < 16 << 20


def test_bomb_that_says_what_it_is(tmp_path: Path) -> None:
    size = 256 << 20
    path = tmp_path / "file.xz"
    path.write_bytes(packed_zeros(struct.pack(">HBB3I", 0, 8, 3, size, 1, 1), size, ".xz"))
    assert size > MAX_COMPRESSION * path.stat().st_size
    assert peak_memory(path) < 16 << 20


def xz_with_dictionary(code: int) -> bytes:
    """An xz file whose header asks for a dictionary by its code, 0 (4 KiB) to 40 (4 GiB), all checksums being right."""
    content = bytearray(lzma.compress(IMAGES))
    header = 12  # of the stream; the first block's header begins here
    length = 4 * (content[header] + 1)
    position = content.index(b"\x21\x01", header, header + length) + 2  # LZMA2, one byte of properties: the size
    content[position] = code
    crc = zlib.crc32(content[header : header + length - 4])
    content[header + length - 4 : header + length] = struct.pack("<I", crc)
    return bytes(content)


@pytest.mark.parametrize("code", [36, 38, 40])
def test_xz_with_a_huge_dictionary(tmp_path: Path, code: int) -> None:
    path = tmp_path / "file.xz"
    path.write_bytes(xz_with_dictionary(22))  # 8 MiB, as `xz` makes it: the forgery is well made
    assert read_idx(path, 3).shape == (3, 4, 5)
    path.write_bytes(xz_with_dictionary(code))
    assert peak_memory(path) < 16 << 20


def test_checkpoint_of_a_few_bytes_that_announces_gigabytes(tmp_path: Path) -> None:
    """Its pickle speaks of 2^31 - 1 numbers, its directory of gigabytes; the file has few bytes."""
    body = saved_by_torch({"format": checkpoint.FORMAT, "model": torch.arange(4.0)})
    many = b"J\xff\xff\xff\x7f"
    forged = [
        repacked(
            body,
            lambda name, old: (
                old.replace(b"K\x04t", many + b"t").replace(b"K\x04\x85", many + b"\x85")
                if name.endswith(".pkl")
                else old
            ),
        )
    ]
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if entry.filename.endswith("data/0")]
    assert sizes == [16]
    directory = body.rindex(b"PK\x01\x02", 0, body.rindex(b"archive/data/0"))
    forged.append(body[: directory + 20] + struct.pack("<II", 0xFFFF_FFF0, 0xFFFF_FFF0) + body[directory + 28 :])
    path = tmp_path / "best.pt"
    for content in forged:
        assert content != body
        path.write_bytes(sign(content))
        tracemalloc.start()
        assert outcome(lambda: checkpoint.load(path), path) is None
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
