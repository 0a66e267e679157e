"""Key rotation on a GPU: one Triton kernel over (block, head, layer) turns the keys of a request's history in place.

It does what `vllm_packcache.worker.keys.rotation.rotate` does with PyTorch, for all layers in one launch. Every key is
read and written once and turned in float32. It knows neither vLLM nor how the blocks were chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_packcache.core.positions import Float64

PAIRS_AT_ONCE = 1024
"""Pairs of channels that a program holds: eight of each side for each of its 128 threads, 16 bytes of bf16."""

ALIGNMENT = 16
"""Bytes that a key cache starts at a multiple of: what the widest load of a thread needs."""

_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class RotationKernel:
    """Rotates the cached keys of a model's layers.

    Layers have caches of their own, so the kernel is given a table of their addresses. Layers that differ in shape,
    strides or dtype get a launch each kind; of most models all are alike.

    Args:
        memories: the keys of every layer, each cache once, [blocks, heads, tokens of a block, head size]; the
            channels of a key lie side by side, whatever the order of the rest.

    Raises:
        ValueError: the kernel cannot read one of them.
    """

    def __init__(self, memories: Iterable[Tensor]) -> None:
        alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for memory in memories:
            _check(memory)
            alike[memory.shape[1:], memory.stride(), memory.dtype].append(memory)
        # The caches are kept beside their addresses, so that none is freed while it can be written to.
        self._groups = [
            (group, torch.tensor([memory.data_ptr() for memory in group], device=group[0].device))
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
        for memories, addresses in self._groups:
            device = addresses.device
            _, heads, block_size, _ = memories[0].shape
            split = kinds.shape[1] // block_size
            _rotate[len(blocks) * split, heads, len(memories)](
                addresses,
                _on_device(blocks, device),
                _on_device(kinds if num_kinds > 1 else blocks, device),
                _on_device(turns, device),
                *memories[0].stride()[:3],
                split,
                ELEMENT=_ELEMENTS[memories[0].dtype],
                BLOCK_SIZE=block_size,
                KINDS=num_kinds,
                PAIRS=pairs,
                INTERLEAVED=interleaved,
                TOKENS_TILE=min(triton.next_power_of_2(block_size), max(1, PAIRS_AT_ONCE // pairs_tile)),
                PAIRS_TILE=pairs_tile,
            )


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
def _rotate(  # type: ignore[no-untyped-def]
    addresses,  # [layers]: of their keys
    blocks,  # [n]
    kinds,  # [n, split * BLOCK_SIZE]; unused if there is one kind only
    turns,  # [2, KINDS, PAIRS]: cosines and sines
    stride_block,
    stride_head,
    stride_token,
    split,  # blocks of this cache that one of ``blocks`` is
    ELEMENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KINDS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
):
    number = tl.program_id(0)
    # A cache has more numbers than int32 counts.
    head = tl.program_id(1).to(tl.int64)
    block = tl.load(blocks + number // split).to(tl.int64) * split + number % split
    keys = tl.multiple_of(tl.load(addresses + tl.program_id(2)).to(tl.pointer_type(ELEMENT)), 16)
    keys += block * stride_block + head * stride_head
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
        if INTERLEAVED:
            # Whole rows are moved, so that neighbours travel together.
            turning = in_block & (channel < 2 * PAIRS)
            numbers = tl.load(row + channel, mask=turning, other=0.0).to(tl.float32)
            left, right = tl.split(tl.reshape(numbers, (TOKENS_TILE, PAIRS_TILE, 2)))
            turned = tl.join(left * cos - right * sin, right * cos + left * sin)
            turned = tl.reshape(turned, (TOKENS_TILE, 2 * PAIRS_TILE))
            tl.store(row + channel, turned.to(ELEMENT), mask=turning)
        else:
            left = tl.load(row + pair, mask=is_pair, other=0.0).to(tl.float32)
            right = tl.load(row + PAIRS + pair, mask=is_pair, other=0.0).to(tl.float32)
            tl.store(row + pair, (left * cos - right * sin).to(ELEMENT), mask=is_pair)
            tl.store(row + PAIRS + pair, (right * cos + left * sin).to(ELEMENT), mask=is_pair)
