"""What `benchmarks.play` runs: sizes and servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.model import ModelShape

SEED = 0
BLOCK_SIZE = 32
THREADS = 1
"""OpenMP threads of each engine: the API server and the client need a core of a small machine."""

MODEL = ModelShape(layers=2, heads=8, head_size=64, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2)

ACTIONS = 4
"""Ids of a frame that the client gives."""


def layout(rows: int, columns: int, actions: int = ACTIONS) -> dict[str, Any]:
    """Frames as MineWorld has them: a picture, and the action that follows it."""
    return {
        "grid": [rows, columns],
        "frame_end_tokens": actions,
        "frame_end_ids": [[400, 499]] * actions,
        "visual_ids": [0, 399],
    }


PACKCACHE, RESET, STOCK = "packcache", "reset", "stock"

POLICIES: dict[str, dict[str, Any]] = {
    PACKCACHE: {"selection": "changed", "history_frames": 2, "window": 12},
    RESET: {"reset_frames": 16, "kept_frames": 8},
}
"""Reset at 16 frames, of which 8 are kept, is what MineWorld's players have with its 16-frame models."""


@dataclass(frozen=True, kw_only=True)
class PlayPlan:
    """Sizes of everything that is run.

    Args:
        grid: rows and columns of a frame.
        sessions: that are played at once where throughput is compared.
        pool_blocks: of both servers then.
        context: frames after which stock vLLM's client begins anew, with half of them.
        rounds: bursts of each.
        burst: frames of every session in one.
        late: the frame whose first token is compared with that of an early one.
        pairs: of a late and an early frame.
        pauses: frames of a session whose longest is looked for.
        repeats: how often; of each frame the median counts.
        held: rows, columns and actions of the frames of which sessions are let in.
        held_frames: that the pool holds of one such video whole.
    """

    model: ModelShape = MODEL
    grid: tuple[int, int] = (8, 12)
    sessions: int = 8
    pool_blocks: int = 192
    context: int = 16
    rounds: int = 7
    burst: int = 4
    late: int = 500
    pairs: int = 21
    pauses: int = 200
    repeats: int = 3
    held: tuple[int, int, int] = (14, 24, 11)
    held_frames: int = 32

    @property
    def frame(self) -> int:
        """F, tokens of a frame."""
        return self.grid[0] * self.grid[1] + ACTIONS


FULL = PlayPlan()
QUICK = PlayPlan(
    grid=(3, 4), sessions=2, pool_blocks=64, rounds=2, burst=2, late=20, pairs=2, pauses=20, repeats=1, context=8
)
