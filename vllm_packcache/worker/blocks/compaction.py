"""Block-table compaction: attention reads live blocks only, and every backend works unmodified.

Softmax attention does not depend on the order of its keys and RoPE is already in the cached ones, so a row's
block table may list just the live blocks, with its length reduced to the live tokens. A row whose queries
span several frames becomes one virtual row a frame, because each frame sees what was live while it was made.

This is done on the host, for the V1 runner; `vllm_packcache.worker.blocks.kernel` is for the V2 runner.
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
        step: the batch; its block table is in the manager's blocks.
        kernel_block_size: tokens of a block of the compacted table. It divides the manager's block size: for
            backends that want smaller blocks vLLM splits the manager's block b into b * split + 0, 1, ...
    """
    rows = [virtual for source, row in enumerate(step.rows) for virtual in _virtual_rows(source, row, step.block_size)]
    split = step.block_size // kernel_block_size
    widths = [-(-row.seq_len // kernel_block_size) for row in rows]
    table = np.zeros((len(rows), max(widths)), dtype=np.int32)
    for target, row, width in zip(table, rows, widths, strict=True):
        blocks = step.block_table[row.source]
        if split == 1:
            past = len(row.past)
            blocks.take(row.past, out=target[:past])
            target[past:width] = blocks[row.tail_start : row.tail_stop]
        else:
            live = np.concatenate([blocks[row.past], blocks[row.tail_start : row.tail_stop]])
            # The last of the manager's blocks may be filled so little that not all its parts hold tokens.
            target[:width] = (live[:, None] * split + np.arange(split)).ravel()[:width]
    starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([row.queries for row in rows], out=starts[1:])
    return CompactedBatch(
        block_table=table,
        seq_lens=np.array([row.seq_len for row in rows], dtype=np.int32),
        query_start_loc=starts,
        source_rows=np.array([row.source for row in rows]),
    )


def _virtual_rows(source: int, row: Row, block_size: int) -> list[_VirtualRow]:
    stop = row.computed + row.scheduled
    if row.retention is None:
        everything = np.empty(0, dtype=np.int64)
        return [_VirtualRow(source, row.scheduled, everything, 0, -(-stop // block_size), stop)]
    return [
        _VirtualRow(
            source,
            segment.stop - segment.start,
            segment.past,
            segment.tail_start,
            -(-segment.stop // block_size),
            segment.live_tokens(block_size),
        )
        for segment in row.retention.segments(row.computed, stop)
    ]
