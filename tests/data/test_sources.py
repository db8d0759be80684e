"""The sources of images: which are for validation and the test, names of data sets, labels, and the record."""

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import about, in_order, mnist, random_images, refusal, training, write_idx, write_pictures
from torchvision import datasets

import eval as evaluation
import train
from cvae.data.sources import NAMES, TORCHVISION, difference, load_labels, load_test, load_train, named
from cvae.errors import DataError
from cvae.settings import Settings

IMAGES, TEST = random_images(12, 4, 5), random_images(6, 4, 5, 1)


def test_last_ten_thousand_images_of_mnist_are_for_validation() -> None:
    """Whatever the seed, and with their labels: the numbers of the README depend on it."""
    s = Settings(seed=3)
    images = load_train(s)
    assert torch.equal(torch.cat([images.train, images.validation]), mnist("train"))
    assert len(images.validation) == len(load_labels(s, "validation")) == 10_000
    assert torch.equal(load_labels(s, "train"), mnist("train", "labels")[:50_000])
    assert torch.equal(load_test(Settings(data="mnist")).images, mnist("t10k"))
    counts = "50,000 training, 10,000 validation, 10,000 test images of 28×28 pixels"
    assert images.about == f"MNIST, which comes with the package: {counts}; the last ones for validation"


@pytest.mark.parametrize(("count", "held_out"), [(6, 1), (11, 1), (12, 2), (59_999, 9_999), (60_001, 10_000)])
def test_a_sixth_is_for_validation(tmp_path: Path, count: int, held_out: int) -> None:
    images = random_images(count, 2, 3)
    images[:, 0, :2] = torch.tensor([0, 255])
    parts = load_train(Settings(data=str(write_idx(tmp_path, images, images[:1]))))
    assert (len(parts.train), len(parts.validation)) == (count - held_out, held_out)
    assert in_order(torch.cat([parts.train, parts.validation])) == in_order(images)


def test_set_that_is_sorted_by_class(tmp_path: Path) -> None:
    """Validation images, and the first training images too, are of all classes; others for another seed."""
    images = random_images(600, 4, 4)
    images[:, 0, 0] = torch.arange(600) // 60
    write_idx(tmp_path, images, images[:6])
    loaded = [load_train(Settings(data=str(tmp_path), seed=seed)) for seed in (0, 0, 1)]
    for part in (part for each in loaded for part in (each.validation, each.train[:100])):
        counts = torch.bincount(part[:, 0, 0].int(), minlength=10)
        assert 0 < counts.min() < counts.max() < 30
    records = [each.record for each in loaded]
    assert records[0] == records[1]
    assert records[0]["validation"] != records[2]["validation"]
    assert records[0]["test"] == records[2]["test"]
    assert "validation images drawn by seed 1" in loaded[2].about


@pytest.mark.parametrize("seed", [0, 3])
def test_labels_are_in_the_order_of_the_images(tmp_path: Path, seed: int) -> None:
    """Which a seed permutes: the corners of the images tell their labels."""
    train_images, test_images = random_images(60, 5, 4), random_images(9, 5, 4)
    for images in (train_images, test_images):
        images[:, 0, 0] = torch.arange(len(images)) % 7
    s = Settings(data=str(write_idx(tmp_path, train_images, test_images)), seed=seed)
    loaded = load_train(s)
    for part, images in (("train", loaded.train), ("validation", loaded.validation), ("test", load_test(s).images)):
        assert torch.equal(load_labels(s, part), images[:, 0, 0].long())


def test_labels_that_are_missing_or_of_other_images(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", IMAGES)
    write_idx(tmp_path / "idx", IMAGES, TEST)
    labels = tmp_path / "idx" / "t10k-labels-idx1-ubyte"
    labels.write_bytes((tmp_path / "idx" / "train-labels-idx1-ubyte").read_bytes())
    for folder, words in (
        ("pictures", f"{tmp_path / 'pictures'}: has no labels to classify images by"),
        ("idx", f"{labels}: has 12 labels for 6 images"),
    ):
        with pytest.raises(DataError, match=words):
            load_labels(Settings(data=str(tmp_path / folder)), "test")


def test_record_identifies_each_part(tmp_path: Path) -> None:
    """By the bytes of its images; another number, size or pixel is told apart."""
    s = Settings(data=str(write_idx(tmp_path, IMAGES, TEST)))
    images = load_train(s)
    parts = {"train": images.train, "validation": images.validation, "test": TEST}
    record: dict[str, Any] = {"height": 4, "width": 5}
    for part, pixels in parts.items():
        record[part] = {"count": len(pixels), "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}
    assert images.record == record
    assert load_test(s).record == {name: record[name] for name in ("height", "width", "test")}
    assert difference(record, load_test(s).record) is None
    for change, words in (
        ((IMAGES[:10], TEST), "10 train images, and here are 9"),
        ((IMAGES[:, :3], TEST[:, :3]), "images of 4×5 pixels, and these have 3×5"),
        ((255 - IMAGES, TEST), "other train images of the same number and size"),
        ((IMAGES, 255 - TEST), "other test images of the same number and size"),
    ):
        assert words in str(difference(record, load_train(Settings(data=str(write_idx(tmp_path, *change)))).record))


def test_transposed(tmp_path: Path) -> None:
    write_idx(tmp_path / "emnist" / "raw", IMAGES, IMAGES)
    assert training(tmp_path, transpose=True) == in_order(IMAGES.transpose(1, 2).contiguous())
    assert "--transpose turns them upright" in about(tmp_path)
    assert "--transpose" not in about(tmp_path, transpose=True)


def test_what_is_too_little_or_not_there(tmp_path: Path) -> None:
    words = "5 images are too few to hold out a sixth; give at least 6"
    assert refusal(write_idx(tmp_path / "few", IMAGES[:5], TEST)) == f"{tmp_path}/few: {words}"
    assert refusal(write_pictures(tmp_path / "undivided", IMAGES[:5]), test=True) == f"{tmp_path}/undivided: {words}"
    write_pictures(tmp_path / "half" / "train", IMAGES)
    assert "no test images, so that eval.py will not be able to evaluate the run" in about(tmp_path / "half")
    assert refusal(tmp_path / "half", test=True) == f"{tmp_path}/half: has no test images"
    write_pictures(tmp_path / "other" / "test", IMAGES)
    assert refusal(tmp_path / "other") == f"{tmp_path}/other: has no training images"
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path}/empty: holds no images; --data takes a folder")
    for word in (tmp_path / "nowhere", tmp_path / "loop"):
        assert "there is no such folder or file; --data takes a folder" in refusal(word)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_data_sets(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken as torchvision leaves them below a root; else the message has a command that downloads them."""
    cls = TORCHVISION[name]
    prefix = name if cls in ("EMNIST", "QMNIST") else ""
    arguments = {"split": name.removeprefix("emnist-")} if cls == "EMNIST" else {}
    raw = write_idx(tmp_path / "it's here" / cls / "raw", IMAGES, TEST, start=prefix and f"{prefix}-")
    if cls == "EMNIST":  # all its sets are unpacked to one folder
        write_idx(raw, TEST, IMAGES, start="emnist-other-")
    if cls == "QMNIST":  # its labels have eight columns, of which the first is the class
        for part, count in (("train", 12), ("test", 6)):
            columns = b"".join((i % 7).to_bytes(4) + bytes(28) for i in range(count))
            path = (raw / f"qmnist-{part}-labels-idx1-ubyte").rename(raw / f"qmnist-{part}-labels-idx2-int")
            path.write_bytes(bytes([0, 0, 12, 2]) + count.to_bytes(4) + (8).to_bytes(4) + columns)
    s = Settings(data=name, data_root=str(tmp_path / "it's here"))
    assert training(name, data_root=s.data_root) == in_order(IMAGES)
    stored = getattr(datasets, cls)(s.data_root, train=False, **arguments)
    assert torch.equal(load_test(s).images, stored.data)
    assert torch.equal(load_labels(s, "test"), stored.targets.view(6, -1)[:, 0].long())
    assert load_labels(s, "test").tolist() == [i % 7 for i in range(6)]
    assert about(name, data_root=s.data_root).startswith(
        f"{name}, as torchvision has it in {raw / prefix}: 10 training"
    )
    message = refusal(name, data_root=str(tmp_path / "not 'here'"))
    assert message.startswith(f"{name}: is not below {tmp_path}/not 'here' (--data-root names another)")
    command, _, code = shlex.split(message.partition("; to download: ")[2])
    calls: list[Any] = []
    monkeypatch.setattr(datasets, cls, lambda root, **more: calls.append((root, more)))
    exec(code, {})
    assert command == "python"
    assert calls == [
        (f"{tmp_path}/not 'here'", {"train": part, "download": True, **arguments}) for part in (True, False)
    ]


def test_words_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in capitals too; what is there as a path is a path; ~ is the home; the usual roots."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for word, name in (
        ("MNIST", "mnist"), ("EMNIST-Letters", "emnist-letters"), ("./mnist", f"{tmp_path}/mnist"),
        ("~/pictures", f"{tmp_path}/home/pictures"), ("", ""),
    ):  # fmt: skip
        assert named(word) == name
    write_idx(tmp_path / "mnist", IMAGES, TEST)
    assert named("mnist") == str(tmp_path / "mnist")
    assert f"is not below {tmp_path}/home/.cache/torchvision or data" in refusal("kmnist")
    for root in ("data", "home/.cache/torchvision"):
        write_idx(tmp_path / root / "KMNIST" / "raw", random_images(12, 4, 5, len(root)), TEST)
        assert training("kmnist") == in_order(random_images(12, 4, 5, len(root)))
    assert all(named(name) == name for name in NAMES if name != "mnist")


MEMORY = """
import resource, sys
from pathlib import Path
from cvae.data.sources import load_train
from cvae.errors import CvaeError, telling_of_memory
from cvae.settings import Settings
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1))
for data in sys.argv[1:]:
    try:
        with telling_of_memory():
            load_train(Settings(data=data))
    except CvaeError as error:
        print(error.exit_code, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_too_little_memory_is_no_damage(tmp_path: Path) -> None:
    """An array, an IDX file and a picture that are whole, for which 100 MiB are too few: exit code 2."""
    with (tmp_path / "a.npy").open("wb") as file:  # sparse: none of them takes a gigabyte on the disk
        words = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1048576, 32, 32), }"
        file.write(b"\x93NUMPY\1\0" + (118).to_bytes(2, "little") + words.ljust(117) + b"\n")
        file.truncate(128 + (1 << 30))
    with (tmp_path / "train-images-idx3-ubyte").open("wb") as file:
        file.write(bytes([0, 0, 8, 3]) + b"".join(side.to_bytes(4) for side in (1 << 20, 32, 32)))
        file.truncate(16 + (1 << 30))
    write_pictures(tmp_path / "pictures", torch.zeros(1, 9400, 9400, dtype=torch.uint8))
    places = [str(tmp_path / "a.npy"), str(tmp_path), str(tmp_path / "pictures")]
    ended = subprocess.run([sys.executable, "-c", MEMORY, *places], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("2 ") and "the memory does not suffice" in line for line in lines), lines


def test_scripts_say_what_they_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their first line; a training keeps the record; a path that is no text is refused before a folder is made."""
    data, runs = write_pictures(tmp_path / "images", random_images(60, 6, 5)), tmp_path / "runs"
    tiny = ["--hidden", "8", "--latent-dim", "4", "--batch-size", "20", "--epochs", "1", "--baseline-epochs", "1"]
    words = [*tiny, "--device", "cpu", "--runs", str(runs)]
    assert train.main(["--data", str(data), *words]) == 0
    counts = "42 training, 8 validation, 10 test images of 6×5 pixels"
    assert capsys.readouterr().out.startswith(f"pictures below {data}: {counts}; ")
    assert evaluation.main([str(runs / "q1"), "--samples", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"pictures below {data}: 10 test images of 6×5 pixels")
    assert train.main(["--data", "s\udcff", *words, "--name", "new"]) == 2
    assert "is no text in UTF-8" in capsys.readouterr().err
    assert not (runs / "new").exists()
