"""Cached keys, and how their numbers are stored: read as float32, and written back with the rounding of the format.

One class a format. Where the numbers lie is `vllm_packcache.worker.keys.layout`'s affair. A format of 8 bits rounds a
key anew at every turn, to the nearest number that it has: its error grows with the root of the number of turns.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LEAST_SCALE = 1e-6
"""Of a key that is nothing but zeros, as vLLM's kernel has it."""


class Stored(Protocol):
    """A format. ``memory`` is [blocks, heads, a, b], of which each block and head has m = a x b numbers."""

    def read(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """The numbers of some blocks.

        Args:
            memory: of a layer.
            blocks: int64, [n].

        Returns:
            float32, [n, heads, m].
        """
        ...

    def write(self, memory: Tensor, blocks: Tensor, numbers: Tensor) -> None:
        """Put ``numbers`` [n, heads, m] in the place of those of ``blocks`` [n]."""
        ...


class AsTheyAre(NamedTuple):
    """Numbers of a floating-point type that PyTorch computes with."""

    def read(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """See `Stored.read`."""
        return memory[blocks].flatten(2).float()

    def write(self, memory: Tensor, blocks: Tensor, numbers: Tensor) -> None:
        """See `Stored.write`."""
        memory[blocks] = numbers.view(len(blocks), *memory.shape[1:]).to(memory.dtype)


class Bytes(NamedTuple):
    """Floating-point numbers of 8 bits in a memory of bytes. A layer's scale changes nothing: turning is linear.

    Attributes:
        dtype: what a byte is.
    """

    dtype: torch.dtype

    def read(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """See `Stored.read`."""
        return memory[blocks].view(self.dtype).flatten(2).float()

    def write(self, memory: Tensor, blocks: Tensor, numbers: Tensor) -> None:
        """See `Stored.write`. Numbers beyond the largest of the format become it."""
        rounded = rounded_to(self.dtype, numbers)
        memory[blocks] = rounded.view(len(blocks), *memory.shape[1:]).view(memory.dtype)


class PerTokenHead(NamedTuple):
    """Integers or floating-point numbers of 8 bits, with a scale for every token and head. Keys lie in rows.

    Source: vLLM's ``_reshape_cache_per_token_head`` (v0.32.0), whose scale and rounding these are.

    Attributes:
        dtype: of the numbers.
        scales: float32, [blocks, tokens of a block, heads], a view of the same cache.
    """

    dtype: torch.dtype
    scales: Tensor

    def read(self, memory: Tensor, blocks: Tensor) -> Tensor:
        """See `Stored.read`."""
        scales = self.scales[blocks].transpose(1, 2)[..., None]
        return (memory[blocks].view(self.dtype).float() * scales).flatten(2)

    def write(self, memory: Tensor, blocks: Tensor, numbers: Tensor) -> None:
        """See `Stored.write`."""
        numbers = numbers.view(len(blocks), *memory.shape[1:])
        scaled, scales = scaled_to(self.dtype, numbers)
        memory[blocks] = scaled.view(memory.dtype)
        self.scales[blocks] = scales.transpose(1, 2)


class CachedKeys(NamedTuple):
    """The keys of a layer.

    Attributes:
        memory: a view of the cache, [blocks, heads, a, b]; the a x b numbers of a block and head are the keys of
            its tokens in some order.
        order: int64, [tokens of a block, head size]: which of the a x b numbers is channel c of token t.
        stored: how a number is stored.
    """

    memory: Tensor
    order: Tensor
    stored: Stored = AsTheyAre()

    @classmethod
    def in_rows(cls, memory: Tensor, stored: Stored = AsTheyAre()) -> CachedKeys:  # noqa: B008
        """Keys of which each lies in a row of ``memory`` [blocks, heads, tokens of a block, head size]."""
        tokens, channels = memory.shape[2:]
        return cls(memory, torch.arange(tokens * channels, device=memory.device).view(tokens, channels), stored)


def rounded_to(dtype: torch.dtype, numbers: Tensor) -> Tensor:
    """``numbers`` as 8-bit integers or floats, those beyond the largest as that one.

    Floats are rounded to nearest, ties to even; integers half away from zero.
    """
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return numbers.clamp(-largest, largest).to(dtype)
    # As vLLM's kernel: half is added, and what is behind the point cut off.
    limits = torch.iinfo(dtype)
    return (numbers + torch.where(numbers >= 0, 0.5, -0.5)).clamp(limits.min, limits.max).to(dtype)


def scaled_to(dtype: torch.dtype, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, [..., head size], as numbers of ``dtype`` of which the largest stands for the largest of a key.

    Returns:
        The numbers, and float32, [...]: what each stands for is it times the scale.
    """
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scales = (numbers.abs().amax(-1) / largest).clamp_min(LEAST_SCALE)
    return rounded_to(dtype, numbers * (1.0 / scales)[..., None]), scales
