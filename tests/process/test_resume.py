"""Exact resume: wherever a training ends, it can go on, and leaves what one leaves that was never interrupted."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from support.scripts import run_script
from support.trainings import (
    SMALL,
    Forked,
    assert_same,
    contents,
    epochs_logged,
    events,
    finish,
    fork_script,
    said,
    start,
    train_command,
)

from cvae import context
from cvae.run import checkpoint
from cvae.run.folder import read_json, read_precision, read_settings
from cvae.run.plan import MOVABLE
from cvae.settings import Settings

BASELINE = [("baseline", 1), ("baseline", 2)]
ALL_EPOCHS = [*BASELINE, ("cvae", 1), ("cvae", 2), ("cvae", 3)]


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    """The folder of a training that nothing interrupted."""
    code, _, err = finish(start(train_command("--data", "data", *SMALL, "--name", "undisturbed"), work))
    assert (code, err) == (0, "")
    assert epochs_logged(work / "runs/undisturbed") == ALL_EPOCHS
    return work / "runs/undisturbed"


@pytest.fixture(scope="module")
def moments(forked: Forked, undisturbed: Path) -> list[str]:
    """When a small training changes the disk; the forked trainings are the same as one started by itself."""
    answer = forked("--data", "data", *SMALL, "--name", "forked", watched=True)
    assert answer["code"] == 0, answer
    assert_same(undisturbed.with_name("forked"), undisturbed)
    moments: list[str] = answer["moments"]
    return moments


def nth(moments: list[str], what: str, n: int) -> int:
    """The number of the moment just before something happens for the n-th time."""
    return [i for i, moment in enumerate(moments) if moment.startswith(what)][n - 1]


# At every moment


CONTRARY = [*SMALL, "--data", "contrary", "--baseline-epochs", "1", "--epochs", "2", "--batch-size", "60"]
"""The CVAE has two epochs, each of five steps; the second is no improvement."""


@pytest.fixture(scope="module")
def contrary(work: Path, forked: Forked) -> tuple[Path, list[str]]:
    """The folder of such a training, undisturbed, and the moments at which it changed the disk."""
    answer = forked(*CONTRARY, "--name", "reference", watched=True)
    assert answer["code"] == 0, answer
    assert read_json(work / "runs/reference/summary.json")["best_epoch"] == 1
    return work / "runs/reference", answer["moments"]


def test_moments_are_those_of_every_write(contrary: tuple[Path, list[str]]) -> None:
    """The control of the next test: what it kills before."""
    for what, times in {
        "atomic_file replace config.json": 1,
        "atomic_file replace last.pt": 3,
        "atomic_file replace best.pt": 2,
        "atomic_file replace curves.png": 1,
        "atomic_file replace learning.gif": 1,
        "atomic_file replace completions.png": 1,
        "atomic_file replace summary.json": 1,
        "sync_folder fsync": 10,
        "epoch write": 3,
        "write write": 5,  # amid each checkpoint
    }.items():
        assert sum(moment.startswith(what) for moment in contrary[1]) == times, what
    assert contrary[1].count("flush events") >= 4


def test_killed_before_any_write_and_again_as_it_goes_on(
    work: Path, forked: Forked, contrary: tuple[Path, list[str]]
) -> None:
    """A training killed at any moment, and killed a second time after it was resumed, ends like the undisturbed one."""
    reference, moments = contrary
    dice = random.Random(0)
    best_behind = 0
    for kill_at, moment in enumerate(moments):
        if moment.startswith("sync_folder fsync"):
            continue  # the next moment finds the same on the disk
        name = f"killed-{kill_at}"
        folder = work / "runs" / name
        argv = [*CONTRARY, "--name", name]
        assert forked(*argv, kill_at=kill_at)["code"] == -9
        if (folder / "config.json").exists():
            best_behind += is_best_behind(folder)
            argv = ["--resume", name]
            second = forked(*argv, kill_at=dice.randrange(12))
            assert second["code"] in (0, -9), second
        else:
            assert "atomic_file replace config.json" not in moments[:kill_at]
        answer = forked(*argv)
        assert answer["code"] == 0, (moment, answer)
        assert_same(folder, reference)
        shutil.rmtree(folder)
    assert best_behind >= 4  # last.pt is of a new best epoch, and best.pt of an earlier one or not there at all


def is_best_behind(folder: Path) -> bool:
    """Whether the last checkpoint is the best, and stands there already while `best.pt` does not hold it yet."""
    if not (folder / "last.pt").exists():
        return False
    last = checkpoint.load(folder / "last.pt")
    if last["progress"]["epoch"] != last["progress"]["best_epoch"]:
        return False
    return not (folder / "best.pt").exists() or last["phase"] != checkpoint.load(folder / "best.pt")["phase"]


# At each kind of place


PLACES = {  # what it is killed before, for the n-th time; the epochs that its last.pt has seen; how it goes on
    "before there is a checkpoint": ("atomic_file replace last.pt", 1, 0, "by name"),
    "in the baseline": ("atomic_file replace last.pt", 2, 1, "by folder"),
    "between the phases": ("epoch write", 3, 2, "by name"),
    "in the CVAE": ("flush events", 4, 3, "by the command itself"),
    "when all is done but saying so": ("atomic_file replace summary.json", 1, 5, "by name"),
}


@pytest.mark.parametrize("place", PLACES)
def test_resumed_at_any_place(work: Path, forked: Forked, moments: list[str], undisturbed: Path, place: str) -> None:
    what, times, seen, way = PLACES[place]
    name = place.replace(" ", "-")
    folder = work / "runs" / name
    kill_at = nth(moments, what, times)
    assert forked("--data", "data", *SMALL, "--name", name, kill_at=kill_at)["code"] == -9
    last = checkpoint.load(folder / "last.pt") if seen else None
    assert (last is None) == (not (folder / "last.pt").exists())
    if last is not None:
        assert (last["phase"], last["progress"]["epoch"]) == ALL_EPOCHS[seen - 1]

    resume = run_script if way == "by the command itself" else fork_script
    ended = resume("train.py", "--resume", name if way == "by name" else f"runs/{name}", cwd=work)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.split("/")[0] for line in said(ended.stdout).splitlines()[:-1]] == [
        f"{p}, epoch {n}" for p, n in ALL_EPOCHS[seen:]
    ]
    assert_same(folder, undisturbed)
    assert events_are_each_once_and_in_order(folder)


def events_are_each_once_and_in_order(folder: Path) -> bool:
    """Whether TensorBoard shows each epoch of each phase once, by every tag that there is."""
    view = events(folder)
    tags = {**view["scalars"], **view["images"]}
    per_epoch = {tag: [step for step, _ in values] for tag, values in tags.items() if "/" in tag}
    assert len(per_epoch) >= 15
    return all(steps == ([1, 2] if tag.startswith("baseline") else [1, 2, 3]) for tag, steps in per_epoch.items())


def test_what_a_crash_leaves_at_the_end_of_the_log_is_dropped(
    work: Path, forked: Forked, moments: list[str], undisturbed: Path
) -> None:
    """A whole epoch, a torn line, torn records, a log that was being begun. What is not ours stays."""
    folder = work / "runs/torn"
    answer = forked("--data", "data", *SMALL, "--name", "torn", kill_at=nth(moments, "atomic_file replace last.pt", 4))
    assert answer["code"] == -9
    assert epochs_logged(folder) == ALL_EPOCHS[:4]  # one more than last.pt has seen
    [log] = folder.glob("events.*")
    with open(folder / "metrics.jsonl", "ab") as metrics, open(log, "ab") as records:
        metrics.write(b'{"phase": "cv')
        records.write(log.read_bytes()[:1000])
    assert log.name.endswith(".train")
    log.with_suffix(".later.train").write_bytes(log.read_bytes()[:777])
    for name in (".last.pt.tmp", ".best.pt.tmp", ".config.json.tmp", ".summary.json.tmp"):
        (folder / name).write_bytes(b"half a f")
    own = folder / "events.out.tfevents.1.somebody"
    own.write_bytes(log.read_bytes()[:300])
    assert forked("--resume", "torn")["code"] == 0
    assert own.stat().st_size == 300
    own.unlink()
    assert_same(folder, undisturbed)


# Nothing left to do, and more to do


def test_early_stopping(work: Path, forked: Forked) -> None:
    """A rate so low that nothing can improve: one good epoch, two without improvement, and the end, in both phases."""
    argv = ["--data", "data", *SMALL, "--learning-rate", "1e-30", "--patience", "2", "--epochs", "9"]
    argv += ["--baseline-epochs", "9"]
    stopped = [("baseline", 1), ("baseline", 2), ("baseline", 3), ("cvae", 1), ("cvae", 2), ("cvae", 3)]
    whole = forked(*argv, "--name", "early", watched=True)
    assert whole["code"] == 0, whole
    folder = work / "runs/early"
    assert epochs_logged(folder) == stopped

    before = contents(folder)
    again = forked("--resume", "early")
    nothing = "runs/early is finished: nothing is left to do\n"
    assert (again["code"], said(again["out"]), again["err"]) == (0, nothing, "")
    assert contents(folder) == before

    for n in (2, 3, 5, 6):  # the count of epochs without improvement is not begun anew
        name = f"early-{n}"
        answer = forked(*argv, "--name", name, kill_at=nth(whole["moments"], "atomic_file replace last.pt", n) + 1)
        assert answer["code"] == -9
        assert forked("--resume", name)["code"] == 0
        assert_same(work / "runs" / name, folder)


def test_more_epochs(work: Path, forked: Forked) -> None:
    """`--epochs` may be raised: a finished training goes on, as if it had been told at once."""
    argv = ["--data", "data", *SMALL, "--schedule", "constant"]
    for words in (
        [*argv, "--name", "long", "--epochs", "4"],
        [*argv, "--name", "short", "--epochs", "1"],
        ["--resume", "short", "--epochs", "2"],
        ["--resume", "short", "--epochs", "4"],
    ):
        assert forked(*words)["code"] == 0
    assert read_settings(work / "runs/short").epochs == 4
    assert_same(work / "runs/short", work / "runs/long", apart_from="texts")  # of the settings it began with
    assert said(forked("--resume", "short")["output"]) == "runs/short is finished: nothing is left to do\n"
    fewer = forked("--resume", "short", "--epochs", "3")
    assert fewer["code"] == 2
    assert "has had 4 epochs" in fewer["output"]
    assert read_settings(work / "runs/short").epochs == 4


# What is refused


CONTRADICTIONS = [
    "--observed left", "--network paper", "--objective gsnn", "--objective hybrid", "--alpha 0.25",
    "--objective multisample", "--quadrants 2", "--quadrants 1 2", "--precision bf16", "--baseline-epochs 3",
    "--patience 9", "--batch-size 31", "--learning-rate 0.5", "--schedule constant", "--warmup-epochs 7",
    "--weight-decay 0.1",
    "--average 7", "--hidden 32 33", "--latent-dim 9", "--particles 2", "--seed 1", "--size 32", "--transpose",
    "--targets binary", "--levels 2", "--channels 8", "--clip 5", "--preset best", "--bend 0.5",
    "--unbent-epochs 1", "--free-epochs 2",
    "--train-limit 299", "--compile", "--epochs 9 --seed 1",
]  # fmt: skip


def test_contradicting_settings(work: Path, forked: Forked, undisturbed: Path) -> None:
    flags = {flag.split()[-2 if "--epochs" in flag else 0][2:].replace("-", "_") for flag in CONTRADICTIONS}
    assert flags == read_settings(undisturbed).to_dict().keys() - {*MOVABLE}  # all of them
    before = contents(undisturbed)
    for words in CONTRADICTIONS:
        answer = forked("--resume", "undisturbed", *words.split())
        flag = words.split()[-2 if "--epochs" in words else 0]
        assert answer["code"] == 2, (words, answer)
        line, rest = answer["output"].split("\n", 1)
        assert rest == ""
        begun = f"without {flag}, " if flag in ("--observed", "--size", "--clip") else f"with {flag} "
        assert line.startswith(f"train.py: runs/undisturbed was begun {begun}")
    assert contents(undisturbed) == before


def test_contradiction_by_command(work: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    code, out, err = finish(start(train_command("--resume", undisturbed, "--latent-dim", "9"), work))
    assert (code, out) == (2, "")
    assert (
        err == f"train.py: {undisturbed} was begun with --latent-dim 8, which cannot change now; leave the flag out\n"
    )
    assert contents(undisturbed) == before


def test_the_same_settings_again_are_no_contradiction(work: Path, forked: Forked, undisturbed: Path) -> None:
    before = contents(undisturbed)
    answer = forked("--resume", "undisturbed", "--data", "data", *SMALL, "--seed", "0", "--quadrants", "1")
    assert (answer["code"], said(answer["output"])) == (0, "runs/undisturbed is finished: nothing is left to do\n")
    assert contents(undisturbed) == before


def test_checkpoint_of_other_settings(work: Path, forked: Forked, moments: list[str], undisturbed: Path) -> None:
    """A `last.pt` from elsewhere is not believed."""
    argv = ["--data", "data", *SMALL, "--name", "other", "--latent-dim", "9"]
    assert forked(*argv, kill_at=nth(moments, "atomic_file replace last.pt", 4))["code"] == -9
    shutil.copy(undisturbed / "last.pt", work / "runs/other/last.pt")
    answer = forked("--resume", "other", "--epochs", "9")
    assert answer["code"] == 3, answer
    assert said(answer["output"]).count("\n") == 1
    assert said(answer["output"]).startswith("train.py: runs/other/metrics.jsonl: ")


def test_goes_on_in_the_precision_it_was_begun_in(work: Path, forked: Forked, moments: list[str]) -> None:
    """Whatever `auto` stands for where it goes on: from its first step, it is a run of the other precision."""
    auto = context.resolve_precision("auto", torch.device("cpu"))
    other = "fp32" if auto == "bf16" else "bf16"
    argv = ["--data", "data", *SMALL]
    assert forked(*argv, "--name", "elsewhere", kill_at=nth(moments, "epoch write", 1))["code"] == -9
    config = work / "runs/elsewhere/config.json"
    begun = read_json(config)
    assert begun["precision"] == auto
    config.write_text(json.dumps(begun | {"precision": other}))
    assert forked("--resume", "elsewhere")["code"] == 0
    for name, precision in (("as-other", other), ("as-auto", auto)):
        assert forked(*argv, "--precision", precision, "--name", name)["code"] == 0
    resumed, as_other, as_auto = (
        checkpoint.load(work / "runs" / name / "best.pt")["model"] for name in ("elsewhere", "as-other", "as-auto")
    )
    assert all(torch.equal(resumed[name], as_other[name]) for name in resumed)
    assert not all(torch.equal(resumed[name], as_auto[name]) for name in resumed)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_goes_on_bit_for_bit_in_any_precision(work: Path, forked: Forked, moments: list[str], precision: str) -> None:
    """What is kept in half precision beside the weights is made anew; the scale of float16 goes on where it was."""
    argv = ["--data", "data", *SMALL, "--precision", precision, "--name"]
    for phase, epoch in (("baseline", 2), ("cvae", 2)):
        name = f"{precision}-{phase}"
        kill_at = nth(moments, "atomic_file replace last.pt", ALL_EPOCHS.index((phase, epoch)) + 1)
        assert forked(*argv, name, kill_at=kill_at)["code"] == -9
        assert forked("--resume", name)["code"] == 0
        assert forked(*argv, f"{name}-through")["code"] == 0
        assert_same(work / "runs" / name, work / "runs" / f"{name}-through")


@pytest.mark.parametrize(
    "words", ["--network paper --objective iwae --particles 3", "--objective hybrid --alpha 0.3", "--observed top"]
)
def test_goes_on_bit_for_bit_with_any_network_and_objective(
    work: Path, forked: Forked, moments: list[str], words: str
) -> None:
    """Killed amid an epoch of the baseline, and amid one of the CVAE."""
    chosen = words.split()
    argv = ["--data", "data", *SMALL, *chosen, "--name"]
    name = chosen[-1]
    whole = forked(*argv, f"{name}-through", watched=True)
    assert whole["code"] == 0, whole
    for phase, epoch in (("baseline", 2), ("cvae", 2)):
        kill_at = nth(whole["moments"], "epoch write", ALL_EPOCHS.index((phase, epoch)) + 1)
        assert forked(*argv, f"{name}-{phase}", kill_at=kill_at)["code"] == -9
        last = checkpoint.load(work / "runs" / f"{name}-{phase}" / "last.pt")
        assert (last["phase"], last["progress"]["epoch"]) == (phase, epoch - 1)
        answer = forked("--resume", f"{name}-{phase}")
        assert (answer["code"], answer["err"]) == (0, "")
        assert_same(work / "runs" / f"{name}-{phase}", work / "runs" / f"{name}-through")


@pytest.mark.parametrize("precision", ["fp8", 5, [], None], ids=repr)
def test_precision_that_is_none_is_that_of_the_settings(tmp_path: Path, precision: object) -> None:
    config = {"settings": Settings(precision="fp16").to_dict(), "precision": precision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_precision(tmp_path) == "fp16"


def test_no_such_run(work: Path, forked: Forked) -> None:
    answer = forked("--resume", "nowhere")
    assert answer["code"] == 3
    assert answer["output"] == "train.py: runs/nowhere is no run folder: it has no config.json\n"
    assert not (work / "runs/nowhere").exists()
