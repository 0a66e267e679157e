"""Cached keys are found where the kernel of vLLM's GPU backends wrote them, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.runner import needs_v2
from tests.worker.test_key_layout import BLOCKS, HEADS, layer, read, read_stored
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


@needs_v2
@pytest.mark.parametrize(("name", "dtype"), [("int8_per_token_head", torch.int8), ("fp8_per_token_head", torch.uint8)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["blocks, heads", "blocks, tokens"])
def test_scales_stand_behind_the_numbers(name: str, dtype: torch.dtype, order: tuple[int, ...]) -> None:
    """Where vLLM's kernel writes both; and what is read is written back to the byte."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    torch.manual_seed(0)
    shape = [(BLOCKS, HEADS, BLOCK_SIZE, 2 * (HEAD_SIZE + 4))[axis] for axis in order]
    kv_cache = torch.zeros(shape, dtype=dtype).permute(*[order.index(axis) for axis in range(4)])
    attention = TritonAttentionImpl(HEADS, HEAD_SIZE, 1.0, HEADS, None, None, name)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:40]
    # Numbers that the format has, whatever rounds them: the interpreter does not round to 8-bit floats as a GPU does.
    most = 127 if dtype == torch.int8 else 448
    key, value = torch.randint(-15, 16, (2, len(slots), HEADS, HEAD_SIZE)).float()
    key[..., 7] = most
    key *= 2.0 ** torch.randint(-3, 4, (len(slots), HEADS, 1))
    attention.do_kv_cache_update(torch.nn.Module(), key, value, kv_cache, slots)
    keys = cached_keys(layer(kv_cache, "TRITON_ATTN", head_size=HEAD_SIZE, kv_cache_dtype=name))
    assert torch.equal(read_stored(keys, slots), key)
    before, some = kv_cache.clone(), torch.unique(slots // BLOCK_SIZE)
    keys.stored.write(keys.memory, some, keys.stored.read(keys.memory, some))
    assert torch.equal(read_stored(keys, slots), key)
    assert torch.equal(kv_cache[..., HEAD_SIZE + 4 :], before[..., HEAD_SIZE + 4 :])
