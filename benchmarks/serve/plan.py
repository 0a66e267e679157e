"""What `benchmarks.serve` runs: sizes and servers."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.decode.plan import CHANGED_LEAST
from benchmarks.decode.plan import QUICK as QUICK_DECODE
from benchmarks.model import ModelShape
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import Full, Policy
from vllm_packcache.core.retention import Retention, some_tokens

SEED = 0
BLOCK_SIZE = 32
CHUNK = 2048
"""Longest prefill chunk."""

STEPS_AHEAD = 1
"""Scheduled before the one in flight has been processed: a new block may be held with the old ones."""

THREADS = 1
"""OpenMP threads of each engine: the API server and the client need a core of a small machine."""

STOCK, PACKCACHE = SERVERS = ("stock", "packcache")
POLICIES: dict[str, Policy] = {STOCK: Full(), PACKCACHE: CHANGED_LEAST}

MODEL = ModelShape(layers=2, heads=8, head_size=128, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2)
"""That of `benchmarks.decode`."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        condition_tokens: C, the prompt of every video.
        tokens_per_frame: F.
        frames: T, of every video.
        pool_videos: videos with their full cache that the KV pool has room for, to the block.
        load_videos: videos that both servers are sent at once, where throughput is compared.
        rounds: how often both servers get the load.
    """

    model: ModelShape = MODEL
    condition_tokens: int
    tokens_per_frame: int
    frames: int
    pool_videos: int
    load_videos: int
    rounds: int

    @property
    def generated_tokens(self) -> int:
        """Of a video."""
        return self.frames * self.tokens_per_frame

    @property
    def max_model_len(self) -> int:
        """A video in whole blocks."""
        return -(-(self.condition_tokens + self.generated_tokens) // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def pool_blocks(self) -> int:
        """KV-cache blocks that requests of either server can hold."""
        return self.pool_videos * self.peak_blocks(STOCK)

    @property
    def max_videos(self) -> int:
        """Videos that a server may run at once: more than it has room for."""
        return 2 * self.fitting_videos(PACKCACHE)

    def held_blocks(self, server: str) -> list[int]:
        """Blocks that one video holds on ``server`` by its policy, while each token after the condition is computed."""
        layout = VideoLayout(FrameLayout(self.tokens_per_frame), self.condition_tokens)
        retention = Retention(layout, POLICIES[server], BLOCK_SIZE, some_tokens)
        # The last token is sampled and never computed.
        return [
            len(segment.past) + token // BLOCK_SIZE + 1 - segment.tail_start
            for segment in retention.segments(self.condition_tokens, layout.frame_start(self.frames) - 1)
            for token in range(segment.start, segment.stop)
        ]

    def peak_blocks(self, server: str) -> int:
        """Most blocks that one video holds on ``server``."""
        return max(self.held_blocks(server))

    def fitting_videos(self, server: str) -> int:
        """Videos of ``server`` that fit into the pool if all are longest at the same time, whatever their ids are."""
        layout = VideoLayout(FrameLayout(self.tokens_per_frame), self.condition_tokens)
        most = Retention(layout, POLICIES[server], BLOCK_SIZE).most_blocks(STEPS_AHEAD)
        return self.pool_blocks // (self.peak_blocks(server) if most is None else most)


USUAL = ServePlan(condition_tokens=17, tokens_per_frame=257, frames=13, pool_videos=4, load_videos=16, rounds=2)
QUICK = ServePlan(
    model=QUICK_DECODE.model,
    condition_tokens=40,
    tokens_per_frame=40,
    frames=13,
    pool_videos=2,
    load_videos=6,
    rounds=1,
)
