"""What caches of 8 bits make of numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_packcache.reference.quantised import Rounding


def as_the_cpu_writes(dtype: torch.dtype, name: str) -> Rounding:
    """vLLM's kernel cuts off what a format of 8 bits has no room for, so it is asked."""

    def written(numbers: Tensor) -> Tensor:
        tokens, heads, channels = numbers.shape
        blocks = -(-tokens // 32)
        cache = torch.zeros(blocks, heads, 64, channels, dtype=torch.uint8)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            numbers, numbers.contiguous(), keys, values, torch.arange(tokens), "vec", kv_cache_dtype=name
        )
        # Values lie in rows.
        return values.view(dtype).float().transpose(1, 2).flatten(0, 1)[:tokens]

    return written


def to_nearest(dtype: torch.dtype) -> Rounding:
    return lambda numbers: numbers.to(dtype).float()


def int8(numbers: Tensor) -> Tensor:
    """A scale for every token and head, by which the largest is 127; halves are rounded away from zero."""
    scales = numbers.abs().amax(-1, keepdim=True) / 127
    scaled = numbers * (1.0 / scales)
    return (scaled.abs() + 0.5).floor() * scaled.sign() * scales
