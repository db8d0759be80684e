"""The conditional variational autoencoder of Sohn, Lee and Yan (2015) on image quadrants, in plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cvae.settings import VERSION as __version__

if TYPE_CHECKING:
    from cvae.data.pictures import as_digit
    from cvae.report.figures import show
    from cvae.run.load import load, load_tutorial

__all__ = ["__version__", "as_digit", "load", "load_tutorial", "show"]

_ROOMS = {"as_digit": "data.pictures", "load": "run.load", "load_tutorial": "run.load", "show": "report.figures"}


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is used: the scripts prepare the process before PyTorch is loaded."""
    if name in _ROOMS:
        return getattr(import_module(f"cvae.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
