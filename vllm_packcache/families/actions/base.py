"""What a coding of actions is: how what a client does in a frame becomes the ids that a layout leaves to it.

A new coding is one file with one class, and its name in the registry.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from vllm_packcache.core.grammar import FrameGrammar, IdRange
from vllm_packcache.core.shown import named

Ranges = tuple[tuple[float, float], ...]
"""The smallest and the largest value of each number of an action, in the client's units."""


class ActionCoding(ABC):
    """How the actions of one model are coded. It has no state but its ranges.

    Args:
        ranges: of each number of an action, `dimensions` pairs; None: none are known.

    Raises:
        ValueError: there are too many or too few, or one is upside down.
    """

    name: ClassVar[str]
    """By which a layout asks for it."""
    spans: ClassVar[tuple[IdRange, ...]]
    """Of each id of a frame, in their order, the smallest and the largest that it may be."""
    dimensions: ClassVar[int] = 0
    """Numbers of an action that ranges are given of; 0: it has no use for ranges."""

    def __init__(self, ranges: Ranges | None = None) -> None:
        if ranges is not None and not self.dimensions:
            raise ValueError(f"action_ranges must be left out: {self.name} has its own units")
        if ranges is not None and len(ranges) != self.dimensions:
            raise ValueError(
                f"action_ranges must be {self.dimensions} pairs, one for each number of an action of {self.name}, not "
                f"{len(ranges)}"
            )
        for number, (low, high) in enumerate(ranges or (), 1):
            if low > high:
                raise ValueError(
                    f"action_ranges: pair {number} must be the smallest and the largest value, not {[low, high]}"
                )
        self.ranges = ranges

    @property
    def ids_per_frame(self) -> int:
        """How many ids an action is, as many as the layout leaves to a client in each frame."""
        return len(self.spans)

    @abstractmethod
    def ids(self, action: Mapping[str, Any]) -> list[int]:
        """The ids of the action that is taken in one frame.

        Args:
            action: what is done, by name, as JSON has it. What is left out is not done: the empty one does nothing.

        Returns:
            [ids_per_frame], for the places that the layout leaves to a client, in their order.

        Raises:
            ValueError: there is no such action; one sentence says what must be and what was given.
        """

    def check(self, grammar: FrameGrammar | None) -> None:
        """Check that frames have a place for every id of an action.

        Args:
            grammar: of the layout; None: it says nothing of ids.

        Raises:
            ValueError: they have not.
        """
        given: Sequence[int] = () if grammar is None else grammar.given.tolist()
        if len(given) != len(self.spans):
            raise ValueError(
                f"actions: {self.name} makes {len(self.spans)} ids for each frame, and the layout must leave as many "
                f"to a client, as ranges in frame_start_ids and frame_end_ids, not {len(given)}"
            )
        assert grammar is not None
        for number, (place, span) in enumerate(zip(given, self.spans, strict=True), 1):
            allowed = grammar.range_at(place)
            if not (allowed.first <= span.first and span.last <= allowed.last):
                raise ValueError(
                    f"actions: range {number} of what the layout leaves to a client must hold the ids of {self.name} "
                    f"there, {list(span)}, and it is {list(allowed)}"
                )


def check_names(action: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that an action is made of what is known.

    Raises:
        ValueError: it is not.
    """
    for name in action:
        if name not in known:
            raise ValueError(f"an action must be made of {', '.join(known)}, not of {named(str(name))}")


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number from ``low`` to ``high``; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
