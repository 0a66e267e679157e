"""Encoding and decoding history with PyTorch, as `vllm_packcache.core.packing` describes it, on any device.

Equal numbers are encoded to equal bytes: a request that is computed again after a preemption must go on as it would
have. So nothing is drawn by chance, and sums do not depend on who comes first.

Only integers and float32 are used: devices without types of 8 bits decode as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_packcache.core.packing import BLOCK_CHANNELS, SCALE_OFFSET, SCALE_SHIFT, Packing

ITERATIONS = 4
"""Of k-means: more gain nothing that is seen."""

SHRUNK = (1.0, 0.82, 0.68, 0.56, 0.46, 0.38)
"""What the largest code may stand for, of a block's largest magnitude: the one that leaves the least error is taken."""

CHUNK_BYTES = 256 * 2**20
"""Memory that a GPU may take beside what is given and what comes of it; a head at least is done at once."""

CACHE_BYTES = 4 * 2**20
"""The same of a CPU: what lies in its cache need not be fetched."""

_SMALLEST_UNIT = -90
"""As a power of two: with it the smallest factor is a float32 that no device takes for zero."""


def encode(packing: Packing, keys: Tensor, values: Tensor) -> Tensor:
    """The bytes of a unit.

    Args:
        packing: how it is encoded.
        keys: float32 [heads, n, channels], as they are before they are turned.
        values: the same.

    Returns:
        uint8, [``packing.encoded_bytes(n)``], on the device of the keys.
    """
    heads, tokens, channels = keys.shape
    data = torch.zeros((2, heads, packing.head_bytes(tokens)), dtype=torch.uint8, device=keys.device)
    # A distance, a membership and the like for each centroid, and a number, its copies and errors for each channel.
    weight = 4 * tokens * (3 * packing.centroids(tokens) + 6 * channels)
    at_once = _heads_at_once(weight, keys.device)
    encode_heads = _encode_clustered if packing.clustered else _encode_plain
    for rows, encoded in zip((keys, values), data, strict=True):
        for some, written in zip(rows.split(at_once), encoded.split(at_once), strict=True):
            encode_heads(some, _parts(packing, written, tokens), packing)
    return data.flatten()


def decode(
    packing: Packing,
    data: Tensor,
    tokens: int,
    turn: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What a unit's bytes stand for.

    Args:
        packing: how it was encoded.
        data: uint8 [at least ``packing.encoded_bytes(tokens)``], the bytes of `encode` and whatever follows them.
        tokens: n of the unit.
        turn: cosines and sines, float32 [n, 1, channels / 2], by which the keys are turned: channel j with channel
            j + channels / 2. None: they stay as they are.
        dtype: what both are rounded to in the end.

    Returns:
        Keys and values, [n, heads, channels].
    """
    heads, channels = packing.heads, packing.channels
    encoded = data[: packing.encoded_bytes(tokens)].view(2, heads, -1)
    decoded = torch.empty((2, tokens, heads, channels), dtype=dtype, device=data.device)
    at_once = _heads_at_once(4 * tokens * channels, data.device)
    for of_keys, bytes_of, out in zip((True, False), encoded, decoded, strict=True):
        for some, written in zip(bytes_of.split(at_once), out.split(at_once, 1), strict=True):
            rows = _decode_heads(packing, _parts(packing, some, tokens))
            if of_keys and turn is not None:
                _turn(rows, *(part.transpose(0, 1) for part in turn))
            written.copy_(rows.transpose(0, 1))
    keys, values = decoded
    return keys, values


def _heads_at_once(weight: int, device: torch.device) -> int:
    """How many heads are done at once that take ``weight`` bytes each."""
    return max(1, (CACHE_BYTES if device.type == "cpu" else CHUNK_BYTES) // weight)


def _parts(packing: Packing, heads: Tensor, tokens: int) -> dict[str, Tensor]:
    """The arrays among the bytes [heads, head bytes], each [heads, ...]: views of them."""
    return {
        name: heads[:, part.start : part.start + part.size].view(getattr(torch, part.kind)).unflatten(1, part.shape)
        for name, part in packing.parts(tokens).items()
    }


def _encode_plain(rows: Tensor, parts: dict[str, Tensor], packing: Packing) -> None:
    scales = rows.abs().amax(-1) / 127
    parts["scales"].copy_(scales)
    parts["codes"].copy_((rows / _divisor(scales)[..., None]).round_().clamp_(-127, 127))


def _encode_clustered(rows: Tensor, parts: dict[str, Tensor], packing: Packing) -> None:
    tokens, channels = rows.shape[1:]
    exponents = torch.frexp(rows.abs().amax((1, 2)))[1]
    units = torch.ldexp(torch.ones_like(rows[:, 0, 0]), (exponents - 1).clamp_(min=_SMALLEST_UNIT))
    parts["unit"].copy_(units[:, None])
    # A power of two changes no digit, and squares neither vanish nor overflow.
    rows = (rows / units[:, None, None]).contiguous()

    centroids = _centroids(rows, packing.centroids(tokens))
    scales = centroids.abs().amax(-1) / 127
    codes = (centroids / _divisor(scales)[..., None]).round_().clamp_(-127, 127)
    parts["centroids"].copy_(codes)
    parts["centroid_scales"].copy_(scales * units[:, None])
    centroids = codes.mul_(scales[..., None])
    nearest = _nearest(rows, centroids)
    parts["indices"].copy_(nearest)

    rest = rows - centroids.gather(1, nearest[..., None].expand(-1, -1, channels))
    whole = channels // BLOCK_CHANNELS
    for blocks, first, width in (
        (slice(0, whole), 0, BLOCK_CHANNELS),
        (slice(whole, None), whole * BLOCK_CHANNELS, channels % BLOCK_CHANNELS),
    ):
        if width and (count := len(range(packing.blocks)[blocks])):
            some = rest[..., first : first + count * width].unflatten(-1, (count, width))
            scales, codes = _quantise(some, packing.bits)
            parts["scales"][..., blocks] = scales
            packed = _packed(codes.flatten(-2), packing.bits)
            start = first * packing.bits // 8
            parts["codes"][..., start : start + packed.shape[-1]] = packed


def _divisor(scales: Tensor) -> Tensor:
    """Numbers whose scale is 0 are 0 themselves: they stay it."""
    return torch.where(scales > 0, scales, 1.0)


def _centroids(rows: Tensor, count: int) -> Tensor:
    """k-means of each head, float32 [heads, count, channels], of rows [heads, tokens, channels]."""
    tokens = rows.shape[1]
    # Tokens at equal distances lie all over a picture.
    first = (2 * torch.arange(count, device=rows.device) + 1) * tokens // (2 * count)
    centroids = rows[:, first]
    for _ in range(ITERATIONS):
        nearest = _nearest(rows, centroids)
        # A product sums in the same order always, which adding to rows by index does not on a GPU.
        member = rows.new_zeros((*rows.shape[:2], count)).scatter_(2, nearest[..., None], 1.0)
        members = member.sum(1)[..., None]
        sums = member.transpose(1, 2) @ rows
        # A centroid that is nobody's nearest stays where it is.
        centroids = torch.where(members > 0, sums / members.clamp(min=1), centroids)
    return centroids


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """The index of each row's nearest centroid, int64 [heads, tokens]; of equally near ones the first."""
    norms = centroids.square().sum(-1)[:, None]
    return torch.baddbmm(norms, rows, centroids.transpose(1, 2), beta=0.5, alpha=-1).argmin(-1)


def _quantise(rest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Factors, as their bytes [...], and codes, uint8 [..., width], of what is left, in units: float32 [..., width]."""
    largest = 2**bits - 1
    middle = largest / 2
    magnitude = rest.abs().amax(-1)

    def codes_of(factors: Tensor) -> Tensor:
        return (rest / _divisor(factors)[..., None]).add_(middle).round_().clamp_(0, largest)

    def tried(shrunk: float) -> tuple[Tensor, Tensor]:
        # The codes belong to the factor as it is stored.
        stored = _factor_bytes(magnitude * (shrunk / middle))
        factors = _factors(stored)
        return stored, codes_of(factors).sub_(middle).mul_(factors[..., None]).sub_(rest).square_().sum(-1)

    best, least = tried(SHRUNK[0])
    for shrunk in SHRUNK[1:]:
        stored, error = tried(shrunk)
        best, least = torch.where(error < least, stored, best), torch.minimum(error, least)
    return best.to(torch.uint8), codes_of(_factors(best)).to(torch.uint8)


def _factor_bytes(factors: Tensor) -> Tensor:
    """The bytes nearest to factors in units, int32."""
    half = 1 << (SCALE_SHIFT - 1)
    return ((factors.contiguous().view(torch.int32) + half >> SCALE_SHIFT) - SCALE_OFFSET).clamp_(0, 255)


def _factors(stored: Tensor) -> Tensor:
    """What the bytes of factors stand for, in units: float32."""
    numbers = (stored.to(torch.int32) + SCALE_OFFSET << SCALE_SHIFT).view(torch.float32)
    return numbers.masked_fill_(stored == 0, 0.0)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., channels] in bytes, the first in the lowest bits."""
    each = codes.unflatten(-1, (-1, 8 // bits))
    packed = each[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= each[..., place] << place * bits
    return packed


def _decode_heads(packing: Packing, parts: dict[str, Tensor]) -> Tensor:
    """What the parts [heads, ...] stand for, float32 [heads, tokens, channels]."""
    if not packing.clustered:
        return parts["codes"].float().mul_(parts["scales"][..., None])
    channels, bits, width = packing.channels, packing.bits, BLOCK_CHANNELS
    codes = parts["codes"]
    heads, tokens, _ = codes.shape
    # A byte is looked up: the numbers of all its channels at once.
    table = torch.arange(256, device=codes.device)[:, None] >> bits * torch.arange(8 // bits, device=codes.device)
    numbers = (table & 2**bits - 1).float() - (2**bits - 1) / 2
    # They move as one number of as many bytes, which takes half the time.
    moved = numbers.view(torch.complex128 if bits == 2 else torch.float64).flatten()
    rows = moved.index_select(0, codes.flatten().int()).view(torch.float32).view(heads, tokens, channels)
    factors = _factors(parts["scales"]) * parts["unit"][..., None]
    whole = channels // width
    if whole:
        rows[..., : whole * width].unflatten(-1, (whole, width)).mul_(factors[..., :whole, None])
    if channels % width:
        rows[..., whole * width :].mul_(factors[..., whole:])
    centroids = parts["centroids"] * parts["centroid_scales"][..., None]
    for head in range(heads):
        rows[head] += centroids[head].index_select(0, parts["indices"][head].int())
    return rows


def _turn(rows: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn rows [heads, tokens, channels] in place, rounding as whoever turns them with four products and two sums."""
    left, right = rows.chunk(2, -1)
    across = right * sin
    right.mul_(cos).add_(left * sin)
    left.mul_(cos).sub_(across)
