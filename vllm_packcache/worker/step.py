"""What the rest of the worker side must know of the step being run, published by the runner's adapter.

vLLM's metadata builders see block tables and lengths, not requests. The adapter of the model runner knows the
requests; it publishes how to compact while it builds the attention metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.plan import Stream, VideoRequest
from vllm_packcache.core.positions import Int64, Positions
from vllm_packcache.core.retention import Retention

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

Compaction = Callable[["CommonAttentionMetadata", "AttentionMetadataBuilder[Any]"], "CommonAttentionMetadata"]
"""What attention is to read in a step, for the builder that is about to build: metadata with live blocks only."""


class Kept(NamedTuple):
    """A video in the worker: what of it lives, and where its tokens are."""

    retention: Retention
    positions: Positions

    @classmethod
    def of(cls, request: VideoRequest | None, block_size: int) -> Kept | None:
        """Of the first stream of a causal request; None: it keeps its whole cache, and positions are as without us."""
        return None if request is None or request.as_stock else cls.of_stream(request.streams[0], block_size)

    @classmethod
    def of_stream(cls, stream: Stream, block_size: int) -> Kept:
        """Of one stream."""
        plan = stream.plan
        return cls(Retention(plan.layout, plan.policy, block_size), plan.positions)


class Row(NamedTuple):
    """One request of the batch: tokens ``[computed, computed + scheduled)`` are run in this step.

    A video has a retention and positions; other requests have neither.
    """

    retention: Retention | None
    computed: int
    scheduled: int
    positions: Positions | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The batch of one step.

    Args:
        rows: the requests in batch order.
        block_table: host copy of the block table, [at least len(rows), blocks], int32: the manager's blocks.
        block_size: tokens of a block of that table, the same as every retention's.
    """

    rows: list[Row]
    block_table: npt.NDArray[np.int32]
    block_size: int


def position_shifts(rows: Sequence[Row]) -> Int64 | None:
    """By how much the tokens of ``rows`` are positioned off their index, [axes, tokens]; None: none is."""
    shifts = [_position_shift(row) for row in rows]
    if all(isinstance(shift, int) for shift in shifts):
        if not any(shifts):
            return None
        return np.repeat(np.array(shifts), [row.scheduled for row in rows])[None]
    return np.concatenate(
        [np.broadcast_to(shift, (3, row.scheduled)) for row, shift in zip(rows, shifts, strict=True)], axis=1
    )


def _position_shift(row: Row) -> int | Int64:
    """Of all the row's tokens, or with three axes of each, [3, tokens]."""
    positions = row.positions
    if positions is None or positions.as_stock:
        return 0
    if row.scheduled > 1:
        _check_chunk(row, positions)
    layout = positions.layout
    window_start = positions.window_start(layout.frame_of(row.computed))
    if positions.scale is None:
        return -window_start * layout.tokens_per_frame
    tokens = np.arange(row.computed, row.computed + row.scheduled)
    return positions.of(tokens, window_start) - tokens


def _check_chunk(row: Row, positions: Positions) -> None:
    stop, slide = row.computed + row.scheduled, positions.next_slide(row.computed)
    if slide is not None and stop > slide:
        raise RuntimeError(
            f"tokens {row.computed} to {stop} of a video are run in one step, but its window slides at {slide}: the "
            "scheduler did not end the chunk there"
        )


_current: ContextVar[Compaction | None] = ContextVar("packcache_compaction", default=None)


def current_compaction() -> Compaction | None:
    """How to compact the step whose attention metadata is being built; None: it is read as it is."""
    return _current.get()


@contextmanager
def publish(compaction: Compaction) -> Iterator[None]:
    """Make ``compaction`` the current one."""
    token = _current.set(compaction)
    try:
        yield
    finally:
        _current.reset(token)
