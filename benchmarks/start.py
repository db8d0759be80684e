"""What comes before PyTorch is loaded: a benchmark begins as `train.py` does, so that its threads wait as those do."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code of this checkout, installed or not

GIVEN = dict(os.environ)  # the environment as the user has it; before_torch adds to it

from cvae.console import before_torch  # noqa: E402

__all__ = ["GIVEN", "ROOT", "before_torch"]
