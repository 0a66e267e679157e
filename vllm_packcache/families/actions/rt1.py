"""Actions of RLVR-World's multi-step model of the robot data of RT-1: thirteen numbers, each in 256 bins.

Which values a number has is the data's; the published code has their ranges in a file, and a layout says them as
``action_ranges``. Without ranges a client gives bins.

Source: the public code of RLVR-World (order of the numbers, bins, ids). That a value of 0 is rest is not said there.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from vllm_packcache.core.grammar import IdRange
from vllm_packcache.core.shown import shown
from vllm_packcache.families.actions.base import ActionCoding, check_names, is_number

FIRST_ID = 8750
BINS = 256
NUMBERS = {
    "base_displacement_vector": 2,
    "base_displacement_vertical_rotation": 1,
    "gripper_closedness": 1,
    "rotation_delta": 3,
    "terminate_episode": 3,
    "world_vector": 3,
}
"""How many numbers a part of an action has, in the order of their ids."""


def value_bin(value: float, low: float, high: float) -> int:
    """The bin of a value, 0 to 255; values outside the range are in the first or the last one."""
    # So much keeps a range of one value from a division by zero, as published.
    share = (value - low) / (high - low + 1e-8)
    return min(math.floor(BINS * min(max(share, 0.0), 1.0)), BINS - 1)


class RT1(ActionCoding):
    """Of an action such as ``{"world_vector": [0.1, 0, 0], "gripper_closedness": 1}``.

    A part of one number may be given without brackets. With ranges, what is left out is 0. Without, nobody knows the
    bin of 0: all parts must be given, in bins.
    """

    name: ClassVar[str] = "rt1"
    spans: ClassVar[tuple[IdRange, ...]] = (IdRange(FIRST_ID, FIRST_ID + BINS - 1),) * sum(NUMBERS.values())
    dimensions: ClassVar[int] = len(spans)

    def ids(self, action: Mapping[str, Any]) -> list[int]:
        """See `ActionCoding.ids`.

        Raises:
            ValueError: there is no such action, or something is left out and there are no ranges.
        """
        check_names(action, NUMBERS)
        values = [value for name, count in NUMBERS.items() for value in self._part(name, count, action)]
        if self.ranges is None:
            return [FIRST_ID + bin for bin in values]
        return [FIRST_ID + value_bin(value, *own) for value, own in zip(values, self.ranges, strict=True)]

    def _part(self, name: str, count: int, action: Mapping[str, Any]) -> list[Any]:
        if name not in action:
            if self.ranges is None:
                raise ValueError(
                    f"an action must have all of {', '.join(NUMBERS)} where the layout has no action_ranges, and "
                    f"{name} is not given"
                )
            return [0.0] * count
        given = action[name]
        values = given if isinstance(given, list | tuple) else [given]
        plural = "s" * (count > 1)
        if self.ranges is None:
            right = [isinstance(value, int) and is_number(value, 0, BINS - 1) for value in values]
            must = f"{count} whole number{plural} from 0 to {BINS - 1}, the bin{plural}"
        else:
            right = [is_number(value, -sys.float_info.max, sys.float_info.max) for value in values]
            must = f"{count} finite number{plural}"
        if len(values) != count or not all(right):
            raise ValueError(f"{name} must be {must}, not {shown(given)}")
        return list(values)
