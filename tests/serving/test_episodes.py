"""``episodes`` in the engine: anchors of scenes that have ended live on behind the window, where it left them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.margins import numbers
from tests.runner import shorter
from tests.serving.conftest import prompt, run, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies.base import Tokens
from vllm_packcache.core.retention import Retention

CONFIG = {"selection": "changed", "history_frames": 2, "window": 3, "episodes": 2}


def film(condition: int, frame: int, scenes: str, seed: int) -> list[int]:
    """A condition, and given frames that show these scenes, in which one place in twelve changes."""
    random = numbers(seed)
    pictures = {scene: random.integers(0, 256, frame) for scene in sorted(set(scenes))}
    ids = [*prompt(condition, seed=seed)]
    for scene in scenes:
        moves = random.random(frame) < 0.08
        pictures[scene][moves] = random.integers(0, 256, int(moves.sum()))
        ids += pictures[scene].tolist()
    return ids


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
def test_scenes_that_come_back(engine: Any, reference: Any, positions: str) -> None:
    config = {**CONFIG, "positions": positions}
    llm = engine("packcache", config, max_num_batched_tokens=256)
    server = ServerConfig.parse("packcache", config)
    batch = []
    for seed, (condition, frame, scenes, options) in enumerate(
        [
            (70, shorter(67, 50), "aabbbbbcaaaabbbbb", {}),
            (5, shorter(97, 65), "abbcccccbbaa", {"episodes": 1, "window": 2}),
            (41, 64, "aabbccccccbb", {"history_frames": 3, "changed_tokens": 40}),
        ]
    ):
        params = sampling(shorter(2 * frame + 3, 12), tokens_per_frame=frame, condition_tokens=condition, **options)
        batch.append((film(condition, frame, scenes, seed), params))
    answers = run(llm, [ids for ids, _ in batch], [params for _, params in batch])
    for (ids, params), tokens in zip(batch, answers, strict=True):
        plan = server.plan(params.extra_args, len(ids))
        reference.check(ids, tokens, params.max_tokens, plan)
        retention = Retention(plan.layout, plan.policy, 32, reader([*ids, *tokens]))
        frame = plan.layout.frame_of(len(ids))
        tags = {retention.blocks.tag(block) for block in retention.past(frame).tolist()}
        assert any(0 <= tag < frame - plan.policy.window for tag in tags), "no anchor lives behind the window"


def reader(ids: list[int]) -> Tokens:
    return lambda start, stop: np.array(ids[start:stop])
