"""Turns of a session, and what it may forget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, SlidingWindow
from vllm_packcache.core.retention import Retention
from vllm_packcache.core.session import Forgetting, Turns

LAYOUT = {
    "grid": [2, 3], "frame_start_tokens": 2, "row_end_tokens": 1, "frame_end_tokens": 3, "visual_ids": [0, 9],
    "frame_start_ids": [20, [21, 29]], "row_end_ids": [30], "frame_end_ids": [40, [41, 49], [51, 59]],
}  # fmt: skip
"""header 20 g / v v v 30 / v v v 30 / 40 g g: 13 tokens."""


def turns(condition: int, **layout: object) -> Turns:
    config = ServerConfig.parse("packcache", {"layout": {**LAYOUT, **layout}})
    made = config.video({"packcache_condition_tokens": condition, "packcache_session_tokens": 0}, condition)
    assert made is not None
    return Turns(made.streams[0].plan, None if made.grammar is None else made.grammar.frame)


def test_between_two_frames_stands_what_is_fixed_and_what_the_client_gives() -> None:
    own = turns(5)
    assert own.picture == (2, 8)
    assert own.next_picture(5) == (0, 7, 14)
    assert own.given(5, [25]) == [20, 25]
    # Frame 0 is made: its row and its frame end, and the next one begins.
    assert own.next_picture(14) == (1, 20, 27)
    assert own.given(14, [44, 55, 23]) == [30, 40, 44, 55, 20, 23]
    # In the middle of a picture nothing is given, and of the rest of a header what is missing.
    assert own.next_picture(9) == (0, 9, 14)
    assert own.given(9, []) == []
    assert own.given(6, [22]) == [22]
    assert [own.after(frame) for frame in (-1, 0, 1)] == [5, 14, 27]
    ids = [*range(5), 20, 25, 1, 2, 3, 30, 4, 5, 6]
    assert own.pictures(ids, 0) == [1, 2, 3, 4, 5, 6]


def test_a_frame_of_which_nothing_is_said_is_made_whole() -> None:
    config = ServerConfig.parse("packcache", {"layout": {"tokens_per_frame": 7}})
    made = config.video({"packcache_condition_tokens": 3}, 3)
    assert made is not None
    own = Turns(made.streams[0].plan)
    assert own.next_picture(3) == (0, 3, 10)
    assert own.next_picture(10) == (1, 10, 17)
    assert own.given(10, []) == []
    assert own.pictures(list(range(10)), 0) == list(range(3, 10))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "must have 3 ids, which the client gives before this frame, not 0"),
        ([44, 55, 23, 1], "must have 3 ids, .* not 4"),
        ([44, 60, 23], "must have ids from 51 to 59 as number 2, not 60"),
    ],
)
def test_what_a_client_gives_is_checked(ids: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        turns(5).given(14, ids)


def test_a_layout_that_leaves_nothing_to_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing for the model to make"):
        _ = turns(5, visual_ids=[4, 4]).picture


@pytest.mark.parametrize(
    "policy", [Full(), AttentionSink(), PackCache(selection="random")], ids=lambda own: type(own).__name__
)
def test_what_never_settles_forgets_nothing(policy: object) -> None:
    base = turns(5).plan
    own = Forgetting(Plan(base.layout, policy, base.positions), 16)  # type: ignore[arg-type]
    assert own.step is None
    assert own.shortest is None
    assert own.most(10_000) == 0


@quick
@given(data=st.data())
def test_what_is_decided_after_forgetting_is_what_would_have_been(data: st.DataObject) -> None:
    window, size = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    selection = data.draw(st.sampled_from(["changed", "spatial", "tail"]))
    episodes = data.draw(st.integers(0, 2)) if selection == "changed" else 0
    packcache = PackCache(
        window=window, history_frames=data.draw(st.floats(1.5, 4)), selection=selection, episodes=episodes
    )
    policy: PackCache | SlidingWindow = data.draw(st.sampled_from([SlidingWindow(window=window), packcache]))
    tokens, condition = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 50))
    config = ServerConfig.parse("full", {"layout": {"tokens_per_frame": tokens}})
    made = config.video({"packcache_tokens_per_frame": tokens, "packcache_condition_tokens": condition}, condition)
    assert made is not None
    layout = made.streams[0].plan.layout
    plan = Plan(layout, policy, ServerConfig(policy, positions="rebase").positions_of(layout, policy))
    forgetting = Forgetting(plan, size)
    assert forgetting.step is not None
    assert forgetting.shortest is not None
    frame = data.draw(st.integers(forgetting.step, 3 * forgetting.step)) + forgetting.step + 2 * window + 1 + 40
    random = np.random.default_rng(data.draw(st.integers(0, 100)))
    assume(frame < 400)
    # Some frames differ in most places: there a scene ends.
    scenes = np.repeat(random.integers(0, 3, frame // 7 + 3), 7)[: frame + 8]
    ids = np.concatenate([random.integers(0, 9, condition), *(random.integers(0, 2, tokens) + 9 * s for s in scenes)])

    def begun(own: np.ndarray) -> Retention:
        return Retention(layout, policy, size, lambda start, stop: own[start:stop])

    long = begun(ids)
    for number in range(frame + 1):
        long.past(number)
    first, most = forgetting.room([long], frame)
    assume(most > 0)
    frames = data.draw(st.sampled_from(range(forgetting.step, most + 1, forgetting.step)))
    start = layout.frame_start(first)
    short = begun(np.delete(ids, np.s_[start : start + frames * tokens]))
    for number in (frame - 1, frame):
        short._decided[number] = long.past(number)
    gone = forgetting.blocks(frames, first)
    short.forget(frames, gone)
    for number in range(frame, frame + 8):
        past = long.past(number)
        assert not ((past >= gone.start) & (past < gone.stop)).any()
        assert short.past(number - frames).tolist() == np.where(past < gone.stop, past, past - len(gone)).tolist()
        assert short.blocks.tail_start(number - frames) == long.blocks.tail_start(number) - len(gone)
    assert plan.positions.window_start(frame - frames) == plan.positions.window_start(frame) - frames
