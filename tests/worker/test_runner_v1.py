"""The adapter of the V1 runner: which step is published, when, and that nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_packcache.config import CONFIG_KEY, POLICY_KEY
from vllm_packcache.worker.runner_v1 import publishing_step
from vllm_packcache.worker.step import Step, current_step

ON = {POLICY_KEY: "sliding_window", CONFIG_KEY: {"window": 1, "layout": {"tokens_per_frame": 8}}}
VIDEO = {"packcache_condition_tokens": 10}


def state(name: str, extra_args: dict[str, Any] | None, prompt: int = 12) -> CachedRequestState:
    return CachedRequestState(
        req_id=name,
        prompt_token_ids=list(range(prompt)),
        mm_features=[],
        sampling_params=SamplingParams(extra_args=extra_args),
        generator=None,
        block_ids=([],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


def runner(additional_config: dict[str, Any], *requests: CachedRequestState) -> Any:
    """As much of a `GPUModelRunner` as the adapter reads."""
    table = np.arange(1, 41, dtype=np.int32).reshape(4, 10)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=additional_config),
        requests={request.req_id: request for request in requests},
        input_batch=SimpleNamespace(
            req_ids=[request.req_id for request in requests],
            num_computed_tokens_cpu=np.array([20, 5, 7, 0]),
            block_table=[SimpleNamespace(get_numpy_array=lambda: table)],
        ),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=4))]),
    )


def build(runner: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], Step | None]:
    return runner, args, kwargs, current_step()


wrapped = publishing_step(build)


def published(runner: Any, scheduled: dict[str, int] | None) -> Step | None:
    step = wrapped(runner, num_tokens=3, num_scheduled_tokens=scheduled)[3]
    assert current_step() is None
    return step


def test_rows_are_the_requests_in_the_order_of_the_batch() -> None:
    requests = [state("a", VIDEO), state("b", None), state("c", {**VIDEO, "packcache_policy": "full"})]
    # Dictionaries of the scheduler are in another order.
    step = published(runner(ON, *requests), {"c": 3, "a": 1, "b": 2})
    assert step is not None
    assert [(row.computed, row.scheduled) for row in step.rows] == [(20, 1), (5, 2), (7, 3)]
    assert [row.retention is not None for row in step.rows] == [True, False, False]
    retention = step.rows[0].retention
    assert retention is not None
    assert (retention.layout.condition_tokens, retention.layout.tokens_per_frame) == (10, 8)
    assert retention.block_size == step.block_size == 4
    assert step.block_table[0, 0] == 1


def test_arguments_and_result_pass_through() -> None:
    one = runner(ON, state("a", VIDEO))
    result = wrapped(one, 1, 2, num_scheduled_tokens={"a": 1}, max_query_len=3)
    assert result[:3] == (one, (1, 2), {"num_scheduled_tokens": {"a": 1}, "max_query_len": 3})


@pytest.mark.parametrize(
    ("additional_config", "extra_args", "scheduled"),
    [
        pytest.param({}, VIDEO, {"a": 1}, id="switched off"),
        pytest.param(ON, VIDEO, None, id="a dummy run names no requests"),
        pytest.param(ON, None, {"a": 1}, id="text only"),
        pytest.param(ON, {**VIDEO, "packcache_policy": "full"}, {"a": 1}, id="opted out"),
        pytest.param({POLICY_KEY: "full"}, {"packcache_tokens_per_frame": 8}, {"a": 1}, id="full"),
    ],
)
def test_nothing_is_published_when_there_is_nothing_to_compact(
    additional_config: dict[str, Any], extra_args: dict[str, Any] | None, scheduled: dict[str, int] | None
) -> None:
    assert published(runner(additional_config, state("a", extra_args)), scheduled) is None


def test_a_retention_lives_as_long_as_the_runners_record() -> None:
    one = runner(ON, state("a", VIDEO))
    steps = [published(one, {"a": 1}) for _ in range(2)]
    assert steps[0] is not None
    assert steps[1] is not None
    assert steps[0].rows[0].retention is steps[1].rows[0].retention
    # The id comes again with another video.
    one.requests["a"] = state("a", {"packcache_condition_tokens": 3})
    step = published(one, {"a": 1})
    assert step is not None
    assert step.rows[0].retention is not None
    assert step.rows[0].retention.layout.condition_tokens == 3


def test_a_failure_leaves_no_step_behind() -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        publishing_step(fail)(runner(ON, state("a", VIDEO)), num_scheduled_tokens={"a": 1})
    assert current_step() is None
