"""Every reader of images against damaged and forged files: a DataError of one line, or the right answer."""

import gzip
import io
import lzma
import os
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.fuzzing import edited, fuzz, outcome
from support.scripts import PACKERS, idx_bytes

from cvae.data.arrays import find_arrays
from cvae.data.idx import MAX_COMPRESSION, read_idx
from cvae.data.parts import Reading
from cvae.data.pictures import Expected, read_picture
from cvae.data.sources import load_test, load_train
from cvae.settings import Settings

Edits = list[tuple[str, int, int, bytes]]


def changed(content: bytes, edits: Edits) -> bytes:
    """The content after these mutations."""
    for edit in edits:
        content = edited(content, edit)
    return content


IMAGES = idx_bytes(torch.arange(60, dtype=torch.uint8).view(3, 4, 5))
LABELS = idx_bytes(torch.tensor([5, 0, 4], dtype=torch.uint8))
UNPACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}


def test_idx() -> None:
    """Mutated outside and inside its compression. What is read is what the standard library and `struct` make of it."""

    def check(folder: Path, seed: tuple[bytes, int, str, bool], edits: Edits) -> bool:
        content, num_dims, suffix, inside = seed
        packed = PACKERS[suffix](changed(content, edits)) if inside else changed(PACKERS[suffix](content), edits)
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


# NumPy's files

ARRAYS = np.random.default_rng(0).integers(0, 256, (8, 4, 5), dtype=np.uint8)


def saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    """A file as NumPy writes it."""
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def rezipped(content: bytes) -> bytes:
    """An archive of one array with this content, which is true to itself."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x_train.npy", content)
    return file.getvalue()


def test_arrays() -> None:
    """Mutated outside and inside the archive. What is read of bytes is what NumPy reads."""

    def check(folder: Path, seed: tuple[bytes, bool], edits: Edits) -> bool:
        content, inside = seed
        path = folder / "images"
        path.write_bytes(rezipped(changed(content, edits)) if inside else changed(content, edits))

        def read() -> dict[str, Any] | None:
            source = find_arrays(path, Settings())
            parts = {} if source is None else source.parts
            return {name: part.read(torch.arange(part.count), Reading()).pixels for name, part in parts.items()} or None

        found = outcome(read, path)
        if found is None:
            return False
        content = np.load(path, allow_pickle=False)
        arrays = {"all": content} if isinstance(content, np.ndarray) else dict(content)
        arrays = {len(array): array for array in arrays.values() if array.ndim > 2}
        for images in found.values():
            assert images.dtype == torch.uint8
            assert images.dim() == 3
            if arrays[len(images)].dtype == np.uint8:
                assert images.numpy().tobytes() == arrays[len(images)].tobytes()
        return True

    seeds = [
        (saved(np.save, ARRAYS), True),
        (saved(np.save, ARRAYS), False),
        (saved(np.save, ARRAYS / 255), True),
        (saved(np.save, np.asfortranarray(ARRAYS[..., None].repeat(3, 3).astype(">u2"))), True),
        (saved(np.savez, x_train=ARRAYS, y_train=ARRAYS[:, 0, 0], x_test=ARRAYS[:2]), False),
        (saved(np.savez_compressed, ARRAYS), False),
    ]
    fuzz("arrays", seeds, check)


# Pictures


def drawn(form: str, mode: str = "L", **more: Any) -> bytes:
    """A picture of 12×10 pixels as Pillow writes it."""
    file = io.BytesIO()
    grey = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(file, form, **more)
    return file.getvalue()


PICTURES = [
    drawn("PNG"), drawn("PNG", "RGBA"), drawn("PNG", "P"), drawn("PNG", "1"), drawn("PNG", "I;16"), drawn("JPEG"),
    drawn("JPEG", "CMYK"), drawn("GIF"), drawn("BMP"), drawn("PPM"), drawn("WEBP"), drawn("WEBP", lossless=True),
    drawn("TIFF"), drawn("TIFF", "RGB", compression="tiff_lzw"), drawn("TIFF", "F"),
    drawn("GIF", save_all=True, append_images=[Image.new("L", (10, 12))]),
]  # fmt: skip


def test_pictures() -> None:
    """Each has the size that all have to have, or is refused."""

    def check(folder: Path, content: bytes, edits: Edits) -> bool:
        path = folder / "picture.png"
        path.write_bytes(changed(content, edits))
        levels = outcome(lambda: read_picture(path, expected=Expected("another", 12, 10)), path)
        if levels is None:
            return False
        assert levels.dtype == np.uint8
        assert levels.shape == (12, 10)
        return True

    fuzz("pictures", PICTURES, check)


KINDS = ["good", "good", "larger", "broken", "empty", "text", "inside", "outside", "folder", "nothing", "pipe"]
PLACES = ["", "train", "test", "test/3", "a", ".hidden", "train/deep/er"]


def add(folder: Path, kind: str, name: str) -> None:
    """Something in a folder of pictures."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        return
    match kind:
        case "good":
            path.write_bytes(PICTURES[len(name) % 3])
        case "larger":
            Image.effect_noise((10, 13), 50).save(path)
        case "broken":
            path.write_bytes(PICTURES[0][:60])
        case "empty":
            path.touch()
        case "text":
            path.with_suffix(".txt").touch()
        case "pipe":
            os.mkfifo(path)
        case _:
            targets = {
                "inside": folder / "0.png",
                "outside": folder.parent / "0.png",
                "folder": folder,
                "nothing": path,
            }
            path.symlink_to(targets[kind])


def test_folder() -> None:
    """All that can lie in a folder of pictures: it is refused, or every picture in it has been taken once."""

    def check(place: Path, divided: bool, edits: Edits) -> bool:
        shutil.rmtree(place / "data", ignore_errors=True)
        folder = place / "data" / "folder"
        add(folder.parent, "good", "0.png")
        for i in range(8):
            add(folder, "good", f"{i}.png")
            if divided:
                add(folder, "good", f"Train/{i}.png")
        for _, first, second, new in edits:
            add(folder, KINDS[second % len(KINDS)], f"{PLACES[first % len(PLACES)]}/{new.hex()}.png")
        images = outcome(lambda: load_train(Settings(data=str(folder))), folder)
        if images is None:
            return False
        taken = [path for path in folder.rglob("*.png") if path.is_file() and ".hidden" not in path.parts]
        parts = [path for path in taken if path.relative_to(folder).parts[0] in ("Train", "train", "test")]
        counts = [part["count"] for part in images.record.values() if isinstance(part, dict)]
        assert sum(counts) == len(parts or taken)
        if images.record["test"] is not None:
            assert load_test(Settings(data=str(folder))).record["test"] == images.record["test"]
        return True

    fuzz("folder", [False, True], check)


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


def peak_of(read: Callable[[], Any], path: Path) -> int:
    """Bytes at the height of a refusal."""
    tracemalloc.start()
    try:
        assert outcome(read, path) is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side: int, *chunks: bytes) -> bytes:
    """A grey PNG that says to have so many pixels square."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + b"".join(chunks)


def gif(screen: int, frame: int) -> bytes:
    """A GIF of one frame that says how large it is, and has one pixel."""
    sizes = struct.pack("<HHBBB", screen, screen, 0, 0, 0), struct.pack("<HHHHB", 0, 0, frame, frame, 0)
    return b"GIF89a" + sizes[0] + b"," + sizes[1] + b"\x02\x02\x44\x01\0;"


SIDE = 60_000
ZEROS = zlib.compress(bytes(64 << 20))
BOMBS = {
    "frame.gif": gif(1, SIDE),
    "screen.gif": gif(SIDE, 1),
    "pixels.png": png(SIDE, chunk(b"IDAT", ZEROS)),
    "text.png": png(12, chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "image.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, SIDE, SIDE, 1, 8, 0, 0, 0, 0, 0, 0),
    "image.pgm": b"P5 60000 60000 255 ",
}


@pytest.mark.parametrize("side", [None, 28])
@pytest.mark.parametrize("name", BOMBS)
def test_picture_that_says_or_makes_itself_huge(tmp_path: Path, name: str, side: int | None) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    assert peak_of(lambda: read_picture(path, side), path) < 16 << 20


def header(shape: str, start: bytes = b"\x93NUMPY\1\0", length: int | None = None) -> bytes:
    """That of a file with an array of bytes."""
    words = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    packing = "<H" if start[6] == 1 else "<I"
    return start + struct.pack(packing, len(words) if length is None else length) + words


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(header("(1000000, 60, 60)"), id="nothing behind it"),
        pytest.param(header("(10, 4096, 4096)") + bytes(99), id="little behind it"),
        pytest.param(header("(99999999999999999999, 9, 9)"), id="beyond 64 bits"),
        pytest.param(header("(-8, -9, 9)"), id="negative"),
        pytest.param(header("(0, 9, 9)"), id="empty"),
        pytest.param(header("(8, 99999, 99999)"), id="huge images"),
        pytest.param(header("()"), id="scalar"),
        pytest.param(header("(" * 999), id="nested"),
        pytest.param(header("(8, 4, 5)", b"\x93NUMPY\2\0", 0xFFFF_FFF0) + bytes(160), id="header of 4 GiB"),
        pytest.param(header("(8, 4, 5)", b"\x93NUMPY\x09\0") + bytes(160), id="later version"),
        pytest.param(saved(np.save, np.array([[["x"]]], dtype=object)), id="pickle"),
        pytest.param(saved(np.save, np.zeros((8, 4, 5), "i4,i4")), id="records"),
        pytest.param(saved(np.save, np.zeros((8, 4, 5), complex)), id="complex"),
        pytest.param(saved(np.save, ARRAYS) + b"\0", id="longer"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_array_that_is_not_what_its_header_says(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / "images.npz"
    path.write_bytes(rezipped(content) if packed else content)
    assert peak_of(lambda: load_train(Settings(data=str(path))), path) < 16 << 20


def test_archive_that_grows(tmp_path: Path) -> None:
    """The directory says 160 bytes and a header, the compressed stream holds 64 MiB."""
    size = 64 << 20
    path = tmp_path / "images.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", header("(8, 4, 5)") + bytes(size))
    start = len(header("(8, 4, 5)"))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", start + size), struct.pack("<I", start + 160)))
    assert peak_of(lambda: load_train(Settings(data=str(path))), path) < 16 << 20
