"""Old place of `active_units`, for rooms that are not moved yet."""

from cvae.model.likelihood import LEAST_VARIANCE, active_units

__all__ = ["LEAST_VARIANCE", "active_units"]
