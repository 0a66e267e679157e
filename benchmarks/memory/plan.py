"""What `benchmarks.memory` runs: worlds, and policies at several budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.variants import FULL_CACHE, Shape, Variant
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, TRAINED_FRAMES

SHAPE = Shape("demo", CONDITION_TOKENS)

FAMILIES = {
    FULL_CACHE: "everything",
    "packcache": "as the paper says",
    "changed": "packcache, what changed first",
    "changed, absolute": "the same, positions of the whole video",
    "packcache, absolute": "as the paper says, positions of the whole video",
    "evenly": "as many blocks of every frame of the same window",
    "last frames": "whole frames",
    "attention sink": "the first block, and the last tokens",
}
"""What is compared, in words: each is a curve over budgets."""

LONG_WINDOW = 12
"""W of what looks at changes, and of what is spread evenly beside it."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes of everything that is run.

    Args:
        worlds: V, held-out worlds that every policy gets.
        budgets: H, frames of history.
        first_frame: the first one that counts: before it nothing has been dropped. People count from 1.
        frames: T.
    """

    worlds: int
    budgets: tuple[float, ...] = (1, 1.25, 1.5, 2, 3, 4)
    first_frame: int = 5
    frames: int = TRAINED_FRAMES

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every policy at every budget that it can have, each with a name of its own."""
        return tuple(self._variants())

    def _variants(self) -> Iterator[Variant]:
        yield _variant(FULL_CACHE, None, "full", {})
        for budget in self.budgets:
            changed = {"history_frames": budget, "window": LONG_WINDOW, "selection": "changed"}
            evenly = {"history_frames": budget, "window": LONG_WINDOW, "decay": 1}
            paper = {"history_frames": budget, "window": 4}
            recent = CONDITION_TOKENS + round(budget * SHAPE.frame_tokens)
            for family, policy, options in (
                ("packcache", "packcache", paper),
                ("packcache, absolute", "packcache", {**paper, "positions": "absolute"}),
                ("changed", "packcache", changed),
                ("changed, absolute", "packcache", {**changed, "positions": "absolute"}),
                ("evenly", "packcache", evenly),
                ("last frames", "sliding_window", {"window": int(budget), "positions": "rebase"}),
                ("attention sink", "attention_sink", {"sink_tokens": 16, "recent_tokens": recent}),
            ):
                if family != "last frames" or budget == int(budget):
                    yield _variant(family, budget, policy, options)


def _variant(family: str, budget: float | None, policy: str, options: Mapping[str, Any]) -> Variant:
    name = family if budget is None else f"{family}, H = {budget:g}"
    return Variant(SHAPE, name, policy, options, family, budget)


FULL = MemoryPlan(worlds=200)
QUICK = MemoryPlan(worlds=2, budgets=(2,), frames=7)
