"""The adapter of the V1 runner: which step is published, when, what positions become, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_packcache.config.server import POLICY_KEY, ServerConfig
from vllm_packcache.config.sources import CONFIG_KEY
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.families.base import Prompt, Server
from vllm_packcache.families.decoder import Decoder
from vllm_packcache.worker.runner_v1 import position_tokens, publish_step
from vllm_packcache.worker.step import Step, current_compaction

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
        vllm_config=SimpleNamespace(additional_config=additional_config, model_config=None),
        requests={request.req_id: request for request in requests},
        input_batch=SimpleNamespace(
            req_ids=[request.req_id for request in requests],
            num_computed_tokens_cpu=np.array([20, 5, 7, 0]),
            block_table=[SimpleNamespace(get_numpy_array=lambda: table)],
        ),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=4))]),
    )


def build(runner: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], Step | None]:
    compaction = current_compaction()
    return runner, args, kwargs, None if compaction is None else compaction.step


wrapped = publish_step(build)


def published(runner: Any, scheduled: dict[str, int] | None) -> Step | None:
    step = wrapped(runner, num_tokens=3, num_scheduled_tokens=scheduled)[3]
    assert current_compaction() is None
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
        publish_step(fail)(runner(ON, state("a", VIDEO)), num_scheduled_tokens={"a": 1})
    assert current_compaction() is None


# --------------------------------------------------------------------------- positions

REBASING = {
    POLICY_KEY: "packcache",
    CONFIG_KEY: {"window": 2, "selection": "spatial", "layout": {"tokens_per_frame": 8}},
}


class Rotation:
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.slides: list[tuple[int, int, int]] = []

    def slide(self, retention: Any, positions: Any, token: int, block_table: Any) -> None:
        assert retention.layout is positions.layout
        self.slides.append((positions.layout.condition_tokens, token, int(block_table[0])))


def run_step(one: Any, scheduled: dict[str, int], axes: int = 1) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """Positions that the model gets, and the slides before it runs."""
    count = sum(scheduled.values())
    index = torch.cat(
        [
            torch.arange(computed, computed + scheduled[name])
            for name, computed in zip(one.input_batch.req_ids, one.input_batch.num_computed_tokens_cpu, strict=False)
        ]
    )
    padded = torch.cat([index, torch.zeros(3, dtype=torch.int64)])
    one.positions = padded if axes == 1 else padded.expand(axes, -1).clone()
    one._packcache_rotation = Rotation()
    publish_step(build)(one, num_scheduled_tokens=scheduled)
    inputs = position_tokens(lambda runner: ("ids", "embeds", runner.positions, "rest"))(one)
    assert inputs[:2] == ("ids", "embeds")
    assert inputs[2] is one.positions
    assert not one.positions[..., count:].any(), "padding"
    return one.positions[..., :count].tolist(), one._packcache_rotation.slides


def batch(computed: list[int], *requests: CachedRequestState, config: dict[str, Any] = REBASING) -> Any:
    one = runner(config, *requests)
    one.input_batch.num_computed_tokens_cpu = np.array(computed)
    return one


def test_positions_count_from_the_window() -> None:
    # Condition 10, frames of 8, window 2: frame 3 begins at 34 and makes the window slide.
    one = batch([34, 7, 35, 20], state("a", VIDEO), state("b", None), state("c", VIDEO), state("d", VIDEO))
    positions, slides = run_step(one, {"a": 1, "b": 2, "c": 3, "d": 4})
    assert positions == [26, 7, 8, 27, 28, 29, 20, 21, 22, 23]
    assert slides == [(10, 34, 1)]


def test_every_request_slides_by_itself() -> None:
    other = {"packcache_condition_tokens": 3, "packcache_window": 1, "packcache_history_frames": 1}
    one = batch([19, 42, 41], state("a", other), state("b", VIDEO), state("c", VIDEO))
    positions, slides = run_step(one, {"a": 8, "b": 1, "c": 1})
    assert positions == [*range(11, 19), 26, 33]
    assert slides == [(3, 19, 1), (10, 42, 11)]


def test_a_model_with_three_axes_moves_on_all_of_them() -> None:
    positions, _ = run_step(batch([35], state("a", VIDEO)), {"a": 2}, axes=3)
    assert positions == [[27, 28]] * 3


def test_a_grid_is_positioned_by_row_and_column() -> None:
    layout = {"grid": [2, 3], "frame_start_tokens": 1, "frame_end_tokens": 1, "axis_scale": [4, 8, 2]}
    config = {POLICY_KEY: "packcache", CONFIG_KEY: {"window": 2, "selection": "spatial", "layout": layout}}
    one = batch([35, 5], state("a", VIDEO), state("b", None), config=config)
    positions, slides = run_step(one, {"a": 7, "b": 1}, axes=3)
    # Frame 3 is in slot 2 of its window; the first visual token of the video is 11.
    assert positions[0] == [*[11 + 4 * 2] * 6, 33, 5]
    assert positions[1] == [*[11] * 3, *[11 + 8] * 3, 33, 5]
    assert positions[2] == [*[11, 13, 15] * 2, 33, 5]
    assert slides == []


@pytest.mark.parametrize("config", [ON, {POLICY_KEY: "packcache", CONFIG_KEY: {"positions": "absolute"}}])
def test_absolute_positions_are_left_alone(config: dict[str, Any]) -> None:
    video = {"packcache_tokens_per_frame": 8, "packcache_condition_tokens": 10}
    positions, slides = run_step(batch([90, 34], state("a", video), state("b", None), config=config), {"a": 9, "b": 1})
    assert positions == [*range(90, 99), 34]
    assert slides == []


def test_a_step_over_a_slide_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match="tokens 33 to 35 of a video are run in one step, but its window slides at 34"
    ):
        run_step(batch([33], state("a", VIDEO)), {"a": 2})


def test_a_dummy_run_between_two_steps_leaves_no_positions() -> None:
    one = batch([34], state("a", VIDEO))
    publish_step(build)(one, num_scheduled_tokens={"a": 1})
    publish_step(build)(one, num_scheduled_tokens=None)
    one.positions = torch.tensor([34])
    position_tokens(lambda runner: (None, None, runner.positions))(one)
    assert one.positions.tolist() == [34]


def test_a_family_is_given_the_ids_of_the_prompt() -> None:
    """As the scheduler gives them: both sides must get the same answer."""
    asked = []

    class Asking(Decoder):
        def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
            asked.append(prompt)
            return super().request(server, extra_args, prompt)

    one = runner(ON, state("a", VIDEO))
    one._packcache_config = ServerConfig.parse(ON[POLICY_KEY], ON[CONFIG_KEY], family=Asking())
    assert published(one, {"a": 1}) is not None
    assert asked == [list(range(12))]
