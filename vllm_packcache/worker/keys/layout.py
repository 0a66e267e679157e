"""Where a cached key lies in memory. One function a layout; the rest of the package sees `CachedKeys`.

A cache of a layer has the logical shape [blocks, heads, tokens of a block, 2 x head size]. What a backend makes of
the memory of one block and head is its own affair: GPU backends keep the key of a token in a row, the CPU backend
packs the keys of a block the way its instruction set likes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.formats import SCALE_BYTES, check_turned, find
from vllm_packcache.worker.keys.stored import AsTheyAre, Bytes, CachedKeys, PerTokenHead, Stored


def layout_of(backend: str) -> Callable[..., CachedKeys]:
    """How the attention backend of this name stores keys: asked with a layer, and whether values are meant.

    Raises:
        ConfigError: it is not known.
    """
    if backend not in _LAYOUTS:
        raise ConfigError(
            f"positions: rebase rotates cached keys, and how attention backend {backend} stores them is not known: "
            f"choose one of {', '.join(_LAYOUTS)} with --attention-backend, or set positions: absolute"
        )
    return _LAYOUTS[backend]


def cached_keys(layer: Attention) -> CachedKeys:
    """The keys of an attention layer whose cache has been allocated.

    Raises:
        ConfigError: its backend or what it stores is not known.
    """
    check_turned(layer.kv_cache_dtype)
    return layout_of(layer.attn_backend.get_name())(layer)


def cached_values(layer: Attention) -> CachedKeys:
    """The values of an attention layer whose cache has been allocated, and has the model's precision.

    Raises:
        ConfigError: its backend is not known.
    """
    return layout_of(layer.attn_backend.get_name())(layer, True)


def row_major_keys(layer: Attention, values: bool = False) -> CachedKeys:
    """Key and value of a token side by side: FlashAttention, Triton, FlashInfer, FlexAttention. Its keys, or values.

    With a scale for each token and head, that of the key stands behind its numbers, and that of the value behind those.
    """
    memory = layer.kv_cache[..., layer.head_size :] if values else layer.kv_cache[..., : layer.head_size]
    numbers = _numbers(layer)
    if numbers is None or not find(layer.kv_cache_dtype).scaled:
        return CachedKeys.in_rows(memory, _bytes_or_more(numbers))
    behind = layer.kv_cache[..., layer.head_size : layer.head_size + SCALE_BYTES]
    scales = behind.view(torch.float32)[..., 0].transpose(1, 2)
    return CachedKeys.in_rows(memory, PerTokenHead(numbers, scales))


def settle_scales(layer: Attention) -> None:
    """Have vLLM set the scales of an allocated cache to 1 now, where it has any, and not when the layer is first run.

    Streams share the memory of their layers: a second stream's first run would wipe out the scales of the first one's.
    """
    settle = getattr(layer.impl, "_ensure_scale_caches", None)
    if settle is not None and find(layer.kv_cache_dtype).scaled:
        settle(layer.kv_cache)


def _numbers(layer: Attention) -> torch.dtype | None:
    """What a byte of a layer's cache is; None: its numbers are of a type that PyTorch computes with."""
    name = find(layer.kv_cache_dtype).numbers_in(layer.attn_backend.get_name())
    return None if name is None else getattr(torch, name)


def _bytes_or_more(numbers: torch.dtype | None) -> Stored:
    return AsTheyAre() if numbers is None else Bytes(numbers)


def cpu_keys(layer: Attention, values: bool = False) -> CachedKeys:
    """The keys of a block packed in its first half, or the values in its second."""
    blocks, heads, block_size, _ = layer.kv_cache.shape
    memory = layer.kv_cache.view(blocks, heads, 2 * block_size, layer.head_size).chunk(2, dim=2)[values]
    order = cpu_key_order(layer.isa, layer.dtype, block_size, layer.head_size, layer.kv_cache_dtype, values)
    return CachedKeys(memory, order, _bytes_or_more(_numbers(layer)))


@cache
def cpu_key_order(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int, cache_dtype: str = "auto", values: bool = False
) -> Tensor:
    """`CachedKeys.order` of vLLM's CPU kernel, found by letting it store numbered keys, or values.

    The packing differs with instruction set and dtype; the kernel that writes the cache is asked, not copied.

    Args:
        isa: instruction set, as the backend calls it.
        dtype: of the keys that the model makes.
        block_size: tokens of a block.
        head_size: channels of a key.
        cache_dtype: of the cache, as vLLM calls it.
        values: of values, and not of keys.
    """
    numbers = torch.arange(block_size * head_size)
    found = torch.zeros_like(numbers)
    numbers_are = find(cache_dtype).numbers
    stored_as = None if numbers_are is None else getattr(torch, numbers_are)
    # Small numbers are exact in every dtype: the index is stored digit by digit.
    digit_bits = 7 if stored_as is None else 2
    for shift in range(0, int(numbers[-1]).bit_length(), digit_bits):
        digit = (numbers >> shift) & ((1 << digit_bits) - 1)
        key = digit.view(block_size, 1, head_size).to(dtype)
        cached = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype if stored_as is None else torch.uint8)
        halves = cached.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, key.clone(), *halves, torch.arange(block_size), isa, kv_cache_dtype=cache_dtype
        )
        half = halves[values]
        found |= (half if stored_as is None else half.view(stored_as)).flatten().long() << shift
    order = torch.empty_like(found)
    order[found] = numbers
    return order.view(block_size, head_size)


_LAYOUTS: dict[str, Callable[..., CachedKeys]] = {
    "CPU_ATTN": cpu_keys,
    "FLASH_ATTN": row_major_keys,
    "TRITON_ATTN": row_major_keys,
    "FLASHINFER": row_major_keys,
    "FLEX_ATTENTION": row_major_keys,
}

BACKENDS = tuple(_LAYOUTS)
"""Attention backends whose cached keys can be found."""
