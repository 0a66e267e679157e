"""Key rotation on a GPU: one Triton kernel over (block, head, layer) turns the keys of a request's history in place.

It does what `vllm_packcache.worker.keys.rotation.rotate` does with PyTorch, for all layers in one launch. Every key is
read and written once and turned in float32. It knows neither vLLM nor how the blocks were chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_packcache.core.positions import Float64
from vllm_packcache.worker.keys.stored import AsTheyAre, CachedKeys, PerTokenHead

PAIRS_AT_ONCE = 1024
"""Pairs of channels that a program holds: eight of each side for each of its 128 threads, 16 bytes of bf16."""

ALIGNMENT = 16
"""Bytes that a key cache starts at a multiple of: what the widest load of a thread needs."""

_ELEMENTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


class RotationKernel:
    """Rotates the cached keys of a model's layers.

    Layers have caches of their own, so the kernel is given a table of their addresses. Layers that differ in shape,
    strides or dtype get a launch each kind; of most models all are alike.

    Args:
        layers: the keys of every layer, each cache once; the channels of a key lie side by side, whatever the order of
            the rest.

    Raises:
        ValueError: the kernel cannot read one of them.
    """

    def __init__(self, layers: Iterable[CachedKeys]) -> None:
        alike: dict[tuple[object, ...], list[_Layer]] = defaultdict(list)
        for keys in layers:
            own = _Layer.of(keys)
            alike[own.keys.shape[1:], own.keys.stride(), own.keys.dtype, own.scales.stride()].append(own)
        # The caches are kept beside their addresses, so that none is freed while it can be written to.
        self._groups = [
            (group, torch.tensor([layer.addresses for layer in group], device=group[0].keys.device).T.contiguous())
            for group in alike.values()
        ]

    def rotate(self, blocks: Tensor, kinds: Tensor, angles: Float64, interleaved: bool) -> None:
        """Turn the keys of ``blocks`` in place, in every layer. Waits for nothing on the device.

        Args:
            blocks: int32 or int64, [n], on any device. A layer's blocks may be smaller by a whole factor: block b is
                then b x factor + 0, 1, ...
            kinds: integer, [n, tokens of a block]: by which row of ``angles`` each token turns.
            angles: [kinds, p], in radians: of the p pairs that the first 2p channels make, the others do not turn.
            interleaved: a pair is channels 2i and 2i + 1; otherwise it is i and p + i.
        """
        if len(blocks) == 0:
            return
        num_kinds, pairs = angles.shape
        turns = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))
        pairs_tile = triton.next_power_of_2(pairs)
        for layers, addresses in self._groups:
            (keys, scales), device = layers[0], addresses.device
            _, heads, block_size, head_size = keys.shape
            split = kinds.shape[1] // block_size
            scaled = scales.numel() > 0
            _rotate[len(blocks) * split, heads, len(layers)](
                addresses,
                _on_device(blocks, device),
                _on_device(kinds if num_kinds > 1 else blocks, device),
                _on_device(turns, device),
                *keys.stride()[:3],
                *scales.stride(),
                split,
                LAYERS=len(layers),
                ELEMENT=_ELEMENTS[keys.dtype],
                LARGEST=_largest(keys.dtype),
                SCALED=scaled,
                BLOCK_SIZE=block_size,
                KINDS=num_kinds,
                PAIRS=pairs,
                INTERLEAVED=interleaved,
                TOKENS_TILE=min(triton.next_power_of_2(block_size), max(1, PAIRS_AT_ONCE // pairs_tile)),
                PAIRS_TILE=pairs_tile,
                REST=head_size - 2 * pairs if scaled else 0,
                REST_TILE=triton.next_power_of_2(max(1, head_size - 2 * pairs)),
            )


class _Layer(NamedTuple):
    """A layer as the kernel sees it.

    Attributes:
        keys: [blocks, heads, tokens, head size], of the type that a number is.
        scales: float32, [blocks, tokens, heads]; empty: there are none.
    """

    keys: Tensor
    scales: Tensor

    @classmethod
    def of(cls, keys: CachedKeys) -> _Layer:
        """What is to be known of a layer's keys.

        Raises:
            ValueError: the kernel cannot read them.
        """
        memory, stored = keys.memory, keys.stored
        if not isinstance(stored, AsTheyAre):
            memory = memory.view(stored.dtype)  # type: ignore[attr-defined]
        _check(memory)
        scales = stored.scales if isinstance(stored, PerTokenHead) else memory.new_empty((0, 0, 0), dtype=torch.float32)
        return cls(memory, scales)

    @property
    def addresses(self) -> tuple[int, int]:
        """Where its keys begin, and where their scales do."""
        return self.keys.data_ptr(), self.scales.data_ptr()


def _largest(dtype: torch.dtype) -> float:
    """The largest number of a type of 8 bits; 0: it has more, and is never too small."""
    if dtype.itemsize > 1:
        return 0.0
    return torch.finfo(dtype).max if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def _check(memory: Tensor) -> None:
    if memory.dtype not in _ELEMENTS:
        raise ValueError(f"keys of {memory.dtype} cannot be rotated: known are {', '.join(map(str, _ELEMENTS))}")
    if memory.stride(-1) != 1:
        raise ValueError(f"the channels of a key must lie side by side, not {memory.stride(-1)} numbers apart")
    if memory.data_ptr() % ALIGNMENT:
        raise ValueError(f"a key cache must start at a multiple of {ALIGNMENT} bytes, not at {memory.data_ptr():#x}")


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy from pageable memory may wait for everything that the stream has yet to do.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@triton.jit
def _round(numbers, ELEMENT: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """See `vllm_packcache.worker.keys.stored.rounded_to`."""
    if LARGEST == 127:
        numbers = tl.where(numbers >= 0, numbers + 0.5, numbers - 0.5)
        numbers = tl.clamp(numbers, -128.0, 127.0)
    elif LARGEST > 0:
        numbers = tl.clamp(numbers, -LARGEST, LARGEST)
    return numbers.to(ELEMENT)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    addresses,  # [2, LAYERS]: of their keys, and of the scales of these
    blocks,  # [n]
    kinds,  # [n, split * BLOCK_SIZE]; unused if there is one kind only
    turns,  # [2, KINDS, PAIRS]: cosines and sines
    stride_block,
    stride_head,
    stride_token,
    scale_block,
    scale_token,
    scale_head,
    split,  # blocks of this cache that one of ``blocks`` is
    LAYERS: tl.constexpr,
    ELEMENT: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KINDS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
    REST: tl.constexpr,  # channels that do not turn, and are rounded anew with those that do
    REST_TILE: tl.constexpr,
):
    number = tl.program_id(0)
    # A cache has more numbers than int32 counts.
    head = tl.program_id(1).to(tl.int64)
    block = tl.load(blocks + number // split).to(tl.int64) * split + number % split
    layer = tl.program_id(2)
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(ELEMENT)), 16)
    keys += block * stride_block + head * stride_head
    scales = tl.load(addresses + LAYERS + layer).to(tl.pointer_type(tl.float32))
    scales += block * scale_block + head * scale_head
    pair = tl.arange(0, PAIRS_TILE)[None]
    channel = tl.arange(0, 2 * PAIRS_TILE)[None]
    for first in range(0, BLOCK_SIZE, TOKENS_TILE):
        token = first + tl.arange(0, TOKENS_TILE)[:, None]
        in_block = token < BLOCK_SIZE
        kind = tl.zeros_like(token)
        if KINDS > 1:
            kind = tl.load(kinds + number * BLOCK_SIZE + token, mask=in_block, other=0).to(tl.int32)
        angle = turns + kind * PAIRS + pair
        is_pair = in_block & (pair < PAIRS)
        cos = tl.load(angle, mask=is_pair, other=0.0)
        sin = tl.load(angle + KINDS * PAIRS, mask=is_pair, other=0.0)
        row = keys + token * stride_token
        turning = in_block & (channel < 2 * PAIRS)
        if INTERLEAVED:
            # Whole rows are moved, so that neighbours travel together.
            numbers = tl.load(row + channel, mask=turning, other=0.0).to(tl.float32)
            left, right = tl.split(tl.reshape(numbers, (TOKENS_TILE, PAIRS_TILE, 2)))
        else:
            left = tl.load(row + pair, mask=is_pair, other=0.0).to(tl.float32)
            right = tl.load(row + PAIRS + pair, mask=is_pair, other=0.0).to(tl.float32)
        scale_of = scales + token * scale_token
        if SCALED:
            scale = tl.load(scale_of, mask=in_block, other=0.0)
            left, right = left * scale, right * scale
        turned_left, turned_right = left * cos - right * sin, right * cos + left * sin
        if SCALED:
            most = tl.maximum(tl.max(tl.abs(turned_left), 1), tl.max(tl.abs(turned_right), 1))
            if REST > 0:
                other = tl.arange(0, REST_TILE)[None]
                is_other = in_block & (other < REST)
                rest = tl.load(row + 2 * PAIRS + other, mask=is_other, other=0.0).to(tl.float32) * scale
                most = tl.maximum(most, tl.max(tl.abs(rest), 1))
            scale = tl.maximum(most / LARGEST, 1e-6)[:, None]
            tl.store(scale_of, scale, mask=in_block)
            turned_left, turned_right = turned_left * (1.0 / scale), turned_right * (1.0 / scale)
            if REST > 0:
                rest = rest * (1.0 / scale)
                tl.store(row + 2 * PAIRS + other, _round(rest, ELEMENT, LARGEST), mask=is_other)
        if INTERLEAVED:
            turned = tl.reshape(tl.join(turned_left, turned_right), (TOKENS_TILE, 2 * PAIRS_TILE))
            tl.store(row + channel, _round(turned, ELEMENT, LARGEST), mask=turning)
        else:
            tl.store(row + pair, _round(turned_left, ELEMENT, LARGEST), mask=is_pair)
            tl.store(row + PAIRS + pair, _round(turned_right, ELEMENT, LARGEST), mask=is_pair)
