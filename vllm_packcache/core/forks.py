"""Forks: videos of one request that hold what they have in common once; what scheduler and workers say of it.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from typing import NamedTuple

FORK_OPTION = "_packcache_fork"
"""Key of ``extra_args`` under which each of a request's several videos has the name of the request."""

FORKS = "_packcache_forks"
"""Attribute of a step's schedule: `Forked`, by request."""


class Replaced(NamedTuple):
    """A part of a stream's block table that has changed.

    Args:
        stream: number of the request's stream.
        start: logical index of the first block.
        blocks: ids, from there on.
    """

    stream: int
    start: int
    blocks: list[int]


class Forked(NamedTuple):
    """What the workers must be told of a fork.

    Args:
        tokens: of the request, from its first: their keys and values are in blocks of another one; 0: none, or it has
            been told.
        replaced: of its block tables, blocks that it had in common with others and has a copy of now.
    """

    tokens: int
    replaced: tuple[Replaced, ...]
