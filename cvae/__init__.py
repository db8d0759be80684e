"""The conditional variational autoencoder of Sohn, Lee and Yan (2015) on image quadrants, in plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae.data.digits import as_digit
    from cvae.report.figures import show
    from cvae.run.load import load
    from cvae.run.tutorial import load_tutorial

__version__ = "0.3.0"
__all__ = ["as_digit", "load", "load_tutorial", "show"]

_PLACES = {
    "as_digit": "cvae.data.digits",
    "load": "cvae.run.load",
    "load_tutorial": "cvae.run.tutorial",
    "show": "cvae.report.figures",
}


def __getattr__(name: str) -> Any:
    """What the package offers is imported when it is used: the scripts prepare the process before PyTorch is loaded."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
