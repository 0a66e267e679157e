"""Decoding history on a GPU: one Triton kernel over (tokens, head) reads a unit where it lies in a cache's pages.

It does what `vllm_packcache.worker.history.codec.decode` does, turns the keys and writes both to where attention reads
them, without anything in between. It knows neither vLLM nor how the pages were chosen.

Bytes are taken apart with integers: a GPU without floats of 8 bits can do it, and Triton's interpreter is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_packcache.core.packing import BLOCK_CHANNELS, SCALE_OFFSET, SCALE_SHIFT, Packing

PAIRS_AT_ONCE = 1024
"""Pairs of channels that a program holds: eight of each side for each of its 128 threads."""


def decode_turned(
    packing: Packing, pages: Tensor, unit: Tensor, tokens: int, turn: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """Write the keys, turned, and the values of a unit to blocks of a cache. Waits for nothing on the device.

    Args:
        packing: how it was encoded.
        pages: uint8, [blocks, bytes of a block]: the memory of a layer's cache.
        unit: int32 or int64, [m]: those of them that hold the unit's bytes, in order and each to its end.
        tokens: n of the unit.
        turn: cosines and sines, float32 [n, 1, channels / 2]: channel j turns with channel j + channels / 2.
        out: float32, bfloat16 or float16, [n / block size, heads, block size, 2 x channels], a token's key before its
            value; these lie side by side, whatever the order of the rest. The last block may be cut short by n.

    Raises:
        ValueError: the kernel cannot read the pages, or they are too few.
    """
    page_bytes = pages.shape[1]
    if page_bytes % 4 or pages.stride(0) % 4 or pages.stride(1) != 1 or pages.data_ptr() % 4:
        raise ValueError(
            f"pages must be whole and start at multiples of 4 bytes, not be {page_bytes} bytes every {pages.stride(0)}"
        )
    if len(unit) * page_bytes < packing.encoded_bytes(tokens):
        raise ValueError(
            f"a unit of {tokens} tokens has {packing.encoded_bytes(tokens)} bytes, and {len(unit)} pages of "
            f"{page_bytes} are too few for it"
        )
    cos, sin = (part.contiguous() for part in turn)
    starts = [part.start for part in packing.parts(tokens).values()]
    pairs = packing.channels // 2
    pairs_tile = triton.next_power_of_2(pairs)
    tokens_tile = max(1, min(triton.next_power_of_2(tokens), PAIRS_AT_ONCE // pairs_tile))
    _decode[triton.cdiv(tokens, tokens_tile), packing.heads](
        pages,
        pages.view(torch.float32),
        pages.stride(0),
        unit,
        cos,
        sin,
        out,
        *out.stride()[:3],
        tokens,
        packing.head_bytes(tokens),
        *(starts if packing.clustered else (0, 0, 0, 0, *starts)),
        BITS=packing.bits,
        PAGE=page_bytes,
        OUT_BLOCK=out.shape[2],
        PAIRS=pairs,
        PAIRS_TILE=pairs_tile,
        TOKENS_TILE=tokens_tile,
        SCALED=BLOCK_CHANNELS,
        OFFSET=SCALE_OFFSET,
        SHIFT=SCALE_SHIFT,
    )


@triton.jit
def _at(unit, stride, byte, mask, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in the pages the bytes of a unit are."""
    page = tl.load(unit + byte // PAGE, mask=mask, other=0).to(tl.int64)
    return page * stride + byte % PAGE


@triton.jit
def _signed(pages, at, mask):  # type: ignore[no-untyped-def]
    return tl.load(pages + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _numbers(  # type: ignore[no-untyped-def]
    pages,
    floats,
    stride,
    unit,
    head,  # the first byte of a head
    unit_at,
    centroid_scales_at,
    centroids_at,
    indices_at,
    scales_at,
    codes_at,
    token,  # [t, 1]
    channel,  # [1, c]
    is_token,  # [t, 1]
    is_number,  # [t, c]
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALED: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What some channels of some tokens stand for, float32 [t, c]."""
    if BITS == 8:
        scale = tl.load(
            floats + _at(unit, stride, head + scales_at + 4 * token, is_token, PAGE) // 4, mask=is_token, other=0.0
        )
        code = _at(unit, stride, head + codes_at + token * CHANNELS + channel, is_number, PAGE)
        return _signed(pages, code, is_number) * scale
    whole = tl.load(floats + _at(unit, stride, head + unit_at, True, PAGE) // 4)
    index = tl.load(pages + _at(unit, stride, head + indices_at + token, is_token, PAGE), mask=is_token, other=0)
    index = index.to(tl.int32)
    scale_byte = head + centroid_scales_at + 4 * index
    centroid_scale = tl.load(floats + _at(unit, stride, scale_byte, is_token, PAGE) // 4, mask=is_token, other=0.0)
    centroid = _at(unit, stride, head + centroids_at + index * CHANNELS + channel, is_number, PAGE)

    blocks: tl.constexpr = (CHANNELS + SCALED - 1) // SCALED
    factor = _at(unit, stride, head + scales_at + token * blocks + channel // SCALED, is_number, PAGE)
    factor = tl.load(pages + factor, mask=is_number, other=0).to(tl.int32)
    power = ((factor + OFFSET) << SHIFT).to(tl.float32, bitcast=True)
    factor = tl.where(factor > 0, power, 0.0) * whole

    each: tl.constexpr = 8 // BITS
    code = _at(unit, stride, head + codes_at + token * (CHANNELS // each) + channel // each, is_number, PAGE)
    code = tl.load(pages + code, mask=is_number, other=0).to(tl.int32) >> (channel % each * BITS)
    code = (code & ((1 << BITS) - 1)).to(tl.float32) - ((1 << BITS) - 1) / 2
    return code * factor + _signed(pages, centroid, is_number) * centroid_scale


@triton.jit(do_not_specialize=["tokens"])
def _decode(  # type: ignore[no-untyped-def]
    pages,  # bytes
    floats,  # the same memory
    stride,  # bytes from a page to the next
    unit,  # [m]
    cosines,  # [tokens, PAIRS]
    sines,  # [tokens, PAIRS]
    out,
    out_block,
    out_head,
    out_token,
    tokens,
    head_bytes,
    unit_at,  # as of `Packing.parts`
    centroid_scales_at,
    centroids_at,
    indices_at,
    scales_at,
    codes_at,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    OFFSET: tl.constexpr,
    SHIFT: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS_TILE + tl.arange(0, TOKENS_TILE)[:, None]
    head = tl.program_id(1)
    pair = tl.arange(0, PAIRS_TILE)[None]
    is_token = token < tokens
    is_pair = is_token & (pair < PAIRS)
    row = out + (token // OUT_BLOCK).to(tl.int64) * out_block + head.to(tl.int64) * out_head
    row += token % OUT_BLOCK * out_token
    cos = tl.load(cosines + token * PAIRS + pair, mask=is_pair, other=0.0)
    sin = tl.load(sines + token * PAIRS + pair, mask=is_pair, other=0.0)
    for values in tl.static_range(2):
        first = (head + values * tl.num_programs(1)) * head_bytes
        left = _numbers(
            pages, floats, stride, unit, first, unit_at, centroid_scales_at, centroids_at, indices_at, scales_at,
            codes_at, token, pair, is_token, is_pair, BITS, PAGE, 2 * PAIRS, SCALED, OFFSET, SHIFT,
        )  # fmt: skip
        right = _numbers(
            pages, floats, stride, unit, first, unit_at, centroid_scales_at, centroids_at, indices_at, scales_at,
            codes_at, token, PAIRS + pair, is_token, is_pair, BITS, PAGE, 2 * PAIRS, SCALED, OFFSET, SHIFT,
        )  # fmt: skip
        if values == 0:
            left, right = left * cos - right * sin, right * cos + left * sin
        number = row + 2 * PAIRS * values + pair
        tl.store(number, left.to(out.dtype.element_ty), mask=is_pair)
        tl.store(number + PAIRS, right.to(out.dtype.element_ty), mask=is_pair)
