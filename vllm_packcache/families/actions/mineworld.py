"""Actions of MineWorld: keys, the hotbar and the camera of Minecraft.

The block of 11 ids that follows a frame is::

    act_bos, pitch, yaw, hotbar, forward|back, left|right, sprint|sneak, use|attack, jump, drop|pickItem, act_eos

The first and the last one are fixed ids of the layout; the nine between them are made here. Where nothing is pressed,
and where both of a pair are, stands ``null_act``. A camera that rests is its middle bin.

Source: arXiv 2504.08388, and the public code (order of ids and of the block, camera).

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from vllm_packcache.core.grammar import IdRange
from vllm_packcache.core.shown import shown
from vllm_packcache.families.actions.base import ActionCoding, check_names, is_number

FIRST_BUTTON = 8192
BUTTONS = (
    "use", "attack", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop", "swapHands", "pickItem",
    "inventory", "ESC",
)  # fmt: skip
"""In the order of their ids."""
FIRST_HOTBAR = 8206
HOTBARS = 9
FIRST_PITCH = 8215
FIRST_YAW = 8236
NULL_ACT = 8258

SLOTS = (
    ("forward", "back"),
    ("left", "right"),
    ("sprint", "sneak"),
    ("use", "attack"),
    ("jump",),
    ("drop", "pickItem"),
)
"""Buttons that share a place, in the order of their places."""

MOST_DEGREES = 90
DEGREES_PER_BIN = 9
"""On average: bins are narrow about the middle and wide at the ends."""
MU = 11.4887
MIDDLE_BIN = MOST_DEGREES // DEGREES_PER_BIN
BINS = 2 * MIDDLE_BIN + 1

_IDS = {name: id for id, name in enumerate(BUTTONS, FIRST_BUTTON)}
_IN_A_SLOT = [name for slot in SLOTS for name in slot]
_KNOWN = ("camera", "hotbar", *_IN_A_SLOT)


def _spans() -> tuple[IdRange, ...]:
    camera = [IdRange(first, first + BINS - 1) for first in (FIRST_PITCH, FIRST_YAW)]
    # A range that holds the ids of a pair and null_act holds others too: the coding makes none of those.
    firsts = [FIRST_HOTBAR, *(min(_IDS[name] for name in slot) for slot in SLOTS)]
    return (*camera, *(IdRange(first, NULL_ACT) for first in firsts))


def camera_bin(degrees: float) -> int:
    """The bin of a turn of the camera: its mu-law, so that small turns are told apart best.

    Args:
        degrees: -90 to 90 in a frame.

    Returns:
        0 to 20; 10 is no turn.
    """
    share = math.log1p(MU * abs(degrees) / MOST_DEGREES) / math.log1p(MU)
    return MIDDLE_BIN + round(math.copysign(share, degrees) * MOST_DEGREES / DEGREES_PER_BIN)


class MineWorld(ActionCoding):
    """Of an action such as ``{"forward": 1, "camera": [0, 12], "hotbar": 3}``.

    Buttons are true or 1 where they are pressed. ``camera`` is pitch and yaw in degrees, downwards and to the right;
    ``hotbar`` is a slot, 1 to 9.
    """

    name: ClassVar[str] = "mineworld"
    spans: ClassVar[tuple[IdRange, ...]] = _spans()

    def ids(self, action: Mapping[str, Any]) -> list[int]:
        """See `ActionCoding.ids`."""
        for name in action:
            if name in BUTTONS and name not in _IN_A_SLOT:
                raise ValueError(f"an action of MineWorld must leave {name} out: it has an id, but no place in a frame")
        check_names(action, _KNOWN)
        for name in _IN_A_SLOT:
            pressed = action.get(name, 0)
            if not isinstance(pressed, int) or pressed not in (0, 1):
                raise ValueError(f"{name} must be true or 1 where it is pressed, false or 0 else, not {shown(pressed)}")
        pitch, yaw = self._camera(action.get("camera", (0, 0)))
        return [
            FIRST_PITCH + pitch,
            FIRST_YAW + yaw,
            self._hotbar(action),
            *(self._slot([name for name in slot if action.get(name)]) for slot in SLOTS),
        ]

    @staticmethod
    def _camera(turn: object) -> tuple[int, int]:
        if (
            not isinstance(turn, list | tuple)
            or len(turn) != 2
            or not all(is_number(degrees, -MOST_DEGREES, MOST_DEGREES) for degrees in turn)
        ):
            raise ValueError(
                f"camera must be [pitch, yaw], two numbers of degrees from -{MOST_DEGREES} to {MOST_DEGREES}, not "
                f"{shown(turn)}"
            )
        return camera_bin(turn[0]), camera_bin(turn[1])

    @staticmethod
    def _hotbar(action: Mapping[str, Any]) -> int:
        if "hotbar" not in action:
            return NULL_ACT
        slot = action["hotbar"]
        if not isinstance(slot, int) or not is_number(slot, 1, HOTBARS):
            raise ValueError(f"hotbar must be a slot, a whole number from 1 to {HOTBARS}, not {shown(slot)}")
        return FIRST_HOTBAR + slot - 1

    @staticmethod
    def _slot(pressed: list[str]) -> int:
        # Both of a pair undo each other.
        return _IDS[pressed[0]] if len(pressed) == 1 else NULL_ACT
