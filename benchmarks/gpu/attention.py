"""Attention over a paged KV cache, for measurements on machines that have torch and Triton and no vLLM.

One kernel does the decode step, where the keys of a sequence are split over programs, and the frame-parallel step,
where a frame's queries are tiled. Every query reads all keys of its sequence. Layers are alike, so what belongs to a
step (block table, lengths, room for the output) is made once and used for every layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_TILE = 64
"""Keys that a program reads at a time."""

QUERIES_TILE = 128
"""Most queries of a program, a query being one of a token and an attention head."""

SMALLEST_TILE = 16
"""Least rows of a matrix product on tensor cores."""


class PagedAttention:
    """Attention of one step over the keys and values of a layer, whichever layer that is.

    Args:
        query: [sequences, tokens, heads, head size]; head size is a power of two.
        block_table: int32, [sequences, most blocks of a sequence].
        lengths: int32, keys of each sequence, at least 1, [sequences].
        kv_heads: heads of the cache; each is read by heads / kv_heads consecutive heads.
        splits: programs that the keys of a sequence and head are divided between.
    """

    def __init__(self, query: Tensor, block_table: Tensor, lengths: Tensor, kv_heads: int, splits: int) -> None:
        sequences, tokens, heads, head_size = query.shape
        self._query, self._block_table, self._lengths = query, block_table, lengths
        self._kv_heads, self._splits = kv_heads, splits
        rows = tokens * heads // kv_heads
        self._tile = min(QUERIES_TILE, max(SMALLEST_TILE, triton.next_power_of_2(rows)))
        self._tiles = triton.cdiv(rows, self._tile)
        self.output = torch.empty_like(query)
        # With one split its part is the output.
        parts = (sequences, tokens, heads, splits if splits > 1 else 0)
        self._parts = query.new_empty((*parts, head_size), dtype=torch.float32)
        self._weights = query.new_empty(parts, dtype=torch.float32)

    def __call__(self, cache: Tensor) -> Tensor:
        """Read a layer's ``cache`` [blocks, KV heads, tokens of a block, 2 x head size], key before value.

        Returns:
            The output, like the query; the next call overwrites it.
        """
        sequences, tokens, heads, head_size = self._query.shape
        _attend[self._tiles * self._splits, self._kv_heads, sequences](
            self._query,
            cache,
            self._block_table,
            self._lengths,
            self._parts if self._splits > 1 else self.output,
            self._weights,
            *cache.stride()[:3],
            self._block_table.stride(0),
            tokens,
            head_size**-0.5,
            HEADS=heads,
            GROUP=heads // self._kv_heads,
            HEAD_SIZE=head_size,
            BLOCK_SIZE=cache.shape[2],
            SPLITS=self._splits,
            ROWS=self._tile,
            KEYS=KEYS_TILE,
            num_warps=8 if self._tile == QUERIES_TILE else 4,
            num_stages=2,
        )
        if self._splits > 1:
            _merge[sequences * tokens, heads](
                self._parts,
                self._weights,
                self.output,
                HEADS=heads,
                HEAD_SIZE=head_size,
                SPLITS=self._splits,
                SPLITS_TILE=triton.next_power_of_2(self._splits),
            )
        return self.output


class UnifiedAttention:
    """The same with vLLM's Triton attention, in the way its backend calls it.

    Args and call: as those of `PagedAttention`; vLLM chooses its number of splits itself.
    """

    SPLITS = 16
    PROGRAMS = 128
    """Steps with fewer programs than this have their keys split."""

    def __init__(self, query: Tensor, block_table: Tensor, lengths: Tensor, kv_heads: int, splits: int) -> None:
        del splits
        sequences, tokens, heads, head_size = query.shape
        most = self.PROGRAMS // kv_heads
        parts = (most, heads, self.SPLITS)
        room = query.new_empty((2, *parts), dtype=torch.float32)
        self.output = torch.empty_like(query)
        self._arguments = {
            "q": query.flatten(0, 1),
            "out": self.output.flatten(0, 1),
            "cu_seqlens_q": torch.arange(sequences + 1, dtype=torch.int32, device=query.device) * tokens,
            "max_seqlen_q": tokens,
            "seqused_k": lengths,
            "max_seqlen_k": int(lengths.max()),
            "softmax_scale": head_size**-0.5,
            # The queries of a frame-parallel step read all keys; a decode step's one query does anyway.
            "causal": tokens == 1,
            "window_size": (-1, -1),
            "block_table": block_table,
            "softcap": 0.0,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
            "seq_threshold_3D": most,
            "num_par_softmax_segments": self.SPLITS,
            "softmax_segm_output": query.new_empty((*parts, triton.next_power_of_2(head_size)), dtype=torch.float32),
            "softmax_segm_max": room[0],
            "softmax_segm_expsum": room[1],
        }

    def __call__(self, cache: Tensor) -> Tensor:
        """See `PagedAttention.__call__`."""
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
        unified_attention(k=keys, v=values, **self._arguments)
        return self.output


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,  # [sequences, tokens, HEADS, HEAD_SIZE]
    cache,  # [blocks, KV heads, BLOCK_SIZE, 2 * HEAD_SIZE]
    block_table,  # [sequences, blocks of a sequence]
    lengths,  # [sequences]
    parts,  # [sequences, tokens, HEADS, SPLITS, HEAD_SIZE]
    weights,  # [sequences, tokens, HEADS, SPLITS]: base-2 logarithm of what a part weighs
    stride_block,
    stride_head,
    stride_token,
    stride_table,
    tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2)
    # Queries of all heads that read the same keys are rows of one tile.
    row = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    number = (sequence * tokens + row // GROUP) * HEADS + kv_head * GROUP + row % GROUP
    is_row = row < tokens * GROUP
    channel = tl.arange(0, HEAD_SIZE)
    queries = tl.load(query + number[:, None] * HEAD_SIZE + channel[None], mask=is_row[:, None], other=0.0)
    length = tl.load(lengths + sequence)
    tiles = (length + KEYS - 1) // KEYS
    each = (tiles + SPLITS - 1) // SPLITS
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, HEAD_SIZE), tl.float32)
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        key = tile * KEYS + tl.arange(0, KEYS)
        is_key = key < length
        block = tl.load(block_table + sequence * stride_table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        place = cache + block * stride_block + kv_head * stride_head + key % BLOCK_SIZE * stride_token
        keys = tl.load(place[None] + channel[:, None], mask=is_key[None], other=0.0)
        # Scores as powers of 2, which is what the hardware raises.
        scores = tl.dot(queries, keys, input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(is_key[None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        values = tl.load(place[:, None] + HEAD_SIZE + channel[None], mask=is_key[:, None], other=0.0)
        result = tl.dot(shares.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(shares, 1)
        largest = larger
    # A part without keys weighs nothing.
    part = result / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS > 1:
        tl.store(weights + number * SPLITS + split, largest + tl.log2(total), mask=is_row)
    places = parts + (number * SPLITS + split)[:, None] * HEAD_SIZE + channel[None]
    tl.store(places, part.to(parts.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    parts,
    weights,
    output,  # [sequences, tokens, HEADS, HEAD_SIZE]
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS_TILE)
    channel = tl.arange(0, HEAD_SIZE)
    weight = tl.load(weights + number * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    share = tl.exp2(weight - tl.max(weight, 0))
    share /= tl.sum(share, 0)
    places = parts + (number * SPLITS + split)[:, None] * HEAD_SIZE + channel[None]
    part = tl.load(places, mask=(split < SPLITS)[:, None], other=0.0)
    merged = tl.sum(part * share[:, None], 0)
    tl.store(output + number * HEAD_SIZE + channel, merged.to(output.dtype.element_ty))
