"""Older frames in fewer bits: encoded once, in the blocks that they had, and decoded for each pass that reads them.

A unit of bytes is what a codec makes of a frame's keys before RoPE and of its values, in one layer. Attention kernels
read blocks of a cache: what a picture reads is put together in a scratch laid out as a cache is, a layer and a picture
at a time, so there is one for all layers. In it stand what is read as it was written, copied; the units, decoded and
turned to their present positions; and the picture's own blocks.

Source: Quant VideoGen, arXiv 2602.02958.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_packcache.core.packing import Packing
from vllm_packcache.worker.history.codec import decode, encode
from vllm_packcache.worker.keys.layout import cached_keys, cached_values
from vllm_packcache.worker.keys.stored import CachedKeys

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of some positions, float32, [n, 1, D/2]."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers by their size: bytes are moved as they are, which floating-point numbers need not be."""


class Leaving(NamedTuple):
    """A frame that is to be encoded.

    Attributes:
        blocks: int64, [n]: those that it is in.
        held: how many of them it lives in from then on.
        turn: of the positions that its keys are at, [n x tokens of a block].
    """

    blocks: Tensor
    held: int
    turn: Turn


class Encoded(NamedTuple):
    """A frame that has been encoded, as a picture reads it.

    Attributes:
        pages: int64, [m]: the blocks that it lives in.
        blocks: n, those that it is read as.
        turn: of the positions that its keys are read at, [n x tokens of a block].
    """

    pages: Tensor
    blocks: int
    turn: Turn


class Past(NamedTuple):
    """What a picture reads, when some of it is encoded.

    Attributes:
        plain: int64, [p]: blocks that are read as they were written.
        encoded: what stands behind them.
        own: int64, [o]: the picture's own blocks, behind all others.
    """

    plain: Tensor
    encoded: Sequence[Encoded]
    own: Tensor

    @property
    def blocks(self) -> int:
        """Blocks of the scratch."""
        return len(self.plain) + sum(unit.blocks for unit in self.encoded) + len(self.own)


class Read(NamedTuple):
    """Some rows of a step, and what they read.

    Attributes:
        rows: which.
        metadata: of attention, by the name of the layer.
        past: None: they read the cache as it is.
    """

    rows: slice
    metadata: dict[str, Any]
    past: Past | None


@dataclass
class History:
    """Encoded frames of a model's layers.

    Args:
        packing: the format.
        block_size: tokens of a block.
        rotate: turns heads [n, heads, D] by a `Turn`.
        usual_bytes: of the scratch, where videos are as the server knows them.
    """

    packing: Packing
    block_size: int
    rotate: Callable[[Tensor, Turn], Tensor]
    usual_bytes: int

    def __post_init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, device: torch.device) -> None:
        """Have memory for a scratch of ``size`` bytes."""
        if self._memory.numel() < size:
            # The old one first: both at a time would be more than is ever needed.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)

    def clear(self, layers: Sequence[Any], block: Tensor) -> None:
        """Make all numbers of a block zeros; ``block`` is its id, on the device."""
        for layer in layers:
            _pages(layer.kv_cache).index_fill_(0, block[None], 0)

    def encode(self, layers: Sequence[Any], leaving: Leaving) -> None:
        """Encode a frame in all ``layers``, into the first of its blocks."""
        cos, sin = leaving.turn
        for layer in layers:
            keys = self.rotate(_numbers(cached_keys(layer), leaving.blocks), (cos, -sin))
            values = _numbers(cached_values(layer), leaving.blocks)
            data = encode(self.packing, keys.transpose(0, 1), values.transpose(0, 1))
            pages = _pages(layer.kv_cache)
            room = torch.zeros(leaving.held, pages.shape[1], dtype=pages.dtype, device=pages.device)
            room.view(-1).view(torch.uint8)[: len(data)] = data
            pages[leaving.blocks[: leaving.held]] = room

    def gather(self, layer: Any, past: Past) -> Tensor:
        """What a picture reads in a layer, [blocks, ...] as the layer's cache; of use until this is called again."""
        cache = layer.kv_cache
        pages = _pages(cache)
        size = past.blocks * pages.shape[1] * pages.element_size()
        self.reserve(size, cache.device)
        room = self._memory[:size].view(pages.dtype).view(past.blocks, -1)
        strides = (pages.shape[1], *cache.stride()[1:])
        scratch = room.view(cache.dtype).as_strided((past.blocks, *cache.shape[1:]), strides)
        torch.index_select(pages, 0, past.plain, out=room[: len(past.plain)])
        torch.index_select(pages, 0, past.own, out=room[past.blocks - len(past.own) :])
        first = len(past.plain)
        for unit in past.encoded:
            tokens = unit.blocks * self.block_size
            place = slice(first, first + unit.blocks)
            first = place.stop
            if cache.is_cuda:
                from vllm_packcache.worker.history.kernel import decode_turned

                decode_turned(self.packing, pages.view(torch.uint8), unit.pages, tokens, unit.turn, scratch[place])
                continue
            data = pages[unit.pages].view(-1).view(torch.uint8)
            keys, values = decode(self.packing, data, tokens, unit.turn, cache.dtype)
            slots = torch.arange(place.start * self.block_size, place.stop * self.block_size)
            layer.impl.do_kv_cache_update(layer, keys, values, scratch, slots)
        return scratch


def _pages(cache: Tensor) -> Tensor:
    """The memory of a cache [blocks, ...] block by block, as integers, [blocks, numbers of a block].

    Raises:
        RuntimeError: a block's memory is not in one piece.
    """
    numbers = prod(cache.shape[1:])
    reach = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))
    if reach != numbers:
        raise RuntimeError(f"a block of a cache of shape {tuple(cache.shape)} and strides {cache.stride()} has gaps")
    return cache.as_strided((len(cache), numbers), (cache.stride(0), 1)).view(_BITS[cache.element_size()])


def _numbers(cached: CachedKeys, blocks: Tensor) -> Tensor:
    """Keys or values of some blocks, float32, [tokens, heads, D]."""
    numbers = cached.stored.read(cached.memory, blocks)[..., cached.order]
    return numbers.permute(0, 2, 1, 3).flatten(0, 1)
