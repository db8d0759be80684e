"""Old names of `tasks.py`, for rooms that are not moved yet."""

from torch import Tensor

from cvae.data.tasks import MASKS, described, is_picture, mask_name, quadrants
from cvae.data.tasks import FixedMask as Split
from cvae.data.tasks import make_task as make_split
from cvae.settings import Settings

__all__ = ["MASKS", "Split", "described", "is_picture", "make_split", "mask", "mask_name", "quadrants"]


def mask(s: Settings, height: int, width: int) -> Tensor:
    return quadrants(s.quadrants, height, width)
