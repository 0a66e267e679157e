"""Caches of fewer bits: each policy in bfloat16, in a format at as many tokens, and with what the freed bytes buy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from benchmarks.formats import BFLOAT16, FORMATS
from benchmarks.quality.variants import BLOCK_SIZE, DEFAULT_BUDGET, Shape, Variant, of_any_budget
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.demo.tokenizer import MODEL_DIR

EQUAL_BYTES = "equal bytes"

BUDGET_STEP = 1 / 16
"""Of a frame of the bundled model, about a block."""


class InFormats(NamedTuple):
    """A policy in several formats.

    Args:
        base: in bfloat16.
        same: in each format, as many tokens.
        larger: in each format, as many bytes.
    """

    base: Variant
    same: tuple[Variant, ...]
    larger: tuple[Variant, ...]

    @property
    def all(self) -> tuple[Variant, ...]:
        """Each of them."""
        return (self.base, *self.same, *self.larger)

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names of each format's and of the base."""
        return ((own.name, self.base.name) for own in (*self.same, *self.larger))


def in_formats(plain: Variant, formats: Sequence[str], of_budget: Callable[[float], Variant]) -> InFormats:
    """A policy in bfloat16 and in other formats.

    Args:
        plain: the policy.
        formats: their names.
        of_budget: the policy of a history of so many frames.
    """
    base, same = kept_in(plain, BFLOAT16.name), tuple(kept_in(plain, name) for name in formats)
    larger = []
    for own in same:
        assert own.budget is not None
        budget = own.budget
        while held_bytes(kept_in(of_budget(budget + BUDGET_STEP), own.cache)) <= held_bytes(base):
            budget += BUDGET_STEP
        larger.append(replace(kept_in(of_budget(budget), own.cache), name=f"{own.name}, {EQUAL_BYTES}"))
    return InFormats(base, same, tuple(larger))


def kept_in(variant: Variant, name: str) -> Variant:
    """The same with a cache in a format, at the trained length: everything is computed, which takes long."""
    return replace(variant, name=f"{variant.name}, {name}", cache=name, lengths=1)


def held_bytes(variant: Variant, frames: int | None = None) -> int:
    """Bytes of the bundled model's keys and values that a video holds at most, in whole blocks.

    Args:
        variant: in a format.
        frames: of the video; None: as many as it likes, for a policy that bounds them.
    """
    plan, size = variant.plan(), _size()
    retention = Retention(plan.layout, plan.policy, BLOCK_SIZE, some_tokens)
    most = retention.most_blocks() if frames is None else retention.most_of(plan.layout.frame_start(frames))
    assert most is not None, "what keeps everything has no bound"
    of_token = 2 * FORMATS[variant.cache].bytes_of_key(size["head_dim"])
    return most * BLOCK_SIZE * of_token * size["num_key_value_heads"] * size["num_hidden_layers"]


def in_bytes(variant: Variant, frames: int) -> dict[str, Any]:
    """How a cache is kept and what it takes, of videos of so many frames: for a result."""
    return {"cache": variant.cache, "bytes": held_bytes(variant, frames)}


def all_in_formats(shape: Shape, formats: Sequence[str]) -> tuple[InFormats, ...]:
    """The rule of the paper and the default."""
    return tuple(in_formats(of_budget(DEFAULT_BUDGET), formats, of_budget) for of_budget in of_any_budget(shape))


@cache
def _size() -> dict[str, int]:
    """Of the bundled model."""
    found: dict[str, int] = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    return found
