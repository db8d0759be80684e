"""How a run was begun, and each time it was resumed: what `config.json` keeps of it."""

from typing import Any

from cvae.settings import Settings

Config = dict[str, Any]


def resumptions(config: Config) -> list[Config]:
    """The records of the times that the run was resumed, the last one at the end."""
    found = config.get("resumed")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def last_machine(config: Config) -> Config:
    """What the run was trained on last, as `describe_machine` gave it."""
    return [config, *resumptions(config)][-1]


def changes(config: Config, settings: Settings) -> dict[str, list[Any]]:
    """The settings that are others now than they were, by name: each as it was and as it is."""
    before = Settings.from_dict(config["settings"]).to_dict()
    return {name: [before[name], value] for name, value in settings.to_dict().items() if value != before[name]}


def resumed(config: Config, settings: Settings, last: dict[str, Any], machine: Config) -> Config:
    """The configuration of a run that goes on from its last checkpoint, {} for none: how it was begun stays in it.

    machine: as `describe_machine` gives it.
    """
    where = {"phase": last.get("phase", "baseline"), "epoch": last.get("progress", {}).get("epoch", 0)}
    record = {**where, "changed": changes(config, settings), **machine}
    return {**config, "settings": settings.to_dict(), "resumed": [*resumptions(config), record]}
