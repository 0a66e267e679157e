"""What `vllm_packcache.bench.decode` runs: sizes, engines, stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_packcache.bench.model import ModelShape
from vllm_packcache.layout import FrameLayout, VideoLayout
from vllm_packcache.policies import PackCache
from vllm_packcache.retention import Retention

SEED = 0
POLICY = PackCache()
BLOCK_SIZE = 32

THREADS = 1
"""OpenMP threads of each engine. With one, no step waits for a thread that other processes keep from running,
and prefill, which is not timed, runs in several engines at once."""

STOCK = ("full", "short")
WITH_PLUGIN = ("packcache", "opt_out")
LAST_FRAME = (*STOCK, *WITH_PLUGIN)
POSITIONED = ("packcache", "absolute")

PACKCACHE = {"kv_cache_policy": POLICY.name}
ENGINES: dict[str, dict[str, Any]] = {
    "full": {},
    "short": {},
    "packcache": PACKCACHE,
    "opt_out": PACKCACHE,
    "absolute": PACKCACHE | {"kv_cache_policy_config": {"positions": "absolute"}},
}
"""Every engine and what switches the plugin on in it."""

RATIOS = {
    "full / packcache": ("full", "packcache"),
    "packcache / short": ("packcache", "short"),
    "opt_out / full": ("opt_out", "full"),
}
"""Ratios of step times on the last frame: name, and the engines that it divides."""

STAGES = {
    "starting engines": 20,
    "last frame, start: prefill": 200,
    "last frame, start: decode": 45,
    "last frame, middle: prefill": 60,
    "last frame, middle: decode": 45,
    "last frame, end: prefill": 60,
    "last frame, end: decode": 45,
    "controls": 10,
    "a frame that slides: prefill": 100,
    "a frame that slides: decode": 60,
    "early and late frame: prefill": 20,
    "early and late frame: decode": 5,
    "late and early frame: prefill": 20,
    "late and early frame: decode": 5,
    "all frames from the condition on": 20,
}
"""What is run, in order, and about how many seconds it takes: the remaining time is reckoned from these."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        chunk: longest prefill chunk.
        condition_tokens: C, of every request.
        tokens_per_frame: F, of the request whose last frame is timed.
        frames: its number of frames, the last one included.
        rounds: bursts of each engine at each place of the last frame.
        growth_tokens_per_frame: F, of the requests that compare an early frame with a late one.
        generated_tokens_per_frame: F, of the request that is generated from its condition on.
        early: number of the early frame.
        late: number of the late frame.
    """

    model: ModelShape
    chunk: int
    condition_tokens: int
    tokens_per_frame: int
    frames: int
    rounds: int
    growth_tokens_per_frame: int
    generated_tokens_per_frame: int
    early: int
    late: int

    @property
    def burst(self) -> int:
        """Steps of a burst: each contains the allocation of exactly one block."""
        return BLOCK_SIZE

    @property
    def span(self) -> int:
        """Tokens that are decoded at one place: a burst to warm up, then the rounds."""
        return (self.rounds + 1) * self.burst

    @property
    def places(self) -> dict[str, int]:
        """Where in the last frame it is timed: how many of its tokens are part of the prompt.

        A step's time is linear in the number of tokens it reads, so the mean over the three places is the
        mean over the frame.
        """
        return {
            "start": 0,
            "middle": (self.tokens_per_frame - self.span) // 2,
            "end": self.tokens_per_frame - self.span,
        }

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        frames = (
            self.frames * self.tokens_per_frame,
            (self.late + 1) * self.growth_tokens_per_frame,
            (self.late + 1) * self.generated_tokens_per_frame,
        )
        return self.condition_tokens + max(frames) + BLOCK_SIZE

    def retention(self, tokens_per_frame: int) -> Retention:
        """What packcache keeps of a request of frames of ``tokens_per_frame``."""
        return Retention(VideoLayout(FrameLayout(tokens_per_frame), self.condition_tokens), POLICY, BLOCK_SIZE)

    def options(self, tokens_per_frame: int) -> dict[str, Any]:
        """Request options that say the same to the plugin."""
        return {
            "packcache_condition_tokens": self.condition_tokens,
            "packcache_tokens_per_frame": tokens_per_frame,
        }


FULL = Plan(
    model=ModelShape(layers=2, heads=8, head_size=128, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2),
    chunk=2048,
    condition_tokens=272,
    tokens_per_frame=4084,
    frames=13,
    rounds=10,
    growth_tokens_per_frame=515,
    generated_tokens_per_frame=67,
    early=10,
    late=100,
)
QUICK = Plan(
    model=ModelShape(layers=2, heads=2, head_size=32, hidden=64, vocab=256, dtype="float32", bytes_per_element=4),
    chunk=512,
    condition_tokens=70,
    tokens_per_frame=197,
    frames=13,
    rounds=2,
    growth_tokens_per_frame=131,
    generated_tokens_per_frame=35,
    early=10,
    late=30,
)
