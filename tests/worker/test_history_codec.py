"""History is encoded within bounds of error, always to the same bytes, and decoded as the format's description says."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_packcache.core.packing import BLOCK_CHANNELS, HISTORY_FORMATS, Packing
from vllm_packcache.reference.history import decode_reference
from vllm_packcache.worker.history import codec
from vllm_packcache.worker.history.codec import decode, encode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(seed: int, heads: int, tokens: int, channels: int, clusters: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values, float32 [heads, tokens, channels]; of clusters they are ten times as wide as these."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, heads, tokens, channels, generator=generator)
    if clusters:
        centers = 10 * torch.randn(2, heads, clusters, channels, generator=generator)
        rows += centers[:, :, torch.randint(clusters, (tokens,), generator=generator)]
    keys, values = rows.to(DEVICE)
    return keys, values


def coded(packing: Packing, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of keys and values, [heads, n, channels]."""
    tokens = keys.shape[1]
    decoded = decode(packing, encode(packing, keys, values), tokens)
    return decoded[0].transpose(0, 1), decoded[1].transpose(0, 1)


def error(decoded: Tensor, rows: Tensor) -> float:
    """Root mean square error, of what the rows are wide."""
    return ((decoded - rows).norm() / rows.norm()).item()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.sampled_from(HISTORY_FORMATS),
    st.integers(1, 3),
    st.integers(1, 100),
    st.sampled_from((8, 32, 64, 96, 128)),
    st.sampled_from((1e-30, 1e-3, 1.0, 1e3, 1e30)),
    st.integers(0, 2**31),
)
def test_decoded_as_described(format: str, heads: int, tokens: int, channels: int, size: float, seed: int) -> None:
    packing = Packing(format, heads, channels)
    keys, values = (size * rows for rows in drawn(seed, heads, tokens, channels, clusters=3))
    data = encode(packing, keys, values)
    assert data.shape == (packing.encoded_bytes(tokens),)
    expected = decode_reference(format, heads, channels, data.cpu().numpy().tobytes(), tokens)
    # Whatever follows a unit in its last page is none of its.
    decoded = decode(packing, torch.cat([data, data.new_full((7,), 255)]), tokens)
    for read, meant in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(read.cpu().numpy(), meant)


@pytest.mark.parametrize(
    ("format", "gaussian", "clustered"), [("int8", 0.0075, 0.0075), ("int4", 0.1, 0.0115), ("int2", 0.35, 0.036)]
)
def test_errors_are_within_bounds(format: str, gaussian: float, clustered: float) -> None:
    packing = Packing(format, 2, 128)
    for clusters, bound in ((0, gaussian), (12, clustered)):
        rows = drawn(5, 2, 600, 128, clusters)
        for decoded, given in zip(coded(packing, *rows), rows, strict=True):
            assert bound / 2 < error(decoded, given) < bound


@pytest.mark.parametrize("channels", [32, 96, 128])
@pytest.mark.parametrize("format", ["int4", "int2"])
def test_a_block_is_no_worse_than_its_largest_magnitude_allows(format: str, channels: int) -> None:
    # With codes that reach to the block's largest magnitude no channel is off by more than half of a code's step.
    packing = Packing(format, 2, channels)
    rows = drawn(7, 2, 90, channels, clusters=4)
    data = encode(packing, *rows)
    decoded = decode(packing, data, 90)
    parts = packing.parts(90)
    heads = data.view(2, 2, -1)

    def part(name: str) -> Tensor:
        start, kind, shape = parts[name]
        return heads[..., start : start + parts[name].size].view(getattr(torch, kind)).unflatten(-1, shape)

    centroids = part("centroids") * part("centroid_scales")[..., None]
    largest = (2 ** int(format[3:]) - 1) / 2
    for given, read, centroid, index in zip(rows, decoded, centroids, part("indices").long(), strict=True):
        rest = given - torch.stack([of[at] for of, at in zip(centroid, index, strict=True)])
        for block, wrong in zip(
            rest.split(BLOCK_CHANNELS, -1), (read.transpose(0, 1) - given).split(BLOCK_CHANNELS, -1), strict=True
        ):
            # A stored factor is at most a sixteenth off.
            step = block.abs().amax(-1) / largest * (1 + 1 / 16)
            clipped = block.abs().amax(-1) / 16
            bound = (step / 2 + clipped) * block.shape[-1] ** 0.5
            assert (wrong.norm(dim=-1) <= bound).all()


@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_equal_numbers_are_equal_bytes(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing(format, 3, 64)
    rows = drawn(3, 3, 333, 64, clusters=9)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = encode(packing, *rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(encode(packing, *(part.clone() for part in rows)), first)
    # How many heads are done at once is no matter, whether encoding or decoding.
    read = decode(packing, first, 333)
    monkeypatch.setattr(codec, "CHUNK_BYTES", 0)
    monkeypatch.setattr(codec, "CACHE_BYTES", 0)
    for one, other in zip(decode(packing, first, 333), read, strict=True):
        assert torch.equal(one, other)
    # Products of fewer heads may be summed in another order: what is encoded is as good.
    for one, other, given in zip(coded(packing, *rows), read, rows, strict=True):
        assert error(one, given) == pytest.approx(error(other.transpose(0, 1), given), rel=0.02)


@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_zeros_stay_zeros(format: str) -> None:
    packing = Packing(format, 2, 32)
    keys, values = drawn(0, 2, 40, 32)
    keys[1] = 0
    values.zero_()
    read = coded(packing, keys, values)
    assert not read[0][1].any()
    assert not read[1].any()
    assert read[0][0].any()


@pytest.mark.parametrize("huge", [1e5, 1e30, 3e38])
@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_one_huge_number_is_kept_and_hurts_no_other_head(format: str, huge: float) -> None:
    packing = Packing(format, 2, 64)
    keys, values = drawn(1, 2, 50, 64)
    plain = coded(packing, keys, values)
    keys[1, 20, 5] = -huge
    read = coded(packing, keys, values)
    assert torch.isfinite(read[0]).all()
    assert read[0][1, 20, 5].item() == pytest.approx(-huge, rel=0.1)
    torch.testing.assert_close(read[0][0], plain[0][0])
    torch.testing.assert_close(read[1], plain[1])


@pytest.mark.parametrize("format", HISTORY_FORMATS)
def test_rows_of_bfloat16(format: str) -> None:
    packing = Packing(format, 1, 128)
    rows = [part.bfloat16().float() for part in drawn(2, 1, 80, 128)]
    for decoded, given in zip(coded(packing, *rows), rows, strict=True):
        assert error(decoded, given) < {"int8": 0.0075, "int4": 0.1, "int2": 0.35}[format]


@pytest.mark.parametrize("format", ["int4", "int2"])
def test_tokens_that_repeat_cost_almost_nothing(format: str) -> None:
    # As many different tokens as centroids, each the start of one: what is left is what a centroid's 8 bits round.
    packing = Packing(format, 1, 64)
    keys, values = (part.repeat_interleave(16, 1) for part in drawn(4, 1, 5, 64))
    for decoded, given in zip(coded(packing, keys, values), (keys, values), strict=True):
        assert error(decoded, given) < {"int4": 0.001, "int2": 0.004}[format]
