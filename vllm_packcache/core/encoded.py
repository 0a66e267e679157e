"""Retention of a video whose older frames are held in fewer bits: encoded, in some of the blocks that they had.

The condition, the newest frame and the one being made are read as they were written. A frame that is older than the
newest is a unit: the blocks that have its tag, all of them. It is encoded once, when the frame behind it is finished,
and lives in its first blocks from then on; the others are free. What a policy decides it decides as ever, in whole
frames: of a unit there is no part that could be dropped.

Source: Quant VideoGen, arXiv 2602.02958, which keeps the newest chunk and the first as they are.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_packcache.core.blocks import BlockIndices
from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.packing import Packing
from vllm_packcache.core.policies.base import Policy, Tokens
from vllm_packcache.core.retention import Decision, Retention, Unit

NEWEST_DISTANCE = 1
"""Temporal distance of the newest frame: those at a larger one are encoded."""


class Encoding(NamedTuple):
    """How much room older frames take.

    Args:
        packing: the format, for the heads of a rank.
        page_bytes: of a block in one layer.
    """

    packing: Packing
    page_bytes: int

    def held_blocks(self, blocks: int, block_size: int) -> int:
        """Blocks that ``blocks`` full blocks of ``block_size`` tokens take when they are encoded."""
        return -(-self.packing.encoded_bytes(blocks * block_size) // self.page_bytes)

    def fits(self, blocks: int, block_size: int) -> bool:
        """Whether a unit of ``blocks`` blocks has room in them."""
        return self.held_blocks(blocks, block_size) <= blocks


class EncodedRetention(Retention):
    """See the module.

    Args:
        layout: the video.
        policy: what to keep; one that does not read tokens.
        block_size: tokens of a KV-cache block.
        encoding: how much room older frames take.
    """

    __slots__ = ("_encoding", "_split")

    def __init__(self, layout: VideoLayout, policy: Policy, block_size: int, encoding: Encoding) -> None:
        super().__init__(layout, policy, block_size)
        self._encoding = encoding
        # By frame, as decisions are: what is read as it is, and the units.
        self._split: dict[int, tuple[BlockIndices, BlockIndices, tuple[Unit, ...]]] = {}

    def past(self, frame: int) -> BlockIndices:
        """Live blocks before ``tail_start(frame)`` while ``frame`` is made, those of units being what they live in.

        Raises:
            PolicyError: the policy's decision is none that it may take, or keeps a part of an older frame.
        """
        return self._of(frame)[0]

    def plain(self, frame: int) -> BlockIndices:
        """See `Retention.plain`."""
        return self._of(frame)[1]

    def units(self, frame: int) -> tuple[Unit, ...]:
        """See `Retention.units`."""
        return self._of(frame)[2]

    def leaving(self, frame: int) -> Unit | None:
        """See `Retention.leaving`: the frame before it, if it lives on and has any blocks."""
        if frame < 1:
            return None
        return next((unit for unit in self.units(frame + 1) if unit.frame == frame - NEWEST_DISTANCE), None)

    def history_blocks(self, frame: int) -> BlockIndices:
        """See `Retention.history_blocks`; units are not among them, which hold keys before any rotation."""
        history = super().history_blocks(frame)
        for unit in self.units(frame):
            history = history[(history < unit.held.start) | (history >= unit.held.stop)]
        return history

    def tell(self, decisions: Sequence[Decision]) -> None:
        """Nothing is told of a policy that reads no tokens."""
        assert not decisions, "the policy reads no tokens"

    def most_blocks(self, ahead: int = 0) -> int | None:
        """See `Retention.most_blocks`."""
        most = super().most_blocks(ahead)
        shortest, _ = self._unit_sizes()
        if most is None or self._most_past is None or shortest == 0:
            return most
        # More of the condition or of the newest frame in place of older ones would be more: units are no larger.
        older = max(0, self._most_past - len(self.blocks.condition_blocks) - shortest) // shortest
        if self._window is not None and not self.policy.outlives_window:
            older = min(older, max(0, self._window - NEWEST_DISTANCE))
        return min(most, self._with_older(older, ahead))

    def most_of(self, tokens: int, ahead: int = 0) -> int:
        """See `Retention.most_of`: what a policy keeps without a bound is encoded too."""
        frames = -(-max(0, tokens - self.layout.condition_tokens) // self.layout.tokens_per_frame)
        # Behind the last frame there is none that makes the newest an older one.
        older = max(0, frames - 1 - NEWEST_DISTANCE)
        return min(super().most_of(tokens, ahead), self._with_older(older, ahead))

    def _with_older(self, frames: int, ahead: int) -> int:
        """Blocks of the condition, of so many older frames, of the newest and of the one being made, at most."""
        _, longest = self._unit_sizes()
        held = frames * self._encoding.held_blocks(longest, self.block_size) if longest else 0
        return self._with_frame(len(self.blocks.condition_blocks) + longest + held, ahead)

    def check(self) -> None:
        """Check what can be known before there is a video.

        Raises:
            ValueError: a frame has no room in its own blocks, or the policy keeps parts of older frames; the message
                says what to do.
        """
        if self.policy.reads_tokens:
            raise ValueError(
                "precision.history is for policies that keep whole frames, and this one chooses among their blocks: "
                "choose another selection, such as spatial with as many history_frames as window, or another policy"
            )
        for blocks in filter(None, self._unit_sizes()):
            if not self._encoding.fits(blocks, self.block_size):
                raise ValueError(
                    f"precision.history: an encoded frame of {blocks} blocks takes "
                    f"{self._encoding.held_blocks(blocks, self.block_size)}: leave precision out for such frames"
                )
        for frame in range((self._window or 1) + 3):
            self.past(frame)

    def _unit_sizes(self) -> tuple[int, int]:
        """Least and most blocks that have the tag of one frame."""
        shortest, rest = divmod(self.layout.tokens_per_frame, self.block_size)
        return shortest, shortest + bool(rest)

    def _of(self, frame: int) -> tuple[BlockIndices, BlockIndices, tuple[Unit, ...]]:
        known = self._split.get(frame)
        if known is None:
            known = self._split_past(frame, super().past(frame))
            while len(self._split) >= _REMEMBERED:
                del self._split[next(iter(self._split))]
            self._split[frame] = known
        return known

    def _split_past(self, frame: int, read: BlockIndices) -> tuple[BlockIndices, BlockIndices, tuple[Unit, ...]]:
        if frame == CONDITION:
            return read, read, ()
        first = self.blocks.condition_blocks.stop
        older = read[(read >= first) & (read < self.blocks.frame_blocks(max(0, frame - NEWEST_DISTANCE)).start)]
        units = []
        for number in np.unique(self.blocks.tags(older)).tolist():
            blocks = self.blocks.frame_blocks(number)
            kept = int(np.count_nonzero((older >= blocks.start) & (older < blocks.stop)))
            if kept < len(blocks):
                raise self._error(
                    frame,
                    f"it keeps {kept} of the {len(blocks)} blocks of frame {number}, and with precision.history an "
                    "older frame is kept whole or dropped: let it keep as many frames as its window has",
                )
            held = self._encoding.held_blocks(len(blocks), self.block_size)
            units.append(Unit(number, blocks, range(blocks.start, blocks.start + held)))
        plain = np.setdiff1d(read, older, assume_unique=True)
        past = np.sort(np.concatenate([plain, *(np.arange(unit.held.start, unit.held.stop) for unit in units)]))
        for own in (past, plain):
            own.flags.writeable = False
        return past, plain, tuple(units)


def retention_of(
    layout: VideoLayout, policy: Policy, block_size: int, encoding: Encoding | None, tokens: Tokens | None = None
) -> Retention:
    """What a video keeps, whose older frames take as much room as ``encoding`` says; None: as when they were new."""
    if encoding is None:
        return Retention(layout, policy, block_size, tokens)
    return EncodedRetention(layout, policy, block_size, encoding)


_REMEMBERED = 4
"""Frames of which it is kept in mind what is read: the one being made, its neighbours, and one for those who count."""
