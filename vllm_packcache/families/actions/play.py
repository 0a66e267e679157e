"""Actions of the bundled world to play: where to go, whether to jump, and what to leave behind.

All of an action is one id::

    130 + ((left 0, stay 1, right 2) x 2 + jump) x 4 + (nothing 0, gem 1, flower 2, lantern 3)

The demo's world, which knows these ids too, is held against this by the test suite.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm_packcache.core.grammar import IdRange
from vllm_packcache.core.shown import shown
from vllm_packcache.families.actions.base import ActionCoding, check_names

FIRST_ID = 130
MOVES = ("left", "", "right")
DROPS = ("", "gem", "flower", "lantern")


class Play(ActionCoding):
    """Of an action such as ``{"move": "right", "jump": 1, "drop": "gem"}``."""

    name: ClassVar[str] = "play"
    spans: ClassVar[tuple[IdRange, ...]] = (IdRange(FIRST_ID, FIRST_ID + len(MOVES) * 2 * len(DROPS) - 1),)

    def ids(self, action: Mapping[str, Any]) -> list[int]:
        """See `ActionCoding.ids`."""
        check_names(action, ("move", "jump", "drop"))
        move, drop = (self._one_of(name, words, action) for name, words in (("move", MOVES), ("drop", DROPS)))
        jump = action.get("jump", 0)
        if not isinstance(jump, int) or jump not in (0, 1):
            raise ValueError(f"jump must be true or 1, false or 0 else, not {shown(jump)}")
        return [FIRST_ID + (move * 2 + jump) * len(DROPS) + drop]

    @staticmethod
    def _one_of(name: str, words: tuple[str, ...], action: Mapping[str, Any]) -> int:
        word = action.get(name, "")
        # What a client sends may be what no tuple can be searched for.
        if not isinstance(word, str) or word not in words:
            raise ValueError(f"{name} must be {', '.join(filter(None, words))}, or left out, not {shown(word)}")
        return words.index(word)
