"""Sliding window over frames, the baseline of the PackCache paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import MAX_FRAMES
from vllm_packcache.core.policies.base import Policy, check_range, whole_frames


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
        return whole_frames(blocks, frame, max(0, frame - self.window))
