"""The settings of a run: every choice that its numbers depend on, one line each, and the flags made of them."""

import argparse
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

Own = TypeVar("Own", bound="Settings")
Item = TypeVar("Item")

LARGEST_LAYER = 1 << 15
MOST_LAYERS = 64
LARGEST_SIDE = 1 << 12
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Kind(NamedTuple):
    """What values a setting can have: how a word on the command line becomes one, which are good, and what is said."""

    parse: Callable[[str], Any]
    is_good: Callable[[Any], bool]
    wanted: str


def whole(least: int, most: int, wanted: str) -> Kind:
    """Whole numbers in a range."""
    return Kind(int, lambda value: type(value) is int and least <= value <= most, wanted)


def number(is_good: Callable[[float], bool], wanted: str) -> Kind:
    """Finite numbers with some property."""
    return Kind(float, lambda value: type(value) is float and abs(value) < float("inf") and is_good(value), wanted)


def one_of(*names: str) -> Kind:
    """One of these names."""
    return Kind(str, lambda value: value in names, f"one of {', '.join(names)}")


def optional(kind: Kind) -> Kind:
    """The values of another kind, and None."""
    return kind._replace(is_good=lambda value: value is None or kind.is_good(value))


def several(kind: Kind, most: int, wanted: str) -> Kind:
    """A tuple of such values."""
    return kind._replace(
        is_good=lambda value: type(value) is tuple and 1 <= len(value) <= most and all(map(kind.is_good, value)),
        wanted=wanted,
    )


COUNT = whole(1, 1 << 31, "a positive whole number")
SIZE = whole(1, LARGEST_LAYER, f"a whole number from 1 to {LARGEST_LAYER}")
SIZES = several(SIZE, MOST_LAYERS, f"1 to {MOST_LAYERS} sizes from 1 to {LARGEST_LAYER}")
SHARE = number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
NAME = Kind(str, lambda value: isinstance(value, str) and len(value) < 10_000, "a name")
FOLDER = NAME._replace(wanted="a folder")
SWITCH = Kind(bool, lambda value: type(value) is bool, "true or false")


def setting(default: Any, kind: Kind, text: str, before: Any = MISSING) -> Any:
    """A setting's default, its kind, its help.

    before: what the runs did that were begun before there was this setting, if that is not the default.
    """
    metadata = {"kind": kind, "text": text, "before": default if before is MISSING else before}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Raises ValueError, in one line, for a value that makes no sense."""

    quadrants: int = setting(1, whole(1, 3, "1, 2 or 3"), "observed quadrants; several numbers make several runs")
    observed: str | None = setting(
        None,
        optional(NAME),
        "what is observed, in place of quadrants: 1, 2, 3, a mask's name, or a picture, white = given",
    )
    preset: str = setting("default", NAME, "group of settings, each of which its own flag overrides")
    network: str = setting("tutorial", NAME, "networks of the CVAE and of its baseline")
    objective: str = setting("elbo", NAME, "objective of the CVAE")
    alpha: float = setting(0.5, SHARE, "weight of the elbo in the hybrid objective; that of gsnn is the rest")
    particles: int = setting(1, COUNT, "samples of z per image and step")
    hidden: tuple[int, ...] = setting((500, 500), SIZES, "sizes of the hidden layers")
    latent_dim: int = setting(200, SIZE, "dimensions of z, of all its levels together")
    levels: int = setting(1, whole(1, 64, "a whole number from 1 to 64"), "levels of z, in the network deep")
    channels: int = setting(32, SIZE, "channels of the convolutions, in the network deep")
    epochs: int = setting(30, COUNT, "largest number of epochs of the CVAE")
    baseline_epochs: int = setting(10, COUNT, "largest number of epochs of the baseline")
    patience: int = setting(3, COUNT, "epochs without improvement on the validation images before training stops")
    batch_size: int = setting(128, COUNT, "images per step, over all processes")
    learning_rate: float = setting(2e-3, number(lambda v: v > 0, "a positive number"), "highest learning rate of AdamW")
    schedule: str = setting(
        "cosine", one_of("cosine", "constant"), "learning rate after the warm-up: cosine or constant"
    )
    warmup_epochs: float = setting(
        1.0,
        number(lambda v: v >= 0, "a number of at least 0"),
        "epochs in which the learning rate grows to its highest",
    )
    free_epochs: float = setting(
        0.0,
        number(lambda v: v >= 0, "a number of at least 0"),
        "first epochs of the CVAE in which a little KL of each level costs nothing, with the objective elbo",
    )
    weight_decay: float = setting(
        0.2, SHARE, "decoupled weight decay: this share of the weights, times the learning rate, is taken off each step"
    )
    clip: float | None = setting(
        None,
        optional(number(lambda v: v > 0, "a positive number")),
        "largest norm of a step's gradient, to which larger ones are scaled down",
    )
    bend: float = setting(
        0.0,
        SHARE,
        "share of the CVAE's training images that are turned, scaled, sheared and bent a little, anew in each epoch",
    )
    unbent_epochs: int = setting(
        0,
        whole(0, 1 << 31, "a whole number of at least 0"),
        "how many of the CVAE's last epochs have no bent image, and a lower rate; early stopping may come first",
    )
    average: int = setting(
        500, whole(0, 1 << 31, "a whole number of at least 0"), "steps that the average of the weights spans; 0: none"
    )
    seed: int = setting(0, whole(-(1 << 63), 1 << 63, "a whole number"), "random seed")
    data: str | None = setting(
        None,
        optional(NAME),
        "images other than MNIST: a folder, an .npz file, or a name as torchvision's fashion-mnist",
    )
    data_root: str | None = setting(
        None, optional(FOLDER), "folder of torchvision's data sets, in place of ~/.cache/torchvision and ./data"
    )
    size: int | None = setting(
        None, optional(whole(2, LARGEST_SIDE, f"a whole number from 2 to {LARGEST_SIDE}")),
        "height and width that pictures are scaled to"
    )  # fmt: skip
    transpose: bool = setting(False, SWITCH, "swap rows and columns of the images, as EMNIST's files need it")
    targets: str = setting(
        "grey",
        one_of("grey", "binary", "binary-fixed"),
        "grey: grey levels; binary: black or white, drawn anew each epoch; binary-fixed: drawn once",
    )
    train_limit: int | None = setting(None, optional(COUNT), "number of training images to use, the first ones")
    device: str = setting("auto", NAME, "auto, cpu, cuda or cuda:n")
    precision: str = setting(
        "auto",
        one_of(*PRECISIONS),
        "fp32, bf16, fp16, or auto: bf16 where it is native, else fp16 on CUDA, fp32 on a CPU",
    )
    compile: bool = setting(False, SWITCH, "torch.compile the objective; seldom worth it on a CPU")

    def __post_init__(self) -> None:
        for each in fields(self):
            kind, value = each.metadata["kind"], getattr(self, each.name)
            if not kind.is_good(value):
                raise ValueError(f"{flag(each.name)[2:]} has to be {kind.wanted}, not {reprlib.repr(value)}")
        if self.latent_dim % self.levels:
            raise ValueError(f"latent-dim has to be a multiple of levels, not {self.latent_dim} for {self.levels}")
        if self.compile and self.objective == "iwae":
            raise ValueError("compile cannot be used with the objective iwae, whose gradient takes two backward passes")

    def chosen(self, name: str, table: Mapping[str, Item]) -> Item:
        """What the setting of this name stands for in a table. Raises ValueError if it is not in it."""
        value = getattr(self, name)
        if value not in table:
            raise ValueError(f"{name} has to be one of {', '.join(table)}, not {value!r}")
        return table[value]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON writes them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[Own], values: object) -> Own:
        """The inverse of `to_dict`; a setting that is missing takes the value that means what the run did.

        Raises ValueError for settings that there are not, and for values that make no sense.
        """
        if not isinstance(values, dict):
            raise ValueError("the settings are missing")
        known = {each.name: each.metadata["before"] for each in fields(cls)}
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"this version knows no setting {reprlib.repr(unknown[0])}; was a later one here?")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{**known, **given})


METAVARS = {"data": "PATH", "data_root": "DIR", "observed": "MASK"}


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, choices: dict[str, Collection[str]]) -> None:
    """Add each setting's flag, with no default: what is not given is not there. choices: of some settings, names."""
    group = parser.add_argument_group("settings")
    for each in fields(Settings):
        kind, default = each.metadata["kind"], each.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
        names = f": {', '.join(choices[each.name])}" if each.name in choices else ""
        words = f"{each.metadata['text']}{names} (default: {shown})"
        more: dict[str, Any] = {"action": "store_true"}
        if kind is not SWITCH:
            many = "+" if each.name == "quadrants" or isinstance(default, tuple) else None
            metavar = METAVARS.get(each.name) or {int: "N", float: "X"}.get(kind.parse, "NAME")
            more = {
                "type": kind.parse,
                "nargs": many,
                "metavar": metavar,
                "choices": None if each.name in METAVARS else choices.get(each.name),
            }
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=words, **more)
