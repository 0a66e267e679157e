"""What `benchmarks.memory` runs: worlds with policies at several budgets, and films with policies at one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from benchmarks.quality.cached import InFormats, all_in_formats, in_formats
from benchmarks.quality.variants import BLOCK_SIZE, FULL_CACHE, Shape, Variant
from vllm_packcache.core.policies import PAPER, PackCache
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, TRAINED_FRAMES

SHAPE = Shape("demo", CONDITION_TOKENS)

FAMILIES = {
    FULL_CACHE: "everything",
    "packcache": "as the paper says",
    "changed": "packcache, what changed first",
    "changed, short window": "the same in the window of the paper's rule",
    "changed, episodes": "the same, and an anchor of the scene that ended",
    "changed, absolute": "what changed first, positions of the whole video",
    "packcache, absolute": "as the paper says, positions of the whole video",
    "last frame, evenly": "the last frame whole, as many blocks of every older one of the same window",
    "evenly": "as many blocks of every frame of the same window",
    "last frames": "whole frames",
    "attention sink": "the first block, and the last tokens",
}
"""What is compared, in words: each is a curve over budgets."""

BESIDE = ("packcache", "last frame, evenly", "evenly", "last frames")
"""What is compared at several budgets with what looks at changes."""

SINGLE = ("changed, short window", "changed, absolute", "packcache, absolute", "attention sink")
"""What is compared at one budget."""

BUDGET = 2.0
"""H at which positions are compared, and everything in films."""

FILMS = {"returned_soon": (3, 8, 13), "returned_late": (2, 4, 17)}
"""Frames with which the shots of a film begin, of which the last is the return that is asked about.

It is to the scene that only frames have shown, not the condition: after 5 frames, more than the paper's window and
fewer than `PackCache.window`, and after 13, more than both.
"""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes of everything that is run.

    Args:
        worlds: V, held-out worlds that every policy gets.
        films: of each kind of `FILMS`, as many.
        budgets: H of what looks at changes, frames of history.
        beside: H of what it is compared with.
        first_frame: the first one that counts: before it nothing has been dropped. People count from 1.
        frames: T of a world.
    """

    worlds: int
    films: int
    budgets: tuple[float, ...] = (1, 1.0625, 1.125, 1.25, 1.5, 2, 3, 4)
    beside: tuple[float, ...] = (1, 2, 4)
    first_frame: int = 5
    frames: int = TRAINED_FRAMES

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every policy of worlds at every budget, each with a name of its own."""
        return (
            _full(),
            *(_variant("changed", budget) for budget in self.budgets),
            *(_variant(family, budget) for family in BESIDE for budget in self.beside),
            *(_variant(family, BUDGET) for family in SINGLE),
        )

    @property
    def film_variants(self) -> tuple[Variant, ...]:
        """Every policy of films."""
        families = ("packcache", "changed", "changed, episodes", "evenly", "last frames")
        return (_full(), *(_variant(family, BUDGET) for family in families))


@dataclass(frozen=True, kw_only=True)
class CachedPlan(MemoryPlan):
    """The same of caches of fewer bits, worlds only.

    Args:
        formats: names of formats of 8 bits.
    """

    formats: tuple[str, ...] = ("int8_per_token_head", "fp8_e4m3")
    films: int = 0

    @cached_property
    def policies(self) -> tuple[InFormats, ...]:
        """Those of `bench quality --cache`, and the smallest budget, which has most to gain."""
        smallest = in_formats(_variant("changed", 1), self.formats, partial(_variant, "changed"))
        return (*all_in_formats(SHAPE, self.formats), smallest)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every policy in every format."""
        return tuple(variant for own in self.policies for variant in own.all)


def _full() -> Variant:
    return Variant(SHAPE, FULL_CACHE, "full", {}, FULL_CACHE, None)


def _variant(family: str, budget: float) -> Variant:
    history = {"history_frames": budget, "window": PackCache.window}
    changed = {**history, "selection": "changed"}
    paper = {"history_frames": budget, "window": PAPER.window, "selection": PAPER.selection}
    recent = CONDITION_TOKENS + round(budget * SHAPE.frame_tokens)
    policies: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "packcache": ("packcache", paper),
        "packcache, absolute": ("packcache", {**paper, "positions": "absolute"}),
        "changed": ("packcache", changed),
        "changed, short window": ("packcache", {**paper, "selection": "changed"}),
        "changed, episodes": ("packcache", {**changed, "episodes": 1}),
        "changed, absolute": ("packcache", {**changed, "positions": "absolute"}),
        # No block changes as much as that, so only the budget of the older frames is another.
        "last frame, evenly": ("packcache", {**changed, "changed_tokens": BLOCK_SIZE, "decay": 1}),
        "evenly": ("packcache", {**history, "selection": PAPER.selection, "decay": 1}),
        "last frames": ("sliding_window", {"window": int(budget), "positions": "rebase"}),
        "attention sink": ("attention_sink", {"sink_tokens": 16, "recent_tokens": recent}),
    }
    policy, options = policies[family]
    return Variant(SHAPE, f"{family}, H = {budget:g}", policy, options, family, budget)


FULL = MemoryPlan(worlds=200, films=50)
CACHED_FULL = CachedPlan(worlds=50)
QUICK = MemoryPlan(worlds=2, films=2, budgets=(2,), beside=(2,), frames=9)
CACHED_QUICK = CachedPlan(worlds=2, frames=9)
