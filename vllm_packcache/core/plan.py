"""What a request makes and keeps, settled once: scheduler and worker each derive it for themselves.

A request is one or more streams. A **stream** is one sequence of tokens with blocks of its own, and has a
plan: its layout, what of it is kept, and where the model sees it. A causal video has one stream, a guided one two.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm_packcache.core.grammar import VideoGrammar
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Full, Policy
from vllm_packcache.core.positions import Positions

REQUEST_PREFIX = "packcache_"
"""Prefix of the request options in ``vllm_xargs`` / ``SamplingParams.extra_args``."""

Role = Literal["causal", "canvas"]
"""How tokens are made: ``causal``, one after the other; ``canvas``, a whole frame at a time, in passes."""


@dataclass(frozen=True)
class Plan:
    """What one stream keeps, and where its model sees it."""

    layout: VideoLayout
    policy: Policy
    positions: Positions

    @property
    def as_stock(self) -> bool:
        """Whether the whole cache is kept and positions are as without a policy."""
        return type(self.policy) is Full and self.positions.as_stock


@dataclass(frozen=True)
class Stream:
    """One sequence of a request, whose keys and values are in blocks of its own.

    Args:
        plan: what it keeps.
        start: tokens of the request before its first. The engine counts a request's tokens in its first stream, which
            begins at 0; another one begins later and then grows with it. Below 0: its condition is longer than the
            request's, and its first step is so much larger.
        condition: ids that stand at its beginning in place of the request's; behind them come the same tokens.
    """

    plan: Plan
    start: int = 0
    condition: tuple[int, ...] = ()

    def own_tokens(self, tokens: int) -> int:
        """How many tokens of this stream there are when the request has ``tokens``."""
        return max(0, tokens - self.start) if tokens else 0

    def ids(self, request: Sequence[int], start: int, stop: int) -> list[int]:
        """Ids of the tokens ``[start, stop)`` of this stream, as many of them as there are.

        Args:
            request: ids of the request's tokens.
            start: 0 or more.
            stop: ``start`` or more.
        """
        shared = len(self.condition)
        first, last = (self.start + max(bound, shared) for bound in (start, stop))
        return [*self.condition[start:stop], *request[first:last]]


class Turn(NamedTuple):
    """What a turn of a session says of the session, see `vllm_packcache.core.session`.

    Args:
        tokens: of the session before this turn, without the one sampled last, which begins the turn.
        forget_frames: how many frames it forgets with this turn; ``tokens`` still counts them.
        forget_from: the first of them.
    """

    tokens: int
    forget_frames: int
    forget_from: int = 0


@dataclass(frozen=True)
class VideoRequest:
    """What a request makes: of a family with a KV cache group for each of its streams, stream i is in group i.

    Args:
        streams: one or more.
        frames: how many to make, one that the prompt ends in included; None: it does not say.
        grammar: which ids its tokens may have; None: any.
        turn: of a session; None: it is none.
        guidance: s, by which a causal video's logits move away from those of its second stream: ``u + s (c - u)``, c
            and u the logarithms of the probabilities. 1: there is no second stream.
    """

    streams: tuple[Stream, ...]
    frames: int | None
    grammar: VideoGrammar | None = field(default=None, kw_only=True)
    turn: Turn | None = field(default=None, kw_only=True)
    guidance: float = field(default=1.0, kw_only=True)

    @property
    def as_stock(self) -> bool:
        """Whether it is served as without a policy. Beside another stream one is ours, whatever it keeps."""
        return len(self.streams) == 1 and self.streams[0].plan.as_stock
