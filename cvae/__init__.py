"""The conditional variational autoencoder of Sohn, Lee and Yan (2015) on image quadrants, in plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae.run.load import load
    from cvae.run.tutorial import load_tutorial

__version__ = "0.3.0"
__all__ = ["load", "load_tutorial"]

_PLACES = {"load": "cvae.run.load", "load_tutorial": "cvae.run.tutorial"}


def __getattr__(name: str) -> Any:
    """What the package offers is imported when it is used: the scripts prepare the process before PyTorch is loaded."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
