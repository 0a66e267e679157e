"""Which blocks of a frame are kept, when not all of them are: the choices of the option ``selection``.

A selection is an order of a frame's blocks; a frame that may keep n of them keeps the first n. The order never changes,
so that a frame which shrinks keeps a part of what it has: an evicted block cannot come back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap

Selection = Literal["spatial", "rows", "tail", "random", "changed"]
"""``spatial``: spread evenly over the picture, block by block; ``rows``: the same, a whole row of the grid after the
other; ``tail``: the last ones; ``random``: drawn anew for every frame, the same wherever and whenever it is asked;
``changed``: those of the whole history in which most tokens changed, see `vllm_packcache.core.policies.change`."""

NEEDS_GRID: frozenset[Selection] = frozenset({"rows"})
"""Selections that must know rows and columns."""

RANDOM_SEED = 20_260_104
"""Of ``random``: any number, as long as scheduler and workers have the same."""


def select(selection: Selection, blocks: BlockMap, frame: int, keep: int) -> BlockIndices:
    """The blocks tagged ``frame`` of which ``keep`` are kept, ascending.

    Args:
        selection: the order in which they are kept.
        blocks: tags of the request's logical blocks; for ``rows`` its layout has a grid.
        frame: 0 or more.
        keep: number of blocks, 0 or more.
    """
    tagged = blocks.frame_blocks(frame)
    if keep >= len(tagged):
        return np.arange(tagged.start, tagged.stop)
    return np.sort(tagged.start + _ORDERS[selection](blocks, frame)[:keep])


def keep_fraction(blocks: range, fraction: float) -> BlockIndices:
    """``fraction`` of ``blocks``, rounded up to whole blocks, spread evenly, ascending."""
    # Floating-point dust must not keep a whole block more: 0.7 * 10 is 7.000000000000001 on some paths.
    keep = int(np.ceil(fraction * len(blocks) - 1e-9))
    return np.sort(blocks.start + spread_order(len(blocks))[:keep])


@lru_cache(maxsize=256)
def spread_order(count: int) -> BlockIndices:
    """The numbers 0 .. count - 1 in van der Corput (bit-reversed) order.

    Every prefix is spread evenly over the range, and every longer prefix contains the shorter ones: a frame
    can shrink by cutting the end and still covers the whole picture.

    Source: van der Corput sequence in base 2, ranked among ``count`` items.
    """
    bits = max(1, (count - 1).bit_length())
    numbers = np.arange(1 << bits)
    reversed_numbers = np.zeros_like(numbers)
    for bit in range(bits):
        reversed_numbers |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return _frozen(reversed_numbers[reversed_numbers < count])


@lru_cache(maxsize=256)
def spread_rank(count: int) -> BlockIndices:
    """At which place of `spread_order` each of the numbers 0 .. count - 1 is."""
    rank = np.empty(count, dtype=np.int64)
    rank[spread_order(count)] = np.arange(count)
    return _frozen(rank)


def _spatial(blocks: BlockMap, frame: int) -> BlockIndices:
    return spread_order(len(blocks.frame_blocks(frame)))


def _rows(blocks: BlockMap, frame: int) -> BlockIndices:
    layout = blocks.layout.frame
    assert layout.grid is not None
    tagged = blocks.frame_blocks(frame)
    # A block counts as one of the row that its middle is in: on its edges it may hold a token of the next.
    middle = tagged.start * blocks.block_size + blocks.block_size // 2 - blocks.layout.frame_start(frame)
    rows, columns = layout.grid
    return _row_order(
        len(tagged),
        blocks.block_size,
        middle - layout.frame_start_tokens,
        rows,
        columns + layout.row_end_tokens,
    )


@lru_cache(maxsize=256)
def _row_order(count: int, block_size: int, first_middle: int, rows: int, row_tokens: int) -> BlockIndices:
    middles = first_middle + block_size * np.arange(count)
    row = np.clip(middles // row_tokens, 0, rows - 1)
    rank = np.empty(rows, dtype=np.int64)
    rank[spread_order(rows)] = np.arange(rows)
    return _frozen(np.argsort(rank[row], kind="stable"))


def _tail(blocks: BlockMap, frame: int) -> BlockIndices:
    return np.arange(len(blocks.frame_blocks(frame)))[::-1]


def _random(blocks: BlockMap, frame: int) -> BlockIndices:
    return _random_order(len(blocks.frame_blocks(frame)), frame)


@lru_cache(maxsize=256)
def _random_order(count: int, frame: int) -> BlockIndices:
    return _frozen(np.random.default_rng((RANDOM_SEED, frame)).permutation(count))


def _frozen(order: BlockIndices) -> BlockIndices:
    order = order.astype(np.int64)
    order.flags.writeable = False
    return order


_ORDERS: dict[Selection, Callable[[BlockMap, int], BlockIndices]] = {
    "spatial": _spatial,
    "rows": _rows,
    "tail": _tail,
    "random": _random,
    # Where nothing changed.
    "changed": _spatial,
}
