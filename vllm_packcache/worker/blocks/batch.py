"""What the requests of a V1 batch read, kept from step to step: for each of them it changes once a frame.

`vllm_packcache.worker.blocks.compaction` works a step out anew, request by request. Here a step of requests that stay
in their frames costs a few array operations, however many they are. Only logical indices are kept: the block table is
read in every step, so a request that comes back with other blocks is never served from the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.blocks import BlockIndices
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.positions import Int64
from vllm_packcache.worker.blocks.compaction import CompactedBatch, compact
from vllm_packcache.worker.step import Kept, Row, Step, position_shifts

_FOR_EVER = np.iinfo(np.int64).max
_NOTHING: BlockIndices = np.empty(0, dtype=np.int64)


class BatchReads:
    """The batch of one step, and of those after it as long as its requests are the same.

    Args:
        kept: of every request of the batch, in its order; None: the request keeps its whole cache.
        block_size: tokens of the manager's blocks.
    """

    def __init__(self, kept: Sequence[Kept | None], block_size: int) -> None:
        self.kept = list(kept)
        self.block_size = block_size
        count = len(self.kept)
        # What is known of a request holds while its tokens lie in [_begins, _ends).
        self._begins = np.zeros(count, dtype=np.int64)
        self._ends = np.zeros(count, dtype=np.int64)
        self._dropped_tokens = np.zeros(count, dtype=np.int64)
        self._shifts = np.zeros(count, dtype=np.int64)
        self._past: list[tuple[BlockIndices, int]] = [(_NOTHING, 0)] * count
        self._index, self._columns = np.zeros((count, 0), dtype=np.int64), 0
        self._one_axis = all(own is None or own.positions.scale is None for own in self.kept)
        self.has_videos = any(own is not None for own in self.kept)

    def begin(self, computed: Int64, scheduled: Int64, block_table: npt.NDArray[np.int32]) -> None:
        """Another step begins.

        Args:
            computed: tokens of each request that have been computed, [n].
            scheduled: tokens of each that are run in this step, [n].
            block_table: the manager's blocks, [at least n, blocks]; read until the next step begins.
        """
        if block_table.shape[1] != self._columns:
            self._columns, self._index = block_table.shape[1], self._index[:, :0]
        self.computed, self.scheduled, self.block_table = computed, scheduled, block_table
        self._stops = computed + scheduled
        self.__dict__.pop("step", None)
        stale = (computed < self._begins) | (self._stops > self._ends)
        self.entered: list[int] = np.flatnonzero(stale).tolist() if stale.any() else []
        """Requests that are in another frame than in the step before."""
        self._spans = False
        for row in self.entered:
            self._enter(row)

    @property
    def reads_everything(self) -> bool:
        """Whether no request has dropped anything: the batch is read as it is."""
        return not self._spans and not self._dropped_tokens.any()

    @cached_property
    def step(self) -> Step:
        """The same request by request."""
        rows = [
            Row(None, computed, scheduled) if own is None else Row(own.retention, computed, scheduled, own.positions)
            for own, computed, scheduled in zip(self.kept, self.computed.tolist(), self.scheduled.tolist(), strict=True)
        ]
        return Step(rows, self.block_table, self.block_size)

    def shifts(self) -> Int64 | None:
        """By how much tokens are positioned off their index, [axes, tokens]; None: none is."""
        if self._spans or not self._one_axis:
            return position_shifts(self.step.rows)
        return np.repeat(self._shifts, self.scheduled)[None] if self._shifts.any() else None

    def compact(self, kernel_block_size: int) -> CompactedBatch:
        """The batch as attention sees it; see `vllm_packcache.worker.blocks.compaction.compact`."""
        if self._spans:
            return compact(self.step, kernel_block_size)
        lengths = self._stops - self._dropped_tokens
        blocks = -(-int(lengths.max()) // self.block_size)
        if blocks > self._index.shape[1]:
            self._widen(2 * blocks)
        table = self.block_table.reshape(-1).take(self._index[:, :blocks])
        split = self.block_size // kernel_block_size
        if split > 1:
            table = (table[:, :, None] * split + np.arange(split, dtype=np.int32)).reshape(len(table), -1)
        widths = -(-lengths // kernel_block_size)
        table[np.arange(table.shape[1]) >= widths[:, None]] = 0
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(self.scheduled, out=starts[1:])
        return CompactedBatch(table, lengths.astype(np.int32), starts, np.arange(len(lengths)))

    def _enter(self, row: int) -> None:
        """Work out what a request reads in the frame that it is in now."""
        own, computed = self.kept[row], int(self.computed[row])
        past, first, begins, ends, shift = _NOTHING, 0, 0, _FOR_EVER, 0
        if own is not None:
            retention, layout = own.retention, own.retention.layout
            frame = layout.frame_of(computed)
            begins, ends = layout.frame_start(frame), layout.frame_start(frame + 1)
            if self._stops[row] > ends:
                # What its tokens read is not the same for all of them.
                self._spans, self._ends[row] = True, 0
                return
            if frame != CONDITION:
                past, first = retention.past(frame), retention.blocks.tail_start(frame)
            if own.positions.scale is None:
                shift = -own.positions.window_start(frame) * layout.tokens_per_frame
        self._begins[row], self._ends[row], self._shifts[row] = begins, ends, shift
        self._dropped_tokens[row] = (first - len(past)) * self.block_size
        self._past[row] = past, first
        self._list(row)

    def _widen(self, blocks: int) -> None:
        self._index = np.empty((len(self.kept), min(blocks, self._columns)), dtype=np.int64)
        for row in range(len(self.kept)):
            self._list(row)

    def _list(self, row: int) -> None:
        """Where in the block table the blocks of a request are that it reads, as far as there may be any."""
        past, first = self._past[row]
        index, columns = self._index[row], self._columns
        listed = min(len(past), len(index))
        index[:listed] = past[:listed]
        index[listed:] = np.arange(first, first + len(index) - listed)
        # Behind its last block there are none: what is taken there is not read.
        np.minimum(index, columns - 1, out=index)
        index += row * columns
