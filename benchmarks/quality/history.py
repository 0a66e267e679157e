"""Older frames in fewer bits: the last frames as they were written, in a format, and with what the freed bytes buy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from benchmarks.formats import BFLOAT16
from benchmarks.quality.cached import EQUAL_BYTES, InFormats
from benchmarks.quality.variants import AS_WRITTEN, BLOCK_SIZE, Variant
from vllm_packcache.core.encoded import retention_of
from vllm_packcache.core.packing import Packing
from vllm_packcache.demo.masked.bundle import MODEL_DIR

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_packcache.reference.masked_video import Fading


def in_formats(of_budget: Callable[[int], Variant], formats: Sequence[str], budget: int, most: int) -> InFormats:
    """A history of so many frames in several formats, and of as many frames as have room in its blocks.

    Args:
        of_budget: that of a number of frames.
        formats: their names.
        budget: frames of the one that is as it was written.
        most: frames that there is anything to keep of.
    """
    base = of_budget(budget)
    same = tuple(_kept_in(base, name) for name in formats)
    larger = []
    for own in same:
        fitting = (_kept_in(of_budget(frames), own.history) for frames in range(most, budget, -1))
        found = next((more for more in fitting if held_bytes(more) <= held_bytes(base)), None)
        if found is not None:
            larger.append(replace(found, name=f"{found.name}, {EQUAL_BYTES}"))
    return InFormats(base, same, tuple(larger))


def _kept_in(variant: Variant, name: str) -> Variant:
    return replace(variant, name=f"{variant.name}, {name}", history=name)


def held_bytes(variant: Variant, frames: int | None = None) -> int:
    """Bytes of the keys and values that one stream of a video holds at most, in whole blocks, written in bfloat16.

    Args:
        variant: in a format.
        frames: of the video; None: as many as it likes, for a policy that bounds them.
    """
    heads, channels, layers = _size()
    page = 2 * BLOCK_SIZE * heads * BFLOAT16.bytes_of_key(channels)
    plan, encoding = variant.plan(), variant.server.encoding(heads, channels, page)
    retention = retention_of(plan.layout, plan.policy, BLOCK_SIZE, encoding)
    most = retention.most_blocks() if frames is None else retention.most_of(plan.layout.frame_start(frames))
    assert most is not None, "what keeps everything has no bound"
    return most * page * layers


def fading(history: str) -> Fading | None:
    """What is left of an older frame's keys before RoPE and values; None: all of them."""
    if history == AS_WRITTEN:
        return None
    from vllm_packcache.worker.history.codec import decode, encode

    heads, channels, _ = _size()
    packing = Packing(history, heads, channels)

    def faded(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return decode(
            packing, encode(packing, *(own.transpose(0, 1).contiguous() for own in (keys, values))), len(keys)
        )

    return faded


@cache
def _size() -> tuple[int, int, int]:
    """KV heads, their channels, and layers of the bundled model."""
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    channels = config["hidden_size"] // config["num_attention_heads"]
    return config["num_key_value_heads"], channels, config["num_hidden_layers"]
