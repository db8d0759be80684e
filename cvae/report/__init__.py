"""What shows a trained model to somebody: tables, figures, and commands (`python -m cvae.report.complete`)."""

import sys

from cvae.console import before_torch

if sys.argv[:1] == ["-m"]:  # while Python looks for the command that it is to run
    before_torch()
