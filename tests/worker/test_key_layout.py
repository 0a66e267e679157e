"""Cached keys are found where vLLM's own kernels wrote them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.worker.keys.layout import cached_keys, cpu_keys, layout_of, row_major_keys
from vllm_packcache.worker.keys.stored import CachedKeys

BLOCKS, HEADS = 5, 3


def layer(kv_cache: torch.Tensor, backend: str = "CPU_ATTN", **attributes: Any) -> Any:
    """As much of an attention layer as is read."""
    return SimpleNamespace(
        kv_cache=kv_cache,
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        **{"head_size": kv_cache.shape[-1] // 2, "kv_cache_dtype": "auto", "dtype": kv_cache.dtype, **attributes},
    )


def read(keys: CachedKeys, slots: torch.Tensor) -> torch.Tensor:
    """Keys in the slots, [slots, heads, head size]."""
    block_size = len(keys.order)
    return torch.stack(
        [keys.memory[slot // block_size].flatten(1)[:, keys.order[slot % block_size]] for slot in slots.tolist()]
    )


# amx needs no such processor to write, only to read; but AVX-512, for vLLM to load the kernels that have it.
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("block_size", "head_size"), [(32, 32), (32, 128), (64, 64), (96, 80)])
def test_the_cpu_backend(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> None:
    if isa == "amx" and head_size % 32:
        pytest.skip("vLLM has no amx kernel for this head size")
    if isa == "amx" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's kernels for processors without AVX-512 have no amx layout")
    kv_cache = torch.zeros(BLOCKS, HEADS, block_size, 2 * head_size, dtype=dtype)
    slots = torch.randperm(BLOCKS * block_size)[: 3 * block_size]
    key, value = torch.randn(2, len(slots), HEADS, head_size).to(dtype)
    key_cache, value_cache = kv_cache.view(BLOCKS, HEADS, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    keys = cached_keys(layer(kv_cache, isa=isa))
    assert torch.equal(read(keys, slots), key)
    # The values are none of its numbers.
    keys.memory.zero_()
    ops.cpu_attn_reshape_and_cache(torch.zeros_like(key), value, key_cache, value_cache, slots, isa)
    written = kv_cache.clone()
    keys.memory.fill_(1)
    assert (kv_cache != written).sum() == kv_cache.numel() // 2


def test_the_cpu_backend_packs_keys_by_channel() -> None:
    keys = cpu_keys(layer(torch.zeros(1, 1, 32, 128), isa="vec"))
    assert torch.equal(keys.order, torch.arange(64 * 32).view(64, 32).T)


def test_a_row_is_a_key_and_its_value() -> None:
    kv_cache = torch.arange(2 * 1 * 4 * 6.0).view(2, 1, 4, 6)
    keys = row_major_keys(layer(kv_cache))
    assert torch.equal(read(keys, torch.tensor([0, 5])), torch.tensor([[[0.0, 1, 2]], [[30.0, 31, 32]]]))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention backend ROCM_ATTN stores them is not known: choose one of CPU"):
        layout_of("ROCM_ATTN")


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores 8 bits on processors with AVX-512 only")
@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("isa", ["vec", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_backend_in_eight_bits(name: str, isa: str, dtype: torch.dtype) -> None:
    """Numbers that the format has are found where the kernel put them, and turned by nothing they stay."""
    block_size, head_size = 32, 64
    kv_cache = torch.zeros(BLOCKS, HEADS, block_size, 2 * head_size, dtype=torch.uint8)
    slots = torch.randperm(BLOCKS * block_size)[: 3 * block_size]
    key, value = (torch.randint(-3, 4, (2, len(slots), HEADS, head_size)) / 4).to(dtype)
    key_cache, value_cache = kv_cache.view(BLOCKS, HEADS, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa, kv_cache_dtype=name)
    keys = cached_keys(layer(kv_cache, isa=isa, kv_cache_dtype=name, dtype=dtype))
    assert torch.equal(read_stored(keys, slots), key.float())
    before, every = kv_cache.clone(), torch.arange(BLOCKS)
    keys.stored.write(keys.memory, every, keys.stored.read(keys.memory, every))
    assert torch.equal(kv_cache, before)


def read_stored(keys: CachedKeys, slots: torch.Tensor) -> torch.Tensor:
    """As `read`, in the numbers that are stood for."""
    block_size = len(keys.order)
    numbers = keys.stored.read(keys.memory, torch.arange(len(keys.memory)))
    return torch.stack([numbers[slot // block_size][:, keys.order[slot % block_size]] for slot in slots.tolist()])


@pytest.mark.parametrize("name", ["int4_per_token_head", "turboquant_4bit_nc", "nvfp4", "fp8_inc"])
def test_fewer_bits_are_refused(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"^positions: rebase turns cached keys in place, and what each turn would lose of a key of '{name}' is",
    ):
        cached_keys(layer(torch.zeros(1, 1, 32, 64, dtype=torch.uint8), isa="vec", kv_cache_dtype=name))
