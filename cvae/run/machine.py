"""What a run's numbers and times may depend on beside its settings: versions, revision, hardware."""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cvae import context


def describe_machine(device: torch.device, precision: str, processes: int, words: Sequence[str]) -> dict[str, Any]:
    """What `config.json` says of it, and the command. words: of the command, without the script."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads(), "processes": processes},
        "precision": precision,
        "command": ["train.py", *words],
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two machines, as `describe_machine` gives them, that may change the bits of a training."""
    (old, new), (old_versions, new_versions) = (
        [value if isinstance(value := each.get(part), dict) else {} for each in (before, now)]
        for part in ("device", "versions")
    )
    found = []
    if (old.get("type"), old.get("name")) != (new["type"], new["name"]):
        found.append(f"{new['type']} ({new['name']}) in place of {old.get('type')} ({old.get('name')})")
        if not _is_native(now["precision"], new["type"]):
            found.append(f"{now['precision']} by slow emulation")
    if new_versions["torch"] != old_versions.get("torch"):
        found.append(f"PyTorch {new_versions['torch']} in place of {old_versions.get('torch')}")
    for count in ("threads", "processes"):
        if new[count] != old.get(count) and (count == "processes" or new["type"] == "cpu"):
            found.append(f"{new[count]} {count} in place of {old.get(count)}")
    return found


def _is_native(precision: str, device_type: str) -> bool:
    """Whether this machine computes products in a precision, and does not emulate it."""
    if precision == "fp32" or (precision, device_type) == ("fp16", "cuda"):
        return True
    return context.resolve_precision("auto", torch.device(device_type)) == precision


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_revision() -> str | None:
    """The commit of the source, `+` behind it where the source was changed since; None without git."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
