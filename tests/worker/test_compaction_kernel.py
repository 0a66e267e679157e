"""The kernel that compacts block tables: as its PyTorch twin does, and as the compaction on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiling import compiled
from tests.worker.test_compaction import POLICIES
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.blocks.compaction import compact
from vllm_packcache.worker.blocks.kernel import HEADER, CompactedRows, _compact, compact_rows, compact_rows_reference
from vllm_packcache.worker.step import Row, Step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, LEFT_OVER = 7, -1


def as_tensor(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.as_tensor(values, dtype=dtype, device=DEVICE)


def left_over(rows: int, blocks: int) -> CompactedRows:
    """Memory in which other steps have left something."""
    return CompactedRows(*(part.fill_(LEFT_OVER) for part in CompactedRows.empty(rows, blocks, DEVICE)))


def kept_of(row: Row, block_size: int) -> list[int]:
    """What a row keeps, as the kernel wants it."""
    if row.retention is None or row.retention.layout.frame_of(row.computed) < 0:
        return [0, 0]
    frame = row.retention.layout.frame_of(row.computed)
    past = row.retention.past(frame).tolist()
    return [len(past), row.retention.layout.frame_start(frame) // block_size, *past]


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, int]:
    """Rows whose queries are of one frame each; the split of their blocks."""
    split = draw(st.sampled_from([1, 1, 2, 3]))
    block_size = split * draw(st.sampled_from([1, 2, 4, 8]))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        computed, scheduled = draw(st.integers(0, 200)), draw(st.just(1) | st.integers(1, 40))
        retention = None
        if draw(st.integers(0, 3)):
            condition = draw(st.integers(0, 30))
            layout = VideoLayout(FrameLayout(draw(st.integers(1, 25))), condition, draw(st.integers(0, condition)))
            retention = Retention(layout, draw(st.sampled_from(POLICIES)), block_size)
            end = layout.frame_start(layout.frame_of(computed) + 1)
            scheduled = min(scheduled, end - computed)
        rows.append(Row(retention, computed, scheduled))
    longest = max(row.computed + row.scheduled for row in rows)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = -(-longest // block_size) + 3
    table = 1 + random.permutation(len(rows) * blocks).reshape(len(rows), blocks).astype(np.int32)
    return Step(rows, table, block_size), split


@settings(deadline=None, max_examples=60)
@given(steps(), st.integers(0, 3), st.randoms())
def test_kernel_twin_and_host_agree(case: tuple[Step, int], padding: int, random: object) -> None:
    step, split = case
    rows = len(step.rows)
    slots = list(range(SLOTS))
    random.shuffle(slots)  # type: ignore[attr-defined]
    kept = torch.full((SLOTS, HEADER + step.block_table.shape[1]), 99, dtype=torch.int32)
    for row, slot in zip(step.rows, slots, strict=False):
        keeps = kept_of(row, step.block_size)
        kept[slot, : len(keeps)] = torch.tensor(keeps)
    # As vLLM splits blocks for a kernel.
    table = (step.block_table[:, :, None] * split + np.arange(split)).reshape(rows, -1)
    table = np.concatenate([table, np.zeros((padding, table.shape[1]))])
    lengths = [row.computed + row.scheduled for row in step.rows] + [0] * padding
    arguments = (as_tensor(table), as_tensor(lengths), kept.to(DEVICE), as_tensor(slots[:rows], torch.int64))
    by_kernel, by_twin = (left_over(rows + padding + 2, table.shape[1]) for _ in range(2))
    compact_rows(*arguments, by_kernel, step.block_size, split)
    compact_rows_reference(*arguments, by_twin, step.block_size, split)
    assert torch.equal(by_kernel.seq_lens, by_twin.seq_lens)
    assert torch.equal(by_kernel.block_table, by_twin.block_table)
    assert by_kernel.seq_lens[rows:].tolist() == [0] * padding + [LEFT_OVER] * 2

    batch = compact(step, step.block_size // split)
    assert by_kernel.seq_lens[:rows].tolist() == batch.seq_lens.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        live = -(-length * split // step.block_size)
        assert by_kernel.block_table[row, :live].tolist() == batch.block_table[row, :live].tolist()
        assert set(by_kernel.block_table[row, live:].tolist()) <= {LEFT_OVER}, "more was written than lives"


def test_more_blocks_than_a_program_moves_at_once() -> None:
    blocks = 5000
    table = as_tensor(np.random.default_rng(0).permutation(blocks)[None])
    past = np.sort(np.random.default_rng(1).permutation(4000)[:2500])
    kept = as_tensor([[len(past), 4100, *past]])
    arguments = (table, as_tensor([16 * 4900 + 5]), kept, as_tensor([0], torch.int64))
    by_kernel, by_twin = left_over(1, blocks), left_over(1, blocks)
    compact_rows(*arguments, by_kernel, 16, 1)
    compact_rows_reference(*arguments, by_twin, 16, 1)
    assert by_kernel.seq_lens.tolist() == [16 * (2500 + 800) + 5]
    assert torch.equal(by_kernel.block_table, by_twin.block_table)


def test_a_batch_of_padding_reads_everything() -> None:
    table = as_tensor([[5, 6, 7], [8, 9, 10]])
    out = left_over(2, 3)
    compact_rows(table, as_tensor([9, 4]), as_tensor([[2, 2, 0, 1]]), as_tensor([], torch.int64), out, 4, 1)
    assert out.seq_lens.tolist() == [9, 4]
    assert out.block_table.tolist() == [[5, 6, 7], [8, LEFT_OVER, LEFT_OVER]]


def test_a_row_longer_than_any_request_can_be_is_cut_off() -> None:
    """As vLLM captures and profiles: lengths up to those of the longest sequence, whatever there is room for."""
    table = as_tensor(np.arange(1, 61).reshape(2, 30))
    arguments = (table, as_tensor([60, 7]), as_tensor([[0, 0]]), as_tensor([], torch.int64))
    for compacting in (compact_rows, compact_rows_reference):
        out = left_over(3, 5)
        compacting(*arguments, out, 4, 2)
        assert out.seq_lens.tolist() == [10, 7, LEFT_OVER]
        assert out.block_table.tolist() == [[1, 2, 3, 4, 5], [31, 32, 33, 34, LEFT_OVER], [LEFT_OVER] * 5]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_graph_replays_it() -> None:
    table, lengths = as_tensor([[5, 6, 7, 8]]), as_tensor([13])
    kept, slots, out = as_tensor([[1, 3, 0, 9]]), as_tensor([0], torch.int64), left_over(1, 4)
    compact_rows(table, lengths, kept, slots, out, 4, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_rows(table, lengths, kept, slots, out, 4, 1)
    table.add_(10)
    lengths.add_(1)
    kept[0, 2] = 1
    graph.replay()
    assert out.seq_lens.tolist() == [6]
    assert out.block_table.tolist() == [[16, 18, LEFT_OVER, LEFT_OVER]]


@pytest.mark.parametrize("capability", [86, 90], ids=["A40", "H200"])
def test_it_compiles_for_gpus(capability: int) -> None:
    names = "table_ptr table_stride seq_lens_ptr kept_ptr kept_stride slots_ptr num_slots out_table_ptr "
    names += "out_table_stride most_blocks out_seq_lens_ptr"
    signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names.split()} | {"slots_ptr": "*i64"}
    constants = {"BLOCK_SIZE": 16, "SPLIT": 1, "HEADER_SIZE": HEADER, "AT_ONCE": 1024}
    ptx = compiled(_compact, capability, signature, constants)
    assert "st.global" in ptx
