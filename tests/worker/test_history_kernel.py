"""The kernel that decodes history and its PyTorch twin agree, interpreted or on a GPU, and it compiles for GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compiling import compiled
from vllm_packcache.core.packing import BLOCK_CHANNELS, HISTORY_FORMATS, SCALE_OFFSET, SCALE_SHIFT, Packing
from vllm_packcache.models.lumos import MMRotary, rotate
from vllm_packcache.worker.history.codec import decode, encode
from vllm_packcache.worker.history.kernel import decode_turned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

BLOCK_SIZE = 16

ORDERS = {"heads, tokens": (0, 1, 2, 3), "tokens, heads": (0, 2, 1, 3)}
"""Which axis of [blocks, heads, tokens, 2 x channels] is where in memory."""


def in_order(sizes: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory = torch.randn([sizes[axis] for axis in order], device=DEVICE).to(dtype)
    return memory.permute(*[order.index(axis) for axis in range(4)])


def encoded(packing: Packing, tokens: int, page_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """A unit's bytes, a cache's pages [30, page bytes] that hold them among others, and which of these do."""
    rows = 3 * torch.randn(2, packing.heads, tokens, packing.channels, device=DEVICE)
    data = encode(packing, *rows)
    pages = torch.randint(0, 255, (30, page_bytes + 8), dtype=torch.uint8, device=DEVICE)[:, :page_bytes]
    needed = -(-len(data) // page_bytes)
    unit = torch.randperm(30)[:needed].to(DEVICE)
    held = pages[unit].flatten()
    held[: len(data)] = data
    pages[unit] = held.view(needed, page_bytes)
    return data, pages, unit


@pytest.mark.parametrize(
    ("heads", "channels", "tokens", "order"),
    [
        (1, 128, 32, "heads, tokens"),
        (2, 96, 18, "tokens, heads"),
        (1, 32, 1, "tokens, heads"),
        (3, 8, 70, "heads, tokens"),
    ],
)
@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_what_the_twin_does(format: str, heads: int, channels: int, tokens: int, order: str) -> None:
    torch.manual_seed(channels)
    packing = Packing(format, heads, channels)
    # Parts, and a token's own numbers, go on in the next page.
    page_bytes = max(12, packing.encoded_bytes(tokens) // 20 // 4 * 4)
    data, pages, unit = encoded(packing, tokens, page_bytes)
    positions = torch.randint(0, 90, (3, tokens), device=DEVICE)
    turn = MMRotary(channels, 10000.0).to(DEVICE)(positions)
    keys, values = decode(packing, data, tokens)
    expected = torch.cat([rotate(keys, turn), values], -1)

    before = pages.clone()
    blocks = -(-tokens // BLOCK_SIZE)
    # The scratch is more than the unit's blocks, and not all tokens of the last one are.
    scratch = in_order((blocks + 2, heads, BLOCK_SIZE, 2 * channels), ORDERS[order], torch.float32)
    others = scratch.clone()
    decode_turned(packing, pages, unit, tokens, turn, scratch[1 : 1 + blocks])
    assert torch.equal(pages, before)
    written = scratch.transpose(1, 2)[1 : 1 + blocks].flatten(0, 1)
    torch.testing.assert_close(written[:tokens], expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    assert torch.equal(written[tokens:], others.transpose(1, 2)[1 : 1 + blocks].flatten(0, 1)[tokens:])
    assert torch.equal(scratch[0], others[0])
    assert torch.equal(scratch[-1], others[-1])


@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_the_twin_turns_and_rounds_as_the_model_does(format: str) -> None:
    packing = Packing(format, 3, 96)
    data, _, _ = encoded(packing, 50, 4096)
    turn = MMRotary(96, 10000.0).to(DEVICE)(torch.randint(0, 90, (3, 50), device=DEVICE))
    keys, values = decode(packing, data, 50)
    expected = rotate(keys, turn).bfloat16(), values.bfloat16()
    for read, meant in zip(decode(packing, data, 50, turn, torch.bfloat16), expected, strict=True):
        assert torch.equal(read, meant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_to_what_the_cache_has(dtype: torch.dtype) -> None:
    packing = Packing("int2", 2, 64)
    data, pages, unit = encoded(packing, 40, 1024)
    turn = MMRotary(64, 10000.0).to(DEVICE)(torch.randint(0, 90, (3, 40), device=DEVICE))
    keys, values = decode(packing, data, 40)
    scratch = in_order((3, 2, BLOCK_SIZE, 128), ORDERS["heads, tokens"], dtype)
    decode_turned(packing, pages, unit.int(), 40, turn, scratch)
    expected = torch.cat([rotate(keys, turn), values], -1)
    written = scratch.transpose(1, 2).flatten(0, 1)[:40].float()
    # Triton's interpreter cuts bf16 off where a GPU rounds it.
    torch.testing.assert_close(written, expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_nothing_is_waited_for() -> None:
    """On a GPU torch says so when something is; the interpreter has no device to wait for."""
    packing = Packing("int2", 2, 64)
    _, pages, unit = encoded(packing, 16, 1024)
    turn = MMRotary(64, 10000.0).to(DEVICE)(torch.zeros(3, 16, dtype=torch.int64, device=DEVICE))
    scratch = torch.zeros(1, 2, BLOCK_SIZE, 128, device=DEVICE)
    decode_turned(packing, pages, unit, 16, turn, scratch)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        decode_turned(packing, pages, unit, 16, turn, scratch)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert scratch.any()


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        (torch.zeros(9, 1026, dtype=torch.uint8), "multiples of 4 bytes, not be 1026 bytes every 1026"),
        (torch.zeros(9, 1027, dtype=torch.uint8)[:, :1024], "multiples of 4 bytes, not be 1024 bytes every 1027"),
        (torch.zeros(9, 64, dtype=torch.uint8), r"a unit of 16 tokens has \d+ bytes, and 3 pages of 64 are too few"),
    ],
)
def test_what_the_kernel_cannot_read(pages: Tensor, sentence: str) -> None:
    turn = torch.ones(16, 1, 32), torch.zeros(16, 1, 32)
    with pytest.raises(ValueError, match=sentence):
        decode_turned(Packing("int4", 1, 64), pages, torch.arange(3), 16, turn, torch.zeros(1, 1, 16, 128))


@pytest.mark.parametrize(("capability", "bits"), [(86, 8), (86, 2), (90, 4)])
def test_it_compiles(capability: int, bits: int) -> None:
    from vllm_packcache.worker.history.kernel import _decode

    pointers = {"pages": "*u8", "floats": "*fp32", "stride": "i32", "unit": "*i64", "cosines": "*fp32"}
    pointers |= {"sines": "*fp32", "out": "*bf16"}
    names = ("out_block", "out_head", "out_token", "tokens", "head_bytes", "unit_at", "centroid_scales_at")
    numbers = dict.fromkeys((*names, "centroids_at", "indices_at", "scales_at", "codes_at"), "i32")
    constants = {
        "BITS": bits, "PAGE": 163840, "OUT_BLOCK": 16, "PAIRS": 64, "PAIRS_TILE": 64, "TOKENS_TILE": 16,
        "SCALED": BLOCK_CHANNELS, "OFFSET": SCALE_OFFSET, "SHIFT": SCALE_SHIFT,
    }  # fmt: skip
    ptx = compiled(_decode, capability, pointers | numbers, constants)
    assert "st.global" in ptx
    # No type of 8 bits that older GPUs lack.
    assert "e4m3" not in ptx
