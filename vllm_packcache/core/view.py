"""What of a video lives while one frame is made, block by block: for pictures and for who watches.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.retention import Retention

BlockStates = npt.NDArray[np.int64]

NOT_YET = -3
"""State of a block that holds no token yet."""
DROPPED = -2
"""State of a block that was evicted."""
IN_CONDITION = -1
"""State of a live block of the condition. Live blocks of frames have their temporal distance, 0 or more."""


class FrameTokens(NamedTuple):
    """How many tokens the last query of ``frame`` reads, and would read with nothing dropped."""

    frame: int
    live: int
    full: int

    @property
    def percent(self) -> float:
        """Live tokens as a percentage of the full cache."""
        return 100 * self.live / self.full


@dataclass(frozen=True, slots=True)
class FrameView:
    """What lives while one frame is made, at its last token.

    Args:
        states: one state a block of the whole video, see `NOT_YET`, `DROPPED`, `IN_CONDITION`.
        owners: the frame (or `CONDITION`) that each block counts as while this frame is made.
        tokens: the same in numbers.
        saved: of the live tokens, those whose room older frames have left that are encoded.
    """

    states: BlockStates
    owners: BlockStates
    tokens: FrameTokens
    saved: int = 0

    @property
    def retained(self) -> Int64:
        """The frames of which any block lives and the one being made, ascending."""
        # Blocks are in the order of their owners, so a frame begins where the owner changes.
        owners = np.append(self.owners[self.states >= 0], self.tokens.frame)
        return owners[np.diff(owners, prepend=CONDITION) > 0]


def view_of(retention: Retention, frame: int, blocks: int | None = None) -> FrameView:
    """What lives while ``frame`` is made, at its last token.

    Args:
        retention: of the video, asked for frames in ascending order.
        frame: 0 or more.
        blocks: of the whole video; None: as many as there are when the frame has been made.
    """
    layout = retention.layout
    stop = layout.frame_start(frame + 1)
    segment = next(retention.segments(layout.frame_start(frame), stop))
    made = -(-stop // retention.block_size)
    whole = made if blocks is None else blocks
    numbers = np.arange(whole)
    # The tag of every block at once; a block of the frame being made may already wait for the next one.
    last_tokens = (numbers + 1) * retention.block_size - 1
    newest = (last_tokens - layout.condition_tokens) // layout.tokens_per_frame
    in_condition = numbers < retention.blocks.condition_blocks.stop
    owners = np.where(in_condition, CONDITION, np.minimum(newest, frame))
    live = np.zeros(whole, dtype=bool)
    live[segment.past] = True
    live[segment.tail_start : made] = True
    states = np.where(live, np.where(owners == CONDITION, IN_CONDITION, frame - owners), DROPPED)
    states[made:] = NOT_YET
    # Of a frame that is encoded all is read, and some blocks are held.
    saved = sum(len(unit.blocks) - len(unit.held) for unit in retention.units(frame)) * retention.block_size
    tokens = FrameTokens(frame, segment.live_tokens(retention.block_size) + saved, stop)
    return FrameView(states, owners, tokens, saved)
