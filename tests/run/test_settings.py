"""Settings: one line each, from which flags, checks and defaults come; and how they are read from older runs."""

import argparse
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from cvae.presets import PRESETS
from cvae.run.folder import CHOICES
from cvae.run.plan import parse, plan
from cvae.settings import COUNT, SWITCH, Kind, Settings, add_flags, flag, setting

ALL = {each.name: each for each in fields(Settings)}
EACH = pytest.mark.parametrize("name", ALL)

OTHER: dict[str, tuple[list[str], Any]] = {
    "quadrants": (["3"], [3]),
    "observed": (["left"], "left"),
    "preset": (["best"], "best"),
    "network": (["paper"], "paper"),
    "objective": (["gsnn"], "gsnn"),
    "alpha": (["0.25"], 0.25),
    "particles": (["7"], 7),
    "hidden": (["30", "20", "10"], [30, 20, 10]),
    "levels": (["4"], 4),
    "channels": (["8"], 8),
    "clip": (["2.5"], 2.5),
    "bend": (["0.5"], 0.5),
    "unbent_epochs": (["3"], 3),
    "free_epochs": (["2.5"], 2.5),
    "latent_dim": (["12"], 12),
    "epochs": (["4"], 4),
    "baseline_epochs": (["5"], 5),
    "patience": (["6"], 6),
    "batch_size": (["17"], 17),
    "learning_rate": (["1e-4"], 1e-4),
    "schedule": (["constant"], "constant"),
    "warmup_epochs": (["0"], 0.0),
    "weight_decay": (["1"], 1.0),
    "average": (["0"], 0),
    "seed": (["-8"], -8),
    "data": (["somewhere"], "somewhere"),
    "data_root": (["elsewhere"], "elsewhere"),
    "size": (["32"], 32),
    "transpose": ([], True),
    "targets": (["binary"], "binary"),
    "train_limit": (["11"], 11),
    "device": (["cuda:1"], "cuda:1"),
    "precision": (["fp16"], "fp16"),
    "compile": ([], True),
}
"""For each setting, words on the command line that are not its default, and what they mean."""

BAD: dict[str, list[Any]] = {
    "quadrants": [0, 4, True, 1.0, "1", None],
    "observed": [1, True, "x" * 10_000],
    "preset": [None, 3],
    "network": [None, 3, "x" * 10_000],
    "objective": [None, 3],
    "alpha": [-0.1, 1.1, float("nan"), 1, None],
    "particles": [0, -1, 1.0, True, (1 << 31) + 1],
    "hidden": [(), (0,), [7], 7, (7, True), (1 << 16,), (7,) * 65, ((7,),)],
    "levels": [0, 65, 1.0, True],
    "clip": [0.0, -1.0, "2", float("inf")],
    "channels": [0, 1 << 20, 1.0, "8"],
    "bend": [-0.1, 1.1, 1],
    "unbent_epochs": [-1, 1.0, True],
    "free_epochs": [-1.0, 1, float("nan")],
    "latent_dim": [0, 1 << 16, 2.0],
    "epochs": [0, None],
    "baseline_epochs": [0, -3],
    "patience": [0],
    "batch_size": [0, 2.5],
    "learning_rate": [0.0, -1.0, float("inf"), float("nan"), 1, "0.1"],
    "schedule": ["up", None, ("cosine",)],
    "warmup_epochs": [-1.0, float("nan"), float("inf"), 1],
    "weight_decay": [-0.1, 1.1, float("nan")],
    "average": [-1, 1.0, None],
    "seed": [1 << 64, 0.5, "0", None],
    "data": [3, True],
    "data_root": [3, True],
    "size": [1, (1 << 12) + 1, 28.0, True],
    "transpose": [0, None],
    "targets": ["gray", None],
    "train_limit": [0, -1, 2.0],
    "device": [None, 0],
    "precision": ["fp8", None],
    "compile": [1, None, "yes"],
}


def test_every_setting_is_looked_at_here() -> None:
    assert OTHER.keys() == BAD.keys() == ALL.keys()


@EACH
def test_kind_text_and_default(name: str) -> None:
    """One line says all of a setting, and its default is good by its own check."""
    each = ALL[name]
    kind, text, before = (each.metadata[key] for key in ("kind", "text", "before"))
    assert isinstance(kind, Kind)
    assert kind.wanted
    assert len(text) > 8
    assert text[0].islower() or text.split()[0].isupper()
    assert text.strip(". ") == text
    for value in (each.default, before):
        assert kind.is_good(value)
    assert getattr(Settings(), name) == each.default


@EACH
def test_values_that_make_no_sense(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{flag(name)[2:]} has to be [^\n]+, not [^\n]+$") as caught:
            Settings(**{name: value})
        assert len(str(caught.value)) < 300
        with pytest.raises(ValueError, match="has to be"):
            Settings.from_dict({**Settings().to_dict(), name: list(value) if isinstance(value, tuple) else [value, {}]})


# Flags


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_flags(made, CHOICES)
    return made


@EACH
def test_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """It is there, is of the setting's kind, and says nothing of the others."""
    words, expected = OTHER[name]
    parsed = vars(parser.parse_args([flag(name), *words]))
    assert parsed == {name: expected}
    assert type(parsed[name]) is type(expected)
    value = tuple(expected) if name == "hidden" else expected[0] if name == "quadrants" else expected
    settings = Settings(**{name: value})
    assert settings != Settings()
    assert Settings.from_dict(settings.to_dict()) == settings


def test_no_flags_say_nothing(parser: argparse.ArgumentParser) -> None:
    assert vars(parser.parse_args([])) == {}


@EACH
def test_help_says_the_default(parser: argparse.ArgumentParser, name: str) -> None:
    [action] = [action for action in parser._actions if action.dest == name]
    default = ALL[name].default
    assert action.option_strings == [flag(name)]
    assert action.help is not None
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
    text = action.help % {}  # as argparse formats it
    assert text.endswith(f"(default: {shown})")
    assert ALL[name].metadata["text"] in text
    for choice in CHOICES.get(name, ()):
        assert choice in text
    assert (action.nargs == 0) == (ALL[name].metadata["kind"] is SWITCH)


@pytest.mark.parametrize("name", CHOICES)
def test_names_have_choices(parser: argparse.ArgumentParser, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for choice in CHOICES[name]:
        assert vars(parser.parse_args([flag(name), choice])) == {name: choice}
    with pytest.raises(SystemExit):
        parser.parse_args([flag(name), "no-such"])
    assert f"argument {flag(name)}: invalid choice: 'no-such'" in capsys.readouterr().err


# As JSON, and back


def everything() -> Settings:
    values = {name: value for name, (_, value) in OTHER.items()}
    return Settings(**{**values, "quadrants": 3, "hidden": (30, 20, 10)})


@pytest.mark.parametrize("settings", [Settings(), everything()], ids=["default", "other"])
def test_round_trip(settings: Settings) -> None:
    values = settings.to_dict()
    assert values.keys() == ALL.keys()
    assert not any(isinstance(value, tuple) for value in values.values())
    assert Settings.from_dict(values) == settings


@EACH
def test_missing_setting_is_what_the_runs_did_before(name: str) -> None:
    values = everything().to_dict()
    del values[name]
    assert Settings.from_dict(values) == replace(everything(), **{name: ALL[name].metadata["before"]})
    assert Settings.from_dict({}) == Settings(**{name: each.metadata["before"] for name, each in ALL.items()})


@dataclass(frozen=True)
class Later(Settings):
    """The settings of a later version, which has two more."""

    shades: int = setting(3, COUNT, "shades of z", before=1)
    flips: int = setting(2, COUNT, "flips of an image")


def test_run_opens_after_a_setting_was_added() -> None:
    """As what it was: the new setting's value of then, which may be another than its default."""
    begun = everything()
    opened = Later.from_dict(begun.to_dict())
    assert type(opened) is Later
    assert (opened.shades, opened.flips) == (1, 2)
    assert {name: value for name, value in opened.to_dict().items() if name in ALL} == begun.to_dict()
    assert (Later().shades, Later().flips) == (3, 2)
    assert Later.from_dict(Later(shades=5).to_dict()) == Later(shades=5)
    with pytest.raises(ValueError, match=r"^shades has to be a positive whole number, not 0$"):
        Later.from_dict({"shades": 0})


@pytest.mark.parametrize("name", ["shades", "Epochs", "", "x" * 100_000, "batch-size", "\ud800"])
def test_unknown_settings_are_refused_by_name(name: str) -> None:
    """This version would leave out what they ask for."""
    with pytest.raises(ValueError, match=r"^this version knows no setting '") as caught:
        Settings.from_dict({**Settings().to_dict(), name: 1})
    assert len(str(caught.value)) < 200
    assert len(name) > 100 or repr(name) in str(caught.value)


@pytest.mark.parametrize("values", [None, [], "settings", 3, True], ids=repr)
def test_settings_that_are_none(values: object) -> None:
    with pytest.raises(ValueError, match="the settings are missing"):
        Settings.from_dict(values)


def test_what_cannot_be_compiled_is_refused_in_every_way_there_is() -> None:
    """On the command line, and in a `config.json` that was edited."""
    with pytest.raises(ValueError, match="compile cannot be used with the objective iwae"):
        Settings.from_dict({**Settings(objective="iwae").to_dict(), "compile": True})


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    """Its settings are good together; each is overridden by its own flag; what was chosen is recorded."""
    options, given = parse(["--preset", name], None)
    [(_, settings)] = plan(options, given)
    assert settings == Settings(**PRESETS[name], preset=name)
    options, given = parse(["--preset", name, "--hidden", "7", "--epochs", "3"], None)
    [(_, settings)] = plan(options, given)
    assert settings == Settings(**{**PRESETS[name], "hidden": (7,), "epochs": 3}, preset=name)
