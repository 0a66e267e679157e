"""A pool that is too small for all: what a video holds is bounded, and what can never fit is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.conftest import generate, prompt, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention

BLOCK = 32
FRAME, FRAMES = 67, 10
LAYOUT = {"tokens_per_frame": FRAME}
CONFIG = {"window": 3, "history_frames": 1.5, "layout": LAYOUT}


def plan_of(condition: int, positions: str = "rebase") -> Plan:
    options = {"packcache_condition_tokens": condition}
    plan = ServerConfig.parse("packcache", {**CONFIG, "positions": positions}).plan(options, condition)
    assert plan is not None
    return plan


def most_blocks(condition: int, ahead: int = 0) -> int:
    plan = plan_of(condition)
    most = Retention(plan.layout, plan.policy, BLOCK).most_blocks(ahead)
    assert most is not None
    return most


def manager_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers[0]


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
def test_the_longest_request_need_not_fit_where_what_the_policy_keeps_does(
    engine: Any, reference: Any, positions: str
) -> None:
    condition, length = 40, 8192
    config = {**CONFIG, "positions": positions}
    pool = most_blocks(condition) + 1
    assert pool < length // BLOCK / 10
    llm = engine("packcache", config, max_model_len=length, num_gpu_blocks_override=pool)
    ids = prompt(condition, seed=21)
    made = generate(llm, ids, FRAMES * FRAME, condition_tokens=condition)
    reference.check(ids, made, FRAMES * FRAME, plan_of(condition, positions))
    with pytest.raises(ValueError, match="KV cache is needed, which is larger than"):
        engine(None, max_model_len=length, num_gpu_blocks_override=pool)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("positions", ["rebase", "absolute"])
def test_videos_that_are_recomputed_hold_no_more_than_before(
    engine: Callable[..., Any],
    reference: Any,
    preemptions: list[int],
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    positions: str,
) -> None:
    schedule_asynchronously(monkeypatch, asynchronous)
    config = {**CONFIG, "positions": positions}
    conditions = [40, 75, 40, 61]
    requests = [
        (prompt(condition, seed=30 + number), sampling(5 * FRAME, condition_tokens=condition))
        for number, condition in enumerate(conditions)
    ]
    options = {"max_num_batched_tokens": 512, "enable_prefix_caching": False, "variant": asynchronous}
    # Hardly more than one of them needs.
    most = [most_blocks(condition, int(asynchronous)) for condition in conditions]
    llm = engine("packcache", config, num_gpu_blocks_override=max(most) + 4, **options)
    manager, engine_, held = manager_of(llm), llm.llm_engine, 0
    names = [engine_.add_request(str(n), {"prompt_token_ids": ids}, params) for n, (ids, params) in enumerate(requests)]
    answers: dict[str, list[int]] = {}
    while engine_.has_unfinished_requests():
        for output in engine_.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        for name, video in manager._videos.items():
            bound = most[names.index(name)]
            assert video.resident_blocks <= bound == video.most_blocks
            held = max(held, video.resident_blocks)
    for number, (ids, _) in enumerate(requests):
        reference.check(ids, answers[str(number)], 5 * FRAME, plan_of(len(ids), positions))
    assert len(preemptions) >= 3
    assert held >= max(most) - 1, "the bound is what they really hold"


@pytest.fixture(scope="module")
def small(engine: Callable[..., Any]) -> Any:
    """A server whose pool has room for 640 tokens, of requests that may have 8192."""
    return engine("packcache", CONFIG, num_gpu_blocks_override=21)


@pytest.mark.parametrize("options", [{}, {"policy": "full", "tokens_per_frame": FRAME}], ids=["text", "opted out"])
def test_what_keeps_its_whole_cache_ends_where_the_pool_does(
    small: Any, reference: Any, options: dict[str, Any]
) -> None:
    from vllm.exceptions import VLLMValidationError

    ids = prompt(100, seed=40)
    made = generate(small, ids, 3000, **options)
    reference.check(ids, made, 540)
    with pytest.raises(
        VLLMValidationError, match="the prompt has 640 tokens, and the KV cache has room for 640 tokens"
    ):
        generate(small, prompt(640), 5, **options)
    assert len(generate(small, prompt(639), 5, **options)) == 1


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (30, {"tokens_per_frame": 400}),
        (30, {"window": 8, "history_frames": 8}),
        (600, {"condition_tokens": 600}),
    ],
    ids=["frames", "budget", "condition"],
)
def test_a_video_that_can_never_fit_is_refused(small: Any, tokens: int, options: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    message = r"this video holds \d+ blocks of 32 tokens, and the KV cache has 20: let the policy keep less "
    with pytest.raises(VLLMValidationError, match=message + r"\(packcache_history_frames, packcache_window, "):
        generate(small, prompt(tokens), 3000, **options)
    # One that ends before it holds so much.
    assert len(generate(small, prompt(tokens), 30, **options)) == 30
