"""The engine really holds what the policy says, and gives everything back."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.conftest import PAPERS, prompt, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.retention import Retention

FRAME, CONDITION, BLOCK = 67, 70, 32


def kv_cache_manager(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager


def resident_blocks(llm: Any, request_id: str) -> list[int]:
    """Logical indices of the blocks a running request holds."""
    (blocks,) = kv_cache_manager(llm).coordinator.get_blocks(request_id)
    return [index for index, block in enumerate(blocks) if not block.is_null]


def test_resident_blocks_follow_the_schedule_and_return(engine: Any) -> None:
    llm = engine("packcache", PAPERS)
    pool = kv_cache_manager(llm).block_pool
    free_before = pool.get_num_free_blocks()
    plan = ServerConfig.parse("packcache", PAPERS).plan({"packcache_tokens_per_frame": FRAME}, CONDITION)
    assert plan is not None
    retention = Retention(plan.layout, plan.policy, BLOCK)
    llm.llm_engine.add_request(
        "video", {"prompt_token_ids": prompt(CONDITION)}, sampling(20 * FRAME, tokens_per_frame=FRAME)
    )
    peaks: dict[int, int] = {}
    computed = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        running = llm.llm_engine.engine_core.engine_core.scheduler.running
        if not running:
            continue
        request = running[0]
        # Blocks were freed for the tokens computed before this step, and allocated for those of the step.
        held = resident_blocks(llm, request.request_id)
        frame = max(0, retention.layout.frame_of(computed))
        expected = set(retention.past(frame).tolist()) | set(
            range(retention.blocks.tail_start(frame), -(-request.num_computed_tokens // BLOCK))
        )
        assert set(held) == expected
        computed = request.num_computed_tokens
        peaks[frame] = max(peaks.get(frame, 0), len(held))
    assert pool.get_num_free_blocks() == free_before
    boundaries = 1 + plan.policy.window + 1  # type: ignore[attr-defined]
    assert abs(peaks[19] - peaks[8]) <= boundaries
    full = -(-(CONDITION + 20 * FRAME) // BLOCK)
    assert peaks[19] < full / 3


@pytest.mark.parametrize("steps", [1, 3, 200, 450])
def test_abort_returns_everything(engine: Any, steps: int) -> None:
    llm = engine("packcache", PAPERS)
    pool = kv_cache_manager(llm).block_pool
    free_before = pool.get_num_free_blocks()
    llm.llm_engine.add_request(
        f"abort-{steps}", {"prompt_token_ids": prompt(CONDITION)}, sampling(900, tokens_per_frame=FRAME)
    )
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([f"abort-{steps}"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    llm.llm_engine.step()
    assert pool.get_num_free_blocks() == free_before
    (manager,) = kv_cache_manager(llm).coordinator.single_type_managers
    assert not manager._videos
