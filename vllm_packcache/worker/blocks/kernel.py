"""Block-table compaction on the device: what `worker.blocks.compaction` does on the host, for rows of one frame each.

What a request keeps of the past is the same for every token of a frame, so it is uploaded once a frame. With it a
step's compacted block table and live lengths follow from the block table and lengths that vLLM has put on the
device: no number comes back to the host, nothing is allocated, and a row costs time for its live blocks only.

The memory of what one request keeps is a row of int32: ``[n, first, b_1 ... b_n]``. Its queries read the n blocks b
(ascending logical indices, in the KV cache manager's blocks) in full, and everything from block ``first`` on. All
zeros: the request reads everything.

This module needs Triton and neither vLLM nor a GPU: Triton's interpreter runs it on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADER = 2
"""Numbers of what a request keeps that come before its blocks: n and first."""

_BLOCKS_AT_ONCE = 1024


class CompactedRows(NamedTuple):
    """Where compacted rows are written to: the same memory in every step, so that captured graphs read it.

    Attributes:
        block_table: int32, [most rows, most blocks]; of a row only its live blocks are written. A row that has more,
            which none of a request does, is cut off: what vLLM profiles and captures with holds no blocks.
        seq_lens: int32, [most rows].
    """

    block_table: Tensor
    seq_lens: Tensor

    @classmethod
    def empty(cls, rows: int, blocks: int, device: torch.device) -> CompactedRows:
        """Memory for ``rows`` rows of at most ``blocks`` blocks each."""
        return cls(
            torch.zeros(rows, blocks, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> CompactedRows:
        """The first ``rows`` of them."""
        return CompactedRows(self.block_table[:rows], self.seq_lens[:rows])


def compact_rows(
    block_table: Tensor, seq_lens: Tensor, kept: Tensor, slots: Tensor, out: CompactedRows, block_size: int, split: int
) -> None:
    """Write the live blocks and live lengths of a step's rows to ``out``.

    Args:
        block_table: int32, [r, blocks]: the kernel's blocks of each row, `split` for each of the manager's.
        seq_lens: int32, [r]: tokens of each row, those of the step included; 0 for rows that only fill up a batch.
        kept: int32, [slots, HEADER + most blocks kept]: what requests keep.
        slots: int64, [n], n <= r: the row of ``kept`` of each row of the batch. The rows behind the n-th read
            everything.
        out: at least r rows.
        block_size: tokens of the manager's blocks.
        split: how many of the kernel's blocks make one of the manager's.
    """
    _compact[(len(seq_lens),)](
        block_table,
        block_table.stride(0),
        seq_lens,
        kept,
        kept.stride(0),
        slots,
        len(slots),
        out.block_table,
        out.block_table.stride(0),
        out.block_table.shape[1],
        out.seq_lens,
        BLOCK_SIZE=block_size,
        SPLIT=split,
        HEADER_SIZE=HEADER,
        AT_ONCE=_BLOCKS_AT_ONCE,
    )


@triton.jit(do_not_specialize=["num_slots", "most_blocks"])
def _compact(  # type: ignore[no-untyped-def]
    table_ptr,
    table_stride,
    seq_lens_ptr,
    kept_ptr,
    kept_stride,
    slots_ptr,
    num_slots,
    out_table_ptr,
    out_table_stride,
    most_blocks,
    out_seq_lens_ptr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    HEADER_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    is_request = row < num_slots
    slot = tl.load(slots_ptr + row, mask=is_request, other=0)
    kept_ptr += slot * kept_stride
    past = tl.load(kept_ptr, mask=is_request, other=0)
    first = tl.load(kept_ptr + 1, mask=is_request, other=0)
    kernel_block: tl.constexpr = BLOCK_SIZE // SPLIT
    length = tl.load(seq_lens_ptr + row) - (first - past) * BLOCK_SIZE
    length = tl.minimum(length, most_blocks * kernel_block)
    tl.store(out_seq_lens_ptr + row, length)

    blocks = (length + kernel_block - 1) // kernel_block
    for start in range(0, blocks, AT_ONCE):
        target = start + tl.arange(0, AT_ONCE)
        live = target < blocks
        is_past = target < past * SPLIT
        logical = tl.load(kept_ptr + HEADER_SIZE + target // SPLIT, mask=live & is_past, other=0)
        source = tl.where(is_past, logical * SPLIT + target % SPLIT, target + (first - past) * SPLIT)
        block = tl.load(table_ptr + row * table_stride + source, mask=live, other=0)
        tl.store(out_table_ptr + row * out_table_stride + target, block, mask=live)


def compact_rows_reference(
    block_table: Tensor, seq_lens: Tensor, kept: Tensor, slots: Tensor, out: CompactedRows, block_size: int, split: int
) -> None:
    """The same as `compact_rows`, in PyTorch and row by row: what the kernel is compared with."""
    for row, tokens in enumerate(seq_lens.tolist()):
        keeps = kept[slots[row]] if row < len(slots) else kept.new_zeros(HEADER)
        past, first = keeps[:HEADER].tolist()
        everything = torch.arange(-(-tokens * split // block_size), device=block_table.device)
        in_past = torch.isin(everything // split, keeps[HEADER : HEADER + past])
        most = out.block_table.shape[1]
        live = block_table[row, everything[in_past | (everything >= first * split)]][:most]
        out.block_table[row, : len(live)] = live
        out.seq_lens[row] = min(tokens - (first - past) * block_size, most * block_size // split)
