"""Videos that are interrupted in the middle: by others that are more urgent, by a pause, by a reset of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.runner import shorter
from tests.serving.conftest import prompt, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig

BLOCK, FRAME = 32, 45
CONFIG = {"window": 2, "history_frames": 1.5, "layout": {"tokens_per_frame": FRAME}}
LENGTH = shorter(5 * FRAME, 40)
GIVEN = shorter(0, 3 * FRAME)
REQUESTS = [
    (prompt(40 + GIVEN, seed=80), sampling(LENGTH, condition_tokens=40)),
    (prompt(75, seed=81), sampling(LENGTH)),
    (prompt(61 + 2 * FRAME, seed=82), sampling(LENGTH, condition_tokens=61)),
    (prompt(40, seed=83), sampling(LENGTH)),
]


@pytest.fixture
def expected(reference: Any) -> list[list[int]]:
    server = ServerConfig.parse("packcache", CONFIG)
    return [
        reference.generate(ids, params.max_tokens, server.plan(params.extra_args, len(ids)), BLOCK).token_ids
        for ids, params in REQUESTS
    ]


class Run:
    """Requests in an engine, step by step."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        (self.manager,) = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []

    def add(self, number: int, priority: int = 0) -> None:
        ids, params = REQUESTS[number]
        self.engine.add_request(str(number), {"prompt_token_ids": ids}, params, priority=priority)

    def step(self, steps: int) -> None:
        for _ in range(steps):
            for output in self.engine.step():
                self.tokens[output.request_id] = list(output.outputs[0].token_ids)
                self.ended += [output.request_id] * output.finished

    def to_the_end(self) -> list[list[int]]:
        """Tokens of all requests; nothing is left of them."""
        while self.engine.has_unfinished_requests():
            self.step(1)
        pool = self.core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.manager._videos
        return [self.tokens[str(number)] for number in range(len(self.tokens))]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def started(request: pytest.FixtureRequest, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``started(**options)``: a `Run`."""
    schedule_asynchronously(monkeypatch, request.param)
    return lambda **options: Run(engine("packcache", CONFIG, variant=request.param, **options))


def test_urgent_videos_take_the_blocks_of_others(
    started: Any, expected: list[list[int]], preemptions: list[int]
) -> None:
    # The first two fit, and the third and fourth do not fit beside them.
    run = started(scheduling_policy="priority", num_gpu_blocks_override=shorter(18, 13))
    run.add(0, priority=9)
    run.add(1, priority=5)
    run.step(shorter(80, 8))
    run.add(2, priority=1)
    run.add(3, priority=0)
    assert run.to_the_end() == expected
    assert preemptions
    assert run.ended[-1] == "0"


@pytest.mark.parametrize("clear_cache", [False, True])
def test_a_pause_changes_no_token(
    started: Any, expected: list[list[int]], preemptions: list[int], clear_cache: bool
) -> None:
    run = started()
    for number in range(3):
        run.add(number)
    # One pause while they are prefilled, one in mid-frame, one later.
    for steps in (1, shorter(70, 5), shorter(100, 4)):
        run.step(steps)
        run.core.pause_scheduler("keep", clear_cache)
        before = dict(run.tokens)
        if not run.core.scheduler.get_request_counts()[0]:
            assert clear_cache
        run.core.resume_scheduler()
        assert run.tokens == before
    run.add(3)
    assert run.to_the_end() == expected
    assert bool(preemptions) == clear_cache


def test_what_comes_while_the_server_is_paused_waits(started: Any, expected: list[list[int]]) -> None:
    run = started()
    run.add(0)
    run.step(shorter(60, 5))
    run.core.pause_scheduler("keep", False)
    for number in range(1, 4):
        run.add(number)
    before = dict(run.tokens)
    # What was in flight may still come.
    run.step(2)
    settled = dict(run.tokens)
    run.step(3)
    assert run.tokens == settled
    assert set(settled) == set(before) == {"0"}
    run.core.resume_scheduler()
    assert run.to_the_end() == expected


def test_a_reset_of_the_prefix_cache_changes_no_token(
    started: Any, expected: list[list[int]], preemptions: list[int]
) -> None:
    run = started()
    for number in range(4):
        run.add(number)
    for steps in (2, shorter(50, 4), shorter(100, 4)):
        run.step(steps)
        assert run.core.reset_prefix_cache(reset_running_requests=False) is False, "blocks are in use"
        assert run.core.reset_prefix_cache(reset_running_requests=True)
    assert run.to_the_end() == expected
    assert len(preemptions) >= 6
