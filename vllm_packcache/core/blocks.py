"""Tags of a request's logical KV-cache blocks: condition, or frame k.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.layout import CONDITION, VideoLayout

BlockIndices = npt.NDArray[np.int64]
"""Logical block indices, ascending."""


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

    def tags(self, blocks: BlockIndices) -> npt.NDArray[np.int64]:
        """`tag` of blocks behind the condition."""
        newest = (blocks + 1) * self.block_size - 1
        return (newest - self.layout.condition_tokens) // self.layout.tokens_per_frame

    def tail_start(self, frame: int) -> int:
        """The first block that holds a token of ``frame``; it and all later ones live while ``frame`` is made."""
        return self.layout.frame_start(frame) // self.block_size
