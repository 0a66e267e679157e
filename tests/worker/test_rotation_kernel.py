"""The rotation kernel and its PyTorch twin agree, interpreted or on a GPU, and it compiles for real GPUs."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.compiling import compiled
from vllm_packcache.worker.keys.kernel import RotationKernel
from vllm_packcache.worker.keys.rotation import Rotary, rotate
from vllm_packcache.worker.keys.stored import Bytes, CachedKeys, PerTokenHead

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
    return CachedKeys.in_rows(cache[..., : cache.shape[3] // 2])


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
        kernel = RotationKernel(keys_of(layer) for layer in layers)
        kernel.rotate(blocks, kind_of, angles, interleaved)
        for layer, twin, original in zip(layers, twins, before, strict=True):
            close(layer, twin, original)
            # Values, channels that do not turn and other blocks are bit for bit as they were.
            turned = torch.zeros_like(layer, dtype=torch.bool)
            own = (blocks[:, None] * shape.split + torch.arange(shape.split)).flatten().to(DEVICE)
            turned[own, :, :, : 2 * shape.pairs] = True
            assert torch.equal(layer[~turned], original[~turned])
            assert not torch.equal(layer[turned], original[turned])


FORMATS = {
    "int8, a scale a token": (torch.int8, True),
    "e4m3, a scale a token": (torch.float8_e4m3fn, True),
    "e4m3": (torch.float8_e4m3fn, False),
    "e5m2": (torch.float8_e5m2, False),
}


def eight_bits(
    shape: Shape, order: tuple[int, ...], dtype: torch.dtype, scaled: bool
) -> tuple[torch.Tensor, CachedKeys]:
    """A cache of random keys, and they; what is no key is random too."""
    width = 2 * (shape.head_size + (4 if scaled else 0))
    sizes = (shape.blocks * shape.split, shape.heads, shape.block_size, width)
    cache = torch.randint(0, 64, [sizes[axis] for axis in order], dtype=torch.int8, device=DEVICE)
    cache = cache.permute(*[order.index(axis) for axis in range(4)]).view(
        torch.int8 if dtype == torch.int8 else torch.uint8
    )
    keys = keys_in_eight_bits(cache, shape, dtype, scaled)
    every = torch.arange(len(cache), device=DEVICE)
    numbers = 3 * torch.randn(len(cache), shape.heads, shape.block_size * shape.head_size, device=DEVICE)
    keys.stored.write(keys.memory, every, numbers)
    return cache, keys


def keys_in_eight_bits(cache: torch.Tensor, shape: Shape, dtype: torch.dtype, scaled: bool) -> CachedKeys:
    memory = cache[..., : shape.head_size]
    if not scaled:
        return CachedKeys.in_rows(memory, Bytes(dtype))
    scales = cache[..., shape.head_size : shape.head_size + 4].view(torch.float32)[..., 0].transpose(1, 2)
    return CachedKeys.in_rows(memory, PerTokenHead(dtype, scales))


@pytest.mark.parametrize("kinds", [1, 2], ids=["one kind", "two kinds"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("shape", ["plain", "part of the head", "smaller blocks"])
@pytest.mark.parametrize("name", FORMATS)
def test_eight_bits_are_what_the_twin_makes_of_them(name: str, shape: str, interleaved: bool, kinds: int) -> None:
    (dtype, scaled), own = FORMATS[name], SHAPES[shape]
    torch.manual_seed(kinds)
    generator = np.random.default_rng(kinds)
    angles = generator.uniform(-100, 100, (kinds, own.pairs))
    blocks = torch.from_numpy(generator.permutation(own.blocks)[:2])
    kind_of = torch.from_numpy(generator.integers(kinds, size=(2, own.split * own.block_size)))
    # Scales are read as float32, for which their addresses must be multiples of 4.
    cache, keys = eight_bits(own, ORDERS["blocks, tokens"], dtype, scaled)
    twin = cache.clone()
    rotate(keys_in_eight_bits(twin, own, dtype, scaled), blocks, kind_of, angles, rotary(own, interleaved))
    before = cache.clone()
    RotationKernel([keys]).rotate(blocks, kind_of, angles, interleaved)
    every = torch.arange(len(cache))
    turned, expected, original = (
        own_keys.stored.read(own_keys.memory, every)
        for own_keys in (keys_in_eight_bits(each, own, dtype, scaled) for each in (cache, twin, before))
    )
    # Where float32 rounds beside an edge of the format, a number is its neighbour: of some thousands hardly one.
    apart = (turned - expected).abs() > 1e-5 * expected.abs()
    if dtype.is_floating_point and DEVICE.type == "cpu":
        # Triton's interpreter rounds to 8-bit floats wrongly where that carries into the exponent, and below the normal
        # numbers: these are compared on a GPU alone.
        numbers = keys_in_eight_bits(twin, own, dtype, scaled).memory.view(dtype).flatten(2).float()
        apart &= (numbers.abs() >= torch.finfo(dtype).smallest_normal) & (numbers.abs().frexp().mantissa != 0.5)
    assert apart.float().mean() < 0.002
    assert not torch.equal(turned, original)
    # Values and other blocks are bit for bit as they were.
    touched = torch.zeros_like(cache, dtype=torch.bool)
    touched[(blocks[:, None] * own.split + torch.arange(own.split)).flatten(), :, :, : cache.shape[3] // 2] = True
    assert torch.equal(cache[~touched], before[~touched])


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
    RotationKernel(keys_of(layer) for layer in layers).rotate(blocks, kinds, angles, False)
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
        kernel = RotationKernel([keys_of(cache)])
        kernel.rotate(torch.arange(9), torch.zeros(9, 16, dtype=torch.int64), angles, False)
        error = (cache[..., :4].double().cpu() - exact).abs()
        assert (error <= rounding[dtype] * exact.abs() + 1e-6).all(), dtype


def test_no_blocks_are_no_launch() -> None:
    cache = make_cache(Shape(), ORDERS["blocks, heads"], torch.float32)
    before = cache.clone()
    kernel = RotationKernel([keys_of(cache)])
    kernel.rotate(torch.empty(0, dtype=torch.int64), torch.empty(0, 16, dtype=torch.int64), np.ones((1, 8)), False)
    assert torch.equal(cache, before)


def test_nothing_is_waited_for() -> None:
    """On a GPU torch says so when something is; the interpreter has no device to wait for."""
    cache = make_cache(Shape(), ORDERS["blocks, tokens"], torch.bfloat16)
    kernel = RotationKernel([keys_of(cache)])
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
        RotationKernel([CachedKeys(memory, torch.empty(0))])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("capability", [86, 90], ids=["A40", "H200"])
def test_keys_are_moved_16_bytes_at_a_time(capability: int, interleaved: bool) -> None:
    import triton.language as tl

    from vllm_packcache.worker.keys.kernel import _rotate

    pointers = {"addresses": "*i64", "blocks": "*i32", "kinds": "*i64", "turns": "*fp32"}
    strides = ("stride_block", "stride_head", "stride_token", "scale_block", "scale_token", "scale_head", "split")
    numbers = dict.fromkeys(strides, "i32")
    constants = {
        "LAYERS": 2, "ELEMENT": tl.bfloat16, "LARGEST": 0.0, "SCALED": False, "BLOCK_SIZE": 16, "KINDS": 1, "PAIRS": 64,
        "INTERLEAVED": interleaved, "TOKENS_TILE": 16, "PAIRS_TILE": 64, "REST": 0, "REST_TILE": 1,
    }  # fmt: skip
    ptx = compiled(_rotate, capability, pointers | numbers, constants)
    stores = re.findall(r"st\.global[.\w]*", ptx)
    assert stores
    assert all(".v4.b32" in store for store in stores), stores
