"""PackCache: anchored condition, exponentially decaying history (arXiv 2601.04359)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from vllm_packcache.layout import FrameLayout
from vllm_packcache.policies.base import Policy, check_range
from vllm_packcache.policies.selection import NEEDS_GRID, Selection, keep_fraction, select
from vllm_packcache.retention import BlockIndices, BlockMap

MAX_WINDOW = 256
"""Most history frames: the table of shares grows with the square of the window, and requests may choose it."""


@dataclass(frozen=True, kw_only=True)
class PackCache(Policy):
    """Keep the condition, and of each earlier frame a share that decays with its temporal distance.

    Three phases: *fill* (the history fits into the budget: nothing is dropped), *pack* (frames shrink as they
    age), *slide* (more than ``window`` history frames exist: the oldest is dropped whole).

    Args:
        history_frames: H in frames: the budget for the history is ``history_frames`` x tokens per frame.
        window: W, the number of history frames of which anything is kept, at most `MAX_WINDOW`.
        decay: rho, the factor by which attention falls from one temporal distance to the next.
        gamma_text: fraction of the text's blocks kept once the history no longer fits.
        gamma_condition: the same for the conditioning image.
        selection: which blocks of a frame are kept, when not all are; see `Selection`.

    Raises:
        ValueError: a number is impossible; the message names it.
    """

    name: ClassVar[str] = "packcache"
    rebases: ClassVar[bool] = True
    history_frames: float = 2.0
    window: int = 4
    decay: float = 0.5
    gamma_text: float = 1.0
    gamma_condition: float = 1.0
    selection: Selection = "spatial"

    def __post_init__(self) -> None:
        check_range("history_frames", self.history_frames, 0, open_low=True)
        check_range("window", self.window, 1, MAX_WINDOW)
        check_range("decay", self.decay, 0, 1, open_low=True)
        check_range("gamma_text", self.gamma_text, 0, 1)
        check_range("gamma_condition", self.gamma_condition, 0, 1)

    def check(self, frame: FrameLayout) -> None:
        """Refuse a budget that leaves the oldest frame of the window nothing, and rows without a grid."""
        if self.selection in NEEDS_GRID and frame.grid is None:
            raise ValueError(f"selection = {self.selection} needs grid in the layout, not tokens_per_frame alone")
        if allotment(self, frame.tokens_per_frame, self.window)[-1] < 1:
            raise ValueError(
                f"history_frames = {self.history_frames:g} leaves nothing for the oldest of window = {self.window} "
                "frames: raise history_frames or lower window"
            )

    def kept_tokens(self, tokens_per_frame: int, frame: int) -> tuple[int, ...]:
        """Tokens kept of the frames at distance 1, 2, ... while ``frame`` is made, before rounding to blocks.

        A frame cannot grow again, so each gets the least of what it was ever given.
        """
        table = _kept_tokens(self, tokens_per_frame)
        return table[min(frame, len(table) - 1)]

    @property
    def history_window(self) -> int:
        """W."""
        return self.window

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """Condition blocks, and what a history takes whose every frame is rounded up."""
        return len(blocks.condition_blocks) + _most_history_blocks(
            self, blocks.layout.tokens_per_frame, blocks.block_size
        )

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Condition blocks, and of each of the last W frames its share of blocks, as ``selection`` says."""
        end = blocks.tail_start(frame)
        tokens_per_frame = blocks.layout.tokens_per_frame
        if frame <= min(self.window, self.history_frames):
            return np.arange(end)
        parts = [
            keep_fraction(blocks.text_blocks, self.gamma_text),
            keep_fraction(blocks.image_blocks, self.gamma_condition),
        ]
        kept = self.kept_tokens(tokens_per_frame, frame)
        for distance in range(len(kept), 0, -1):
            keep = -(-kept[distance - 1] // blocks.block_size)
            parts.append(select(self.selection, blocks, frame - distance, keep))
        past = np.concatenate(parts)
        # A block that the condition shares with the frame being made belongs to the tail.
        return past[past < end]


def shares(decay: float, frames: int) -> tuple[float, ...]:
    """Shares of the history budget at temporal distance 1 .. ``frames``; never increasing, they sum to 1.

    ``b_d = (1 - rho) rho^(d-1)`` for d < W and ``b_W = rho^(W-1)``: the sums of a geometric series, the last
    share taking the rest. With rho = 1/2 this is the paper's ``b_d = 2^-min(d, W-1)``. Above 1/2 the rest is
    more than the frame before it has, and a frame cannot grow as it ages: it takes as much as that frame,
    and what is left over is divided in proportion.

    Source: arXiv 2601.04359, mean attention modelled as ``mu_d = C rho^d``.
    """
    weights = [decay ** (distance - 1) for distance in range(1, frames)]
    if weights:
        # All in units of 1 - rho, which may be 0.
        weights.append(weights[-1] * min(1.0, decay / (1 - decay) if decay < 1 else 1.0))
    else:
        weights.append(1.0)
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def allotment(policy: PackCache, tokens_per_frame: int, frame: int) -> tuple[int, ...]:
    """Tokens that the frames at distance 1, 2, ... are given while ``frame`` is made.

    A share above a whole frame is capped, the surplus goes to the next older frame.
    """
    history = min(frame, policy.window)
    if history <= policy.history_frames:
        return (tokens_per_frame,) * history
    given = []
    surplus = 0.0
    for share in shares(policy.decay, history):
        wanted = share * policy.history_frames * tokens_per_frame + surplus
        tokens = min(float(tokens_per_frame), wanted)
        surplus = wanted - tokens
        given.append(int(tokens + 1e-6))
    return tuple(given)


@lru_cache(maxsize=64)
def _kept_tokens(policy: PackCache, tokens_per_frame: int) -> tuple[tuple[int, ...], ...]:
    """Row k: tokens kept of the frames at distance 1, 2, ... while frame k is made; the last row holds for ever.

    What a frame was given depends on how many history frames there were at the time: from frame W on that is
    always W, and W frames later the last frame that saw anything else has gone.
    """
    table: list[tuple[int, ...]] = [()]
    for frame in range(1, 2 * policy.window + 1):
        given = allotment(policy, tokens_per_frame, frame)
        aged = (min(kept, now) for kept, now in zip(table[-1], given[1:], strict=False))
        table.append((given[0], *aged))
    return tuple(table)


@lru_cache(maxsize=64)
def _most_history_blocks(policy: PackCache, tokens_per_frame: int, block_size: int) -> int:
    """Blocks tagged with any frame of the history that are ever kept at once, at most."""

    def blocks(tokens: int) -> int:
        return -(-tokens // block_size)

    # Frames in a row share blocks: the newest i of them never end more than those of all their tokens.
    return max(
        min(
            blocks(newest * tokens_per_frame) + sum(blocks(kept) for kept in row[newest:])
            for newest in range(len(row) + 1)
        )
        for row in _kept_tokens(policy, tokens_per_frame)
    )
