"""Several videos of one request to a masked model: token for token those of as many requests, in fewer blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.runner import needs_v2
from tests.serving.conftest import schedule_asynchronously
from tests.serving.test_masked_tokens import (
    BLOCK,
    CONFIG,
    CONTINUED,
    IMAGE_TO_VIDEO,
    OTHER_WAYS,
    TEXT_TO_VIDEO,
    UNGUIDED,
    Case,
    generate,
    params,
    plan_of,
    scheduler_of,
)
from tests.serving.test_masked_tokens import lumos_model as lumos_model
from tests.serving.test_masked_tokens import masked_engine as masked_engine
from tests.serving.test_masked_tokens import oracle as oracle
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.manager import retention_managers
from vllm_packcache.engine.metrics import counts
from vllm_packcache.families import lumos

pytestmark = needs_v2


CONTINUED_FRAME = lumos.frame_layout(CONTINUED.grid).tokens_per_frame


@dataclass
class Seen:
    """What a scheduler did: blocks that were held after each step, and how many were copied in all."""

    held: list[int] = field(default_factory=list)
    copied: int = 0


@contextmanager
def watched(llm: Any) -> Iterator[Seen]:
    """Whoever holds a block is counted, blocks that several hold are there once, and in the end none is held."""
    scheduler, seen = scheduler_of(llm), Seen()
    pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    managers = retention_managers(scheduler.kv_cache_manager)

    def watching(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen.copied += len(output.kv_cache_block_copies or ())
        tables = [own for each in managers for own in each.req_to_blocks.values()]
        held = Counter(block.block_id for own in tables for block in own if not block.is_null)
        assert held == {number: pool.blocks[number].ref_cnt for number in held}
        seen.held.append(len(held))
        assert seen.held[-1] == pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        assert counts(managers, 1)["resident_tokens"] == seen.held[-1] * BLOCK
        return output

    scheduler.schedule = watching
    try:
        yield seen
    finally:
        scheduler.schedule = schedule
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def several(case: Case, n: int) -> Any:
    sampling = params(case)
    sampling.n = n
    return sampling


def run(
    llm: Any,
    requests: list[tuple[Case, int]],
    steps_between: int = 0,
    abort: int | None = None,
    reset: Sequence[int] = (),
) -> list[list[list[int]]]:
    """Generated tokens of requests that come so many steps apart, each of several videos.

    Args:
        llm: the engine.
        requests: and how many videos of each.
        steps_between: how many steps apart they come; 0: at once.
        abort: the step before which one video of the first request is aborted, which is its second; None: none is.
        reset: the steps before which all that runs is preempted.
    """
    engine, waiting, step = llm.llm_engine, list(enumerate(requests)), 0
    done: dict[tuple[str, int], list[int]] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and step >= steps_between * waiting[0][0]:
            index, (case, n) = waiting.pop(0)
            engine.add_request(f"forks-{index}", {"prompt_token_ids": case.ids}, several(case, n))
        if step == abort:
            (second,) = [name for name in scheduler_of(llm).requests if name.startswith("1_forks-0")]
            engine.abort_request([second], internal=True)
        if step in reset:
            assert engine.engine_core.engine_core.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            for own in output.outputs:
                done[output.request_id, own.index] = list(own.token_ids)
        step += 1
    return [[done.get((f"forks-{index}", i), []) for i in range(n)] for index, (_, n) in enumerate(requests)]


def seeds(case: Case, n: int) -> list[Case]:
    first = dict(case.options)["seed"]
    return [case.having(seed=first + i) for i in range(n)]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_each_is_the_video_of_its_seed(ahead: bool, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    """At once, and beside others that come and go; more than run at a time, guided and not."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(variant=ahead)
    requests = [(CONTINUED, 4), (TEXT_TO_VIDEO, 2), (UNGUIDED, 1), (IMAGE_TO_VIDEO, 3), (OTHER_WAYS, 2)]
    expected = [[oracle(own) for own in seeds(case, n)] for case, n in requests]
    with watched(llm) as seen:
        assert run(llm, requests) == expected
        assert run(llm, requests, steps_between=3) == expected
    assert seen.copied


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_one_is_aborted_and_the_others_go_on(ahead: bool, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(variant=ahead)
    expected = [oracle(own) for own in seeds(CONTINUED, 3)]
    for step in (1, 9):
        with watched(llm):
            (made,) = run(llm, [(CONTINUED, 3)], abort=step)
        assert [made[0], made[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_preempted_ones_find_again_what_is_left(
    ahead: bool, masked_engine: Any, oracle: Any, preemptions: list[int], monkeypatch: Any
) -> None:
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(num_gpu_blocks_override=34, variant=("crowded", ahead))
    requests = [(CONTINUED, 3), (TEXT_TO_VIDEO, 3), (IMAGE_TO_VIDEO, 2)]
    with watched(llm) as seen:
        assert run(llm, requests, steps_between=2) == [[oracle(own) for own in seeds(case, n)] for case, n in requests]
    assert seen.copied
    assert any(preemptions)


def test_all_begin_anew_together(masked_engine: Any, oracle: Any, preemptions: list[int]) -> None:
    """While the prompt is computed, and with frames of their own."""
    llm, expected = masked_engine(variant=False), [oracle(own) for own in seeds(CONTINUED, 3)]
    with watched(llm):
        assert run(llm, [(CONTINUED, 3)], reset=(2, 16)) == [expected]
    assert preemptions == [0] * (len(preemptions) - 3) + [CONTINUED_FRAME] * 3


@pytest.mark.parametrize(
    ("case", "frame"),
    [(TEXT_TO_VIDEO, 2), (TEXT_TO_VIDEO, 4), (OTHER_WAYS.having(frames=6), 1)],
    ids=["text-2", "text-4", "image-1"],
)
def test_a_fork_of_a_video_goes_on_as_it_did(case: Case, frame: int, masked_engine: Any, oracle: Any) -> None:
    """With the same seed; those with others are what each would be alone. From frame 3 on the window slides."""
    straight = oracle(case)
    made = straight[: frame * len(straight) // 6]
    options = case.extra_args | {
        "packcache_made_frames": frame,
        "packcache_frames": 6 - frame,
        "packcache_condition_frames": case.given,
    }
    sampling = several(case, 3)
    sampling.extra_args = options
    llm = masked_engine(variant=False)
    prompt = {"prompt_token_ids": case.ids + made}
    with watched(llm) as seen:
        (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    assert seen.copied
    tokens = [list(own.token_ids) for own in output.outputs]
    assert tokens[0] == straight[len(made) :]
    for i in (1, 2):
        sampling = params(case)
        sampling.extra_args = options | {"packcache_seed": dict(case.options)["seed"] + i}
        (alone,) = llm.generate([prompt], sampling, use_tqdm=False)
        assert tokens[i] == list(alone.outputs[0].token_ids)
    assert len(set(map(tuple, tokens))) == 3


def test_with_encoded_history_the_condition_is_shared(masked_engine: Any) -> None:
    config = {**CONFIG, "layout": {"grid": [4, 7]}, "window": 3, "history_frames": 3, "precision": {"history": "int8"}}
    llm = masked_engine("packcache", config)
    case = Case(40, (4, 7), 3).having(frames=3, steps=2, guidance=2, seed=3, condition_frames=1)
    with watched(llm) as apart:
        alone = generate(llm, *seeds(case, 3))
    with watched(llm) as together:
        assert run(llm, [(case, 3)]) == [alone]
    assert max(together.held) < max(apart.held)
    # The block that the first frame begins in, of either stream, in the second and the third video.
    assert together.copied == 2 * 2


def test_blocks_are_the_condition_and_the_history_once_and_each_ones_own(masked_engine: Any) -> None:
    """Whatever they begin with, until the window slides: then those have copies that it turns."""
    config = {**CONFIG, "layout": {"grid": [5, 9]}, "window": 3, "history_frames": 3}
    llm = masked_engine("packcache", config, max_num_batched_tokens=256)
    case = Case(70, (5, 9), 3).having(frames=3, steps=2, guidance=2, seed=0, condition_frames=1)
    plan = plan_of(case, repr(("packcache", config)))
    retentions = [Retention(own.plan.layout, own.plan.policy, BLOCK) for own in plan.streams]
    with watched(llm) as apart:
        alone = generate(llm, *seeds(case, 4))
    with watched(llm) as together:
        assert run(llm, [(case, 4)]) == [alone]
    # Two frames are given; with the second one that is made, the fourth of the video, nothing slides or is dropped yet.
    once = sum(own.blocks.tail_start(2) for own in retentions)
    all_of_one = sum(-(-own.layout.frame_start(4) // BLOCK) for own in retentions)
    assert [len(own.past(3)) for own in retentions] == [own.blocks.tail_start(3) for own in retentions]
    assert 4 * all_of_one in apart.held
    assert once + 4 * (all_of_one - once) in together.held
    assert not apart.copied
    # The block that the first own frame begins in, once the last of them has it alone; then what is turned.
    turned = sum(np.isin(own.sliding_blocks(4), np.arange(own.blocks.tail_start(2))).sum() for own in retentions)
    assert together.copied == 3 * (2 + turned)
    assert turned
