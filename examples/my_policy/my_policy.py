"""A policy of a package of its own: the previous frame, and every other one before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_packcache import BlockIndices, BlockMap, Policy, check_range


@dataclass(frozen=True, kw_only=True)
class EveryOther(Policy):
    """Keep the condition, the previous frame, and of the frames before it those with an even number.

    Args:
        window: how many earlier frames anything is kept of, 1 to 64.

    Raises:
        ValueError: ``window`` is out of its range.
    """

    # Fields are options: of --kv-cache-policy-config, and of a request as packcache_window.
    window: int = 5

    def __post_init__(self) -> None:
        check_range("window", self.window, 1, 64)

    @property
    def history_window(self) -> int:
        """Nothing older than so many frames lives, so positions can be re-based."""
        return self.window

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """As if the whole window were kept: an upper bound is enough, and it must not take long."""
        tokens = self.window * blocks.layout.tokens_per_frame
        return len(blocks.condition_blocks) + -(-tokens // blocks.block_size)

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Live blocks while ``frame`` is made, ascending. What is even stays even, so no dropped block comes back."""
        end = blocks.tail_start(frame)
        kept = [np.arange(min(blocks.condition_blocks.stop, end))]
        for earlier in range(max(0, frame - self.window), frame):
            if earlier % 2 == 0 or earlier == frame - 1:
                own = blocks.frame_blocks(earlier)
                kept.append(np.arange(min(own.start, end), min(own.stop, end)))
        return np.concatenate(kept)
