"""A slide turns cached keys to their new positions, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions, slide_angles
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.keys import rotation
from vllm_packcache.worker.keys.layout import cpu_key_order
from vllm_packcache.worker.keys.rotation import KeyRotation, Rotary, rotary_of, rotate
from vllm_packcache.worker.keys.stored import Bytes, CachedKeys, PerTokenHead

HEAD = 64
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "other base": {"rope_type": "default", "rope_theta": 500_000.0},
    "part of the head": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "an odd part of the head": {"rope_type": "default", "partial_rotary_factor": 0.75},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "three axes": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "three axes, interleaved": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, *embeddings: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(embeddings)


def make_rope(name: str, neox: bool = True) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD, 1024, is_neox_style=neox, rope_parameters={"rope_theta": 10_000.0, **ROPES[name]})


def cache_of(keys: torch.Tensor, scrambled: bool) -> CachedKeys:
    """Keys [blocks, tokens, heads, head size] as a cache, its numbers in a random order."""
    blocks, tokens, heads, channels = keys.shape
    order = torch.randperm(tokens * channels) if scrambled else torch.arange(tokens * channels)
    memory = torch.empty(blocks, heads, tokens * channels, dtype=keys.dtype)
    memory[..., order] = keys.transpose(1, 2).flatten(2)
    return CachedKeys(memory.view(blocks, heads, tokens, channels), order.view(tokens, channels))


def keys_in(cache: CachedKeys) -> torch.Tensor:
    """The inverse of `cache_of`."""
    return cache.memory.flatten(2)[..., cache.order].transpose(1, 2)


GRID = FrameLayout.from_grid((3, 4), frame_start_tokens=2, row_end_tokens=1, frame_end_tokens=1)


@pytest.mark.parametrize("scrambled", [False, True], ids=["in rows", "packed"])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("name", ROPES)
def test_a_turned_key_is_the_key_at_its_new_position(name: str, neox: bool, scrambled: bool) -> None:
    torch.manual_seed(0)
    embedding = make_rope(name, neox)
    three_axes = "three" in name
    layout = VideoLayout(GRID, 10)
    positions = Positions(layout, 2, (4, 8, 3) if three_axes else None)
    block_size, blocks = 8, 6
    tokens = np.arange(layout.frame_start(3), layout.frame_start(3) + blocks * block_size)
    fresh = torch.randn(len(tokens), 2 * HEAD)

    def at(window_start: int) -> torch.Tensor:
        where = torch.from_numpy(positions.of(tokens, window_start))
        _, keys = embedding.forward_native(where if three_axes else where[0], fresh.clone(), fresh.clone())
        return keys.view(blocks, block_size, 2, HEAD)

    cache = cache_of(at(1), scrambled)
    rotary = rotary_of(Model(embedding, embedding))
    angles = slide_angles(positions, rotary.frequencies, rotary.axis_of)
    kinds = torch.from_numpy(positions.slide_kinds(tokens)).view(blocks, block_size)
    turning = torch.tensor([4, 0, 3])
    rotate(cache, turning, kinds[turning], angles, rotary)
    expected = at(1)
    expected[turning] = at(2)[turning]
    # Angles of up to 100 radians in float32, keys of up to 4.
    torch.testing.assert_close(keys_in(cache), expected, rtol=0, atol=100 * 2**-23 * 4)
    untouched = torch.tensor([1, 2, 5])
    assert torch.equal(keys_in(cache)[untouched], at(1)[untouched])


@pytest.mark.parametrize(
    ("isa", "dtype", "name", "neox", "runs"),
    [
        ("vec", torch.float32, "default", True, True),
        ("vec", torch.bfloat16, "part of the head", False, True),
        ("amx", torch.bfloat16, "default", True, True),
        ("vec", torch.float32, "an odd part of the head", True, False),
    ],
)
def test_keys_of_the_cpu_backend_move_in_runs(isa: str, dtype: torch.dtype, name: str, neox: bool, runs: bool) -> None:
    """Both ways to find partners give the same; the fast one is taken where it can be."""
    if isa == "amx" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's kernels for processors without AVX-512 have no amx layout")
    rotary = rotary_of(Model(make_rope(name, neox)))
    angles = slide_angles(Positions(VideoLayout(FrameLayout(8), 10), 2), rotary.frequencies, rotary.axis_of)
    turn = rotation._turn(cpu_key_order(isa, dtype, 32, HEAD), angles, rotary)
    assert (turn.stride is not None) == runs
    numbers = torch.randn(3, 2, 32 * HEAD)
    moved = turn.partners(numbers) * turn.crossed
    assert torch.equal(moved, numbers[..., turn.partner] * turn.crossed)


def test_smaller_blocks_of_a_kernel_are_found() -> None:
    torch.manual_seed(0)
    rotary = Rotary(np.array([1.0, 0.1]), np.array([0, 0]), np.array([0, 1]), np.array([2, 3]))
    keys = torch.randn(12, 4, 1, 4)
    angles = np.array([[0.5, 0.05], [0.0, 0.0]])
    small, large = cache_of(keys, False), cache_of(keys.view(4, 12, 1, 4), False)
    kinds = torch.randint(2, (2, 12))
    for cache in (small, large):
        rotate(cache, torch.tensor([3, 1]), kinds, angles, rotary)
    assert torch.equal(keys_in(small).view(4, 12, 1, 4), keys_in(large))
    assert not torch.equal(keys_in(large), keys.view(4, 12, 1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_turn_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = Rotary(np.array([1.0]), np.array([0]), np.array([0]), np.array([1]))
    keys = torch.randn(4, 8, 2, 2).to(dtype)
    cache = cache_of(keys, True)
    rotate(cache, torch.arange(4), torch.zeros(4, 8, dtype=torch.int64), np.array([[0.7]]), rotary)
    left, right = keys.double().unbind(-1)
    cos, sin = np.cos(0.7), np.sin(0.7)
    exact = torch.stack([left * cos - right * sin, right * cos + left * sin], -1)
    error = (keys_in(cache).double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def sliding() -> tuple[Retention, Positions]:
    layout = VideoLayout(FrameLayout(13), 10)
    return Retention(layout, PackCache(window=2, history_frames=1.5, selection="spatial"), 8), Positions(layout, 2)


def test_many_blocks_are_turned_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rotary = Rotary(np.array([0.3]), np.array([0]), np.array([0]), np.array([1]))
    keys, kinds = torch.randn(20, 8, 1, 2), torch.randint(2, (11, 8))
    at_once, piecewise = cache_of(keys, False), cache_of(keys, False)
    rotate(at_once, torch.arange(3, 14), kinds, np.array([[0.7], [0.2]]), rotary)
    monkeypatch.setattr(rotation, "NUMBERS_AT_ONCE", 3 * 16 + 1)
    rotate(piecewise, torch.arange(3, 14), kinds, np.array([[0.7], [0.2]]), rotary)
    assert torch.equal(keys_in(at_once), keys_in(piecewise))


def test_a_slide_turns_the_history_and_nothing_else() -> None:
    torch.manual_seed(0)
    retention, positions = sliding()
    rotary = Rotary(np.array([0.3]), np.array([0]), np.array([0]), np.array([1]))
    cache = cache_of(torch.randn(40, 8, 1, 2), False)
    before = keys_in(cache).clone()
    table = np.random.default_rng(0).permutation(40)[:20].astype(np.int32)
    frame = 5
    KeyRotation.of(rotary, [cache]).slide(
        retention, positions, retention.layout.frame_start(frame), torch.from_numpy(table)
    )
    turned = set(torch.nonzero((keys_in(cache) != before).flatten(1).any(1)).flatten().tolist())
    assert turned == set(table[retention.sliding_blocks(frame)].tolist())
    assert not turned & set(table[list(retention.blocks.condition_blocks)].tolist())


def test_layers_that_share_a_cache_are_turned_once() -> None:
    torch.manual_seed(0)
    retention, positions = sliding()
    rotary = Rotary(np.array([0.3]), np.array([0]), np.array([0]), np.array([1]))
    keys = torch.randn(20, 8, 1, 2)
    once, shared = cache_of(keys, False), cache_of(keys, False)
    table = torch.arange(20, dtype=torch.int32)
    for layers in ([once], [shared, shared, CachedKeys(*shared)]):
        KeyRotation.of(rotary, layers).slide(retention, positions, retention.layout.frame_start(4), table)
    assert torch.equal(keys_in(once), keys_in(shared))


def test_a_vision_tower_does_not_count() -> None:
    embedding = make_rope("default")
    model = Model(embedding, make_rope("other base"))
    model.get_language_model = lambda: Model(embedding)
    assert rotary_of(model).frequencies[0] == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Model(), "needs one rotary embedding for all layers, and Model has 0"),
        (lambda: Model(make_rope("default"), make_rope("llama3")), "Model has 2"),
    ],
)
def test_models_that_cannot_be_rotated(make: Callable[[], Model], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        rotary_of(make())


def test_an_unknown_embedding_is_refused() -> None:
    with set_current_vllm_config(VllmConfig()):
        dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        embedding = get_rope(HEAD, 1024, rope_parameters=dynamic)
    with pytest.raises(ConfigError, match="does not know the rotary embedding DynamicNTKScalingRotaryEmbedding"):
        rotary_of(Model(embedding))


@pytest.mark.parametrize(
    ("dtype", "scaled", "written"),
    [
        (torch.int8, True, 0.007),
        (torch.float8_e4m3fn, True, 0.027),
        (torch.float8_e4m3fn, False, 0.028),
        (torch.float8_e5m2, False, 0.055),
    ],
    ids=str,
)
def test_the_error_of_eight_bits_grows_with_the_root_of_the_turns(
    dtype: torch.dtype, scaled: bool, written: float
) -> None:
    """And not faster, as it would if every turn cut off what the format has no room for."""
    torch.manual_seed(0)
    blocks, heads, tokens, channels = 3, 2, 16, 128
    memory = torch.zeros(blocks, heads, tokens, channels, dtype=torch.int8 if dtype == torch.int8 else torch.uint8)
    stored = PerTokenHead(dtype, torch.ones(blocks, tokens, heads)) if scaled else Bytes(dtype)
    cache, every = CachedKeys.in_rows(memory, stored), torch.arange(blocks)
    exact = torch.randn(blocks, heads, tokens, channels)
    stored.write(memory, every, exact.flatten(2))
    left, right = exact.double().chunk(2, -1)
    pairs = np.arange(channels // 2)
    rotary = Rotary(10_000.0 ** (-pairs / 64), np.zeros_like(pairs), pairs, pairs + 64)
    angles = -1035 * rotary.frequencies[None]
    cos, sin = torch.from_numpy(np.cos(angles[0])), torch.from_numpy(np.sin(angles[0]))
    errors = []
    for _ in range(13):
        turned = torch.cat([left, right], -1)
        read = stored.read(memory, every).view(exact.shape).double()
        errors.append(float((read - turned).norm() / turned.norm()))
        left, right = left * cos - right * sin, right * cos + left * sin
        rotate(cache, every, torch.zeros(blocks, tokens, dtype=torch.int64), angles, rotary)
    assert errors[0] < written
    growth = np.array(errors) / errors[0] / np.sqrt(1 + np.arange(13))
    assert (np.abs(growth - 1) < 0.1).all()
