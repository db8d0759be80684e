"""The machine that a training is on, as `config.json` keeps it: versions, revision, hardware."""

import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cvae.context import Context


def describe_machine(context: Context, words: Sequence[str]) -> dict[str, Any]:
    """Return what a run's numbers and times may depend on beside its settings; words: the command's arguments."""
    device, count, revision = context.device, context.processes.count, None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):  # there may be no git, or no repository
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return {
        "git_revision": revision,  # `+` behind it where the source was changed since
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads(), "processes": count},
        "precision": context.precision,
        "command": ["train.py", *words],
    }


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
