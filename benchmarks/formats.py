"""The formats that a KV cache keeps numbers in: what becomes of keys and values of a model in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.worker.keys.stored import rounded_to, scaled_to

SCALE_BYTES = 4
"""Of the float32 number beside a key or a value that has a scale of its own."""


@dataclass(frozen=True)
class CacheFormat:
    """A format.

    Args:
        name: vLLM's, as of ``--kv-cache-dtype``.
        dtype: of a number.
        scaled: whether the numbers of every token and head have a scale of their own.
    """

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def bytes_of_key(self, head_size: int) -> int:
        """Bytes of a key of a head; a value has as many."""
        return head_size * self.dtype.itemsize + self.scaled * SCALE_BYTES

    def rounded(self, numbers: Tensor) -> Tensor:
        """What ``numbers``, float32 [..., head size], are once they have been written."""
        if self.dtype is torch.float32:
            return numbers
        if self.scaled:
            stored, scales = scaled_to(self.dtype, numbers)
            return stored.float() * scales[..., None]
        return rounded_to(self.dtype, numbers).float()


FLOAT32 = CacheFormat("float32", torch.float32)
BFLOAT16 = CacheFormat("bfloat16", torch.bfloat16)

FORMATS = {
    own.name: own
    for own in (
        FLOAT32,
        BFLOAT16,
        CacheFormat("int8_per_token_head", torch.int8, scaled=True),
        CacheFormat("fp8_per_token_head", torch.float8_e4m3fn, scaled=True),
        CacheFormat("fp8_e4m3", torch.float8_e4m3fn),
        CacheFormat("fp8_e5m2", torch.float8_e5m2),
    )
}
"""By name."""

EIGHT_BITS = tuple(name for name, own in FORMATS.items() if own.dtype.itemsize == 1)


def check_formats(names: tuple[str, ...]) -> None:
    """Make sure that these are formats of 8 bits, each named once.

    Raises:
        ConfigError: one is none, or is there twice.
    """
    for number, name in enumerate(names):
        if name not in EIGHT_BITS:
            raise ConfigError(f"--cache must be one of {', '.join(EIGHT_BITS)}, not {shown(name)}")
        if name in names[:number]:
            raise ConfigError(f"--cache: {name} is given twice, leave one out")
