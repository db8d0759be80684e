"""The commands of the installed package, `cvae-train` and `cvae-eval`: the scripts, in a process of their own."""

from importlib import import_module

from cvae.startup import before_torch


def train() -> int:
    """`train.py`; returns the exit code."""
    return _main("train")


def evaluate() -> int:
    """`eval.py`; returns the exit code."""
    return _main("eval")


def _main(script: str) -> int:
    before_torch()
    code: int = import_module(f"{__package__}.{script}").main()
    return code
