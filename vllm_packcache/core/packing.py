"""How the keys and values of tokens that are history lie in fewer bytes.

Tokens that are encoded together are a unit. A unit's bytes are those of its heads, the keys of every head before the
values of every head, and what a head needs to be decoded lies side by side: no head needs another one's bytes.

In ``int8`` a token of a head is its largest magnitude / 127, in float32, and a whole number for each channel.

In ``int4`` and ``int2`` it is the nearest of up to 256 centroids and what is left of it, after Quant VideoGen (arXiv
2602.02958). Centroids are whole numbers of 8 bits and a float32 factor for each. What is left is taken from the
centroid as it was rounded. It has a factor of 8 bits for every `BLOCK_CHANNELS` channels and a code for each channel:
code c of b bits stands for (c - (2^b - 1) / 2) x factor, so that codes lie symmetrically and none is wasted. The
factor's byte f stands for unit x 2^(f // 8 - 30) x (1 + f % 8 / 8), where the unit is a head's own float32, and 0
stands for 0: there is no sign to store, so it reaches further than float8_e4m3 would, and every device can read it.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from vllm_packcache.core.shown import shown

HISTORY_FORMATS = ("int8", "int4", "int2")
"""What history can be encoded in, by the bits of a channel."""

BLOCK_CHANNELS = 64
"""Channels that share a factor. A head's last ones may be fewer."""

CENTROIDS = 256
"""Most centroids of a head: the index of one is a byte."""

TOKENS_PER_CENTROID = 16
"""A unit has a centroid for so many tokens: more would weigh more than they save."""

SCALE_SHIFT = 20
"""(f + SCALE_OFFSET) << SCALE_SHIFT are the bits of the float32 that the byte f of a factor stands for, in units."""

SCALE_OFFSET = 8 * (127 - 30)

ALIGNMENT = 16
"""Every part of a unit starts at a multiple of so many bytes."""


class Part(NamedTuple):
    """An array among a head's bytes, in C order.

    Attributes:
        start: its first byte, counted from the head's first one.
        kind: what its numbers are, by NumPy's name.
        shape: of the array.
    """

    start: int
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * (4 if self.kind == "float32" else 1)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a layer's history is encoded.

    Args:
        format: one of `HISTORY_FORMATS`.
        heads: KV heads of this rank.
        channels: of a head.

    Raises:
        ValueError: there is no such format, or the channels of a head do not fill whole bytes.
    """

    format: str
    heads: int
    channels: int

    def __post_init__(self) -> None:
        if self.format not in HISTORY_FORMATS:
            raise ValueError(
                f"history must be kept in one of {', '.join(HISTORY_FORMATS)}, but the format is {shown(self.format)}"
            )
        if self.heads < 1:
            raise ValueError(f"there must be a head to keep the history of, but there are {self.heads}")
        if self.channels < 8 or self.channels % 8:
            raise ValueError(
                f"a head whose history is encoded must have a multiple of 8 channels, but it has {self.channels}: "
                "keep its history as it is"
            )

    @property
    def bits(self) -> int:
        """Of a channel's code."""
        return int(self.format.removeprefix("int"))

    @property
    def clustered(self) -> bool:
        """Whether a token is a centroid and what is left."""
        return self.bits < 8

    @property
    def blocks(self) -> int:
        """Blocks of channels that have a factor each."""
        return -(-self.channels // BLOCK_CHANNELS)

    def centroids(self, tokens: int) -> int:
        """Centroids of a head, of a unit of ``tokens`` tokens."""
        return min(CENTROIDS, -(-tokens // TOKENS_PER_CENTROID))

    def parts(self, tokens: int) -> dict[str, Part]:
        """What a head's bytes are, of a unit of ``tokens`` tokens.

        Returns:
            By name, in the order of their bytes. Of int8: ``scales`` [tokens] and ``codes`` [tokens, channels]. Of the
            others: the ``unit`` of factors [1], ``centroid_scales`` [centroids], ``centroids`` [centroids, channels],
            ``indices`` [tokens], ``scales`` [tokens, blocks] and ``codes`` [tokens, bytes], where the first channel of
            a byte is in its lowest bits.

        Raises:
            ValueError: there is no token.
        """
        if tokens < 1:
            raise ValueError(f"a unit of history must have a token, but it has {tokens}")
        if not self.clustered:
            arrays = {"scales": ("float32", (tokens,)), "codes": ("int8", (tokens, self.channels))}
        else:
            centroids = self.centroids(tokens)
            arrays = {
                "unit": ("float32", (1,)),
                "centroid_scales": ("float32", (centroids,)),
                "centroids": ("int8", (centroids, self.channels)),
                "indices": ("uint8", (tokens,)),
                "scales": ("uint8", (tokens, self.blocks)),
                "codes": ("uint8", (tokens, self.channels * self.bits // 8)),
            }
        parts: dict[str, Part] = {}
        start = 0
        for name, (kind, shape) in arrays.items():
            parts[name] = Part(start, kind, shape)
            start = _aligned(start + parts[name].size)
        return parts

    def head_bytes(self, tokens: int) -> int:
        """Bytes that the keys of a head need, and its values too, of a unit of ``tokens`` tokens."""
        last = list(self.parts(tokens).values())[-1]
        return _aligned(last.start + last.size)

    def encoded_bytes(self, tokens: int) -> int:
        """Bytes of a unit of ``tokens`` tokens: keys and values of all heads."""
        return 2 * self.heads * self.head_bytes(tokens)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
