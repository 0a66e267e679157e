"""The rotation kernel and its PyTorch twin agree, interpreted or on a GPU, and it compiles for real GPUs."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.compiling import compiled
from vllm_packcache.worker.keys.kernel import RotationKernel
from vllm_packcache.worker.keys.layout import CachedKeys
from vllm_packcache.worker.keys.rotation import Rotary, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ORDERS = {"blocks, heads": (0, 1, 2, 3), "blocks, tokens": (0, 2, 1, 3), "heads, blocks": (1, 0, 2, 3)}
"""Which axis of [blocks, heads, tokens, 2 x head size] is where in memory: those that GPU backends have."""


class Shape(NamedTuple):
    head_size: int = 16
    pairs: int = 8
    block_size: int = 16
    split: int = 1
    heads: int = 2
    blocks: int = 9


SHAPES = {
    "plain": Shape(),
    "part of the head": Shape(head_size=20, pairs=6),
    "odd sizes": Shape(head_size=80, pairs=40, block_size=24),
    "one pair": Shape(head_size=2, pairs=1),
    "smaller blocks": Shape(split=3, heads=1),
    "many tokens": Shape(head_size=128, pairs=64, block_size=40, heads=1, blocks=3),
}


def rotary(shape: Shape, interleaved: bool) -> Rotary:
    pairs = np.arange(shape.pairs)
    left, right = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, shape.pairs + pairs)
    return Rotary(np.ones(shape.pairs), np.zeros_like(pairs), left, right)


def make_cache(shape: Shape, order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache of keys and values with the logical shape [blocks, heads, tokens, 2 x head size]."""
    sizes = (shape.blocks * shape.split, shape.heads, shape.block_size, 2 * shape.head_size)
    cache = torch.randn([sizes[axis] for axis in order], device=DEVICE).to(dtype)
    return cache.permute(*[order.index(axis) for axis in range(4)])


def keys_of(cache: torch.Tensor) -> CachedKeys:
    tokens, channels = cache.shape[2], cache.shape[3] // 2
    return CachedKeys(
        cache[..., :channels], torch.arange(tokens * channels, device=cache.device).view(tokens, channels)
    )


def close(turned: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    """Equal but for how float32 sums round, and where that falls on an edge for how the dtype does."""
    largest = before.float().abs().max().item()
    eps = torch.finfo(turned.dtype).eps
    torch.testing.assert_close(turned.float(), expected.float(), rtol=0 if eps < 1e-5 else eps, atol=4e-7 * largest)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kinds", [1, 2], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_the_twin_does(shape: Shape, interleaved: bool, kinds: int) -> None:
    # Every dtype meets every order: the interpreter is slow, so one pairing for each of three kinds of case.
    turn = kinds + interleaved
    for seed, dtype in enumerate(DTYPES):
        order = tuple(ORDERS.values())[(seed + turn) % 3]
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        angles = generator.uniform(-100, 100, (kinds, shape.pairs))
        blocks = torch.from_numpy(generator.permutation(shape.blocks)[:2].astype(np.int32))
        kind_of = torch.from_numpy(generator.integers(kinds, size=(len(blocks), shape.split * shape.block_size)))
        layers = [make_cache(shape, order, dtype) for _ in range(2)]
        twins = [layer.clone() for layer in layers]
        before = [layer.clone() for layer in layers]
        for twin in twins:
            rotate(keys_of(twin), blocks.long(), kind_of, angles, rotary(shape, interleaved))
        kernel = RotationKernel(keys_of(layer).memory for layer in layers)
        kernel.rotate(blocks, kind_of, angles, interleaved)
        for layer, twin, original in zip(layers, twins, before, strict=True):
            close(layer, twin, original)
            # Values, channels that do not turn and other blocks are bit for bit as they were.
            turned = torch.zeros_like(layer, dtype=torch.bool)
            own = (blocks[:, None] * shape.split + torch.arange(shape.split)).flatten().to(DEVICE)
            turned[own, :, :, : 2 * shape.pairs] = True
            assert torch.equal(layer[~turned], original[~turned])
            assert not torch.equal(layer[turned], original[turned])


def test_layers_that_differ_are_all_turned() -> None:
    torch.manual_seed(0)
    shapes = [Shape(), Shape(heads=3), Shape(), Shape(block_size=8, split=2)]
    orders = [ORDERS["blocks, heads"], ORDERS["blocks, heads"], ORDERS["blocks, tokens"], ORDERS["blocks, heads"]]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    layers = [make_cache(*properties) for properties in zip(shapes, orders, dtypes, strict=True)]
    twins = [layer.clone() for layer in layers]
    blocks, kinds = torch.tensor([4, 1]), torch.randint(2, (2, 16))
    angles = np.random.default_rng(0).uniform(-3, 3, (2, 8))
    for twin in twins:
        rotate(keys_of(twin), blocks, kinds, angles, rotary(Shape(), False))
    RotationKernel(keys_of(layer).memory for layer in layers).rotate(blocks, kinds, angles, False)
    for layer, twin in zip(layers, twins, strict=True):
        close(layer, twin, layer)


def test_a_turn_is_exact_but_for_one_rounding() -> None:
    """Against float64, so that kernel and twin are not wrong together."""
    # Triton's interpreter cuts bf16 off where a GPU rounds it.
    rounding = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
    if DEVICE.type == "cpu":
        rounding[torch.bfloat16] *= 2
    torch.manual_seed(0)
    angles = np.array([[0.7, 91.3]])
    for dtype in DTYPES:
        cache = make_cache(Shape(head_size=4, pairs=2), ORDERS["blocks, tokens"], dtype)
        left, right = cache[..., :4].double().cpu().unflatten(-1, (2, 2)).unbind(-2)
        cos, sin = torch.from_numpy(np.cos(angles[0])), torch.from_numpy(np.sin(angles[0]))
        exact = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        kernel = RotationKernel([keys_of(cache).memory])
        kernel.rotate(torch.arange(9), torch.zeros(9, 16, dtype=torch.int64), angles, False)
        error = (cache[..., :4].double().cpu() - exact).abs()
        assert (error <= rounding[dtype] * exact.abs() + 1e-6).all(), dtype


def test_no_blocks_are_no_launch() -> None:
    cache = make_cache(Shape(), ORDERS["blocks, heads"], torch.float32)
    before = cache.clone()
    kernel = RotationKernel([keys_of(cache).memory])
    kernel.rotate(torch.empty(0, dtype=torch.int64), torch.empty(0, 16, dtype=torch.int64), np.ones((1, 8)), False)
    assert torch.equal(cache, before)


def test_nothing_is_waited_for() -> None:
    """On a GPU torch says so when something is; the interpreter has no device to wait for."""
    cache = make_cache(Shape(), ORDERS["blocks, tokens"], torch.bfloat16)
    kernel = RotationKernel([keys_of(cache).memory])
    arguments = torch.tensor([1, 2]), torch.zeros(2, 16, dtype=torch.int64), np.ones((2, 8)), False
    kernel.rotate(*arguments)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.rotate(*arguments)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        (torch.zeros(2, 1, 4, 8, dtype=torch.float64), "keys of torch.float64 cannot be rotated: known are torch.flo"),
        (torch.zeros(2, 1, 8, 4).transpose(2, 3), "must lie side by side, not 4 numbers apart"),
        (torch.zeros(65)[1:].view(2, 1, 4, 8), "must start at a multiple of 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_read(memory: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RotationKernel([memory])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("capability", [86, 90], ids=["A40", "H200"])
def test_keys_are_moved_16_bytes_at_a_time(capability: int, interleaved: bool) -> None:
    import triton.language as tl

    from vllm_packcache.worker.keys.kernel import _rotate

    pointers = {"addresses": "*i64", "blocks": "*i32", "kinds": "*i64", "turns": "*fp32"}
    numbers = dict.fromkeys(("stride_block", "stride_head", "stride_token", "split"), "i32")
    constants = {
        "ELEMENT": tl.bfloat16, "BLOCK_SIZE": 16, "KINDS": 1, "PAIRS": 64, "INTERLEAVED": interleaved,
        "TOKENS_TILE": 16, "PAIRS_TILE": 64,
    }  # fmt: skip
    ptx = compiled(_rotate, capability, pointers | numbers, constants)
    stores = re.findall(r"st\.global[.\w]*", ptx)
    assert stores
    assert all(".v4.b32" in store for store in stores), stores
