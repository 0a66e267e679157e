"""Where a cached key lies in memory. One function a layout; the rest of the package sees `CachedKeys`.

A cache of a layer has the logical shape [blocks, heads, tokens of a block, 2 x head size]. What a backend makes of
the memory of one block and head is its own affair: GPU backends keep the key of a token in a row, the CPU backend
packs the keys of a block the way its instruction set likes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention

from vllm_packcache.config.errors import ConfigError


class CachedKeys(NamedTuple):
    """The keys of a layer.

    Attributes:
        memory: a view of the cache, [blocks, heads, a, b]; the a x b numbers of a block and head are the keys of
            its tokens in some order.
        order: int64, [tokens of a block, head size]: which of the a x b numbers is channel c of token t.
    """

    memory: Tensor
    order: Tensor


def layout_of(backend: str) -> Callable[[Attention], CachedKeys]:
    """How the attention backend of this name stores keys.

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
    if not layer.kv_cache.dtype.is_floating_point or layer.kv_cache.element_size() < 2:
        raise ConfigError(
            f"positions: rebase cannot rotate keys stored as {layer.kv_cache.dtype} in place: use an unquantised KV "
            "cache, or set positions: absolute"
        )
    return layout_of(layer.attn_backend.get_name())(layer)


def row_major_keys(layer: Attention) -> CachedKeys:
    """Key and value of a token side by side: FlashAttention, Triton, FlashInfer, FlexAttention."""
    memory = layer.kv_cache[..., : layer.head_size]
    tokens, channels = memory.shape[2:]
    return CachedKeys(memory, torch.arange(tokens * channels, device=memory.device).view(tokens, channels))


def cpu_keys(layer: Attention) -> CachedKeys:
    """The keys of a block packed in its first half."""
    blocks, heads, block_size, _ = layer.kv_cache.shape
    memory = layer.kv_cache.view(blocks, heads, 2 * block_size, layer.head_size)[:, :, :block_size]
    return CachedKeys(memory, cpu_key_order(layer.isa, memory.dtype, block_size, layer.head_size))


@cache
def cpu_key_order(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> Tensor:
    """`CachedKeys.order` of vLLM's CPU kernel, found by letting it store numbered keys.

    The packing differs with instruction set and dtype; the kernel that writes the cache is asked, not copied.
    """
    numbers = torch.arange(block_size * head_size)
    found = torch.zeros_like(numbers)
    # Small numbers are exact in every dtype: the index is stored digit by digit.
    digit_bits = 7
    for shift in range(0, int(numbers[-1]).bit_length(), digit_bits):
        digit = (numbers >> shift) & ((1 << digit_bits) - 1)
        key = digit.view(block_size, 1, head_size).to(dtype)
        stored = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        keys, values = stored.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, key.clone(), keys, values, torch.arange(block_size), isa)
        found |= keys.flatten().long() << shift
    order = torch.empty_like(found)
    order[found] = numbers
    return order.view(block_size, head_size)


_LAYOUTS: dict[str, Callable[[Attention], CachedKeys]] = {
    "CPU_ATTN": cpu_keys,
    "FLASH_ATTN": row_major_keys,
    "TRITON_ATTN": row_major_keys,
    "FLASHINFER": row_major_keys,
    "FLEX_ATTENTION": row_major_keys,
}

BACKENDS = tuple(_LAYOUTS)
"""Attention backends whose cached keys can be found."""
