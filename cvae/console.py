"""The installed commands: `cvae-train` and `cvae-eval`, which are the scripts as `pip install` has them in the package
`cvae_commands`, and those of modules.
"""

from importlib import import_module

from cvae.startup import before_torch


def train() -> int:
    """`train.py`; returns the exit code."""
    return _main("cvae_commands.train")


def evaluate() -> int:
    """`eval.py`; returns the exit code."""
    return _main("cvae_commands.eval")


def complete() -> int:
    """`python -m cvae.report.complete`; returns the exit code."""
    return _main("cvae.report.complete")


def page() -> int:
    """`python -m cvae.report.page`; returns the exit code."""
    return _main("cvae.report.page")


def _main(module: str) -> int:
    before_torch()
    code: int = import_module(module).main()
    return code
