"""A trained model by its folder or its name, and runs that are not what they should be: refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inprocess import TINY, call_eval, call_train, interrupted_after, make_tiny_data, results
from support.trainings import contents
from test_checkpoint import saved_by_torch, sign

import cvae
from cvae.data.digits import as_digit
from cvae.data.masks import MASKS
from cvae.errors import DataError
from cvae.model.cvae import CVAE
from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES, OF_PRIOR
from cvae.report.figures import show
from cvae.run import checkpoint
from cvae.run.folder import read_record, read_settings, read_size
from cvae.run.load import load
from cvae.run.tutorial import load_tutorial


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and below `runs` a finished run, one of the baseline only, and one that is not finished."""
    folder = tmp_path_factory.mktemp("place")
    words = ["--data", make_tiny_data(folder / "data"), *TINY, "--runs", folder / "runs", "--name"]
    assert call_train(*words, "done").code == 0
    with interrupted_after("baseline", 1):
        assert call_train(*words, "baseline").code == 143
    with interrupted_after("cvae", 1):
        assert call_train(*words, "begun").code == 143
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of runs, to be spoilt."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(place / "runs" / name, tmp_path / "runs" / name))

    return copy


def change(run: Path, *keys: str, value: Any = None) -> None:
    """Change an entry of a run's config.json; None: take it out."""
    config = json.loads((run / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    (run / "config.json").write_text(json.dumps(config))


def assert_refused(run: Path, reason: str, resume: bool = True) -> None:
    """By all that open it, in one line; nothing in it is changed."""
    before = contents(run)
    with pytest.raises(DataError, match=reason) as caught:
        load(run)
    line = str(caught.value)
    assert "\n" not in line
    assert str(run) in line
    if (run / "summary.json").exists():
        ended = call_eval("--runs", run)
        assert (ended.code, ended.line) == (3, line)
    if resume:
        ended = call_train("--resume", run, "--epochs", "3")
        assert ended.code == 3
        assert str(run) in ended.line
    after = contents(run)
    assert before.keys() == after.keys() - {".lock"} | before.keys() & {".lock"}
    assert all(after[name] == before[name] for name in before if name != ".lock")


# What is loaded


def test_by_folder_and_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = checkpoint.load(place / "runs/done/best.pt")["model"]
    monkeypatch.chdir(place)
    for model in (load(place / "runs/done"), load("runs/done"), load("done"), load("done", runs=str(place / "runs"))):
        assert isinstance(model, CVAE)
        state = model.state_dict()
        assert state.keys() == best.keys()
        assert all(torch.equal(tensor, best[name]) for name, tensor in state.items())
    monkeypatch.chdir(place.parent)
    assert load("done", runs=place / "runs").latent_dim == 4


def test_it_is_ready_to_use(place: Path) -> None:
    """Frozen, in evaluation mode, with the split that it was trained with."""
    model = load(place / "runs/done", "cpu")
    assert not any(module.training for module in model.modules())
    for parameter in model.parameters():
        assert (parameter.requires_grad, parameter.dtype, parameter.device.type) == (False, torch.float32, "cpu")
    assert (model.split.height, model.split.width) == (10, 9)
    assert torch.equal(model.split.observed.nonzero(), torch.cartesian_prod(torch.arange(5, 10), torch.arange(4)))
    x = model.split.split(torch.rand(3, 10, 9))[0]
    completions = model.completions(x, torch.randn(5, 3, 4))
    assert completions.shape == (5, 3, model.split.num_hidden)
    assert 0 < completions.min() < completions.max() < 1
    assert model.split.compose(x, completions).shape == (5, 3, 10, 9)


def test_what_the_package_offers() -> None:
    assert cvae.load is load
    assert cvae.load_tutorial is load_tutorial
    assert cvae.as_digit is as_digit
    assert cvae.show is show
    assert cvae.__all__ == ["as_digit", "load", "load_tutorial", "show"]
    assert cvae.__version__
    with pytest.raises(AttributeError, match="'cvae' has no attribute 'no_such'"):
        cvae.no_such  # noqa: B018


def test_best_weights_of_a_run_that_is_not_finished(place: Path) -> None:
    run = place / "runs/begun"
    assert not (run / "summary.json").exists()
    best = checkpoint.load(run / "best.pt")
    assert best["phase"] == "cvae"
    model = load(run)
    assert all(torch.equal(tensor, best["model"][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("observed", [None, *MASKS])
def test_any_mask(place: Path, tmp_path: Path, observed: str | None) -> None:
    chosen = ["--quadrants", "3"] if observed is None else ["--observed", observed]
    words = ["--data", place / "data", *TINY, "--runs", tmp_path, *chosen]
    assert call_train(*words).code == 0
    [run] = tmp_path.iterdir()
    assert run.name == (observed or "q3")
    expected = MASKS[observed](10, 9) if observed else torch.arange(90).view(10, 9).ne(-1)
    if observed is None:
        expected[5:, 4:] = False
    model = load(run)
    assert torch.equal(model.split.observed, expected)
    [record] = json.loads(call_eval("--runs", run, "--format", "json").out)
    assert record["observed"] == (observed or "3 quadrants")
    assert record["quadrants"] == (None if observed else 3)
    assert record["nn_nll"]["mean"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", NETWORKS)
def test_any_network_and_objective(place: Path, tmp_path: Path, network: str, objective: str) -> None:
    """From `train.py` to the table of `eval.py`; some train no recognition network, and show nothing of it."""
    words = ["--data", place / "data", *TINY, "--runs", tmp_path, "--network", network, "--objective", objective]
    assert call_train(*words, "--particles", "2").code == 0
    run = tmp_path / "q1"
    assert type(load(run)) is NETWORKS[network]
    terms = {
        "elbo": {"elbo", "log_likelihood", "kl"},
        "iwae": {"iwae", "elbo", "log_likelihood", "kl"},
        "gsnn": {"gsnn"},
        "hybrid": {"hybrid", "elbo", "log_likelihood", "kl", "gsnn"},
        "multisample": {"multisample", "gsnn"},
    }[objective]
    for record in results(run)["metrics"][1:]:
        for part, more in {"train": set(), "validation": {"active_units"} if "kl" in terms else set()}.items():
            assert {name.removeprefix(f"{part}_") for name in record if name.startswith(part)} == terms | more
    ended = call_eval("--runs", run, "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    [record] = json.loads(ended.out)
    assert (record["network"], record["objective"]) == (network, objective)
    for name in ("cvae_neg_elbo", "cvae_is_nll"):
        assert (record[name]["mean"] is None) == (objective in OF_PRIOR)
    assert record["cvae_mc_nll"]["mean"] > record["floor"]["mean"]


# Settings that were added since


def test_config_has_the_size_of_the_images(place: Path) -> None:
    assert read_size(place / "runs/done") == (10, 9)
    record = read_record(place / "runs/done")
    assert [record[part]["count"] for part in ("train", "validation", "test")] == [60, 12, 12]


@pytest.mark.parametrize("name", ["network", "objective", "alpha", "observed", "particles", "average", "compile"])
def test_setting_that_the_run_did_not_have_yet(place: Path, copied: Callable[[str], Path], name: str) -> None:
    """It opens as what it was: evaluated, loaded, gone on with to the same end."""
    table = call_eval("--runs", place / "runs/done", "--format", "csv")
    run = copied("done")
    change(run, "settings", name)
    assert load(run).latent_dim == 4
    ended = call_eval("--runs", run, "--format", "csv")
    assert (ended.code, ended.err, ended.out) == (0, "", table.out)
    assert call_train("--resume", run).out.endswith(f"\n{run} is finished: nothing is left to do\n")
    begun = copied("begun")
    change(begun, "settings", name)
    assert call_train("--resume", begun).code == 0
    assert results(begun) == results(place / "runs/done")


def test_setting_of_a_later_version(copied: Callable[[str], Path]) -> None:
    run = copied("done")
    change(run, "settings", "shades", value=2)
    assert_refused(run, "this version knows no setting 'shades'")


@pytest.mark.parametrize("name", ["network", "objective", "observed"])
def test_name_of_a_later_version(copied: Callable[[str], Path], name: str) -> None:
    """Also before the first checkpoint."""
    for spoilt in ("done", "baseline"):
        run = copied(spoilt)
        change(run, "settings", name, value="hierarchical")
        assert_refused(run, f"config.json: this version knows no {name} 'hierarchical'")
    for path in (run / "last.pt", run / "best.pt"):
        path.unlink()
    assert_refused(run, f"config.json: this version knows no {name} 'hierarchical'")


# Runs that are not what they should be


def test_no_such_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(DataError, match=r"^runs/nowhere is no run folder: it has no config\.json$"):
        load("nowhere")
    with pytest.raises(DataError, match=r"^data is no run folder: it has no config\.json$"):
        load("data")
    with pytest.raises(DataError, match="is no run folder"):
        load("x" * 5000)


def test_only_the_baseline_is_trained(place: Path) -> None:
    run = place / "runs/baseline"
    with pytest.raises(DataError) as caught:
        load(run)
    assert str(caught.value) == (
        f"{run}: only its baseline is trained so far; go on with python train.py --resume {run}"
    )


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "missing"])
def test_damaged_weights(copied: Callable[[str], Path], spoil: str) -> None:
    run = copied("done")
    best = run / "best.pt"
    content = best.read_bytes()
    middle = len(content) // 2
    spoilt = {
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:-100],
        "empty": b"",
    }
    best.unlink()
    if spoil != "missing":
        best.write_bytes(spoilt[spoil])
    before = contents(run)
    with pytest.raises(DataError, match=r"best\.pt: (is damaged|cannot be read)") as caught:
        load(run)
    ended = call_eval("--runs", run)
    assert ended.code == 3
    assert ended.line == str(caught.value)
    assert contents(run) == before


def test_weights_that_are_not_those_of_the_settings(place: Path, copied: Callable[[str], Path]) -> None:
    """The checkpoint's digest is right: other shapes, numbers of another type, or none at all."""
    state = checkpoint.load(place / "runs/done/best.pt")["model"]
    for name, value in (("hidden", [8]), ("latent_dim", 9), ("hidden", [30_000, 30_000]), ("network", "paper")):
        run = copied("done")
        change(run, "settings", name, value=value)
        assert_refused(run, "does not hold the weights of a CVAE of the run's settings", resume=False)
        shutil.rmtree(run)
    run = copied("done")
    for forged in (
        {name: tensor.double() for name, tensor in state.items()},
        {name: tensor.half() for name, tensor in state.items()},
        {name: tensor.long() for name, tensor in state.items()},
        {name: tensor.tolist() for name, tensor in state.items()},
        {**state, "more": torch.zeros(1)},
        {name: tensor for name, tensor in state.items() if "bias" not in name},
        {},
        None,
        3,
    ):
        checkpoint.save(run / "best.pt", {"phase": "cvae", "model": forged})
        assert_refused(run, "does not hold the weights", resume=False)


@pytest.mark.parametrize("side", ["height", "width"])
def test_another_size_than_that_of_the_weights(copied: Callable[[str], Path], side: str) -> None:
    """Nor is the run gone on with on images of another size than it was begun on."""
    run = copied("done")
    change(run, "images", side, value=12)
    assert_refused(run, "does not hold the weights of a CVAE of the run's settings")
    assert "was begun on images of 1" in call_train("--resume", run, "--epochs", "3").line


@pytest.mark.parametrize("size", [0, 1, -9, 10.0, "9", True, 1 << 40, [9]], ids=repr)
def test_size_that_no_image_has(copied: Callable[[str], Path], size: Any) -> None:
    run = copied("done")
    change(run, "images", "width", value=size)
    assert_refused(run, "does not say the size of the images; train anew with this version")


def test_test_images_of_another_size(place: Path, tmp_path: Path, copied: Callable[[str], Path]) -> None:
    """Or such ones to go on with: named in one line, with both sizes."""
    other = make_tiny_data(tmp_path / "other", 9, 10)
    for name in ("done", "begun", "baseline"):
        run = copied(name)
        change(run, "settings", "data", value=str(other))
        ended = call_train("--resume", run, "--epochs", "3")
        assert ended.code == 3
        assert ended.line.startswith(f"{run}: was begun on images of 10×9 pixels, and these have 9×10; --data ")
    run = tmp_path / "runs/done"
    ended = call_eval("--runs", run, "--figure", tmp_path / "figure.png")
    assert ended.code == 3
    assert ended.line == (
        f"{run}: was begun on images of 10×9 pixels, and these have 9×10; --data says where its own are"
    )
    assert not (tmp_path / "figure.png").exists()


# Runs of earlier formats


def test_run_that_does_not_say_the_size_of_its_images(copied: Callable[[str], Path]) -> None:
    for name in ("done", "begun"):
        run = copied(name)
        change(run, "images")
        assert_refused(run, "does not say the size of the images; train anew with this version")


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_checkpoint_of_an_earlier_format(copied: Callable[[str], Path], file: str) -> None:
    run = copied("done")
    content = {**checkpoint.load(run / file), "format": 2}
    (run / file).write_bytes(sign(saved_by_torch(content)))
    ended = call_eval("--runs", run) if file == "best.pt" else call_train("--resume", run, "--epochs", "3")
    assert ended.code == 3
    line = f"{run}/{file}: is not a checkpoint of format 3, the only one that this version reads; train anew"
    assert ended.line == line or (file == "last.pt" and ended.line.startswith(f"{line}. The run cannot go on"))


def test_settings_of_the_finished_run_are_those_it_was_begun_with(place: Path) -> None:
    settings = read_settings(place / "runs/done")
    assert (settings.hidden, settings.epochs, settings.data) == ((8, 7), 2, str(place / "data"))
