"""The settings of a run: every choice that its numbers depend on, each a flag of `train.py` of the same name."""

import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any

LARGEST_LAYER = 1 << 15
MOST_LAYERS = 64
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Raises ValueError, in one line, for a value that makes no sense."""

    quadrants: int = 1
    device: str = "auto"
    precision: str = "auto"
    epochs: int = 30
    baseline_epochs: int = 10
    patience: int = 3
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    weight_decay: float = 0.2
    average: int = 500
    hidden: tuple[int, ...] = (500, 500)
    latent_dim: int = 200
    particles: int = 1
    seed: int = 0
    data: str | None = None
    train_limit: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON writes them."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: object) -> "Settings":
        """The inverse of `to_dict`. Raises ValueError for anything that `to_dict` cannot have made."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("the settings are not those that this version writes")
        hidden = values["hidden"]
        return cls(**{**values, "hidden": tuple(hidden) if isinstance(hidden, list) else hidden})


def _is_count(value: object, largest: int = 1 << 31) -> bool:
    return type(value) is int and 1 <= value <= largest


def _check(name: str, value: Any) -> None:
    """Raise ValueError unless this value can be had for this setting."""
    match name:
        case "quadrants":
            good, wanted = type(value) is int and value in (1, 2, 3), "1, 2 or 3"
        case "device":
            good, wanted = isinstance(value, str), "a name"
        case "precision":
            good, wanted = value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"
        case "schedule":
            good, wanted = value in SCHEDULES, f"one of {', '.join(SCHEDULES)}"
        case "learning_rate":
            good, wanted = type(value) is float and 0 < value < float("inf"), "a positive number"
        case "average":
            good, wanted = type(value) is int and 0 <= value <= 1 << 31, "a whole number of at least 0"
        case "weight_decay":
            good, wanted = type(value) is float and 0 <= value <= 1, "a number from 0 to 1"
        case "warmup_epochs":
            good, wanted = type(value) is float and 0 <= value < float("inf"), "a number of at least 0"
        case "hidden":
            good = type(value) is tuple and 1 <= len(value) <= MOST_LAYERS
            good = good and all(_is_count(n, LARGEST_LAYER) for n in value)
            wanted = f"1 to {MOST_LAYERS} sizes from 1 to {LARGEST_LAYER}"
        case "latent_dim":
            good, wanted = _is_count(value, LARGEST_LAYER), f"a whole number from 1 to {LARGEST_LAYER}"
        case "seed":
            good, wanted = type(value) is int, "a whole number"
        case "data":
            good, wanted = value is None or isinstance(value, str), "a folder"
        case "train_limit":
            good, wanted = value is None or _is_count(value), "a positive whole number"
        case "compile":
            good, wanted = type(value) is bool, "true or false"
        case _:
            good, wanted = _is_count(value), "a positive whole number"
    if not good:
        raise ValueError(f"{name.replace('_', '-')} has to be {wanted}, not {reprlib.repr(value)}")
