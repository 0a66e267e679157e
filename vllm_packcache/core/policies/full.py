"""Full cache: nothing is ever dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep everything, as stock vLLM does."""

    name: ClassVar[str] = "full"

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """All blocks. The one policy whose cost grows with the video: so does what it keeps."""
        return np.arange(blocks.tail_start(frame))
