"""Codings of actions: one file each, found by the name that a layout asks for.

This package is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from functools import lru_cache

from vllm_packcache.core.shown import shown
from vllm_packcache.families.actions.base import ActionCoding, Ranges
from vllm_packcache.families.actions.mineworld import MineWorld
from vllm_packcache.families.actions.play import Play
from vllm_packcache.families.actions.rt1 import RT1

__all__ = ["ActionCoding", "Ranges", "find", "names"]

_CODINGS: dict[str, type[ActionCoding]] = {
    coding.name: coding
    for coding in (
        MineWorld,
        Play,
        RT1,
    )
}


def names() -> list[str]:
    """Names of all codings, in order."""
    return sorted(_CODINGS)


@lru_cache(maxsize=64)
def find(name: str, ranges: Ranges | None = None) -> ActionCoding:
    """The coding called ``name``.

    Args:
        name: of a coding.
        ranges: of the numbers of an action; None: none are known.

    Raises:
        ValueError: there is none, or the ranges are not of its actions.
    """
    if name not in _CODINGS:
        raise ValueError(f"actions must be one of {', '.join(names())}, not {shown(name)}")
    return _CODINGS[name](ranges)
