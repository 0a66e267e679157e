"""What workers hear of a video whose policy reads tokens is what its tokens say, whatever the order of its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.output import SchedulerOutput

from tests.engine.harness import Harness, video_options
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.retention import DECISIONS
from vllm_packcache.engine.manager import tell_workers

configs = st.builds(
    lambda **options: ServerConfig.parse("packcache", {**options, "selection": "changed"}),
    history_frames=st.floats(1, 4),
    window=st.integers(1, 6),
    changed_tokens=st.integers(1, 3),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["chunk", "find no room"]), st.integers(1, 90)),
        st.tuples(st.just("decode"), st.integers(1, 25)),
        st.just(("preempt", 0)),
    ),
    min_size=1,
    max_size=16,
)


def video(kv: Harness, tokens: int, frame: int, condition: int) -> Any:
    ids = [index * 7919 % 104_729 % 3 for index in range(tokens)]
    return kv.add(ids, video_options(frame, min(condition, tokens)))


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(
    config=configs,
    block_size=st.integers(1, 7),
    frame=st.integers(2, 24),
    condition=st.integers(0, 30),
    given_tokens=st.integers(1, 160),
    order=steps,
    lag=st.integers(0, 1),
    forgets=st.booleans(),
    caching=st.booleans(),
)
def test_workers_hear_what_the_tokens_say(
    config: ServerConfig,
    block_size: int,
    frame: int,
    condition: int,
    given_tokens: int,
    order: list[tuple[str, int]],
    lag: int,
    forgets: bool,
    caching: bool,
) -> None:
    """`Harness` compares what each step reads with what a retention says that knows all tokens."""
    kv = Harness(config, enable_caching=caching, num_blocks=900, block_size=block_size, distinct_ids=2, forgets=forgets)
    served = video(kv, given_tokens, frame, condition)
    for what, count in order:
        if what == "preempt":
            if served.running:
                kv.preempt(served)
        elif what == "find no room":
            if not served.running:
                # All that a scheduler does about a request that has to wait: its next chunk may be another.
                kv.manager.decide(served.request, min(count, served.request.num_tokens))
        elif not served.running:
            assert kv.admit(served, count) is not None
        else:
            for _ in range(count if what == "decode" else 1):
                kv.step(served, 1 if what == "decode" else count, lag)
        kv.check()
    kv.check_empty()


def test_a_chunk_that_found_no_room_may_come_back_shorter() -> None:
    # 60 frames of 3 tokens. What of them is said too early would be forgotten by the time it is read.
    kv = Harness(
        ServerConfig.parse("packcache", {"window": 4, "selection": "changed"}), enable_caching=False, num_blocks=400
    )
    served = video(kv, 181, 3, 1)
    kv.manager.decide(served.request, 100)
    assert kv.admit(served, 10) == 0
    kv.step(served, 30)
    kv.step(served, 141)
    kv.check()
    kv.check_empty()


def test_a_step_says_what_its_requests_read_and_nothing_else() -> None:
    kv = Harness(ServerConfig.parse("packcache", {"selection": "changed"}), enable_caching=False, num_blocks=200)
    runs, waits, text = video(kv, 60, 9, 20), video(kv, 60, 9, 20), kv.add([0] * 60)
    requests = {served.request.request_id: served.request for served in (runs, waits, text)}
    for request in requests.values():
        kv.manager.decide(request, 40)
    name = runs.request.request_id
    runs.request.num_computed_tokens = 40
    scheduler = SimpleNamespace(kv_cache_manager=kv.kv, requests=requests, running=[])

    def step(*names: str) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens.update(dict.fromkeys(names, 40))
        return tell_workers(lambda scheduler: output)(scheduler)

    told = getattr(step(name, text.request.request_id), DECISIONS)
    assert [(decision.stream, decision.frame) for decision in told.pop(name)] == [(0, 0), (0, 1), (0, 2)]
    assert told == {}
    assert not hasattr(step(name), DECISIONS), "it has been said"
    kv.check_empty()
    assert not kv.manager.decisions
