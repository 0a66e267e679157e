"""Cached keys are found where vLLM's own kernels wrote them."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.worker.keys.layout import CachedKeys, cached_keys, cpu_keys, layout_of, row_major_keys

BLOCKS, HEADS = 5, 3


def layer(kv_cache: torch.Tensor, backend: str = "CPU_ATTN", **attributes: Any) -> Any:
    """As much of an attention layer as is read."""
    return SimpleNamespace(
        kv_cache=kv_cache,
        head_size=kv_cache.shape[-1] // 2,
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        **attributes,
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


TRITON = """
from vllm_packcache.tools import interpreted
interpreted.prepare()
import torch
# The kernel only asks to choose how many numbers a program writes.
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from tests.worker.test_key_layout import layer, read
from vllm_packcache.worker.keys.layout import cached_keys

torch.manual_seed(0)
blocks, heads, block_size, head_size = 5, 3, 16, 32
for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)):
    # Logical [blocks, heads, tokens, 2 x head size], whatever the memory's order is.
    shape = [(blocks, heads, block_size, 2 * head_size)[axis] for axis in order]
    kv_cache = torch.zeros(shape).permute(*[order.index(axis) for axis in range(4)])
    slots = torch.randperm(blocks * block_size)[:40]
    key, value = torch.randn(2, len(slots), heads, head_size)
    parts = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    one = torch.ones(1)
    triton_reshape_and_cache_flash(key, value, *parts, slots, "auto", one, one)
    assert kv_cache.any()
    assert torch.equal(read(cached_keys(layer(kv_cache, "TRITON_ATTN")), slots), key), order
print("equal")
"""


def test_gpu_backends_as_vllms_triton_kernel_writes() -> None:
    """Under Triton's interpreter, which must be chosen before anything is imported."""
    outcome = subprocess.run(
        [sys.executable, "-c", TRITON],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert outcome.stdout.strip().endswith("equal"), outcome.stderr[-3000:]


def test_a_row_is_a_key_and_its_value() -> None:
    kv_cache = torch.arange(2 * 1 * 4 * 6.0).view(2, 1, 4, 6)
    keys = row_major_keys(layer(kv_cache))
    assert torch.equal(read(keys, torch.tensor([0, 5])), torch.tensor([[[0.0, 1, 2]], [[30.0, 31, 32]]]))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention backend ROCM_ATTN stores them is not known: choose one of CPU"):
        layout_of("ROCM_ATTN")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_quantised_cache_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="cannot rotate keys stored as"):
        cached_keys(layer(torch.zeros(1, 1, 32, 64, dtype=dtype), isa="vec"))
