"""Block-table compaction: attention reads live blocks only, and every backend works unmodified.

Softmax attention does not depend on the order of its keys and RoPE is already in the cached ones, so a row's
block table may list just the live blocks, with its length reduced to the live tokens. A row whose queries span
several frames becomes one virtual row a frame, because each frame sees what was live while it was made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_packcache.worker.step import Row, Step

Int32 = npt.NDArray[np.int32]


class CompactedBatch(NamedTuple):
    """A batch as attention sees it; V virtual rows, in the order of the queries.

    Attributes:
        block_table: live blocks of each row, [V, most blocks of a row], padded with the null block 0.
        seq_lens: live tokens of each row, queries included, [V].
        query_start_loc: offsets of the rows' queries, [V + 1].
        source_rows: the request of each row, [V].
    """

    block_table: Int32
    seq_lens: Int32
    query_start_loc: Int32
    source_rows: npt.NDArray[np.int64]


class _VirtualRow(NamedTuple):
    source: int
    queries: int
    past: npt.NDArray[np.int64]
    tail_start: int
    tail_stop: int
    seq_len: int


def compact(step: Step, kernel_block_size: int) -> CompactedBatch:
    """Compact the block tables of a step.

    Args:
        step: the batch; its block table is in kernel blocks.
        kernel_block_size: tokens of a block of that table. It divides the retention's block size: vLLM splits
            the manager's blocks for backends that want smaller ones.
    """
    rows = [
        virtual for source, row in enumerate(step.rows) for virtual in _virtual_rows(source, row, kernel_block_size)
    ]
    widths = [len(row.past) + row.tail_stop - row.tail_start for row in rows]
    table = np.zeros((len(rows), max(widths)), dtype=np.int32)
    for target, row in zip(table, rows, strict=True):
        blocks = step.block_table[row.source]
        past = len(row.past)
        target[:past] = blocks[row.past]
        target[past : past + row.tail_stop - row.tail_start] = blocks[row.tail_start : row.tail_stop]
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([row.queries for row in rows], out=starts[1:])
    return CompactedBatch(
        block_table=table,
        seq_lens=np.array([row.seq_len for row in rows], dtype=np.int32),
        query_start_loc=starts,
        source_rows=np.array([row.source for row in rows]),
    )


def _virtual_rows(source: int, row: Row, kernel_block_size: int) -> list[_VirtualRow]:
    stop = row.computed + row.scheduled
    if row.retention is None:
        everything = np.empty(0, dtype=np.int64)
        return [_VirtualRow(source, row.scheduled, everything, 0, -(-stop // kernel_block_size), stop)]
    block_size = row.retention.block_size
    split = block_size // kernel_block_size
    return [
        _VirtualRow(
            source,
            segment.stop - segment.start,
            segment.past if split == 1 else (segment.past[:, None] * split + np.arange(split)).ravel(),
            segment.tail_start * split,
            -(-segment.stop // kernel_block_size),
            segment.live_tokens(block_size),
        )
        for segment in row.retention.segments(row.computed, stop)
    ]
