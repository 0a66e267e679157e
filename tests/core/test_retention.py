"""What every policy must satisfy, whatever its rule."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import BOUNDED, POLICY_NAMES, cost, layouts, packcaches, policies_called, quick, retentions
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, SlidingWindow
from vllm_packcache.core.retention import Retention

FRAMES = 24


def alive(retention: Retention, frame: int, blocks: int) -> set[int]:
    """Blocks below ``blocks`` that live while ``frame`` is made."""
    if frame == CONDITION:
        return set(range(blocks))
    return {*retention.past(frame).tolist(), *range(retention.blocks.tail_start(frame), blocks)}


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_an_evicted_block_never_comes_back(name, data):
    retention = data.draw(retentions(policies_called(name)))

    for frame in range(CONDITION, FRAMES):
        tail = retention.blocks.tail_start(frame + 1)
        assert set(retention.past(frame + 1).tolist()) <= alive(retention, frame, tail)


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_past_is_ascending_and_below_the_tail(name, data):
    retention = data.draw(retentions(policies_called(name)))

    for frame in range(FRAMES):
        past = retention.past(frame)
        assert past.dtype == np.int64
        assert (np.diff(past) > 0).all()
        assert ((past >= 0) & (past < retention.blocks.tail_start(frame))).all()


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_live_blocks_and_tokens_agree_with_a_count_of_tokens(name, data):
    retention = data.draw(retentions(policies_called(name)))
    end = retention.layout.frame_start(12)
    computed = data.draw(st.integers(0, end))

    live = retention.live_blocks(computed)
    kept = alive(retention, retention.layout.frame_of(computed), -(-computed // retention.block_size))
    tokens = [token for token in range(computed) if token // retention.block_size in kept]

    assert live.tolist() == sorted({token // retention.block_size for token in tokens})
    assert retention.live_tokens(computed) == len(tokens)


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_history_blocks_are_live_and_hold_earlier_frames_and_no_condition(name, data):
    retention = data.draw(retentions(policies_called(name)))
    layout, size = retention.layout, retention.block_size

    for frame in range(FRAMES):
        # When a frame begins, everything computed is of an earlier one.
        computed = layout.frame_start(frame)
        expected = []
        for block in retention.live_blocks(computed).tolist():
            held = [layout.frame_of(token) for token in range(block * size, min(computed, (block + 1) * size))]
            if held and CONDITION not in held:
                assert max(held) < frame
                expected.append(block)
        assert retention.history_blocks(frame).tolist() == expected


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_nothing_older_than_the_history_window_lives(name, data):
    retention = data.draw(retentions(policies_called(name)))
    window = retention.policy.history_window

    if window is None:
        assert not retention.policy.rebases
        return
    for frame in range(FRAMES):
        tags = {retention.blocks.tag(block) for block in retention.history_blocks(frame).tolist()}
        assert all(tag >= frame - window for tag in tags)
        # No smaller number would do: where frames have blocks of their own, the oldest of the window keeps some.
        oldest = frame - window
        if oldest >= 0 and len(retention.blocks.frame_blocks(oldest)) and name == "sliding_window":
            assert oldest in tags


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_segments_say_what_each_query_reads(name, data):
    retention = data.draw(retentions(policies_called(name)))
    start = data.draw(st.integers(0, retention.layout.frame_start(8)))
    stop = start + data.draw(st.integers(1, 1000))

    segments = list(retention.segments(start, stop))

    assert [(s.frame, s.start, s.stop) for s in segments] == list(retention.layout.segments(start, stop))
    for segment in segments:
        last = segment.stop - 1
        read = [
            token
            for token in range(segment.stop)
            if token // retention.block_size in {*segment.past.tolist()}
            or token // retention.block_size >= segment.tail_start
        ]
        # The block of the query itself is written in this step.
        live = {*retention.live_blocks(last).tolist(), last // retention.block_size}
        assert {token // retention.block_size for token in read} == live
        assert segment.live_tokens(retention.block_size) == len(read)


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_dropped_blocks_are_the_difference_of_two_live_sets(name, data):
    retention = data.draw(retentions(policies_called(name)))
    first = data.draw(st.integers(CONDITION, 14))
    last = data.draw(st.integers(first + 1, first + 12))
    tail = retention.blocks.tail_start(last)

    dropped = retention.dropped_blocks(first, last).tolist()

    assert dropped == sorted(alive(retention, first, tail) - alive(retention, last, tail))


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_drops_of_several_hops_are_the_drops_of_one(name, data):
    retention = data.draw(retentions(policies_called(name)))
    stops = sorted(data.draw(st.sets(st.integers(CONDITION, 20), min_size=2, max_size=6)))

    hops = [retention.dropped_blocks(a, b).tolist() for a, b in pairwise(stops)]
    chained = [block for hop in hops for block in hop]

    assert len(set(chained)) == len(chained)
    assert sorted(chained) == retention.dropped_blocks(stops[0], stops[-1]).tolist()
    assert retention.dropped_blocks(stops[-1], stops[0]).size == 0


@pytest.mark.parametrize(
    "policy",
    [packcaches(gammas=st.just(1.0)), policies_called("sliding_window")],
    ids=["packcache", "sliding_window"],
)
@quick
@given(data=st.data())
def test_the_condition_never_goes(policy, data):
    retention = data.draw(retentions(policy))

    for frame in range(FRAMES):
        condition = {b for b in retention.blocks.condition_blocks if b < retention.blocks.tail_start(frame)}
        assert condition <= set(retention.past(frame).tolist())


@pytest.mark.parametrize("name", POLICY_NAMES)
@quick
@given(data=st.data())
def test_a_decision_does_not_depend_on_the_questions_asked_before(name, data):
    layout, policy = data.draw(layouts()), data.draw(policies_called(name))
    block_size = data.draw(st.sampled_from([16, 32, 100]))
    worker = Retention(layout, policy, block_size)
    scheduler = Retention(layout, policy, block_size)
    # A worker asks at every token, a scheduler now and then and after a preemption at an earlier one again.
    stop = min(layout.frame_start(9), 3000)
    by_token = [(worker.live_blocks(n).tolist(), worker.live_tokens(n)) for n in range(stop)]

    for computed in data.draw(st.lists(st.integers(0, stop - 1), max_size=12)):
        answer = (scheduler.live_blocks(computed).tolist(), scheduler.live_tokens(computed))
        assert answer == by_token[computed]


@quick
@given(data=st.data())
def test_full_keeps_everything(data):
    retention = data.draw(retentions(policies_called("full")))

    for frame in range(FRAMES):
        assert retention.past(frame).tolist() == list(range(retention.blocks.tail_start(frame)))


@quick
@given(data=st.data())
def test_sliding_window_keeps_condition_and_whole_recent_frames(data):
    retention = data.draw(retentions(policies_called("sliding_window")))

    for frame in range(FRAMES):
        kept = [
            block
            for block in range(retention.blocks.tail_start(frame))
            if retention.blocks.tag(block) == CONDITION
            or retention.blocks.tag(block) >= frame - retention.policy.window
        ]
        assert retention.past(frame).tolist() == kept


@quick
@given(data=st.data())
def test_attention_sink_keeps_the_first_and_the_last_tokens(data):
    retention = data.draw(retentions(policies_called("attention_sink")))

    for frame in range(FRAMES):
        begin = retention.layout.frame_start(frame)
        first = range(min(begin, retention.policy.sink_tokens))
        last = range(max(0, begin - retention.policy.recent_tokens), begin)
        wanted = {token // retention.block_size for tokens in (first, last) for token in tokens}
        tail = retention.blocks.tail_start(frame)
        assert retention.past(frame).tolist() == sorted(b for b in wanted if b < tail)


def saturated_frame(retention: Retention) -> int:
    """A frame from which on the live set no longer grows, for the options of the strategies."""
    return 16 + 3500 // retention.layout.tokens_per_frame


@pytest.mark.parametrize("name", BOUNDED)
@quick
@given(data=st.data())
def test_a_step_handles_as_much_at_frame_100_000_as_early_on(name, data):
    retention = data.draw(retentions(policies_called(name)))
    boundaries = getattr(retention.policy, "window", 1) + 2
    # What is kept between two resets grows: the same frame after one is compared.
    anew = retention.policy.begins_anew
    period = anew[0] - anew[1] if anew else 1
    early = saturated_frame(retention)
    late = early + 100_000 // period * period

    def sizes(frame):
        return len(retention.past(frame)), len(retention.dropped_blocks(frame, frame + 1))

    for few, many in zip(sizes(early), sizes(late), strict=True):
        assert abs(few - many) <= boundaries


@pytest.mark.parametrize(
    "policy",
    [
        PackCache(window=8, gamma_text=0.5, selection="spatial"),
        SlidingWindow(window=8),
        AttentionSink(sink_tokens=64, recent_tokens=4000),
    ],
    ids=lambda policy: policy.name,
)
def test_no_work_grows_with_the_video(policy):
    layout = VideoLayout(FrameLayout(500), 300, 100)

    def ask(frame):
        retention = Retention(layout, policy, 16)
        retention.past(frame)
        retention.dropped_blocks(frame, frame + 1)
        retention.live_tokens(layout.frame_start(frame) + 77)

    ask(100)
    calls, peak = cost(lambda: ask(100))
    late_calls, late_peak = cost(lambda: ask(10**9))

    assert late_calls <= calls + 10
    assert late_peak <= 1.5 * peak + 1024


# --------------------------------------------------------------------------- how much is held


def held(retention: Retention, frame: int, ahead: int) -> int:
    """Blocks held when ``frame`` has been made, and ``ahead`` tokens besides."""
    end = -(-(retention.layout.frame_start(frame + 1) + ahead) // retention.block_size)
    return end if frame == CONDITION else len(retention.past(frame)) + end - retention.blocks.tail_start(frame)


@pytest.mark.parametrize("name", BOUNDED)
@quick
@given(data=st.data(), ahead=st.integers(0, 2))
def test_no_frame_holds_more_than_most_blocks(name, data, ahead):
    retention = data.draw(retentions(policies_called(name)))
    most = retention.most_blocks(ahead)
    if most is None:
        pytest.skip(f"policy {name} of another package gives no bound")

    assert max(held(retention, frame, ahead) for frame in range(CONDITION, FRAMES)) <= most


@quick
@given(retention=retentions(packcaches(st.just(1.0))))
def test_most_blocks_is_no_more_than_rounding_above_what_is_held(retention):
    policy = retention.policy
    # Of shorter frames some end no block: how many do depends on where the condition ends.
    assume(retention.layout.tokens_per_frame >= retention.block_size)
    frames = 2 * policy.window + retention.block_size

    assert retention.most_blocks() <= max(held(retention, frame, 0) for frame in range(CONDITION, frames)) + 2


def test_a_policy_that_keeps_all_has_no_most_blocks():
    retention = Retention(VideoLayout(FrameLayout(10), 5), Full(), 16)
    assert retention.most_blocks() is None
    assert (retention.most_of(32), retention.most_of(33)) == (2, 3)
