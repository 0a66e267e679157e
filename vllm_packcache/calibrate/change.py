"""How much changes from frame to frame, and the options of ``selection: changed`` that follow from it.

Attention says little about them: it is spread over what changes and what does not. But how much room the changes of a
window take can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_packcache.calibrate.decay import budgets
from vllm_packcache.calibrate.mass import Video
from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.policies.change import changed_tokens
from vllm_packcache.core.policies.packcache import MAX_WINDOW, PackCache
from vllm_packcache.tools.sequences import lookup


@dataclass(frozen=True)
class Changes:
    """What changes in videos of the same number of frames.

    Args:
        videos: whose tokens are compared.
        block_size: tokens of a KV-cache block.
    """

    videos: Sequence[Video]
    block_size: int

    @cached_property
    def counts(self) -> list[list[Int64]]:
        """Of every video and each of its frames but the last: tokens by block that differ in the next frame."""
        return [self._counts(video) for video in self.videos]

    def _counts(self, video: Video) -> list[Int64]:
        blocks, last = BlockMap(video.layout, self.block_size), video.frames - 1
        first = blocks.condition_blocks.stop
        ids = np.array(video.token_ids, dtype=np.int64)
        found = changed_tokens(blocks, first, video.frames, lookup(ids))
        frames = [blocks.frame_blocks(frame) for frame in range(last)]
        return [found[own.start - first : own.stop - first] for own in frames]

    @cached_property
    def by_count(self) -> Int64:
        """How many blocks of all differ in 0, 1, ... tokens, [block size + 1]."""
        flat = [np.concatenate([*frames, np.empty(0, np.int64)]) for frames in self.counts]
        return np.bincount(np.concatenate(flat), minlength=self.block_size + 1)

    @property
    def tokens(self) -> float:
        """Share of tokens that differ from the same place of the next frame."""
        return float(np.arange(len(self.by_count)) @ self.by_count / max(1, self.by_count.sum() * self.block_size))

    @property
    def _usual(self) -> int:
        """Differing tokens that half of all blocks do not exceed."""
        return int(np.searchsorted(np.cumsum(self.by_count), self.by_count.sum() / 2))

    @property
    def told_apart(self) -> bool:
        """Whether blocks differ in how much they change: not where most of them differ in all of their tokens."""
        return self._usual < self.block_size

    @property
    def threshold(self) -> int:
        """From how many differing tokens on a block counts as changed: more than half of all blocks have."""
        return self._usual + 1 if self.told_apart else 1

    @property
    def blocks(self) -> float:
        """Share of blocks that count as changed."""
        return float(self.by_count[self.threshold :].sum() / max(1, self.by_count.sum()))

    def policy(self, history: float, window: int, decay: float) -> PackCache:
        """The options that keep what changed."""
        return PackCache(
            history_frames=history,
            window=window,
            decay=decay,
            selection="changed",
            changed_tokens=self.threshold,
        )

    def holding(self, decay: float, distances: int, most: float, target: float) -> list[tuple[int, float]]:
        """Windows from 1 on, and the least budget that holds what changed in each, in frames.

        Args:
            decay: rho, for what is unchanged.
            distances: the longest window that is looked at.
            most: budgets above it are not looked at.
            target: share of the changed blocks of a window that is to be held, beside the whole last frame.
        """
        found = []
        tried = [history for history in budgets(distances) if 1 <= history <= most]
        for window in range(1, min(distances, MAX_WINDOW) + 1):
            # A longer window needs no smaller budget.
            while tried and self.held(self.policy(tried[0], window, decay)) < target:
                tried.pop(0)
            if not tried:
                break
            found.append((window, tried[0]))
        return found

    def held(self, policy: PackCache) -> float:
        """Share of the blocks that changed within the window for which there is room when a frame begins.

        All frames count that have a full window before them.
        """
        rooms: dict[VideoLayout, dict[int, int]] = {}
        held = all_of_them = 0
        for video, counts in zip(self.videos, self.counts, strict=True):
            blocks = BlockMap(video.layout, self.block_size)
            room = rooms.setdefault(video.layout, {})
            before = np.cumsum([0, *(int((frame >= policy.changed_tokens).sum()) for frame in counts)]).tolist()
            for frame in range(policy.window, video.frames + 1):
                if frame not in room:
                    # No block more than the budget, and none more than where nothing changes; the last frame is not
                    # compared yet, and is kept whole.
                    kept = min(len(policy.past_blocks(blocks, frame)), policy.most_past_blocks(blocks))
                    room[frame] = kept - len(blocks.condition_blocks) - len(blocks.frame_blocks(frame - 1))
                changed = before[frame - 1] - before[frame - policy.window]
                held += min(changed, max(0, room[frame]))
                all_of_them += changed
        return held / all_of_them if all_of_them else 1.0
