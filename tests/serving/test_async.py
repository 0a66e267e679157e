"""Asynchronous scheduling: a step is scheduled while the one before it still runs. The tokens are the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runner import shorter
from tests.serving.conftest import check_together, prompt, sampling, schedule_asynchronously

CONFIG = {"window": 2, "history_frames": 1.5}


def requests() -> list[tuple[list[int], Any]]:
    return [
        (prompt(70, seed=5), sampling(shorter(400, 60), tokens_per_frame=shorter(33, 10))),
        (prompt(130, seed=6), sampling(shorter(300, 40))),
        (prompt(20, seed=7), sampling(shorter(500, 60), tokens_per_frame=shorter(57, 15), window=1, history_frames=1)),
        (prompt(420, seed=8), sampling(shorter(300, 45), tokens_per_frame=40, condition_tokens=30)),
        (prompt(70, seed=5), sampling(shorter(300, 20), tokens_per_frame=67, policy="full")),
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_gpu_blocks_override": shorter(34, 22), "max_model_len": shorter(800, 600)}],
    ids=["room", "crowded"],
)
def test_tokens_are_the_same(
    engine: Any, reference: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    schedule_asynchronously(monkeypatch, True)
    llm = engine("packcache", CONFIG, max_num_batched_tokens=128, variant="asynchronous", **options)
    core = llm.llm_engine.engine_core.engine_core
    assert type(core.scheduler) is AsyncScheduler
    check_together(llm, reference, "packcache", CONFIG, requests())
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
