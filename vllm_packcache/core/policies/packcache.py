"""PackCache: anchored condition, exponentially decaying history (arXiv 2601.04359)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import MAX_FRAMES, MAX_TOKENS_PER_FRAME, FrameLayout
from vllm_packcache.core.policies.base import Int64, Policy, Tokens, check_range
from vllm_packcache.core.policies.change import keep_changed
from vllm_packcache.core.policies.scenes import distinct_scenes, scene_ends
from vllm_packcache.core.policies.selection import NEEDS_GRID, Selection, keep_fraction, select

Float64 = npt.NDArray[np.float64]

MAX_EPISODES = 64
"""Most scenes that may have an anchor: each is compared with the others whenever a frame begins."""

MAX_WINDOW = 256
"""Most history frames: the table of what is kept grows with the square of the window, and requests may choose it."""


@dataclass(frozen=True, kw_only=True)
class PackCache(Policy):
    """Keep the condition, the last frame, and of the frames before it what changed or a share that decays with age.

    Three phases: *fill* (the history fits into the budget: nothing is dropped), *pack* (frames shrink as they
    age), *slide* (more than ``window`` history frames exist: the oldest is dropped whole). The rule of the paper, which
    looks at nothing but age, is `PAPER`.

    Args:
        history_frames: H in frames: the budget for the history is ``history_frames`` x tokens per frame.
        window: W, the number of history frames of which anything is kept, at most `MAX_WINDOW`.
        decay: rho, the factor by which attention falls from one temporal distance to the next.
        gamma_text: fraction of the text's blocks kept once the history no longer fits.
        gamma_condition: the same for the conditioning image.
        selection: which blocks of a frame are kept, when not all are; see `Selection`.
        changed_tokens: of ``selection: changed``: in so many tokens a block must differ from the same place of the next
            frame to count as changed.
        episodes: of ``selection: changed``: of so many scenes that have ended an anchor stays, however long ago it was.
            What the history holds besides the newest frame is divided among them and the scene that is shown.

    Raises:
        ValueError: a number is impossible; the message names it.
    """

    name: ClassVar[str] = "packcache"
    rebases: ClassVar[bool] = True
    history_frames: float = 2.0
    window: int = 12
    decay: float = 0.5
    gamma_text: float = 1.0
    gamma_condition: float = 1.0
    selection: Selection = "changed"
    changed_tokens: int = 1
    episodes: int = 0

    def __post_init__(self) -> None:
        check_range("history_frames", self.history_frames, 0, MAX_FRAMES, open_low=True)
        check_range("window", self.window, 1, MAX_WINDOW)
        check_range("decay", self.decay, 0, 1, open_low=True)
        check_range("gamma_text", self.gamma_text, 0, 1)
        check_range("gamma_condition", self.gamma_condition, 0, 1)
        check_range("changed_tokens", self.changed_tokens, 1, MAX_TOKENS_PER_FRAME)
        if self.changed_tokens != 1 and self.selection != "changed":
            raise ValueError(
                f"changed_tokens is for selection = changed, not for {self.selection}, where it must be 1, not "
                f"{self.changed_tokens}"
            )
        check_range("episodes", self.episodes, 0, MAX_EPISODES)
        if self.episodes and self.selection != "changed":
            raise ValueError(
                f"episodes is for selection = changed, not for {self.selection}, where it must be 0, not "
                f"{self.episodes}"
            )
        if self.selection == "changed":
            # The newest frame is kept whole; an anchor is what there is room for besides.
            check_range(
                f"history_frames of {'episodes' if self.episodes else 'selection = changed'}",
                self.history_frames,
                1,
                open_low=self.episodes > 0,
            )

    def check(self, frame: FrameLayout) -> None:
        """Refuse a budget that leaves the oldest frame of the window nothing, and rows without a grid."""
        if self.selection in NEEDS_GRID and frame.grid is None:
            raise ValueError(f"selection = {self.selection} needs grid in the layout, not tokens_per_frame alone")
        # What is given to the frames evenly is what unchanged blocks get: of an old frame that may be nothing.
        if self.selection != "changed" and allotment(self, frame.tokens_per_frame, self.window)[-1] < 1:
            raise ValueError(
                f"history_frames = {self.history_frames:g} leaves nothing for the oldest of window = {self.window} "
                "frames: raise history_frames or lower window"
            )

    def kept_tokens(self, tokens_per_frame: int, frame: int) -> tuple[int, ...]:
        """Tokens kept of the frames at distance 1, 2, ... while ``frame`` is made, before rounding to blocks.

        A frame cannot grow again, so each gets the least of what it was ever given.
        """
        table = _kept_tokens(self, tokens_per_frame)
        return tuple(table[min(frame, len(table) - 1), : min(frame, self.window)].tolist())

    @property
    def history_window(self) -> int:
        """W."""
        return self.window

    @property
    def outlives_window(self) -> bool:
        """Whether anchors are kept."""
        return self.episodes > 0

    @property
    def settles_at(self) -> int | None:
        """Where the last frame has left the window that saw fewer than W before it.

        Never, where a frame's number says which of its blocks are drawn.
        """
        return None if self.selection == "random" else 2 * self.window + 1

    def most_past_blocks(self, blocks: BlockMap) -> int:
        """Condition blocks, and what a history takes: where each frame has its share, every frame is rounded up."""
        if self._follows_changes(blocks):
            return len(blocks.condition_blocks) + self._budget_blocks(blocks, self.window)
        return len(blocks.condition_blocks) + _most_history_blocks(
            self, blocks.layout.tokens_per_frame, blocks.block_size
        )

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Condition blocks, and of each of the last W frames its share of blocks, as ``selection`` says."""
        end = blocks.tail_start(frame)
        if self._keeps_everything(frame):
            return np.arange(end)
        past = np.concatenate([self._condition_blocks(blocks), self._history_blocks(blocks, frame)])
        # A block that the condition shares with the frame being made belongs to the tail.
        return past[past < end]

    @property
    def reads_tokens(self) -> bool:
        """Whether ``selection`` is ``changed``."""
        return self.selection == "changed"

    def past_blocks_of(self, blocks: BlockMap, frame: int, before: BlockIndices, tokens: Tokens) -> BlockIndices:
        """The same, with what changed first: see `vllm_packcache.core.policies.change`."""
        if self._keeps_everything(frame) or not self._follows_changes(blocks):
            return self.past_blocks(blocks, frame)
        condition, evenly = self._condition_blocks(blocks), self._history_blocks(blocks, frame)
        newest = blocks.frame_blocks(frame - 1)
        had = before[before >= blocks.condition_blocks.stop]
        available = len(had) + len(newest)
        # The frame that leaves the window is the last that may turn out to be the last of its scene.
        oldest, leaves = max(0, frame - self.window), max(0, frame - 1 - self.window)
        ends = scene_ends(blocks.layout, leaves, frame, tokens) if self.episodes else []
        held = had
        if oldest:
            leaving = blocks.frame_blocks(leaves)
            # Whatever is left of it: the number of blocks does not depend on tokens.
            available -= len(leaving)
            if leaves not in ends:
                # What is older is of scenes that have ended.
                held = had[(had < leaving.start) | (had >= leaving.stop)]
        held = np.concatenate([held, np.arange(newest.start, newest.stop)])
        kept = keep_changed(
            blocks,
            frame,
            held,
            evenly,
            max(0, min(available, len(evenly), self._budget_blocks(blocks, frame))),
            tokens,
            self.changed_tokens,
            scene=max([oldest, *(end + 1 for end in ends)]),
            anchors=self._anchors(blocks, frame, had, ends, tokens),
        )
        past = np.concatenate([condition, kept])
        return past[past < blocks.tail_start(frame)]

    def _anchors(
        self, blocks: BlockMap, frame: int, had: BlockIndices, ends: list[int], tokens: Tokens
    ) -> BlockIndices:
        """Of the last frame of every scene that has ended and of which something lives, its share of blocks."""
        if not self.episodes:
            return had[:0]
        window = max(0, frame - 1 - self.window)
        tags = [int(tag) for tag in np.unique(blocks.tags(had))[::-1]]
        lived = [tag for tag in tags if tag < window or tag in ends]
        room = (self.history_frames - 1) * blocks.layout.tokens_per_frame / blocks.block_size
        count = max(1, int(room / (self.episodes + 1) + 1e-6))
        scenes = distinct_scenes(blocks.layout, frame, lived, self.episodes, tokens)
        return np.concatenate([had[:0], *(select("spatial", blocks, scene, count) for scene in scenes)])

    def _follows_changes(self, blocks: BlockMap) -> bool:
        """Whether what changed can make a difference: a block cannot have more changed tokens than tokens."""
        return self.reads_tokens and (self.changed_tokens <= blocks.block_size or self.episodes > 0)

    def _budget_blocks(self, blocks: BlockMap, frame: int) -> int:
        """Blocks that H frames take, or all before ``frame`` if those are fewer."""
        tokens = min(self.history_frames, frame) * blocks.layout.tokens_per_frame
        return math.ceil(tokens / blocks.block_size - 1e-6)

    def _keeps_everything(self, frame: int) -> bool:
        return frame <= min(self.window, self.history_frames)

    def _condition_blocks(self, blocks: BlockMap) -> BlockIndices:
        text = keep_fraction(blocks.text_blocks, self.gamma_text)
        return np.concatenate([text, keep_fraction(blocks.image_blocks, self.gamma_condition)])

    def _history_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        """Of each of the last W frames its share of blocks, ascending."""
        kept = self.kept_tokens(blocks.layout.tokens_per_frame, frame)
        return np.concatenate(
            [
                select(self.selection, blocks, frame - distance, -(-kept[distance - 1] // blocks.block_size))
                for distance in range(len(kept), 0, -1)
            ]
        )


PAPER = PackCache(window=4, selection="spatial")
"""As arXiv 2601.04359 has it: 1, 1/2, 1/4 and 1/4 of the last four frames, each spread evenly over the picture."""


def shares(decay: float, frames: int) -> tuple[float, ...]:
    """Shares of the history budget at temporal distance 1 .. ``frames``; never increasing, they sum to 1.

    ``b_d = (1 - rho) rho^(d-1)`` for d < W and ``b_W = rho^(W-1)``: the sums of a geometric series, the last
    share taking the rest. With rho = 1/2 this is the paper's ``b_d = 2^-min(d, W-1)``. Above 1/2 the rest is
    more than the frame before it has, and a frame cannot grow as it ages: it takes as much as that frame,
    and what is left over is divided in proportion.

    Source: arXiv 2601.04359, mean attention modelled as ``mu_d = C rho^d``.
    """
    return tuple(_shares(decay, np.array([frames]))[0].tolist())


def _shares(decay: float, histories: Int64) -> Float64:
    """`shares` for several numbers of frames, [n, most frames]; 0 behind the last frame of each."""
    # By Python's own power and in the order of the sum: what is rounded decides which blocks live.
    powers = np.array([decay**distance for distance in range(int(histories.max()))])
    # All in units of 1 - rho, which may be 0.
    rest = min(1.0, decay / (1 - decay) if decay < 1 else 1.0)
    last = np.where(histories > 1, powers[np.maximum(histories - 2, 0)] * rest, 1.0)
    before = np.concatenate([[0.0], np.cumsum(powers)])[histories - 1]
    weights = np.where(np.arange(len(powers)) < histories[:, None], powers, 0.0)
    weights[np.arange(len(histories)), histories - 1] = last
    return weights / (before + last)[:, None]


def allotment(policy: PackCache, tokens_per_frame: int, frame: int) -> tuple[int, ...]:
    """Tokens that the frames at distance 1, 2, ... are given while ``frame`` is made.

    A share above a whole frame is capped, the surplus goes to the next older frame.
    """
    history = min(frame, policy.window)
    return tuple(_allotments(policy, tokens_per_frame, np.array([history]))[0].tolist()) if history else ()


def _allotments(policy: PackCache, tokens_per_frame: int, histories: Int64) -> Int64:
    """`allotment` for several numbers of history frames, [n, most frames]; 0 behind the last frame of each."""
    shared = _shares(policy.decay, histories)
    distances = shared.shape[1]
    # A budget above all frames is no other than that of all frames, and does not overflow.
    wanted = np.ascontiguousarray((shared * min(policy.history_frames, distances) * tokens_per_frame).T)
    wanted[:, histories <= policy.history_frames] = tokens_per_frame
    capped = np.flatnonzero(wanted.max(axis=1) > tokens_per_frame)
    surplus = np.zeros(len(histories))
    # Of the newest frames only: what no longer overflows is final.
    for distance in range(capped[0] if len(capped) else distances, distances):
        with_surplus = wanted[distance] + surplus
        np.minimum(tokens_per_frame, with_surplus, out=wanted[distance])
        surplus = with_surplus - wanted[distance]
        if distance >= capped[-1] and not surplus.any():
            break
    given = (wanted + 1e-6).astype(np.int64)
    given[np.arange(distances)[:, None] >= histories] = 0
    return given.T


@lru_cache(maxsize=256)
def _kept_tokens(policy: PackCache, tokens_per_frame: int) -> Int64:
    """Row k: tokens kept of the frames at distance 1, 2, ... W while frame k is made; the last row holds for ever.

    What a frame was given depends on how many history frames there were at the time: from frame W on that is
    always W, and W frames later the last frame that saw anything else has gone.
    """
    given = _allotments(policy, tokens_per_frame, np.arange(1, policy.window + 1))
    table = np.zeros((2 * policy.window + 1, policy.window), dtype=np.int64)
    for frame in range(1, len(table)):
        now = given[min(frame, policy.window) - 1]
        table[frame, 0] = now[0]
        np.minimum(table[frame - 1, :-1], now[1:], out=table[frame, 1:])
    changing = np.flatnonzero((table != table[-1]).any(axis=1))
    return table[: changing.max(initial=-1) + 2].copy()


@lru_cache(maxsize=256)
def _most_history_blocks(policy: PackCache, tokens_per_frame: int, block_size: int) -> int:
    """Blocks tagged with any frame of the history that are ever kept at once, at most."""
    kept = -(-_kept_tokens(policy, tokens_per_frame) // block_size)
    # Frames in a row share blocks: the newest i of them never end more than those of all their tokens.
    older = np.zeros((len(kept), policy.window + 1), dtype=np.int64)
    older[:, :-1] = np.cumsum(kept[:, ::-1], axis=1)[:, ::-1]
    newest = -(-np.arange(policy.window + 1) * tokens_per_frame // block_size)
    return int((newest + older).min(axis=1).max())
