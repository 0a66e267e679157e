"""Begin anew with the last few frames when the model's positions are used up, as players of world models do today."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import MAX_FRAMES
from vllm_packcache.core.policies.base import Policy, check_range, whole_frames


@dataclass(frozen=True, kw_only=True)
class Reset(Policy):
    """Keep everything until there are ``reset_frames`` frames, then the condition and the last ``kept_frames`` of them.

    MineWorld does so at 32 frames, of which it keeps 8, and RLVR-World's robot model at 8, of which it keeps one. In a
    session the kept frames are computed anew, as there: their positions begin again behind the condition. In a single
    request they stay as they are, with the positions that they have.

    Args:
        reset_frames: N, frames that there are when all but the last are dropped.
        kept_frames: k, frames that are kept then, fewer than N.

    Raises:
        ValueError: a number is impossible.
    """

    name: ClassVar[str] = "reset"
    reset_frames: int = 32
    kept_frames: int = 8

    def __post_init__(self) -> None:
        check_range("reset_frames", self.reset_frames, 2, MAX_FRAMES)
        check_range("kept_frames", self.kept_frames, 1, self.reset_frames - 1)

    @property
    def begins_anew(self) -> tuple[int, int]:
        """N and k."""
        return self.reset_frames, self.kept_frames

    def oldest(self, frame: int) -> int:
        """The oldest frame that lives while ``frame`` is made."""
        resets = max(0, (frame - self.kept_frames) // (self.reset_frames - self.kept_frames))
        return resets * (self.reset_frames - self.kept_frames)

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """Condition blocks, and those that end in one of N - 1 frames in a row."""
        frames = (self.reset_frames - 1) * blocks.layout.tokens_per_frame
        return len(blocks.condition_blocks) + -(-frames // blocks.block_size)

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Condition blocks, and the blocks tagged with a frame since the oldest that lives."""
        return whole_frames(blocks, frame, self.oldest(frame))
