"""Compacted block tables against what each query may read, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.blocks.compaction import CompactedBatch, compact
from vllm_packcache.worker.step import Row, Step

NULL_BLOCK = 0

POLICIES: list[Policy] = [
    PackCache(history_frames=1.0, window=2, selection="spatial"),
    PackCache(history_frames=2.5, window=4, decay=0.4, selection="spatial"),
    PackCache(history_frames=1.0, window=3, gamma_text=0.5, gamma_condition=0.25, selection="spatial"),
    SlidingWindow(window=1),
    AttentionSink(sink_tokens=5, recent_tokens=11),
    Full(),
]


# --------------------------------------------------------------------------- what queries may read


def visible(retention: Retention | None, query: int) -> list[int]:
    """The tokens that the query at index ``query`` reads, itself included, ascending.

    Said with the policy and the layout alone: the blocks kept of the past of the query's frame, and
    everything from the block on in which the frame begins.
    """
    if retention is None:
        return list(range(query + 1))
    frame = retention.layout.frame_of(query)
    if frame == CONDITION:
        return list(range(query + 1))
    block_size = retention.block_size
    kept = set(retention.policy.past_blocks(retention.blocks, frame).tolist())
    begins = retention.layout.frame_start(frame) // block_size
    return [token for token in range(query + 1) if token // block_size in kept or token // block_size >= begins]


def slot(blocks: np.ndarray, block_size: int, token: int) -> int:
    """Where a token lies in the KV cache, whatever the blocks: a kernel's are parts of the manager's."""
    return int(blocks[token // block_size]) * block_size + token % block_size


def slots_read(batch: CompactedBatch, kernel_block_size: int) -> list[list[int]]:
    """The slots that each query reads of a compacted batch, as any causal kernel reads it."""
    reads = []
    for row, blocks in enumerate(batch.block_table):
        queries = int(batch.query_start_loc[row + 1] - batch.query_start_loc[row])
        for query in range(queries):
            length = int(batch.seq_lens[row]) - queries + query + 1
            reads.append([slot(blocks, kernel_block_size, token) for token in range(length)])
    return reads


class Case(NamedTuple):
    """A step and the size of the blocks that the kernel wants."""

    step: Step
    kernel_block_size: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel_block_size = draw(st.sampled_from([1, 2, 4, 8]))
    block_size = kernel_block_size * draw(st.sampled_from([1, 1, 2, 3]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        retention = None
        if draw(st.integers(0, 3)):
            condition = draw(st.integers(0, 30))
            layout = VideoLayout(FrameLayout(draw(st.integers(1, 25))), condition, draw(st.integers(0, condition)))
            retention = Retention(layout, draw(st.sampled_from(POLICIES)), block_size)
        # Decoding, or a chunk that may begin and end anywhere and take in several frames.
        rows.append(Row(retention, draw(st.integers(0, 150)), draw(st.just(1) | st.integers(1, 60))))
    table = block_table(rows, block_size, draw(st.integers(0, 2**32 - 1)))
    return Case(Step(rows, table, block_size), kernel_block_size)


def block_table(rows: list[Row], block_size: int, seed: int) -> np.ndarray:
    """Distinct physical blocks in no order; what lies behind a row's own is left over from other rows."""
    blocks = max(-(-(row.computed + row.scheduled) // block_size) for row in rows) + 3
    # The buffer holds more rows than the batch.
    shape = (len(rows) + 2, blocks)
    numbers = np.random.default_rng(seed).permutation(np.arange(1, shape[0] * shape[1] + 1))
    return numbers.reshape(shape).astype(np.int32)


# --------------------------------------------------------------------------- compact()


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_query_reads_what_it_may_in_causal_order(case: Case) -> None:
    step, kernel_block_size = case
    batch = compact(step, kernel_block_size)
    # A causal kernel hides the keys behind a query: the order matters, down to the query's own slot.
    assert slots_read(batch, kernel_block_size) == [
        [slot(blocks, step.block_size, token) for token in visible(row.retention, query)]
        for row, blocks in zip(step.rows, step.block_table, strict=False)
        for query in range(row.computed, row.computed + row.scheduled)
    ]


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_batch_is_well_formed(case: Case) -> None:
    step, kernel_block_size = case
    batch = compact(step, kernel_block_size)
    virtual_rows = len(batch.seq_lens)

    assert batch.block_table.dtype == batch.seq_lens.dtype == batch.query_start_loc.dtype == np.int32
    assert batch.block_table.shape[0] == len(batch.source_rows) == virtual_rows
    assert batch.query_start_loc.shape == (virtual_rows + 1,)
    assert batch.query_start_loc[0] == 0
    queries = np.diff(batch.query_start_loc)
    assert (queries > 0).all()
    assert (queries <= batch.seq_lens).all()

    # Rows in the order of the queries: each request's are adjacent and add up to what was scheduled.
    assert (np.diff(batch.source_rows) >= 0).all()
    scheduled = np.bincount(batch.source_rows, weights=queries, minlength=len(step.rows))
    assert scheduled.tolist() == [row.scheduled for row in step.rows]

    # As wide as the longest row; the rest is the null block.
    used = -(-batch.seq_lens // kernel_block_size)
    assert batch.block_table.shape[1] == used.max()
    padding = np.arange(batch.block_table.shape[1]) >= used[:, None]
    assert (batch.block_table[padding] == NULL_BLOCK).all()
    assert (batch.block_table[~padding] != NULL_BLOCK).all()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(cases(), st.data())
def test_a_chunk_reads_what_its_parts_would(case: Case, data: st.DataObject) -> None:
    step, kernel_block_size = case
    whole = slots_read(compact(step, kernel_block_size), kernel_block_size)
    parts: list[list[list[int]]] = []
    for index, row in enumerate(step.rows):
        cut = data.draw(st.integers(0, row.scheduled))
        pieces = [
            Row(row.retention, row.computed, cut),
            Row(row.retention, row.computed + cut, row.scheduled - cut),
        ]
        table = step.block_table[index : index + 1]
        parts += [
            slots_read(compact(Step([piece], table, step.block_size), kernel_block_size), kernel_block_size)
            for piece in pieces
            if piece.scheduled
        ]
    assert whole == [read for part in parts for read in part]


def test_a_backend_with_smaller_blocks_reads_the_parts_of_the_managers() -> None:
    # Blocks of 8 split in two; 21 tokens end in the third block's second part.
    step = Step([Row(None, 20, 1), Row(None, 3, 1)], np.array([[5, 3, 7], [9, 0, 0]], dtype=np.int32), 8)
    batch = compact(step, 4)
    assert batch.block_table.tolist() == [[10, 11, 6, 7, 14, 15], [18, 0, 0, 0, 0, 0]]
    assert batch.seq_lens.tolist() == [21, 4]


def test_one_row_a_frame() -> None:
    # Condition 10, frames of 8, blocks of 4: [6, 30) takes in the condition's end and frames 0, 1, 2.
    retention = Retention(VideoLayout(FrameLayout(8), 10), SlidingWindow(window=1), 4)
    step = Step([Row(retention, 6, 24)], np.arange(1, 10, dtype=np.int32)[None], 4)
    batch = compact(step, 4)
    # Frame 2 begins at 26 in block 6; of the past it sees the condition (0-2) and frame 1 (blocks 4 and 5).
    assert batch.block_table.tolist() == [
        [1, 2, 3, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 0, 0],
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, 5, 6, 7, 8],
    ]
    assert batch.seq_lens.tolist() == [10, 18, 26, 26]
    assert batch.query_start_loc.tolist() == [0, 4, 12, 20, 24]
    assert batch.source_rows.tolist() == [0, 0, 0, 0]


# --------------------------------------------------------------------------- the real kernel


HEADS, KV_HEADS, HEAD_SIZE, KERNEL_BLOCK = 4, 2, 32, 32


@pytest.mark.parametrize("block_size", [KERNEL_BLOCK, 2 * KERNEL_BLOCK], ids=lambda size: f"block{size}")
@pytest.mark.parametrize("policy", POLICIES[:5], ids=lambda policy: policy.name)
def test_the_cpu_kernel_on_compacted_tables_equals_masked_attention(policy: Policy, block_size: int) -> None:
    """vLLM's kernel on live blocks against softmax over the whole sequence with hidden keys masked.

    What no query may see is NaN in the cache: reading any of it would show. Both sides sum some 500 products
    in float32, in different orders, which is worth a few units in the sixth digit.
    """
    generator = torch.Generator().manual_seed(7)
    layout = VideoLayout(FrameLayout(75), 70)
    rows = [
        Row(Retention(layout, policy, block_size), 260, 170),  # a chunk over frames 2, 3 and 4
        Row(None, 40, 25),  # text
        Row(Retention(layout, policy, block_size), 70 + 6 * 75 + 12, 1),  # decoding inside frame 6
        Row(None, 0, 33),
        Row(Retention(layout, policy, block_size), 0, 90),  # a prompt that ends in frame 0
    ]
    table = block_table(rows, block_size, seed=3)
    batch = compact(Step(rows, table, block_size), KERNEL_BLOCK)

    isa = _get_attn_isa(torch.float32, KERNEL_BLOCK, HEAD_SIZE)
    cache = torch.zeros((table.max() + 1) * block_size // KERNEL_BLOCK, KV_HEADS, 2 * KERNEL_BLOCK, HEAD_SIZE)
    key_cache, value_cache = cache.chunk(2, dim=2)
    queries, expected = [], []
    for row, blocks in zip(rows, table, strict=False):
        stop = row.computed + row.scheduled
        query = torch.randn(row.scheduled, HEADS, HEAD_SIZE, generator=generator)
        key, value = torch.randn(2, stop, KV_HEADS, HEAD_SIZE, generator=generator)
        mask = torch.zeros(row.scheduled, stop, dtype=torch.bool)
        for index in range(row.scheduled):
            mask[index, visible(row.retention, row.computed + index)] = True
        queries.append(query)
        expected.append(masked_attention(query, key, value, mask))

        hidden = ~mask.any(dim=0)
        key[hidden] = value[hidden] = torch.nan
        slots = torch.tensor([slot(blocks, block_size, token) for token in range(stop)])
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    cache[: block_size // KERNEL_BLOCK] = torch.nan  # the null block

    query = torch.cat(queries)
    output = torch.empty_like(query)
    query_start_loc, seq_lens = torch.from_numpy(batch.query_start_loc), torch.from_numpy(batch.seq_lens)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        seq_lens=seq_lens,
        dtype=torch.float32,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=HEAD_SIZE**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.from_numpy(batch.block_table),
        softcap=0,
        scheduler_metadata=metadata,
        s_aux=None,
    )
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-5, atol=2e-6)


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plain attention; ``mask`` [queries, keys] is True where a query sees a key."""
    group = HEADS // KV_HEADS
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * HEAD_SIZE**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
