"""Second streams of guided requests to a causal model: blocks that vLLM does not know of, none for all others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput

from tests.engine.harness import BLOCK, Harness, Served, prompt, video_options
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.retention import SECOND_BLOCKS, PolicyError, Retention, Written
from vllm_packcache.engine import manager as managers
from vllm_packcache.engine.manager import GuidanceManager, bound_chunks, retention_managers, tell_workers

CONFIG = {"history_frames": 2, "window": 3, "selection": "spatial", "guidance": True}
FRAME, CONDITION, NEGATIVE = 10, 9, 23
OPTIONS = video_options(FRAME, CONDITION, guidance=3, negative_prompt_ids=list(range(NEGATIVE)))


@pytest.fixture(params=[False, True], ids=["uncached", "cached"])
def kv(request: Any) -> Harness:
    return Harness(ServerConfig.parse("packcache", CONFIG), enable_caching=request.param, num_blocks=200)


def second_of(kv: Harness) -> GuidanceManager:
    first, second = retention_managers(kv.kv)
    assert first is kv.manager
    assert isinstance(second, GuidanceManager)
    return second


def told(kv: Harness, *names: str, anew: tuple[str, ...] = ()) -> dict[str, Written]:
    """What the workers hear of second streams with a step of these requests."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens.update(dict.fromkeys(names, 1))
    output.scheduled_new_reqs.extend(SimpleNamespace(req_id=name) for name in anew)
    scheduler = SimpleNamespace(kv_cache_manager=kv.kv, requests={}, running=[])
    return getattr(tell_workers(lambda scheduler: output)(scheduler), SECOND_BLOCKS, {})


def begin(kv: Harness) -> Served:
    return kv.add(prompt(1, CONDITION), OPTIONS)


def test_both_streams_hold_what_their_plans_say(kv: Harness) -> None:
    second, served = second_of(kv), begin(kv)
    made = kv.manager.request(served.request)
    assert made is not None
    stream = made.streams[1]
    retention = Retention(stream.plan.layout, stream.plan.policy, BLOCK)
    name, table = served.request.request_id, list[int]()
    for computed in range(CONDITION, CONDITION + 8 * FRAME):
        before = kv.processed(served) if served.running else 0
        kv.run(served, computed)
        nothing = Written(len(table), [])
        start, blocks, _ = told(kv, name, anew=(name,) if computed == CONDITION else ()).get(name, nothing)
        table[start:] = blocks
        held = [index for index, block in enumerate(second.req_to_blocks[name]) if not block.is_null]
        own = stream.own_tokens(before)
        since = range(-(-own // BLOCK), -(-stream.own_tokens(computed) // BLOCK))
        assert held == [*retention.live_blocks(own).tolist(), *since], computed
        blocks_held = second.req_to_blocks[name]
        assert len(table) == len(blocks_held)
        assert all(block.is_null or block.block_id == own for block, own in zip(blocks_held, table, strict=True))
    assert any(block.is_null for block in second.req_to_blocks[name]), "nothing was freed: this shows nothing"
    in_use = kv.initially_free - kv.pool.get_num_free_blocks()
    assert in_use == len(held) + len(kv.held(served))
    record = managers.record_of(served.request)
    assert record is not None
    assert record.held == in_use
    kv.end(served)
    assert kv.pool.get_num_free_blocks() == kv.initially_free
    assert (name in second.requests, name in second.req_to_blocks) == (False, False)


def test_what_is_not_guided_is_unknown_to_it(kv: Harness) -> None:
    second = second_of(kv)
    once = {**OPTIONS, "packcache_guidance": 1}
    for served in (kv.add(prompt(2, 30)), kv.add(prompt(3, 30), video_options(FRAME, 9)), kv.add(prompt(4, 30), once)):
        kv.run(served, 60)
        name = served.request.request_id
        assert (name in second.requests, name in second.req_to_blocks, told(kv, name, anew=(name,))) == (
            False,
            False,
            {},
        )
        assert kv.initially_free - kv.pool.get_num_free_blocks() == len(kv.held(served))
        kv.end(served)


def test_an_engine_that_guides_nothing_has_none() -> None:
    kv = Harness(ServerConfig.parse("packcache", {**CONFIG, "guidance": False}), enable_caching=True, num_blocks=50)
    assert retention_managers(kv.kv) == (kv.manager,)


def test_workers_hear_of_new_blocks_and_of_all_when_they_begin_anew(kv: Harness) -> None:
    second, served = second_of(kv), begin(kv)
    name = served.request.request_id
    kv.run(served, CONDITION)
    ids = [block.block_id for block in second.req_to_blocks[name]]
    assert told(kv, "another") == {}, "it is not in this step"
    assert told(kv, name, anew=(name,)) == {name: Written(0, ids)}
    assert told(kv, name) == {}
    kv.run(served, CONDITION + 2 * BLOCK)
    (new,) = told(kv, name).values()
    assert new == Written(len(ids), [block.block_id for block in second.req_to_blocks[name][len(ids) :]])
    kv.preempt(served)
    assert kv.pool.get_num_free_blocks() == kv.initially_free
    assert told(kv) == {}
    kv.run(served, CONDITION + 2 * BLOCK)
    begun = [block.block_id for block in second.req_to_blocks[name]]
    # Of its own condition all whole blocks but the last token's are found again.
    found = (NEGATIVE - 1) // BLOCK * BLOCK if kv.pool.enable_caching else 0
    assert told(kv, name, anew=(name,)) == {name: Written(0, begun, found)}


def test_it_is_admitted_where_there_is_room_for_both(kv: Harness) -> None:
    blocks = -(-CONDITION // BLOCK) + -(-NEGATIVE // BLOCK)
    for room, fits in ((blocks - 1, False), (blocks, True)):
        pool = Harness(kv.config, enable_caching=False, num_blocks=room + 1)
        served = begin(pool)
        assert (pool.admit(served, CONDITION) is not None) == fits


def test_what_fails_in_it_ends_the_request(kv: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    second, served = second_of(kv), begin(kv)
    request, name = served.request, served.request.request_id
    kv.run(served, CONDITION)
    request.append_output_token_ids([1] * (request.num_computed_tokens + 1 - request.num_tokens))
    scheduler = SimpleNamespace(kv_cache_manager=kv.kv, grammar_compile_error_reqs=set())
    bounded = bound_chunks(lambda scheduler, request, computed, new: new)
    assert bounded(scheduler, request, request.num_computed_tokens, 1) == 1
    assert bounded(scheduler, request, request.num_computed_tokens, 1) == 1, "settled"

    video, dropped_blocks = second.video(request), Retention.dropped_blocks

    def broken(retention: Retention, *args: Any) -> Any:
        if video is not None and retention is video.retention:
            raise PolicyError("it breaks")
        return dropped_blocks(retention, *args)

    monkeypatch.setattr(Retention, "dropped_blocks", broken)
    kv.manager.remove_skipped_blocks(name, CONDITION + 2 * FRAME)
    assert second.failures == {name: "it breaks"}
    assert bounded(scheduler, request, request.num_computed_tokens, 1) == 0
    assert scheduler.grammar_compile_error_reqs == {name}
    kv.end(served)
    assert not second.failures
