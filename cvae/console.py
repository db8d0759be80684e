"""The commands `cvae-train` and `cvae-eval`: the scripts, as `pip install` has them in the package `cvae_commands`."""

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
    code: int = import_module(f"cvae_commands.{script}").main()
    return code
