"""What encoded history stands for, read byte by byte from the description in `vllm_packcache.core.packing`.

Plain and slow: of the package's own it uses nothing, so that where a part lies and what a bit means is said twice.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def decode_reference(format: str, heads: int, channels: int, data: bytes, tokens: int) -> tuple[Float32, Float32]:
    """What a unit's bytes stand for.

    Args:
        format: int8, int4 or int2.
        heads: of the unit.
        channels: of a head.
        data: the unit's bytes.
        tokens: n of the unit.

    Returns:
        Keys and values, float32 [n, heads, channels].
    """
    decoded = np.empty((2, tokens, heads, channels), np.float32)
    start = 0
    for rows in decoded:
        for head in range(heads):
            start = _decode_head(int(format[3:]), data, start, rows[:, head])
    return decoded[0], decoded[1]


def _decode_head(bits: int, data: bytes, start: int, rows: Float32) -> int:
    """Read the head whose bytes begin at ``start``; returns where they end."""
    tokens, channels = rows.shape
    if bits == 8:
        scales = start
        codes = _aligned(scales + 4 * tokens)
        for token in range(tokens):
            scale = _float(data, scales + 4 * token)
            for channel in range(channels):
                rows[token, channel] = _signed(data[codes + token * channels + channel]) * scale
        return _aligned(codes + tokens * channels)
    count = min(256, math.ceil(tokens / 16))
    blocks = math.ceil(channels / 64)
    each = 8 // bits
    centroid_scales = start + 16
    centroids = _aligned(centroid_scales + 4 * count)
    indices = _aligned(centroids + count * channels)
    factors = _aligned(indices + tokens)
    codes = _aligned(factors + tokens * blocks)
    unit = _float(data, start)
    for token in range(tokens):
        index = data[indices + token]
        scale = _float(data, centroid_scales + 4 * index)
        for channel in range(channels):
            centroid = _signed(data[centroids + index * channels + channel]) * scale
            exponent, eighths = divmod(data[factors + token * blocks + channel // 64], 8)
            factor = np.float32(2.0 ** (exponent - 30) * (1 + eighths / 8) if exponent or eighths else 0) * unit
            byte = data[codes + token * (channels // each) + channel // each]
            code = byte // 2 ** (bits * (channel % each)) % 2**bits
            rows[token, channel] = np.float32(code - (2**bits - 1) / 2) * factor + centroid
    return _aligned(codes + tokens * channels // each)


def _aligned(offset: int) -> int:
    return math.ceil(offset / 16) * 16


def _float(data: bytes, start: int) -> np.float32:
    return np.float32(np.frombuffer(data, "<f4", 1, start)[0])


def _signed(byte: int) -> np.float32:
    return np.float32(byte - 256 if byte > 127 else byte)
