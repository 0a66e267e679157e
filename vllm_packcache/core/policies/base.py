"""What a cache policy is.

A new policy is one file with one frozen dataclass: its fields are its options (they are validated and named
in errors without further work), its `Policy.past_blocks` is its rule.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.shown import shown

Int64 = npt.NDArray[np.int64]

Tokens = Callable[[int, int], Int64]
"""``tokens(start, stop)``: ids of a sequence's tokens ``[start, stop)``, which are finished: none of them changes."""


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Decides which blocks of the past live while a frame is made."""

    name: ClassVar[str]
    """What a built-in policy is called; that of another package has the name of its entry point."""
    rebases: ClassVar[bool] = False
    """Whether positions are re-based where nobody says (see `history_window`)."""
    # Options are numbers as written: "4" and true are no windows.
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    @abstractmethod
    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Live blocks before the first block of ``frame``.

        Must be a pure function, cost no more than the blocks it can keep, and never return a block that it
        did not return for an earlier frame: an evicted block cannot come back.

        Args:
            blocks: tags of the request's logical blocks.
            frame: the frame being made, 0 or more.

        Returns:
            Ascending logical block indices, all below ``blocks.tail_start(frame)``. `Retention` checks them.
        """

    @property
    def reads_tokens(self) -> bool:
        """Whether what is kept depends on the tokens of finished frames: then `past_blocks_of` decides."""
        return False

    def past_blocks_of(self, blocks: BlockMap, frame: int, before: BlockIndices, tokens: Tokens) -> BlockIndices:
        """The same as `past_blocks`, of a video whose tokens are known; asked about one frame after the other.

        How many blocks it returns must not depend on the tokens: lengths are planned, and requests admitted, without.

        Args:
            blocks: tags of the request's logical blocks.
            frame: the frame being made, 0 or more.
            before: what it returned for the frame before; nothing for frame 0.
            tokens: ids of the tokens before ``frame``.
        """
        del before, tokens
        return self.past_blocks(blocks, frame)

    def most_past_blocks(self, blocks: BlockMap) -> int | None:
        """A number of blocks that `past_blocks` never exceeds, whatever the frame, in constant time.

        None: it grows with the video, or nobody has said.
        """
        del blocks
        return None

    @property
    def history_window(self) -> int | None:
        """W: nothing of a frame older than the W last ones lives. None: there is no such number.

        Only where there is one can positions be re-based: what lives then lies in a window that slides.
        """
        return None

    @property
    def outlives_window(self) -> bool:
        """Whether blocks of older frames than those of `history_window` may live all the same.

        Where positions are re-based, they stay at the place that the oldest frame of the window has.
        """
        return False

    @property
    def settles_at(self) -> int | None:
        """The frame from which on it decides alike, wherever the video began; None: it never does, or nobody has said.

        What it keeps for a later frame n + p is what it keeps for n, all of it p frames on, where p frames are a whole
        number of blocks, and their tokens are the same. What outlives the window stays where it is, and what lay
        between it and the window does not matter. Only such a video can be played without end.
        """
        return None

    @property
    def begins_anew(self) -> tuple[int, int] | None:
        """With how many frames a session begins anew, and with how many of the last; None: not before it must."""
        return None

    def check(self, frame: FrameLayout) -> None:
        """Check the options against the shape of a frame.

        Raises:
            ValueError: they cannot work together; the message names the option and the remedy.
        """
        del frame


def whole_frames(blocks: BlockMap, frame: int, oldest: int) -> BlockIndices:
    """The condition, and the blocks tagged with a frame from ``oldest`` on, before the first block of ``frame``."""
    end = blocks.tail_start(frame)
    condition = np.arange(min(blocks.condition_blocks.stop, end))
    return np.concatenate([condition, np.arange(min(blocks.frame_blocks(oldest).start, end), end)])


def check_class(policy: type[Policy], reserved: Collection[str]) -> None:
    """Check what can be known of a policy without asking it for a decision.

    Args:
        policy: its class.
        reserved: names that its options cannot have, because they are options already.

    Raises:
        TypeError: it is none whose options could be validated and compared; the message says what must be.
    """
    name = f"{policy.__module__}.{policy.__qualname__}"
    if inspect.isabstract(policy):
        raise TypeError(f"{name} has no {', '.join(sorted(policy.__abstractmethods__))}")
    # A class that only inherits from a dataclass has none of its own options.
    if "__dataclass_params__" not in vars(policy) or not vars(policy)["__dataclass_params__"].eq:
        raise TypeError(f"{name} must be a frozen dataclass: decorate it with @dataclass(frozen=True, kw_only=True)")
    try:
        hints = get_type_hints(policy)
    except Exception as error:
        raise TypeError(f"{name}: the types of its options cannot be read: {error}") from None
    for option in fields(policy):
        if hints[option.name] in (Any, object):
            raise TypeError(f"{name}: option {option.name} needs a type, so that what is given can be validated")
        if option.name in reserved:
            raise TypeError(f"{name}: option {option.name} needs another name, which is no option already")


def check_range(option: str, value: float, low: float, high: float | None = None, *, open_low: bool = False) -> None:
    """Raise a `ValueError` that names ``option`` unless low <= value <= high (low < value if ``open_low``)."""
    too_low = value <= low if open_low else value < low
    no_number = isinstance(value, float) and not math.isfinite(value)
    if too_low or (high is not None and value > high) or no_number:
        bound = f"above {low:g}" if open_low else f"{low:g} or more"
        if high is not None:
            bound += f" and at most {high:.15g}"
        raise ValueError(f"{option} must be {bound}, not {shown(value)}")
