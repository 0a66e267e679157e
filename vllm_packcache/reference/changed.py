"""``selection: changed`` as the rule is told, block by block: what the fast choice is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.policies.selection import spread_order


class ChangedBlocks:
    """Which blocks of the history live while each frame is made, one frame after the other.

    Args:
        plan: of a policy with ``selection: changed``.
        block_size: tokens of a KV-cache block.
        token_ids: of the sequence; it may grow while frames are asked about.
    """

    def __init__(self, plan: Plan, block_size: int, token_ids: Sequence[int]) -> None:
        assert isinstance(plan.policy, PackCache)
        self._layout, self._policy, self._size, self._ids = plan.layout, plan.policy, block_size, token_ids
        self._lives: list[set[int]] = []

    def of(self, frame: int) -> set[int]:
        """Blocks without those of the condition, all below the first block of ``frame``."""
        while len(self._lives) <= frame:
            self._lives.append(self._decide(len(self._lives)))
        return self._lives[frame]

    def _decide(self, frame: int) -> set[int]:
        policy, layout, size = self._policy, self._layout, self._size
        tags = {block: tag(layout, size, block) for block in range(layout.frame_start(frame) // size)}
        blocks_of = {earlier: [block for block in tags if tags[block] == earlier] for earlier in range(frame)}
        if frame <= min(policy.window, policy.history_frames):
            return {block for block in tags if tags[block] != CONDITION}
        evenly: set[int] = set()
        for distance, share in enumerate(policy.kept_tokens(layout.tokens_per_frame, frame), 1):
            own = blocks_of[frame - distance]
            evenly |= {own[place] for place in spread_order(len(own))[: -(-share // size)]}
        if policy.changed_tokens > size and not policy.episodes:
            return evenly
        before, ends = self._lives[-1], self._scene_ends(frame)
        # Of what is older than the window only scenes that have ended stay.
        held = {block for block in before if frame - tags[block] <= policy.window or tags[block] in ends}
        held |= set(blocks_of[frame - 1])
        # As many as H frames take, and no more than are kept evenly; fewer where the frame that leaves the window could
        # take too many along.
        keep = math.ceil(min(policy.history_frames, frame) * layout.tokens_per_frame / size - 1e-6)
        leaving = blocks_of[frame - 1 - policy.window] if frame > policy.window else []
        keep = max(0, min(keep, len(evenly), len(before) + len(blocks_of[frame - 1]) - len(leaving)))
        anchors = self._anchors(frame, [end for end in ends if any(tags[block] == end for block in before)], blocks_of)
        shown = max((end + 1 for end in ends if frame - end <= policy.window + 1), default=0)

        def order(block: int) -> tuple[int, bool, int, int]:
            own, changed = blocks_of[tags[block]], 0
            if tags[block] == frame - 1:
                changed = size + 2
            elif block in anchors:
                changed = size + 1
            elif tags[block] >= shown:
                places = range(block * size, (block + 1) * size)
                changed = sum(self._ids[place] != self._ids[place + layout.tokens_per_frame] for place in places)
                if changed < policy.changed_tokens:
                    changed = 0
            rank = spread_order(len(own)).tolist().index(own.index(block))
            return -changed, changed == 0 and block not in evenly, frame - tags[block], rank

        return set(sorted(held, key=order)[:keep])

    def _differ(self, one: int, other: int) -> bool:
        """Whether most tokens of two frames differ."""
        length = self._layout.tokens_per_frame
        first, second = self._layout.frame_start(one), self._layout.frame_start(other)
        return 2 * sum(self._ids[first + i] != self._ids[second + i] for i in range(length)) > length

    def _scene_ends(self, frame: int) -> list[int]:
        """Frames before ``frame`` - 1 that the next frame shows another scene than, newest first."""
        if not self._policy.episodes:
            return []
        return [end for end in reversed(range(frame - 1)) if self._differ(end, end + 1)]

    def _anchors(self, frame: int, ends: list[int], blocks_of: dict[int, list[int]]) -> set[int]:
        """Blocks that stay of scenes that have ended, those not counted which the newest frame shows again."""
        scenes, policy = [frame - 1], self._policy
        for end in ends:
            if len(scenes) <= policy.episodes and all(self._differ(end, scene) for scene in scenes):
                scenes.append(end)
        # What a history has besides its newest frame is divided among the scenes that have ended and the one shown.
        room = (policy.history_frames - 1) * self._layout.tokens_per_frame
        share = max(1, int(room / (policy.episodes + 1) / self._size + 1e-6))
        return {
            blocks_of[scene][place]
            for scene in scenes[1:]
            for place in spread_order(len(blocks_of[scene])).tolist()[:share]
        }


def tag(layout: VideoLayout, block_size: int, block: int) -> int:
    """The frame of the newest token of ``block``; one with any token of the condition is of the condition."""
    if block * block_size < layout.condition_tokens:
        return CONDITION
    return layout.frame_of((block + 1) * block_size - 1)
