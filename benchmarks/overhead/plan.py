"""What `benchmarks.overhead` runs: sizes, engines, requests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.model import ModelShape
from vllm_packcache.core.policies import PAPER

SEED = 0
POLICY = PAPER
BLOCK_SIZE = 32
THREADS = 1

STOCK, AGAIN, TEXT, ROOM, PACKCACHE = "stock", "again", "text", "room", "packcache"

CASES = {
    STOCK: "stock vLLM",
    AGAIN: "stock vLLM once more",
    TEXT: "plugin, text only",
    ROOM: "plugin, videos from which nothing is dropped",
    PACKCACHE: "plugin, videos under the rule of the paper",
}
"""What is run, and its name for people."""

WITH_PLUGIN = (TEXT, ROOM, PACKCACHE)


@dataclass(frozen=True, kw_only=True)
class OverheadPlan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        requests: of a step.
        steps: decode steps of each engine that are compared.
        rounds: bursts that they are divided into.
        watched_steps: further ones, in which the time inside our own functions is measured.
        condition_tokens: C, the prompt of each request.
        tokens_per_frame: F.
        given_frames: frames in the prompt on Model Runner V2, where steps are too slow to generate them.
        interpreted_requests: of a step of Model Runner V2, whose kernels are interpreted row by row.
        interpreted_steps: of Model Runner V2, in which the time inside our own functions is measured.
    """

    model: ModelShape = dataclasses.field(
        default_factory=lambda: ModelShape(
            layers=1, heads=2, head_size=32, hidden=64, vocab=256, dtype="float32", bytes_per_element=4
        )
    )
    requests: int
    interpreted_requests: int
    interpreted_steps: int
    steps: int
    rounds: int
    watched_steps: int
    condition_tokens: int = 16
    tokens_per_frame: int = 64
    given_frames: int = 5

    @property
    def burst(self) -> int:
        """Steps of a round."""
        return self.steps // self.rounds

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        generated = 1 + self.steps + self.watched_steps
        return self.condition_tokens + self.given_frames * self.tokens_per_frame + generated + BLOCK_SIZE

    @property
    def room(self) -> int:
        """Frames of a history from which nothing is dropped."""
        return self.max_model_len // self.tokens_per_frame + 1

    def options(self, case: str) -> dict[str, Any]:
        """Request options of a case."""
        if case not in (ROOM, PACKCACHE):
            return {}
        video = {
            "packcache_condition_tokens": self.condition_tokens,
            "packcache_tokens_per_frame": self.tokens_per_frame,
        }
        room = {"packcache_history_frames": self.room, "packcache_window": self.room}
        return video | (room if case == ROOM else {})

    def additional_config(self, case: str) -> dict[str, Any]:
        """What switches the plugin on in a case's engine."""
        if case not in WITH_PLUGIN:
            return {}
        return {"kv_cache_policy": POLICY.name, "kv_cache_policy_config": dataclasses.asdict(POLICY)}


FULL = OverheadPlan(requests=64, interpreted_requests=16, interpreted_steps=65, steps=500, rounds=20, watched_steps=130)
QUICK = OverheadPlan(
    requests=4, interpreted_requests=4, interpreted_steps=4, steps=8, rounds=2, watched_steps=4, tokens_per_frame=8
)
