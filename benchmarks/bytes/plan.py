"""What `benchmarks.bytes` runs: engines, a pool, videos."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.model import ModelShape
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PAPER, Policy
from vllm_packcache.core.retention import Retention

SEED = 0
THREADS = 1
POLICY: Policy = PAPER
BASE = "bfloat16"

MODEL = ModelShape(
    layers=1, heads=1, head_size=128, hidden=64, vocab=256, dtype="bfloat16", bytes_per_element=2, intermediate=64
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A format beside bfloat16, on one backend.

    Args:
        cache: the format, as of ``--kv-cache-dtype``.
        backend: attention backend.
        runner: V1 or V2, which Triton's interpreter runs.
        block_size: tokens of a KV-cache block.
    """

    cache: str
    backend: str
    runner: str
    block_size: int


CASES = {
    "integers": Case(cache="int8_per_token_head", backend="TRITON_ATTN", runner="V2", block_size=16),
    "floats": Case(cache="fp8_e4m3", backend="CPU_ATTN", runner="V1", block_size=32),
}
"""What is compared, by name."""

JUDGED = "integers"
"""An A40's."""


@dataclass(frozen=True, kw_only=True)
class BytesPlan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        condition_tokens: C.
        tokens_per_frame: F.
        given_frames: of every prompt, the first of which have left the window.
        begun_tokens: of the frame that is made: so many are given, too, and then a video holds as much as ever.
        made_tokens: of every video.
        pool_videos: that the pool has room for in bfloat16.
        queue: videos at once, in pools of bfloat16.
    """

    model: ModelShape = MODEL
    condition_tokens: int = 32
    tokens_per_frame: int = 32
    given_frames: int = 5
    begun_tokens: int = 20
    made_tokens: int = 8
    pool_videos: int = 12
    queue: float = 2.5

    @property
    def prompt_tokens(self) -> int:
        """Of every video."""
        return self.condition_tokens + self.given_frames * self.tokens_per_frame + self.begun_tokens

    @property
    def max_model_len(self) -> int:
        """Of every video, in whole blocks of any size."""
        return -(-(self.prompt_tokens + self.made_tokens) // 64) * 64

    @property
    def videos(self) -> int:
        """Sent at once."""
        return round(self.queue * self.pool_videos)

    @property
    def options(self) -> dict[str, Any]:
        """Of every request."""
        return {
            "packcache_tokens_per_frame": self.tokens_per_frame,
            "packcache_condition_tokens": self.condition_tokens,
        }

    def most_blocks(self, block_size: int) -> int:
        """Blocks that a video holds at most."""
        layout = VideoLayout(FrameLayout(self.tokens_per_frame), self.condition_tokens)
        most = Retention(layout, POLICY, block_size).most_blocks()
        assert most is not None
        return most

    def pool_bytes(self, block_size: int) -> int:
        """Of the KV cache: whole blocks of bfloat16, one of which vLLM keeps for itself."""
        blocks = self.pool_videos * self.most_blocks(block_size) + 1
        return blocks * block_size * self.model.kv_bytes_per_token


def additional_config() -> dict[str, Any]:
    """What switches the plugin on."""
    return {"kv_cache_policy": POLICY.name, "kv_cache_policy_config": dataclasses.asdict(POLICY)}


FULL = BytesPlan()
QUICK = BytesPlan(tokens_per_frame=16, begun_tokens=4, made_tokens=4, pool_videos=3)
