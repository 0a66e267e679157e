"""What `benchmarks.decode` runs: sizes, engines, stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.model import ModelShape
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PAPER, AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.retention import Retention, some_tokens

SEED = 0
POLICY = PAPER
CHANGED = PackCache()
"""The same budget, what changed first, over a longer window."""

CHANGED_LEAST = dataclasses.replace(CHANGED, history_frames=1.0625)
"""A budget of little more than a frame that remembers more than `POLICY` does: see `benchmarks.memory`."""

BLOCK_SIZE = 32

FRAMES = 13
"""Latent frames of the video of the paper: 48 pictures."""

TIMED_FRAMES = (0, 1, 2, 3, 7, 12)
"""Those of them that are timed, from 0 to the last; between two, what a step reads grows evenly with every policy."""

THREADS = 1
"""OpenMP threads of each engine. With one, no step waits for a thread that other processes keep from running,
and prefill, which is not timed, runs in several engines at once."""

LASTING = ("full", "packcache")
BESIDE_LAST_FRAME = ("short", "opt_out", "absolute")
BESIDE_FRAMES = ("changed", "changed, least", "last 2 frames", "attention sink", "last frame")
"""Engines that live all the time, those that live beside them first, and those that then take the place of these:
each has a KV cache for the longest sequence, and no more than seven need fit into memory."""

STOCK = ("full", "short")
WITH_PLUGIN = ("packcache", "opt_out")
POSITIONED = ("packcache", "absolute")

RATIOS = {
    "full / packcache": ("full", "packcache"),
    "packcache / short": ("packcache", "short"),
    "opt_out / full": ("opt_out", "full"),
}
"""Ratios of step times on the last frame: name, and the engines that it divides."""

END_TO_END = (
    "sum over all frames of tokens per frame x seconds of a step in the middle of the frame, round by round: a step's "
    "time is linear in the number of tokens that it reads, and those of frames between timed ones are interpolated. "
    "Without the prefill of the condition, and without the slides of the window, which are in the first step of a "
    "frame (see sliding_frame)"
)
"""What the time of all frames is, for those who read the result."""

AT_ONE_BUDGET = "changed / packcache"
FRAME_RATIOS = {f"full / {name}": ("full", name) for name in ("packcache", *BESIDE_FRAMES)} | {
    AT_ONE_BUDGET: ("changed", "packcache")
}
"""Ratios of step times frame by frame."""


def _timed(name: str, *, prefill: int, decode: int) -> dict[str, int]:
    return {f"{name}: prefill": prefill, f"{name}: decode": decode}


STAGES = {
    "starting engines that stay": 10,
    "starting engines for the last frame": 15,
    **_timed("last frame, start", prefill=200, decode=45),
    **_timed("last frame, middle", prefill=60, decode=45),
    **_timed("last frame, end", prefill=60, decode=45),
    **_timed("control, tiny", prefill=0, decode=2),
    **_timed("control, live", prefill=1, decode=7),
    **_timed("a frame that slides", prefill=100, decode=60),
    **_timed("early and late frame", prefill=20, decode=5),
    **_timed("late and early frame", prefill=20, decode=5),
    **_timed("all frames from the condition on", prefill=0, decode=20),
    "starting engines of other policies": 15,
    # Six engines with a policy prefill all frames before it anew, 6 s a frame on two cores; what stock vLLM reads
    # in its steps grows, what the others read does not.
    **{
        stage: seconds
        for frame in TIMED_FRAMES
        for stage, seconds in _timed(f"frame {frame}", prefill=6 * frame + 1, decode=18 + 5 * frame // 6).items()
    },
}
"""What is run, in order, and about how many seconds it takes: the remaining time is reckoned from these."""


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        chunk: longest prefill chunk.
        condition_tokens: C, of every request.
        tokens_per_frame: F, of the request whose last frame is timed.
        frames: its number of frames, the last one included.
        rounds: bursts of each engine at each place of the last frame.
        frame_rounds: bursts of each engine in the middle of each frame.
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
    frame_rounds: int
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
            "middle": self._middle(self.span),
            "end": self.tokens_per_frame - self.span,
        }

    @property
    def middle_of_frame(self) -> int:
        """Tokens of any frame that are part of the prompt where each frame is timed, around its middle."""
        return self._middle((self.frame_rounds + 1) * self.burst)

    def _middle(self, span: int) -> int:
        return (self.tokens_per_frame - span) // 2

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        frames = (
            self.frames * self.tokens_per_frame,
            (self.late + 1) * self.growth_tokens_per_frame,
            (self.late + 1) * self.generated_tokens_per_frame,
        )
        return self.condition_tokens + max(frames) + BLOCK_SIZE

    @property
    def policies(self) -> dict[str, Policy]:
        """What is timed frame by frame: engines, and what each keeps.

        All but ``full``, ``changed, least`` and the paper's baseline, ``last frame``, keep the same number of tokens
        once there are frames to drop: the condition and two frames, up to blocks that are kept whole.
        """
        condition_and_frames = self.condition_tokens + int(POLICY.history_frames * self.tokens_per_frame)
        return {
            "full": Full(),
            "packcache": POLICY,
            "changed": CHANGED,
            "changed, least": CHANGED_LEAST,
            "last 2 frames": SlidingWindow(window=2),
            "attention sink": AttentionSink(sink_tokens=BLOCK_SIZE, recent_tokens=condition_and_frames - BLOCK_SIZE),
            "last frame": SlidingWindow(window=1),
        }

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """Every engine and what switches the plugin on in it."""
        packcache = _additional_config(POLICY)
        return {
            "full": {},
            "short": {},
            "packcache": packcache,
            "opt_out": packcache,
            "absolute": _additional_config(POLICY, positions="absolute"),
            **{name: _additional_config(self.policies[name]) for name in BESIDE_FRAMES},
        }

    def retention(self, tokens_per_frame: int, policy: Policy = POLICY) -> Retention:
        """What ``policy`` keeps of a request of frames of ``tokens_per_frame``."""
        layout = VideoLayout(FrameLayout(tokens_per_frame), self.condition_tokens)
        return Retention(layout, policy, BLOCK_SIZE, some_tokens)

    def options(self, tokens_per_frame: int) -> dict[str, Any]:
        """Request options that say of frames of ``tokens_per_frame`` what `retention` knows, to an engine's policy."""
        return {
            "packcache_condition_tokens": self.condition_tokens,
            "packcache_tokens_per_frame": tokens_per_frame,
        }


def described(policy: Policy) -> dict[str, Any]:
    """A policy's name and options."""
    return {"name": policy.name} | dataclasses.asdict(policy)


def _additional_config(policy: Policy, **options: str) -> dict[str, Any]:
    return {"kv_cache_policy": policy.name, "kv_cache_policy_config": dataclasses.asdict(policy) | options}


FULL = DecodePlan(
    model=ModelShape(layers=2, heads=8, head_size=128, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2),
    chunk=2048,
    condition_tokens=272,
    tokens_per_frame=4084,
    frames=FRAMES,
    rounds=10,
    frame_rounds=9,
    growth_tokens_per_frame=515,
    generated_tokens_per_frame=67,
    early=10,
    late=100,
)
QUICK = DecodePlan(
    model=ModelShape(layers=2, heads=2, head_size=32, hidden=64, vocab=256, dtype="float32", bytes_per_element=4),
    chunk=512,
    condition_tokens=70,
    tokens_per_frame=197,
    frames=FRAMES,
    rounds=2,
    frame_rounds=2,
    growth_tokens_per_frame=131,
    generated_tokens_per_frame=35,
    early=10,
    late=30,
)
