"""What `benchmarks.long_video` runs: variants and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.core.policies import PAPER
from vllm_packcache.core.retention import Retention
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, TRAINED_FRAMES

PRESET = "demo"
BLOCK_SIZE = 32
CHUNK = 2048
"""Longest prefill chunk."""

OPTIONS = {"packcache_condition_tokens": CONDITION_TOKENS}
"""Options of every request: the prompt of a teacher-forced one goes on after the condition."""

TRUTH, COPY = REFERENCES = ("the true video", "a copy of the first picture")
"""What generated videos are compared with: the best that can be, and what is had without a model."""

FORCED, GENERATED = MEASUREMENTS = ("teacher_forced", "generated")


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: in table and plot.
        policy: name of the policy.
        options: of the policy, and ``positions``; frames are the demo's.
        colour: in the plot.
        generates: whether it is asked to generate as well.
    """

    name: str
    policy: str
    options: Mapping[str, Any]
    colour: str
    generates: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The server's configuration."""
        base = asdict(PAPER) if self.policy == PAPER.name else {}
        return {"layout": load_mapping(PRESET)["layout"], **base, **self.options}

    @property
    def measurements(self) -> tuple[str, ...]:
        """What it is asked."""
        return MEASUREMENTS if self.generates else (FORCED,)


# A decode step of the full cache reads up to 41,000 tokens for each video, so it is not asked to generate.
VARIANTS = (
    Variant("full cache, absolute", "full", {}, "#9aa0a6", generates=False),
    Variant("packcache, rebase", "packcache", {"positions": "rebase"}, "#2f6fde"),
    Variant("packcache, absolute", "packcache", {"positions": "absolute"}, "#d1495b"),
    Variant("last 2 frames, rebase", "sliding_window", {"window": 2, "positions": "rebase"}, "#2a9d8f"),
    Variant("last 2 frames, absolute", "sliding_window", {"window": 2, "positions": "absolute"}, "#e9a23b"),
    Variant("last frame, absolute", "sliding_window", {"window": 1, "positions": "absolute"}, "#7b5ea7"),
)


@dataclass(frozen=True, kw_only=True)
class LongVideoPlan:
    """Sizes of everything that is run.

    Args:
        videos: V, worlds that everything is averaged over.
        frames: T, of each.
        trained_frames: frames of the longest videos that the model was trained on; results are summed up over spans
            of as many.
        variants: what is compared.
    """

    videos: int
    frames: int
    trained_frames: int
    variants: tuple[Variant, ...]

    @property
    def seeds(self) -> range:
        """Of the worlds."""
        return range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + self.videos)

    @property
    def tokens(self) -> int:
        """Of a whole video with its condition."""
        return CONDITION_TOKENS + self.frames * FRAME_TOKENS

    @property
    def spans(self) -> dict[str, slice]:
        """Frames that a mean is taken over, by what they are called; people count frames from 1."""
        span, frames = self.trained_frames, self.frames
        return {
            f"frames 1-{span}": slice(0, span),
            f"{span + 1}-{2 * span}": slice(span, 2 * span),
            f"{frames - span + 1}-{frames}": slice(frames - span, frames),
        }


FULL = LongVideoPlan(videos=10, frames=10 * TRAINED_FRAMES, trained_frames=TRAINED_FRAMES, variants=VARIANTS)


def described(variant: Variant, plan: LongVideoPlan) -> dict[str, Any]:
    """Its configuration, and what it needs while the last frame is made: tokens it reads, positions the model has."""
    server = ServerConfig.parse(variant.policy, variant.config)
    video = server.plan(OPTIONS, plan.tokens)
    last = plan.tokens - FRAME_TOKENS
    return {
        "policy": variant.policy,
        "config": server.as_mapping(),
        "live_tokens": last if video is None else Retention(video.layout, video.policy, BLOCK_SIZE).live_tokens(last),
        "positions": plan.tokens if video is None else video.positions.limit(plan.tokens),
    }
