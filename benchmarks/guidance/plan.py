"""What `benchmarks.guidance` runs: sizes, engines, requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.decode import plan as decode
from benchmarks.model import ModelShape
from vllm_packcache.core.policies import PAPER, Full, Policy

SEED = 0
POLICY = PAPER
BLOCK_SIZE = 32
THREADS = 1
SCALE = 3.0

PLAIN, ABLE, GUIDED = "plain", "able", "guided"
GUIDED_FULL, GUIDED_LAST, TWO_LAST = "guided, full, last frame", "guided, last frame", "two, last frame"

ENGINES: dict[str, tuple[Policy, bool]] = {
    PLAIN: (POLICY, False),
    ABLE: (POLICY, True),
    GUIDED: (POLICY, True),
    GUIDED_FULL: (Full(), True),
    GUIDED_LAST: (POLICY, True),
    TWO_LAST: (POLICY, False),
}
"""The policy of each, and whether it could guide."""

NAMES = {
    PLAIN: "not guided, a server that cannot guide",
    ABLE: "not guided, a server that could",
    GUIDED: "guided, half as many",
    GUIDED_FULL: "guided, everything kept",
    GUIDED_LAST: "guided, packcache",
    TWO_LAST: "two videos that are not guided, packcache",
}
"""For people."""

TEXTS, VIDEOS, LAST = "texts", "videos", "last frame"

RATIOS = {
    TEXTS: {"able / plain": (ABLE, PLAIN)},
    VIDEOS: {"able / plain": (ABLE, PLAIN), "guided / two": (GUIDED, PLAIN)},
    LAST: {"guided / two": (GUIDED_LAST, TWO_LAST), "full / packcache": (GUIDED_FULL, GUIDED_LAST)},
}
"""What is divided in each stage."""


class Request(NamedTuple):
    """One request.

    Attributes:
        prompt: its ids.
        options: ``extra_args``.
    """

    prompt: list[int]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Videos of a stage.

    Args:
        model: the model.
        condition_tokens: of a video, and of a guided one's first stream.
        negative_tokens: of the other of two videos, and of a guided one's second stream.
        tokens_per_frame: F.
        given_tokens: behind the condition, of every prompt.
        burst: steps of a round.
        rounds: that are compared.
        warm_up: bursts before them.
        chunk: longest prefill chunk.
    """

    model: ModelShape
    condition_tokens: int
    negative_tokens: int
    tokens_per_frame: int
    given_tokens: int
    burst: int
    rounds: int
    warm_up: int
    chunk: int

    @property
    def steps(self) -> int:
        """Decode steps."""
        return self.burst * (self.rounds + self.warm_up)

    @property
    def max_tokens(self) -> int:
        """More than any request makes: those that are prefilled first decode while others are."""
        return self.steps + BLOCK_SIZE

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        return max(self.condition_tokens, self.negative_tokens) + self.given_tokens + self.max_tokens

    def options(self, condition_tokens: int) -> dict[str, Any]:
        """Of a video with so long a condition."""
        return {
            "packcache_condition_tokens": condition_tokens,
            "packcache_tokens_per_frame": self.tokens_per_frame,
        }


@dataclass(frozen=True, kw_only=True)
class GuidancePlan:
    """Sizes of everything that is run.

    Args:
        host: videos and texts of many requests.
        requests: of a step of those; a guided engine has half as many.
        last_frame: one guided video, or two.
    """

    host: Geometry
    requests: int
    last_frame: Geometry

    def geometry(self, stage: str) -> Geometry:
        """Of a stage."""
        return self.last_frame if stage == LAST else self.host


def additional_config(engine: str) -> dict[str, Any]:
    """What switches the plugin on in an engine."""
    policy, could_guide = ENGINES[engine]
    config = dataclasses.asdict(policy) | ({"guidance": True} if could_guide else {})
    return {"kv_cache_policy": policy.name, "kv_cache_policy_config": config}


def _last_frame(sizes: decode.DecodePlan, negative_tokens: int, rounds: int) -> Geometry:
    """The middle of the last frame of `benchmarks.decode`: a step's time is linear in what it reads."""
    before, span = (sizes.frames - 1) * sizes.tokens_per_frame, (rounds + 1) * sizes.burst
    return Geometry(
        model=sizes.model,
        condition_tokens=sizes.condition_tokens,
        negative_tokens=negative_tokens,
        tokens_per_frame=sizes.tokens_per_frame,
        given_tokens=before + (sizes.tokens_per_frame - span) // 2,
        burst=sizes.burst,
        rounds=rounds,
        warm_up=1,
        chunk=sizes.chunk,
    )


_ONE_LAYER = ModelShape(layers=1, heads=2, head_size=32, hidden=64, vocab=256, dtype="float32", bytes_per_element=4)

FULL = GuidancePlan(
    host=Geometry(
        model=_ONE_LAYER,
        condition_tokens=16,
        negative_tokens=24,
        tokens_per_frame=64,
        given_tokens=5 * 64,
        burst=16,
        rounds=20,
        warm_up=1,
        chunk=2048,
    ),
    requests=16,
    last_frame=_last_frame(decode.FULL, 96, rounds=9),
)
QUICK = GuidancePlan(
    host=dataclasses.replace(FULL.host, tokens_per_frame=8, given_tokens=40, burst=2, rounds=2),
    requests=4,
    last_frame=_last_frame(decode.QUICK, 24, rounds=2),
)
