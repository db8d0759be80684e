"""What identifies images, as `config.json` records it."""

import hashlib
from typing import Any

from torch import Tensor


def record(**parts: Tensor | None) -> dict[str, Any]:
    """What identifies images: see `sources.TrainImages`."""
    sides = next(part.shape[1:] for part in parts.values() if part is not None)
    found = {
        name: None
        if part is None
        else {"count": len(part), "sha256": hashlib.sha256(part.contiguous().numpy().data).hexdigest()}
        for name, part in parts.items()
    }
    return {"height": sides[0], "width": sides[1], **found}


def difference(recorded: dict[str, Any], found: dict[str, Any]) -> str | None:
    """In what the images that were found differ from the recorded ones, in the parts that both have; None: in nothing.

    Raises KeyError, TypeError or AttributeError for a record that is none.
    """
    sizes = [f"{each['height']}×{each['width']}" for each in (recorded, found)]
    if sizes[0] != sizes[1]:
        return f"images of {sizes[0]} pixels, and these have {sizes[1]}"
    for part in ("train", "validation", "test"):
        before, now = recorded.get(part), found.get(part)
        if before is None or now is None or before == now:
            continue
        if before["count"] != now["count"]:
            return f"{before['count']} {part} images, and here are {now['count']}"
        return f"other {part} images of the same number and size (their SHA-256 differs)"
    return None
