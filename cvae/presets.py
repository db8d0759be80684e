"""Presets: names for groups of settings, each of which a flag of its own overrides."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The tutorial's training, as close as it comes: Adam without decay, schedule and average, and early stopping.
    "tutorial": {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "weight_decay": 0.0,
        "average": 0,
        "epochs": 50,
        "baseline_epochs": 50,
    },
    "paper": {"network": "paper", "bend": 0.5, "epochs": 45},
    "best": {
        "network": "deep",
        "hidden": (500, 240),
        "channels": 32,
        "latent_dim": 64,
        "levels": 8,
        "weight_decay": 0.1,
        "clip": 50.0,
        "bend": 0.9,
        "epochs": 44,
        "unbent_epochs": 4,
        "free_epochs": 4.0,
        "patience": 10,
    },
}
