"""Sliding window over frames, the baseline of the PackCache paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import MAX_FRAMES
from vllm_packcache.core.policies.base import Policy, check_range


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Policy):
    """Keep the condition and the last ``window`` frames whole.

    Args:
        window: n, whole frames of history.

    Raises:
        ValueError: ``window`` is below 1 or above `MAX_FRAMES`.
    """

    name: ClassVar[str] = "sliding_window"
    window: int = 2

    def __post_init__(self) -> None:
        check_range("window", self.window, 1, MAX_FRAMES)

    @property
    def history_window(self) -> int:
        """W."""
        return self.window

    @property
    def settles_at(self) -> int:
        """Where the window is full."""
        return self.window

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """Condition blocks, and those that end in one of n frames in a row."""
        frames = self.window * blocks.layout.tokens_per_frame
        return len(blocks.condition_blocks) + -(-frames // blocks.block_size)

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Condition blocks and the blocks tagged with one of the last n frames."""
        end = blocks.tail_start(frame)
        condition = np.arange(min(blocks.condition_blocks.stop, end))
        oldest = blocks.frame_blocks(max(0, frame - self.window)).start
        return np.concatenate([condition, np.arange(min(oldest, end), end)])
