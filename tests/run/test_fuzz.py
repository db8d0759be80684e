"""What a run folder holds, damaged and forged: a DataError of one line, or the right answer."""

import io
import json
import math
import struct
import tracemalloc
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fuzzing import EXAMPLES, edited, fuzz, outcome
from test_checkpoint import repacked, saved_by_torch, sign

from cvae.data.masks import MASKS
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


def test_ten_thousand_inputs() -> None:
    assert sum(EXAMPLES.values()) >= 10_000


# The readers

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
