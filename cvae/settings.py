"""The settings of a run: all choices that its numbers depend on, a line each; the flags and presets made of them."""

import argparse
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from cvae.errors import is_text

Item = TypeVar("Item")
VERSION = "0.3.0"  # of the program
LARGEST_LAYER, LARGEST_SIDE = 1 << 15, 1 << 12
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Kind(NamedTuple):
    """The values that a setting can have."""

    type: Callable[[str], Any]  # which makes one of a word, too
    is_good: Callable[[Any], bool]
    wanted: str  # the same in words


def whole(least: int, most: int = 1 << 31) -> Kind:
    """Return the kind of whole numbers in a range."""
    wanted = f"a whole number of at least {least}" if most == 1 << 31 else f"a whole number from {least} to {most}"
    return Kind(int, lambda value: least <= value <= most, wanted)


def one_of(*names: str) -> Kind:
    """Return the kind of these names."""
    return Kind(str, names.__contains__, f"one of {', '.join(names)}")


COUNT, SIZE = whole(1), whole(1, LARGEST_LAYER)
SHARE = Kind(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
POSITIVE = Kind(float, lambda value: 0 < value < 1e300, "a number above 0")
EPOCHS = Kind(float, lambda value: 0 <= value < 1e300, "a number of at least 0")
NAME = Kind(str, lambda value: 0 < len(value) < 10_000 and is_text(value), "a name in UTF-8")
SWITCH = Kind(bool, lambda value: True, "true or false")
SIZES = Kind(
    tuple, lambda value: 1 <= len(value) <= 64 and all(type(each) is int and SIZE.is_good(each) for each in value),
    f"1 to 64 sizes from 1 to {LARGEST_LAYER}",
)  # fmt: skip


def setting(default: Any, kind: Kind, text: str) -> Any:
    """Return the field of a setting: its default, its kind, its help. Where the default is None, None is allowed."""
    return field(default=default, metadata={"kind": kind, "text": text})


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Raises ValueError, in one line, for a value that makes no sense."""

    # fmt: off
    quadrants: int = setting(1, whole(1, 3), "observed quadrants; several numbers make several runs")
    observed: str | None = setting(None, NAME, "given pixels: 1, 2, 3, a mask's name, or a picture, white")
    preset: str = setting("default", NAME, "group of settings, each of which its own flag overrides")
    network: str = setting("tutorial", NAME, "networks of the CVAE and of its baseline")
    objective: str = setting("elbo", NAME, "objective of the CVAE")
    alpha: float = setting(0.5, SHARE, "weight of the elbo in the objective hybrid; gsnn has the rest")
    particles: int = setting(1, COUNT, "samples of z per image and step")
    hidden: tuple[int, ...] = setting((500, 500), SIZES, "sizes of the hidden layers")
    latent_dim: int = setting(200, SIZE, "dimensions of z, of all its levels together")
    levels: int = setting(1, whole(1, 64), "levels of z, in the network deep")
    channels: int = setting(32, SIZE, "channels of the convolutions, in the network deep")
    epochs: int = setting(30, COUNT, "largest number of epochs of the CVAE")
    baseline_epochs: int = setting(10, COUNT, "largest number of epochs of the baseline")
    patience: int = setting(3, COUNT, "epochs without improvement on the validation images before training stops")
    batch_size: int = setting(128, COUNT, "images per step, over all processes")
    learning_rate: float = setting(2e-3, POSITIVE, "highest learning rate of AdamW")
    schedule: str = setting("cosine", one_of("cosine", "constant"), "learning rate after the warm-up")
    warmup_epochs: float = setting(1.0, EPOCHS, "epochs in which the learning rate grows to its highest")
    free_epochs: float = setting(0.0, EPOCHS, "first epochs of elbo in which a little KL of each level is free")
    weight_decay: float = setting(0.2, SHARE, "share of the weights, times the rate, taken off in each step")
    clip: float | None = setting(None, POSITIVE, "largest norm of a gradient; larger ones are scaled down")
    bend: float = setting(0.0, SHARE, "share of the CVAE's training images that are bent a little, anew each epoch")
    unbent_epochs: int = setting(0, whole(0), "last epochs of the CVAE, without bent images and at a lower rate")
    average: int = setting(500, whole(0), "steps that the average of the weights spans; 0: none")
    seed: int = setting(0, whole(-(1 << 63), 1 << 63), "random seed")
    data: str | None = setting(None, NAME, "other images: a folder, an .npz file, or a name as fashion-mnist")
    data_root: str | None = setting(None, NAME, "torchvision's folder, not ~/.cache/torchvision or ./data")
    size: int | None = setting(None, whole(2, LARGEST_SIDE), "height and width that pictures are scaled to")
    transpose: bool = setting(False, SWITCH, "swap rows and columns of the images, as EMNIST's files need it")
    targets: str = setting("grey", one_of("grey", "binary", "binary-fixed"), "black or white drawn each epoch, or once")
    train_limit: int | None = setting(None, COUNT, "number of training images to use, the first ones")
    device: str = setting("auto", NAME, "auto, cpu, cuda or cuda:n")
    precision: str = setting("auto", one_of(*PRECISIONS), "products; auto: native bf16, else fp16 (CUDA), fp32 (CPU)")
    # fmt: on

    def __post_init__(self) -> None:
        for each in fields(self):
            kind, value = each.metadata["kind"], getattr(self, each.name)
            if value is None and each.default is None:
                continue
            if type(value) not in ((int, float) if kind.type is float else (kind.type,)) or not kind.is_good(value):
                raise ValueError(f"{flag(each.name)[2:]} has to be {kind.wanted}, not {reprlib.repr(value)}")
            object.__setattr__(self, each.name, kind.type(value))  # a whole number may have become a float
        if self.latent_dim % self.levels:
            raise ValueError(f"latent-dim has to be a multiple of levels, not {self.latent_dim} for {self.levels}")

    def chosen(self, name: str, table: Mapping[str, Item]) -> Item:
        """Return the item of a table that the setting `name` names. Raises ValueError if there is none."""
        value = getattr(self, name)
        if value not in table:
            raise ValueError(f"{name} has to be one of {', '.join(table)}, not {value!r}")
        return table[value]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings that `to_dict` gave; one that is missing, as in older runs, has its default."""
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
        kept.pop("compile", None)  # in runs of older versions, and without an effect on the numbers
        if unknown := kept.keys() - {each.name for each in fields(cls)}:
            raise ValueError(f"this version knows no setting {reprlib.repr(min(unknown))}; was a later one here?")
        return cls(**kept)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The tutorial's training, as close as it comes: Adam without decay, schedule and average, and early stopping.
    "tutorial": {
        "learning_rate": 1e-3, "schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0, "average": 0,
        "epochs": 50, "baseline_epochs": 50,
    },
    "paper": {"network": "paper", "bend": 0.5, "epochs": 45},
    "best": {
        "network": "deep", "hidden": (500, 240), "channels": 32, "latent_dim": 64, "levels": 8, "weight_decay": 0.1,
        "clip": 50.0, "bend": 0.9, "epochs": 44, "unbent_epochs": 4, "free_epochs": 4.0, "patience": 10,
    },
}  # fmt: skip

# Settings that have an effect with one value of another setting alone.
DEEP, ELBO, HYBRID = ("network", "deep"), ("objective", "elbo"), ("objective", "hybrid")
NEEDED = {"levels": DEEP, "channels": DEEP, "free_epochs": ELBO, "alpha": HYBRID}
METAVARS = {"data": "PATH", "data_root": "DIR", "observed": "MASK"}


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a new run: those that are given, and others of the preset among them.

    Where fewer epochs are given than the preset has, the parts of its schedule are shorter in proportion. Raises
    ValueError for a given setting that would do nothing.
    """
    preset = PRESETS[given.get("preset", Settings.preset)]
    settings = {**preset, **given}
    share = min(1.0, settings.get("epochs", 1) / preset.get("epochs", Settings.epochs))
    for name, digits in (("unbent_epochs", None), ("free_epochs", 3)):
        if name in preset and name not in given:
            settings[name] = round(preset[name] * share, digits)
    for name, (other, value) in NEEDED.items():
        if name in given and settings.get(other, getattr(Settings, other)) != value:
            raise ValueError(f"{flag(name)} does nothing without {flag(other)} {value}: leave it out")
    if given.get("unbent_epochs", 0) >= settings.get("epochs", Settings.epochs) > 0:
        raise ValueError("unbent-epochs has to be less than epochs, or no epoch comes before them")
    return settings


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, choices: dict[str, Collection[str]]) -> None:
    """Add the flag of each setting, without a default; choices: The names that some settings choose from."""
    group = parser.add_argument_group("settings")
    for each in fields(Settings):
        kind, default, names = each.metadata["kind"], each.default, choices.get(each.name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
        listed = ", ".join(names or ()) or kind.wanted.partition("one of ")[2]
        words = each.metadata["text"] + (f": {listed}" if listed else "") + f" (default: {shown})"
        more: dict[str, Any] = {"action": "store_true"}
        if kind is not SWITCH:
            parse = int if kind is SIZES else kind.type
            metavar = METAVARS.get(each.name) or {int: "N", float: "X", str: "NAME"}[parse]
            more = {"type": parse, "metavar": metavar, "choices": None if each.name in METAVARS else names}
            more["nargs"] = "+" if kind is SIZES or each.name == "quadrants" else None
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=words, **more)
