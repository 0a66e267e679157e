"""Which KV-cache blocks of a request live: the one truth, shared by scheduler and worker.

Retention is a pure function of (layout, policy, number of computed tokens). Scheduler and worker evaluate it
each for itself and exchange no messages; a preempted request that is recomputed replays the same decisions.

What a query may read is constant inside a frame: the blocks its policy kept of everything before the frame
(`Retention.past`), and everything from the first block of the frame on (`BlockMap.tail_start`).

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_packcache.layout import CONDITION, VideoLayout

if TYPE_CHECKING:
    from vllm_packcache.policies.base import Policy

BlockIndices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Tags of a request's logical blocks: condition, or frame k.

    A block has the tag of the newest token it holds, except that a block with any condition token is
    condition.

    Args:
        layout: the video.
        block_size: tokens of a KV-cache block.
    """

    layout: VideoLayout
    block_size: int

    @property
    def condition_blocks(self) -> range:
        """Logical blocks tagged condition."""
        return range(-(-self.layout.condition_tokens // self.block_size))

    @property
    def text_blocks(self) -> range:
        """The condition blocks that hold text only."""
        text_tokens = self.layout.condition_tokens - self.layout.condition_image_tokens
        if self.layout.condition_image_tokens == 0:
            return self.condition_blocks
        return range(text_tokens // self.block_size)

    @property
    def image_blocks(self) -> range:
        """The condition blocks that hold any token of the conditioning image."""
        return range(self.text_blocks.stop, self.condition_blocks.stop)

    def frame_blocks(self, frame: int) -> range:
        """Logical blocks tagged ``frame``. Empty where frames are shorter than a block."""
        first = self.layout.frame_start(frame) // self.block_size
        last = self.layout.frame_start(frame + 1) // self.block_size
        return range(max(first, self.condition_blocks.stop), max(last, self.condition_blocks.stop))

    def tag(self, block: int) -> int:
        """The frame whose tag ``block`` has, or `CONDITION`."""
        if block in self.condition_blocks:
            return CONDITION
        return self.layout.frame_of((block + 1) * self.block_size - 1)

    def tail_start(self, frame: int) -> int:
        """The first block that holds a token of ``frame``; it and all later ones live while ``frame`` is made."""
        return self.layout.frame_start(frame) // self.block_size


class LiveSegment(NamedTuple):
    """The queries ``[start, stop)`` of one frame and the blocks they read.

    They read the blocks ``past`` in full (ascending logical indices), then the blocks from ``tail_start`` on
    up to token ``stop``, causally.
    """

    frame: int
    start: int
    stop: int
    past: BlockIndices
    tail_start: int

    def live_tokens(self, block_size: int) -> int:
        """Tokens that the last query of the segment reads."""
        return len(self.past) * block_size + self.stop - self.tail_start * block_size


class Retention:
    """What one request keeps: the policy applied to its layout.

    Time and memory of every method are bounded by the blocks of the condition and of the frames that the
    policy can keep (and by the tokens asked about), never by the length of the video.

    Args:
        layout: the video.
        policy: what to keep.
        block_size: tokens of a KV-cache block.
    """

    __slots__ = ("_past", "_past_frame", "blocks", "layout", "policy")

    def __init__(self, layout: VideoLayout, policy: Policy, block_size: int) -> None:
        self.layout = layout
        self.policy = policy
        self.blocks = BlockMap(layout, block_size)
        # A request works on one frame for many steps: remember the decision for that frame only.
        self._past_frame = CONDITION
        self._past: BlockIndices = np.empty(0, dtype=np.int64)

    @property
    def block_size(self) -> int:
        """Tokens of a KV-cache block."""
        return self.blocks.block_size

    def past(self, frame: int) -> BlockIndices:
        """Live blocks before ``tail_start(frame)`` while ``frame`` is made, ascending logical indices."""
        if frame != self._past_frame:
            self._past = self.policy.past_blocks(self.blocks, frame)
            self._past.flags.writeable = False
            self._past_frame = frame
        return self._past

    def history_blocks(self, frame: int) -> BlockIndices:
        """Live blocks with tokens of earlier frames while ``frame`` is made, without the condition's, ascending.

        The last of them may be the block that ``frame`` begins in.
        """
        past = self.past(frame)
        history = past[past >= self.blocks.condition_blocks.stop]
        tail_start = self.blocks.tail_start(frame)
        shared = self.layout.frame_start(frame) % self.block_size != 0
        if shared and tail_start not in self.blocks.condition_blocks:
            history = np.append(history, tail_start)
        return history

    def most_blocks(self, ahead: int = 0) -> int | None:
        """Blocks that the request holds at most, however long it grows; None: as many as its length takes.

        That is the condition, or what is kept of the past besides the frame being made, whichever is more.

        Args:
            ahead: tokens of the next frame that may be computed while blocks of the past are still held: a step is
                scheduled before the one in flight has been processed.
        """
        past = self.policy.most_past_blocks(self.blocks)
        if past is None:
            return None
        # A frame begins anywhere in a block.
        making = -(-(self.block_size - 1 + self.layout.tokens_per_frame + ahead) // self.block_size)
        return max(-(-(self.layout.condition_tokens + ahead) // self.block_size), past + making)

    def segments(self, start: int, stop: int) -> Iterator[LiveSegment]:
        """What the queries ``[start, stop)`` read, one item a frame."""
        for frame, first, last in self.layout.segments(start, stop):
            if frame == CONDITION:
                yield LiveSegment(frame, first, last, np.empty(0, dtype=np.int64), 0)
            else:
                yield LiveSegment(frame, first, last, self.past(frame), self.blocks.tail_start(frame))

    def live_blocks(self, num_computed_tokens: int) -> BlockIndices:
        """Logical blocks that live when ``num_computed_tokens`` tokens have been computed, ascending.

        The next token decides: at a frame's end its successor's decisions already hold.
        """
        frame = self.layout.frame_of(num_computed_tokens)
        end = -(-num_computed_tokens // self.block_size)
        if frame == CONDITION:
            return np.arange(end)
        return np.concatenate([self.past(frame), np.arange(self.blocks.tail_start(frame), end)])

    def live_tokens(self, num_computed_tokens: int) -> int:
        """Tokens held by `live_blocks`: computed ones only."""
        if num_computed_tokens == 0:
            return 0
        live = self.live_blocks(num_computed_tokens)
        return len(live) * self.block_size - (-num_computed_tokens % self.block_size)

    def dropped_blocks(self, from_frame: int, to_frame: int) -> BlockIndices:
        """Logical blocks that live while ``from_frame`` is made and no longer while ``to_frame`` is, ascending.

        Blocks of the frames between the two count as living before. Costs time for those frames, each of
        which is asked about once in a request's life.
        """
        if to_frame <= from_frame:
            return np.empty(0, dtype=np.int64)
        before = np.empty(0, dtype=np.int64) if from_frame == CONDITION else self.past(from_frame)
        added = np.arange(self.blocks.tail_start(from_frame), self.blocks.tail_start(to_frame))
        return np.setdiff1d(np.concatenate([before, added]), self.past(to_frame), assume_unique=True)
