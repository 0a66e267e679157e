"""Which ids the tokens of a frame may have, by their place in it.

A model that is trained on frames of one shape writes row ends, headers and actions where they belong most of the time,
and one token too many or too few moves all that follows. So a layout may say, for every place of a frame, which ids may
stand there: any of a range, one that is fixed, or one that the client gives, as an action is.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies.base import Int64

LARGEST_ID = 2**31 - 1
"""As wide as vLLM keeps them."""


class IdRange(NamedTuple):
    """Ids ``first`` to ``last``, both included."""

    first: int
    last: int

    @property
    def fixed(self) -> bool:
        """Whether it is one id."""
        return self.first == self.last


ANY = IdRange(0, LARGEST_ID)


@dataclass(frozen=True)
class FrameIds:
    """What a layout says of the ids of a frame; None: nothing, so that they may be any.

    Args:
        visual: ids of visual tokens.
        frame_start: of each special token before the first row: an id is fixed, of a range the client gives one.
        row_end: the same of those after every row, which are fixed.
        frame_end: the same of those after the last row.
        last_row_end: the end of the last row, where it is another than ``row_end``.
    """

    visual: IdRange | None = None
    frame_start: tuple[int | IdRange, ...] | None = None
    row_end: tuple[int, ...] | None = None
    frame_end: tuple[int | IdRange, ...] | None = None
    last_row_end: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class FrameGrammar:
    """Which ids may stand at each place of a frame.

    Args:
        frame: the shape of a frame, with its grid.
        first: the smallest id, int64 [F].
        last: the largest one, int64 [F].
        given: places whose id the client gives, ascending, int64 [G].
    """

    frame: FrameLayout
    first: Int64
    last: Int64
    given: Int64

    def range_at(self, offset: int) -> IdRange:
        """Which ids may stand at an offset of a frame, 0 .. F - 1."""
        return IdRange(int(self.first[offset]), int(self.last[offset]))

    def check_given(self, ids: Sequence[int]) -> None:
        """Check what a client gives for one frame.

        Args:
            ids: one for each of ``given``, in their order.

        Raises:
            ValueError: there are too many or too few, or one is outside its range.
        """
        if len(ids) != len(self.given):
            raise ValueError(f"must have {len(self.given)} ids for each frame, not {len(ids)}")
        for number, (offset, own) in enumerate(zip(self.given.tolist(), ids, strict=True)):
            allowed = self.range_at(offset)
            if not allowed.first <= own <= allowed.last:
                raise ValueError(
                    f"must have ids from {allowed.first} to {allowed.last} as number {number + 1}, not {own}"
                )


@lru_cache(maxsize=256)
def grammar_of(frame: FrameLayout, ids: FrameIds) -> FrameGrammar:
    """The grammar of frames of a shape.

    Raises:
        ValueError: there is no grid, or ids are said of another number of tokens than there are.
    """
    if frame.grid is None:
        raise ValueError("ids of a frame need grid, not tokens_per_frame alone")
    rows, columns = frame.grid
    first, last = np.full(frame.tokens_per_frame, ANY.first), np.full(frame.tokens_per_frame, ANY.last)
    given: list[int] = []

    def put(offset: int, name: str, tokens: int, own: Sequence[int | IdRange] | None) -> None:
        if own is None:
            return
        if len(own) != tokens:
            counted = f"{name.removeprefix('last_')}_tokens"
            raise ValueError(f"{name}_ids must be of {tokens} tokens, as many as {counted}, not of {len(own)}")
        for place, allowed in enumerate(own, offset):
            first[place], last[place] = (allowed, allowed) if isinstance(allowed, int) else allowed
            if not isinstance(allowed, int):
                given.append(place)

    put(0, "frame_start", frame.frame_start_tokens, ids.frame_start)
    for row in range(rows):
        begin = frame.frame_start_tokens + row * (columns + frame.row_end_tokens)
        if ids.visual is not None:
            first[begin : begin + columns], last[begin : begin + columns] = ids.visual
        put(begin + columns, "row_end", frame.row_end_tokens, ids.row_end)
    put(begin + columns, "last_row_end", frame.row_end_tokens, ids.last_row_end)
    put(frame.tokens_per_frame - frame.frame_end_tokens, "frame_end", frame.frame_end_tokens, ids.frame_end)
    return FrameGrammar(frame, first, last, np.array(given, dtype=np.int64))


@dataclass(frozen=True)
class VideoGrammar:
    """Which ids the tokens of one video may have.

    Args:
        layout: where its frames are.
        frame: of each of them.
        first_frame: the frame that the first of ``given`` is for.
        given: what the client gives: of each frame an id for each of ``frame.given``.
    """

    layout: VideoLayout
    frame: FrameGrammar
    first_frame: int
    given: tuple[tuple[int, ...], ...]

    def allowed(self, token: int) -> IdRange:
        """Which ids the token at an index of the sequence may have; any, where nobody has given what belongs there."""
        frame = self.layout.frame_of(token)
        if frame < 0:
            return ANY
        offset = token - self.layout.frame_start(frame)
        place = int(np.searchsorted(self.frame.given, offset))
        if place < len(self.frame.given) and self.frame.given[place] == offset:
            number = frame - self.first_frame
            if 0 <= number < len(self.given):
                own = self.given[number][place]
                return IdRange(own, own)
        return self.frame.range_at(offset)

    def first_wrong(self, ids: Sequence[int], begin: int = 0) -> int | None:
        """The first token of a sequence that has an id which it may not have; None: there is none.

        Args:
            ids: of the sequence from token ``begin`` on.
            begin: the first of them.
        """
        start = max(begin, self.layout.condition_tokens)
        own = np.array(ids[start - begin :], dtype=np.int64)
        offsets = (start - self.layout.condition_tokens + np.arange(len(own))) % self.layout.tokens_per_frame
        wrong = (own < self.frame.first[offsets]) | (own > self.frame.last[offsets])
        # What a client gives for a frame that the sequence ends in is one id.
        begun = self.layout.frame_start(self.first_frame) - start + self.frame.given
        for token in begun[(begun >= 0) & (begun < len(own))] if self.given else ():
            wrong[token] |= own[token] < self.allowed(start + int(token)).first
            wrong[token] |= own[token] > self.allowed(start + int(token)).last
        return int(start + wrong.argmax()) if wrong.any() else None
