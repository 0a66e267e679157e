"""What a query sees and where it sees it: the method's rule over tokens, stated literally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from vllm_packcache.core.layout import CONDITION, FrameLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.retention import Retention
from vllm_packcache.reference.changed import ChangedBlocks, tag


class Live:
    """Which blocks of a request live while a token is computed.

    Args:
        plan: layout and policy of the request.
        block_size: tokens of a KV-cache block.
        token_ids: of the sequence, for a policy that reads them; it may grow while tokens are asked about.
    """

    def __init__(self, plan: Plan, block_size: int, token_ids: Sequence[int] = ()) -> None:
        self._layout, self._size = plan.layout, block_size
        self._changed = ChangedBlocks(plan, block_size, token_ids) if plan.policy.reads_tokens else None
        # What of the condition lives does not depend on ids.
        policy = plan.policy
        if isinstance(policy, PackCache) and self._changed is not None:
            policy = replace(policy, selection="spatial", changed_tokens=1, episodes=0)
        self._retention = Retention(plan.layout, policy, block_size)

    def blocks(self, token: int) -> Tensor:
        """Logical blocks that ``token`` reads if they are not later than it, [blocks]."""
        blocks = torch.from_numpy(self._retention.live_blocks(token))
        frame = self._layout.frame_of(token)
        if self._changed is None or frame == CONDITION:
            return blocks
        own = [tag(self._layout, self._size, block) for block in blocks.tolist()]
        first = self._layout.frame_start(frame) // self._size
        others = [b for b, of in zip(blocks.tolist(), own, strict=True) if of == CONDITION or b >= first]
        return torch.tensor(sorted({*others, *self._changed.of(frame)}), dtype=torch.int64)


def visibility(plan: Plan | None, block_size: int, num_tokens: int, token_ids: Sequence[int] = ()) -> Tensor:
    """Which key each query sees.

    Query p sees key j if j is not later than p and the block of j lives when p is computed. The block that p
    itself is written to lives then by definition.

    Args:
        plan: layout and policy of the request; None: the whole cache is kept.
        block_size: tokens of a KV-cache block; without a plan it does not matter.
        num_tokens: T, length of the sequence.
        token_ids: of the sequence, for a policy that reads them.

    Returns:
        bool, [T, T]: row p, column j is True where query p sees key j.
    """
    tokens = torch.arange(num_tokens)
    causal = tokens[None, :] <= tokens[:, None]
    if plan is None:
        return causal
    live = Live(plan, block_size, token_ids)
    return torch.stack([seen(live, block_size, query, num_tokens) for query in range(num_tokens)])


def seen(live: Live, block_size: int, query: int, num_tokens: int) -> Tensor:
    """The row of `visibility` of one query."""
    tokens = torch.arange(num_tokens)
    block_of = tokens // block_size
    return (tokens <= query) & (torch.isin(block_of, live.blocks(query)) | (block_of == query // block_size))


def frame_visibility(plan: Plan, block_size: int, frame: int, token_ids: Sequence[int] = ()) -> Tensor:
    """Which key every query of ``frame`` sees in masked generation, whatever the pass.

    The history that lives while the frame is made, and the frame itself, whole.

    Args:
        plan: layout and policy of the request.
        block_size: tokens of a KV-cache block.
        frame: 0 or more.
        token_ids: of the sequence, for a policy that reads them.

    Returns:
        bool, [T], T where the frame ends.
    """
    start, stop = plan.layout.frame_start(frame), plan.layout.frame_start(frame + 1)
    tokens = torch.arange(stop)
    return torch.isin(tokens // block_size, Live(plan, block_size, token_ids).blocks(start)) | (tokens >= start)


@lru_cache(maxsize=256)
def positions(plan: Plan | None, block_size: int, num_tokens: int, frame: int) -> Tensor:
    """Model positions of every token, as key and as query, while ``frame`` is made.

    One token after the other, as the method is told: a token's index in the sequence, less the tokens of the frames
    that the window has left behind. A token in a block of the condition keeps the position that it was made at, and one
    in a block that outlives the window the position that it had when the window left it behind.

    Args:
        plan: layout, policy and positions of the request; None: positions are indices.
        block_size: tokens of a KV-cache block; without a plan it does not matter.
        num_tokens: T, length of the sequence.
        frame: the frame being made, or `vllm_packcache.core.layout.CONDITION`.

    Returns:
        int64, [axes, T].
    """
    if plan is None:
        return torch.arange(num_tokens)[None]
    layout, window, scale = plan.layout, plan.positions.window, plan.positions.scale
    length, condition = layout.tokens_per_frame, layout.condition_tokens
    grid_places = _grid_places(layout.frame) if scale is not None else {}
    columns = []
    for token in range(num_tokens):
        own = layout.frame_of(token)
        in_condition_block = token // block_size * block_size < condition
        made_for = own
        if not in_condition_block:
            made_for = frame
            if window is not None and plan.policy.outlives_window:
                made_for = min(frame, tag(layout, block_size, token // block_size) + window)
        dropped = 0 if window is None or own == CONDITION else max(0, made_for - window)
        index = token - dropped * length
        if scale is None:
            columns.append([index])
            continue
        first_picture = condition - layout.condition_image_tokens
        picture, offset = divmod(token - first_picture, length)
        if picture < 0 or offset not in grid_places:
            columns.append([index] * 3)
            continue
        origin = first_picture + layout.frame.frame_start_tokens
        row, column = grid_places[offset]
        columns.append([origin + scale[0] * (picture - dropped), origin + scale[1] * row, origin + scale[2] * column])
    return torch.tensor(columns).T


def _grid_places(frame: FrameLayout) -> dict[int, tuple[int, int]]:
    """Row and column of the tokens of a frame that have one, by their offset in the frame."""
    assert frame.grid is not None
    rows, columns = frame.grid
    places: dict[int, tuple[int, int]] = {}
    for row in range(rows):
        for column in range(columns + frame.row_end_tokens):
            places[frame.frame_start_tokens + len(places)] = (row, column)
    return places
