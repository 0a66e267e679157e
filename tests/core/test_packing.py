"""What encoded history weighs, and where its parts lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_packcache.core.packing import ALIGNMENT, HISTORY_FORMATS, Packing


@pytest.mark.parametrize(("format", "most"), [("int8", 0.52), ("int4", 0.3), ("int2", 0.17)])
@pytest.mark.parametrize("tokens", [510, 4084])
def test_share_of_what_bfloat16_weighs(format: str, most: float, tokens: int) -> None:
    assert 0.97 * most < Packing(format, 20, 128).encoded_bytes(tokens) / (tokens * 20 * 4 * 128) < most


@given(st.sampled_from(HISTORY_FORMATS), st.integers(1, 3), st.integers(1, 5000), st.sampled_from((8, 32, 64, 96, 128)))
def test_parts_are_aligned_and_apart(format: str, heads: int, tokens: int, channels: int) -> None:
    packing = Packing(format, heads, channels)
    end = 0
    for part in packing.parts(tokens).values():
        assert end <= part.start < end + ALIGNMENT
        assert part.start % ALIGNMENT == 0
        end = part.start + part.size
    assert packing.encoded_bytes(tokens) == 2 * heads * packing.head_bytes(tokens)
    assert end <= packing.head_bytes(tokens) < end + ALIGNMENT
    assert packing.head_bytes(tokens) % ALIGNMENT == 0


def test_more_tokens_never_weigh_less() -> None:
    # What is reserved for a frame holds for what is left of it.
    for format in HISTORY_FORMATS:
        weights = [Packing(format, 1, 64).encoded_bytes(tokens) for tokens in range(1, 300)]
        assert weights == sorted(weights)


@pytest.mark.parametrize(
    ("format", "heads", "channels", "message"),
    [
        ("int3", 1, 64, r"history must be kept in one of int8, int4, int2, but the format is 'int3'"),
        ("int2", 0, 64, r"there must be a head to keep the history of, but there are 0"),
        ("int2", 1, 44, r"a head whose history is encoded must have a multiple of 8 channels, but it has 44: keep"),
    ],
)
def test_refused(format: str, heads: int, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(format, heads, channels)


def test_an_empty_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="a unit of history must have a token, but it has 0"):
        Packing("int2", 1, 64).encoded_bytes(0)
