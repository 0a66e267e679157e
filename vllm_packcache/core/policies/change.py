"""Which blocks of the history are kept by what changed in them: the option ``selection: changed``.

In a video most places do not change from one frame to the next, and a block of unchanged background says nothing that
the newer frame does not say. So a block counts for the tokens in it that differ from the same place of the next frame,
and the room of a whole history goes to those that changed most, however old they are within the window.
"""

from __future__ import annotations

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.policies.base import Int64, Tokens
from vllm_packcache.core.policies.selection import spread_rank


def changed_tokens(blocks: BlockMap, first: int, frame: int, tokens: Tokens) -> Int64:
    """How many tokens of each block differ from the same place of the next frame.

    Args:
        blocks: tags of the request's logical blocks.
        first: a block behind the condition.
        frame: the frame being made; those before it are finished.
        tokens: ids of the sequence.

    Returns:
        Of the blocks from ``first`` on whose tokens have a next frame that is finished, [blocks].
    """
    size, length = blocks.block_size, blocks.layout.tokens_per_frame
    ids = tokens(first * size, blocks.layout.frame_start(frame))
    whole = max(0, len(ids) - length) // size * size
    return (ids[:whole] != ids[length : length + whole]).reshape(-1, size).sum(axis=1)


def keep_changed(
    blocks: BlockMap,
    frame: int,
    held: BlockIndices,
    evenly: BlockIndices,
    keep: int,
    tokens: Tokens,
    threshold: int,
    scene: int,
    anchors: BlockIndices,
) -> BlockIndices:
    """The blocks of the history that are kept while ``frame`` is made.

    The newest frame comes first, then the anchors of scenes that have ended, then what changed in the scene that is
    shown: blocks with more changed tokens first, then newer frames, then those that a selection of each frame spread
    evenly would take first. A block in which fewer than ``threshold`` tokens changed, or of a scene that has ended, is
    kept only where the others leave room: what ``evenly`` names first.

    Args:
        blocks: tags of the request's logical blocks.
        frame: the frame being made.
        held: blocks that may be kept, ascending: those of the newest frame, and what lived before of older ones.
        evenly: what is to be kept first where nothing changed, ascending.
        keep: number of blocks, at most those of ``held``.
        tokens: ids of the sequence.
        threshold: changed tokens from which on a block counts as changed.
        scene: the first frame of the scene that is shown.
        anchors: blocks of older frames.

    Returns:
        ``keep`` of ``held``, ascending.
    """
    if keep == len(held):
        return held
    size, frames = blocks.block_size, blocks.tags(held)
    # The newest frame cannot be compared yet.
    changed = np.where(frames == frame - 1, size + 2, 0)
    seen = np.flatnonzero((frames >= scene) & (frames < frame - 1))
    if len(seen):
        compared = changed_tokens(blocks, int(held[seen[0]]), frame, tokens)[held[seen] - held[seen[0]]]
        changed[seen] = np.where(compared < threshold, 0, compared)
    changed[np.isin(held, anchors, assume_unique=True)] = size + 1
    rank = np.empty(len(held), dtype=np.int64)
    for tag in np.unique(frames).tolist():
        own, tagged = frames == tag, blocks.frame_blocks(tag)
        rank[own] = spread_rank(len(tagged))[held[own] - tagged.start]
    beyond = (changed == 0) & ~np.isin(held, evenly, assume_unique=True)
    order = np.lexsort((rank, -frames, beyond, -changed))
    return np.sort(held[order[:keep]])
