"""The conditional variational autoencoder of Sohn, Lee and Yan (2015) on image quadrants, in plain PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae.run.load import load

__version__ = "0.3.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """What the package offers is imported when it is used: the scripts prepare the process before PyTorch is loaded."""
    if name == "load":
        from cvae.run.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
