"""Settings: one line each, from which flags, checks and defaults come; presets; how older runs are read."""

import argparse
from dataclasses import fields, replace
from typing import Any

import pytest

from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES
from cvae.settings import PRESETS, Settings, add_flags, flag, with_preset

INF, NAN = float("inf"), float("nan")
CASES: dict[str, tuple[str, Any, list[Any]]] = {
    "quadrants": ("3", [3], [0, 4, True, 1.0, "1", None]),
    "observed": ("left", "left", [1, True, "x" * 10_000, "s\udcff"]),
    "preset": ("best", "best", [None, 3]),
    "network": ("paper", "paper", [None, 3, "x" * 10_000]),
    "objective": ("gsnn", "gsnn", [None, 3]),
    "alpha": ("0.25", 0.25, [-0.1, 1.1, NAN, True, None]),
    "particles": ("7", 7, [0, -1, 1.0, True, (1 << 31) + 1]),
    "hidden": ("30 20 10", [30, 20, 10], [(), (0,), [7], 7, (7, True), (1 << 16,), (7,) * 65, ((7,),)]),
    "latent_dim": ("12", 12, [0, 1 << 16, 2.0]),
    "levels": ("4", 4, [0, 65, 1.0, True]),
    "channels": ("8", 8, [0, 1 << 20, 1.0, "8"]),
    "epochs": ("4", 4, [0, None]),
    "baseline_epochs": ("5", 5, [0, -3]),
    "patience": ("6", 6, [0]),
    "batch_size": ("17", 17, [0, 2.5]),
    "learning_rate": ("1e-4", 1e-4, [0.0, 0, -1.0, INF, NAN, 10**400, "0.1"]),
    "schedule": ("constant", "constant", ["up", None, ("cosine",)]),
    "warmup_epochs": ("0", 0.0, [-1.0, NAN, INF]),
    "free_epochs": ("2.5", 2.5, [-1.0, NAN]),
    "weight_decay": ("1", 1.0, [-0.1, 1.1, NAN]),
    "clip": ("2.5", 2.5, [0.0, -1.0, "2", INF]),
    "bend": ("0.5", 0.5, [-0.1, 1.1, False]),
    "unbent_epochs": ("3", 3, [-1, 1.0, True]),
    "average": ("0", 0, [-1, 1.0, None]),
    "seed": ("-8", -8, [1 << 64, 0.5, "0", None]),
    "data": ("somewhere", "somewhere", ["", 3, True, "s\udcff"]),
    "data_root": ("elsewhere", "elsewhere", [3, True]),
    "size": ("32", 32, [1, (1 << 12) + 1, 28.0, True]),
    "transpose": ("", True, [0, None]),
    "targets": ("binary", "binary", ["gray", None]),
    "train_limit": ("11", 11, [0, -1, 2.0]),
    "device": ("cuda:1", "cuda:1", [None, 0]),
    "precision": ("fp16", "fp16", ["fp8", None]),
}
"""For each setting: words that are not its default, what they mean, and values that are refused."""
CHOICES = {"network": NETWORKS, "objective": OBJECTIVES, "preset": PRESETS}
EACH = pytest.mark.parametrize("name", CASES)


EVERYTHING = Settings.from_dict({name: case[1] if name != "quadrants" else 3 for name, case in CASES.items()})


def test_every_setting_is_looked_at_here() -> None:
    assert list(CASES) == [each.name for each in fields(Settings)]


@EACH
def test_values_that_make_no_sense(name: str) -> None:
    for value in CASES[name][2]:
        with pytest.raises(ValueError, match=rf"^{flag(name)[2:]} has to be [^\n]+, not [^\n]+$") as caught:
            Settings(**{name: value})
        assert len(str(caught.value)) < 300


@EACH
def test_flag(name: str) -> None:
    """It says nothing of other settings; its help ends with the default, and lists the names that there are."""
    add_flags(parser := argparse.ArgumentParser(), CHOICES)
    words, expected, _ = CASES[name]
    assert repr(vars(parser.parse_args([flag(name), *words.split()]))) == repr({name: expected})
    (action,) = (action for action in parser._actions if action.dest == name)
    default = {"hidden": "500 500"}.get(name, getattr(Settings(), name))
    assert str(action.help).endswith(f"(default: {'none' if default is None else default})")
    assert all(choice in str(action.help) for choice in CHOICES.get(name, ()))


def test_whole_numbers_become_floats() -> None:
    """So that a run's record does not depend on how they were written."""
    assert repr(Settings(bend=0, learning_rate=1, clip=2)) == repr(Settings(bend=0.0, learning_rate=1.0, clip=2.0))


# As JSON, and back


@pytest.mark.parametrize("settings", [Settings(), EVERYTHING], ids=["default", "other"])
def test_round_trip(settings: Settings) -> None:
    values = settings.to_dict()
    assert not any(isinstance(value, tuple) for value in values.values())
    assert Settings.from_dict(values) == settings


@EACH
def test_setting_that_an_older_run_does_not_have(name: str) -> None:
    """Or that only older ones have."""
    values = {**EVERYTHING.to_dict(), "compile": True}
    del values[name]
    assert Settings.from_dict(values) == replace(EVERYTHING, **{name: getattr(Settings(), name)})


@pytest.mark.parametrize("name", ["shades", "", "x" * 100_000, "batch-size"])
def test_unknown_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^this version knows no setting '") as caught:
        Settings.from_dict({**Settings().to_dict(), name: 1})
    assert len(str(caught.value)) < 200


# Presets, and settings that need others


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    """Its settings are good together; each is overridden by its own flag; more epochs change nothing else."""
    for given in ({}, {"hidden": (7,)}, {"epochs": 99}):
        assert with_preset({"preset": name, **given}) == {**PRESETS[name], "preset": name, **given}
        Settings(**with_preset({"preset": name, **given}))


@pytest.mark.parametrize(("epochs", "unbent", "free"), [(44, 4, 4.0), (22, 2, 2.0), (11, 1, 1.0), (3, 0, 0.273)])
def test_schedule_of_a_preset_shrinks_with_its_epochs(epochs: int, unbent: int, free: float) -> None:
    """In proportion, to whole unbent epochs; what is given by its own flag stays."""
    settings = with_preset({"preset": "best", "epochs": epochs})
    assert (settings["unbent_epochs"], settings["free_epochs"]) == (unbent, free)
    assert with_preset({"preset": "best", "epochs": epochs, "free_epochs": 1.5})["free_epochs"] == 1.5


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"levels": 2}, "network deep"),
        ({"channels": 8, "network": "paper"}, "network deep"),
        ({"preset": "best", "network": "paper", "levels": 8}, "network deep"),
        ({"free_epochs": 2.0, "objective": "iwae"}, "objective elbo"),
        ({"alpha": 0.5}, "objective hybrid"),
    ],
    ids=str,
)
def test_setting_that_would_do_nothing(given: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=rf"^--\S+ does nothing without --{needed}: leave it out$"):
        with_preset(given)


def test_setting_that_has_what_it_needs() -> None:
    """Given, or from the preset; a preset's own settings are never refused."""
    for given in ({"preset": "best", "levels": 2}, {"alpha": 0.1, "objective": "hybrid"}, {"free_epochs": 1.0}):
        assert with_preset(given).items() >= given.items()
    assert with_preset({"preset": "best", "objective": "iwae"})["free_epochs"] == 4.0
    with pytest.raises(ValueError, match="unbent-epochs has to be less than epochs"):
        with_preset({"unbent_epochs": 3, "epochs": 3})
    with pytest.raises(ValueError, match="latent-dim has to be a multiple of levels, not 10 for 4"):
        Settings(latent_dim=10, levels=4)
