"""Attention sink: the first tokens and the last ones, blind to what they are (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.policies.base import Policy, check_range

MAX_TOKENS = 2**40
"""Most of either, more than any sequence has."""


@dataclass(frozen=True, kw_only=True)
class AttentionSink(Policy):
    """Keep the first ``sink_tokens`` tokens and the last ``recent_tokens`` before the frame being made.

    Both are rounded up to whole blocks. As with every policy the decision is taken where a frame begins and
    holds for the whole frame; the tokens of the frame being made are kept besides.

    Args:
        sink_tokens: s, tokens kept at the start of the sequence.
        recent_tokens: n, tokens kept at the end of the history.

    Raises:
        ValueError: ``sink_tokens`` is negative, ``recent_tokens`` below 1, or either above `MAX_TOKENS`.
    """

    name: ClassVar[str] = "attention_sink"
    sink_tokens: int = 4
    recent_tokens: int = 1024

    def __post_init__(self) -> None:
        check_range("sink_tokens", self.sink_tokens, 0, MAX_TOKENS)
        check_range("recent_tokens", self.recent_tokens, 1, MAX_TOKENS)

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """Blocks of s tokens at the start, and those that end in n tokens in a row."""
        return -(-self.sink_tokens // blocks.block_size) + -(-self.recent_tokens // blocks.block_size)

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Blocks with one of the first s tokens, and blocks with one of the last n tokens of the history."""
        end = blocks.tail_start(frame)
        sink = min(end, -(-self.sink_tokens // blocks.block_size))
        oldest = max(0, blocks.layout.frame_start(frame) - self.recent_tokens) // blocks.block_size
        return np.concatenate([np.arange(sink), np.arange(min(max(sink, oldest), end), end)])
