"""A video that is played: frame after frame, each from what its client gives, for as long as somebody plays.

A session is one sequence of tokens that grows by **turns**. A turn appends what the client gives (an action) with what
the grammar fixes around it, and then the model makes the tokens of one frame that are its own to choose. So what is
given or fixed between two frames costs no step of its own.

What has left a window for ever need not be counted any more. A session **forgets** old frames: the sequence is the
condition, what outlives the window, and the newest frames. Their keys stay as they are, and everything that is decided
from then on is decided alike. That is exact where the policy says from which frame on it decides alike
(`vllm_packcache.core.policies.base.Policy.settles_at`), where positions are re-based, and where the frames forgotten
are a whole number of blocks.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import gcd

import numpy as np

from vllm_packcache.core.grammar import FrameGrammar, IdRange
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import Plan, Stream, VideoRequest
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.retention import Retention


@dataclass(frozen=True)
class Turns:
    """How a session's sequence grows.

    Args:
        plan: what it keeps.
        grammar: of its frames; None: any id may stand anywhere, and the model chooses all of them.
    """

    plan: Plan
    grammar: FrameGrammar | None = None

    @classmethod
    def of(cls, request: VideoRequest) -> Turns:
        """Of a session whose turns make what ``request`` does: its tokens are counted in its first stream."""
        return cls(request.streams[0].plan, None if request.grammar is None else request.grammar.frame)

    @cached_property
    def _chosen(self) -> list[bool]:
        """Of each place of a frame, whether the model chooses its id."""
        frame = self.plan.layout.tokens_per_frame
        if self.grammar is None:
            return [True] * frame
        given = set(self.grammar.given.tolist())
        return [offset not in given and not self.grammar.range_at(offset).fixed for offset in range(frame)]

    @cached_property
    def picture(self) -> tuple[int, int]:
        """The first and the last place of a frame that the model chooses.

        Raises:
            ValueError: there is none.
        """
        if not any(self._chosen):
            raise ValueError("a layout whose ids are all fixed or given leaves nothing for the model to make")
        return self._chosen.index(True), len(self._chosen) - 1 - self._chosen[::-1].index(True)

    def next_picture(self, tokens: int) -> tuple[int, int, int]:
        """What the model chooses next in a sequence of ``tokens`` tokens.

        Returns:
            The frame, and the tokens ``[start, stop)`` of the sequence that are made in it. Those before ``start`` are
            given or fixed.
        """
        layout, (first, last) = self.plan.layout, self.picture
        frame = max(0, layout.frame_of(tokens))
        if tokens > layout.frame_start(frame) + last:
            frame += 1
        start = layout.frame_start(frame)
        return frame, max(tokens, start + first), start + last + 1

    def between(self, tokens: int) -> list[IdRange]:
        """Which ids may stand at each token from ``tokens`` up to the next one that the model chooses."""
        if self.grammar is None:
            return []
        layout, (_, start, _) = self.plan.layout, self.next_picture(tokens)
        return [
            self.grammar.range_at((token - layout.condition_tokens) % layout.tokens_per_frame)
            for token in range(tokens, start)
        ]

    def needed(self, tokens: int) -> list[IdRange]:
        """Of `between`, those that the client gives."""
        return [allowed for allowed in self.between(tokens) if not allowed.fixed]

    def given(self, tokens: int, ids: Sequence[int]) -> list[int]:
        """Ids from token ``tokens`` up to the next one that the model chooses.

        Args:
            tokens: of the sequence so far.
            ids: one for each of `needed`.

        Raises:
            ValueError: there are too many or too few, or one is outside its range.
        """
        needed = self.needed(tokens)
        if len(ids) != len(needed):
            raise ValueError(f"must have {len(needed)} ids, which the client gives before this frame, not {len(ids)}")
        for number, (allowed, own) in enumerate(zip(needed, ids, strict=True), 1):
            if not allowed.first <= own <= allowed.last:
                raise ValueError(f"must have ids from {allowed.first} to {allowed.last} as number {number}, not {own}")
        own_ids = iter(ids)
        return [allowed.first if allowed.fixed else next(own_ids) for allowed in self.between(tokens)]

    def after(self, frame: int) -> int:
        """Tokens of a sequence that ends when the model has made ``frame``; `CONDITION`: with the condition."""
        layout = self.plan.layout
        return layout.condition_tokens if frame == CONDITION else layout.frame_start(frame) + self.picture[1] + 1

    def pictures(self, ids: Sequence[int], frame: int) -> list[int]:
        """Ids of a frame's visual tokens, row by row, where its grid is known; without, all that the model chose.

        Args:
            ids: of the sequence, in which the frame is finished.
            frame: the frame.
        """
        layout, (first, last) = self.plan.layout, self.picture
        start = layout.frame_start(frame)
        if layout.frame.grid is None:
            return list(ids[start + first : start + last + 1])
        rows, columns = layout.frame.grid
        begin = start + layout.frame.frame_start_tokens
        stride = columns + layout.frame.row_end_tokens
        return [own for row in range(rows) for own in ids[begin + row * stride : begin + row * stride + columns]]


@dataclass(frozen=True)
class Forgetting:
    """How many of its old frames a session may forget, so that nothing of what comes changes.

    Streams of one session have the same frames and keep them by the same rule: `step`, `shortest` and `most` are the
    same in all of them.

    Args:
        plan: what a stream of the session keeps.
        block_size: tokens of a KV-cache block.
    """

    plan: Plan
    block_size: int

    @cached_property
    def step(self) -> int | None:
        """Frames are forgotten in multiples of this; None: none can be.

        Frame k lies in blocks as frame k + step does.
        """
        if self._settled is None:
            return None
        return self.block_size // gcd(self.plan.layout.tokens_per_frame, self.block_size)

    @cached_property
    def _settled(self) -> int | None:
        """The first frame of which nothing depends on how many came before; None: there is none."""
        plan = self.plan
        settled = plan.policy.settles_at
        if settled is None or plan.positions.window is None:
            return None
        # What is dropped may be a part of the condition's last block, which a frame shares.
        return max(settled, plan.positions.window + 1) + -(-self.block_size // plan.layout.tokens_per_frame)

    @property
    def shortest(self) -> int | None:
        """Tokens, with the frame being made, below which a session never needs to grow; None: it grows for ever."""
        if self._settled is None or self.step is None:
            return None
        return self.plan.layout.frame_start(self._settled + self.step + 1)

    def most(self, frame: int, first: int = 0) -> int:
        """How many frames from ``first`` on may be forgotten before a token of ``frame`` + 1 is made, if nothing lives.

        Args:
            frame: is finished or begun.
            first: of those that are forgotten; before it lives what outlives the window.
        """
        if self._settled is None or self.step is None:
            return 0
        # The decision about `frame` follows from that about the one before.
        return max(0, (frame - 1 - self._settled - first) // self.step * self.step)

    def room(self, retentions: Sequence[Retention], frame: int) -> tuple[int, int]:
        """The longest run of frames that may be forgotten before a token of ``frame`` + 1 is made.

        Args:
            retentions: what lives of each stream.
            frame: is finished or begun.

        Returns:
            The first frame, and how many may go: a multiple of `step`, or 0.
        """
        if not self.plan.policy.outlives_window:
            return 0, self.most(frame)
        if self._settled is None or self.step is None:
            return 0, 0
        end = frame - 1 - self._settled
        stay = set[int]().union(*(self._stay(retention, frame, end) for retention in retentions))
        found, first = (0, 0), 0
        for stays in [*sorted(stay), max(end, 0)]:
            room = max(0, stays - first) // self.step * self.step
            if room > found[1]:
                found = first, room
            first = stays + 1
        return found

    def _stay(self, retention: Retention, frame: int, end: int) -> Iterator[int]:
        """Frames before ``end`` that a stream cannot forget while it makes ``frame``."""
        blocks, history = retention.blocks, retention.past(frame)
        tags = blocks.tags(history[history >= blocks.condition_blocks.stop])
        for lives in np.unique(tags[tags < end]).tolist():
            yield lives
            # Its first block may hold tokens of the frame before.
            if lives > 0 and blocks.layout.frame_start(lives) % self.block_size > 0:
                yield lives - 1

    def blocks(self, frames: int, first: int = 0) -> range:
        """Logical blocks that go with ``frames`` frames, a multiple of `step`, from ``first`` on.

        The block that frame ``first`` begins in stays: it has tokens of what lies before.
        """
        tokens = frames * self.plan.layout.tokens_per_frame
        assert tokens % self.block_size == 0, "frames are forgotten in whole blocks"
        begin = -(-self.plan.layout.frame_start(first) // self.block_size)
        return range(begin, begin + tokens // self.block_size)


class Resident:
    """What lives of a session between its turns, in all its streams: as the engine counts it.

    Args:
        streams: of the session's request.
        block_size: tokens of a KV-cache block.
        ids: gives the ids of the session's sequence, without frames that it has forgotten.
    """

    def __init__(self, streams: Sequence[Stream], block_size: int, ids: Callable[[], Sequence[int]]) -> None:
        self._streams, self._ids = streams, ids
        self._forgetting = [Forgetting(stream.plan, block_size) for stream in streams]
        self._retentions = [
            Retention(stream.plan.layout, stream.plan.policy, block_size, partial(self._tokens, stream))
            for stream in streams
        ]

    def _tokens(self, stream: Stream, start: int, stop: int) -> Int64:
        return np.array(stream.ids(self._ids(), start, stop), dtype=np.int64)

    @property
    def step(self) -> int | None:
        """See `Forgetting.step`."""
        return self._forgetting[0].step

    def decide(self, frame: int) -> None:
        """``frame`` is finished; to be called for one frame after the other."""
        for retention in self._retentions:
            retention.past(frame)

    def room(self, frame: int) -> tuple[int, int]:
        """See `Forgetting.room`."""
        return self._forgetting[0].room(self._retentions, frame)

    def forget(self, frames: int, first: int) -> None:
        """``frames`` frames, a multiple of `step`, from ``first`` on are not counted any more."""
        for forgetting, retention in zip(self._forgetting, self._retentions, strict=True):
            retention.forget(frames, forgetting.blocks(frames, first))

    def live_tokens(self, computed: int) -> int:
        """Tokens that the KV cache holds of a session of which so many have been computed."""
        return sum(
            retention.live_tokens(stream.own_tokens(computed))
            for stream, retention in zip(self._streams, self._retentions, strict=True)
        )
