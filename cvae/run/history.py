"""What `config.json` keeps of how a run was begun and resumed: versions, revision, hardware, changed settings."""

import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cvae.context import Context
from cvae.settings import Settings

Config = dict[str, Any]


def describe_machine(context: Context, words: Sequence[str]) -> Config:
    """Return what a run's numbers and times may depend on beside its settings; words: the command's arguments."""
    device, count = context.device, context.processes.count
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads(), "processes": count},
        "precision": context.precision,
        "command": ["train.py", *words],
    }


def differences(config: Config, now: Config) -> list[str]:
    """Return what may change the bits of a training: a machine other than the one that a run was on last."""
    last = [config, *config.get("resumed", [])][-1]
    before, here = ({**each.get("device", {}), "torch": each.get("versions", {}).get("torch")} for each in (last, now))
    counted = [name for name in here if (name, here["type"]) != ("threads", "cuda")]
    return [f"{name} {here[name]} in place of {before.get(name)}" for name in counted if here[name] != before.get(name)]


def resumed(config: Config, images: Config, settings: Settings, last: dict[str, Any], machine: Config) -> Config:
    """Return the configuration of a run that goes on from its last checkpoint, {} for none; its beginning stays."""
    before, now = Settings.from_dict(config["settings"]).to_dict(), settings.to_dict()
    record = {
        "phase": last.get("phase", "baseline"),
        "epoch": last["progress"]["epoch"] if last else 0,
        "changed": {name: [before[name], value] for name, value in now.items() if value != before[name]},
        **machine,
    }
    known = {part: recorded for part, recorded in config["images"].items() if recorded is not None}
    history = [*config.get("resumed", []), record]
    return {**config, "settings": now, "images": {**images, **known}, "resumed": history}


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _git_revision() -> str | None:
    """Return the commit of the source, `+` behind it where the source was changed since; None without git."""
    here = str(Path(__file__).resolve().parent)
    git = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None
