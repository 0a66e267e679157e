"""Cached keys are found where the kernel of vLLM's GPU backends wrote them, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.runner import needs_v2
from tests.worker.test_key_layout import BLOCKS, HEADS, layer, read
from vllm_packcache.worker.keys.layout import cached_keys

BLOCK_SIZE, HEAD_SIZE = 16, 32


@needs_v2
@pytest.mark.parametrize(
    "order",
    [
        pytest.param((0, 1, 2, 3), id="blocks, heads, tokens"),
        pytest.param((0, 2, 1, 3), id="blocks, tokens, heads"),
        pytest.param((1, 0, 2, 3), id="heads, blocks, tokens"),
    ],
)
def test_gpu_backends_as_vllms_triton_kernel_writes(
    order: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the numbers have in memory."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    # The kernel only asks to choose how many numbers a program writes.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    torch.manual_seed(0)
    # Logical [blocks, heads, tokens, 2 x head size].
    shape = [(BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[axis] for axis in order]
    kv_cache = torch.zeros(shape).permute(*[order.index(axis) for axis in range(4)])
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:40]
    key, value = torch.randn(2, len(slots), HEADS, HEAD_SIZE)
    parts = kv_cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    one = torch.ones(1)
    triton_reshape_and_cache_flash(key, value, *parts, slots, "auto", one, one)
    assert kv_cache.any()
    assert torch.equal(read(cached_keys(layer(kv_cache, "TRITON_ATTN")), slots), key)
