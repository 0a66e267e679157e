"""``selection: changed``: the rule in words, block by block, against what is computed; and what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import block_sizes, quick, small_layouts
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.reference.changed import ChangedBlocks

policies = st.builds(
    PackCache,
    history_frames=st.floats(1, 6),
    window=st.integers(1, 8),
    decay=st.floats(0.05, 1),
    selection=st.just("changed"),
    changed_tokens=st.integers(1, 4),
)

with_episodes = st.builds(
    PackCache,
    history_frames=st.floats(1.1, 6),
    window=st.integers(1, 6),
    decay=st.floats(0.05, 1),
    selection=st.just("changed"),
    changed_tokens=st.integers(1, 4),
    episodes=st.integers(1, 3),
)


def video(layout: VideoLayout, frames: int, seed: int, share: float = 0.1) -> np.ndarray:
    """Ids of a video in which a share of the places changes from frame to frame."""
    random = np.random.default_rng(seed)
    frame = random.integers(0, 9, layout.tokens_per_frame)
    ids = [random.integers(0, 9, layout.condition_tokens)]
    for _ in range(frames):
        frame = np.where(random.random(len(frame)) < share, random.integers(0, 9, len(frame)), frame)
        ids.append(frame)
    return np.concatenate(ids)


def film(layout: VideoLayout, frames: int, seed: int) -> np.ndarray:
    """Ids of a video that is cut every few frames to one of four scenes, in which a little moves."""
    random = np.random.default_rng(seed)
    scenes = random.integers(0, 9, (4, layout.tokens_per_frame))
    ids, shown = [random.integers(0, 9, layout.condition_tokens)], 0
    for _ in range(frames):
        if random.random() < 0.25:
            shown = int(random.integers(0, 4))
        moves = random.random(layout.tokens_per_frame) < 0.06
        scenes[shown] = np.where(moves, random.integers(0, 9, layout.tokens_per_frame), scenes[shown])
        ids.append(scenes[shown].copy())
    return np.concatenate(ids)


def retention(layout: VideoLayout, policy: PackCache, block_size: int, ids: np.ndarray) -> Retention:
    def tokens(start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(ids)
        return ids[start:stop]

    return Retention(layout, policy, block_size, tokens)


@quick
@given(
    layout=small_layouts(),
    policy=policies | with_episodes,
    block_size=st.integers(1, 9),
    made=st.sampled_from([video, film]),
    seed=st.integers(0, 99),
)
def test_it_keeps_what_the_rule_says(layout, policy, block_size, made, seed):
    frames = 20
    ids = made(layout, frames, seed)
    expected = ChangedBlocks(Plan(layout, policy, Positions(layout)), block_size, ids.tolist())
    computed = retention(layout, policy, block_size, ids)
    condition = computed.blocks.condition_blocks.stop
    for frame in range(frames):
        past = computed.past(frame)
        assert set(past[past >= condition].tolist()) == expected.of(frame)
        assert past[past < condition].tolist() == list(range(min(condition, computed.blocks.tail_start(frame))))


@quick
@given(
    layout=small_layouts(),
    policy=policies | with_episodes,
    block_size=block_sizes,
    seeds=st.tuples(*[st.integers(0, 99)] * 2),
)
def test_how_much_is_kept_does_not_depend_on_what_is_seen(layout, policy, block_size, seeds):
    frames = 24
    found = [
        retention(layout, policy, block_size, video(layout, frames, seed, share))
        for seed, share in zip(seeds, (0.02, 0.6), strict=True)
    ]
    found.append(retention(layout, policy, block_size, film(layout, frames, seeds[0])))
    for frame in range(frames):
        one, *others = (len(each.past(frame)) for each in found)
        assert others == [one] * 2
        if policy.changed_tokens <= block_size:
            condition = len(found[0].blocks.condition_blocks)
            tokens = min(policy.history_frames, policy.window) * layout.tokens_per_frame
            # A frame that leaves the window may have a block more than the one that enters it.
            assert frame < policy.window or one >= condition + int(tokens / block_size) - 1
            assert one <= condition - (-policy.history_frames * layout.tokens_per_frame // block_size)


@quick
@given(layout=small_layouts(), policy=policies, block_size=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_threshold_above_the_block_is_the_even_selection(layout, policy, block_size, seed):
    spatial = PackCache(**{**vars(policy), "selection": "spatial", "changed_tokens": 1, "episodes": 0})
    changed = PackCache(**{**vars(policy), "changed_tokens": block_size + 1})
    ids = video(layout, 20, seed)
    computed, evenly = retention(layout, changed, block_size, ids), Retention(layout, spatial, block_size)
    for frame in range(20):
        assert computed.past(frame).tolist() == evenly.past(frame).tolist()


@quick
@given(
    layout=small_layouts(),
    policy=policies,
    block_size=st.integers(1, 9),
    asked=st.lists(st.integers(0, 19), min_size=1, max_size=12),
)
def test_it_says_the_same_in_whatever_order_it_is_asked(layout, policy, block_size, asked):
    ids = video(layout, 20, 0)
    one, all_at_once = (retention(layout, policy, block_size, ids) for _ in range(2))
    decided = [all_at_once.past(frame).tolist() for frame in range(20)]
    for frame in asked:
        assert one.past(frame).tolist() == decided[frame]


def flicker(layout: VideoLayout, frames: int) -> np.ndarray:
    """Ids of a video in which every place changes from frame to frame."""
    return np.concatenate([np.zeros(layout.condition_tokens), np.arange(frames).repeat(layout.tokens_per_frame)])


@quick
@given(layout=small_layouts(), policy=policies, block_size=st.integers(1, 9), still=st.booleans())
def test_where_nothing_changes_and_where_everything_does(layout, policy, block_size, still):
    frames = 16
    ids = video(layout, frames, 0, share=0) if still else flicker(layout, frames)
    expected = ChangedBlocks(Plan(layout, policy, Positions(layout)), block_size, ids.tolist())
    computed = retention(layout, policy, block_size, ids)
    condition = computed.blocks.condition_blocks.stop
    for frame in range(frames):
        past = computed.past(frame)
        assert set(past[past >= condition].tolist()) == expected.of(frame)


def test_a_video_that_stands_still_is_kept_evenly_and_one_that_flickers_by_its_last_frames():
    # Eight blocks a frame, and room for two frames: half of it is the last one's.
    layout, size, frames = VideoLayout(FrameLayout(32), 16), 4, 12
    policy = PackCache(selection="changed", history_frames=2, window=4)
    still = retention(layout, policy, size, video(layout, frames, 0, share=0))
    evenly = Retention(layout, PackCache(history_frames=2, window=4, selection="spatial"), size)
    flickers = retention(layout, policy, size, flicker(layout, frames))
    for frame in range(frames):
        assert still.past(frame).tolist() == evenly.past(frame).tolist()
        assert flickers.past(frame).tolist() == [*range(4), *range(4 + 8 * max(0, frame - 2), 4 + 8 * frame)]


def test_what_is_not_finished_is_not_looked_at():
    layout = VideoLayout(FrameLayout(10), 5)
    ids = video(layout, 12, 0)
    for frame in range(12):
        known = retention(layout, PackCache(selection="changed", window=6), 4, ids[: layout.frame_start(frame)])
        whole = retention(layout, PackCache(selection="changed", window=6), 4, ids)
        assert known.past(frame).tolist() == whole.past(frame).tolist()


def test_what_moves_is_kept_longer_than_what_stands():
    # Nine frames of eight blocks. In the first frames block 3 changes and then stands still like the rest.
    layout, size = VideoLayout(FrameLayout(32), 16), 4
    frames = np.zeros((12, 32), dtype=np.int64)
    for number in range(3):
        frames[number, 12:16] = number + 1
    frames[5:, 20] = 9  # one token of block 5, once
    ids = np.concatenate([np.zeros(16, dtype=np.int64), frames.ravel()])
    policy = PackCache(selection="changed", history_frames=2, window=10)
    past = retention(layout, policy, size, ids).past(9)
    blocks = [(block - 4) // 8 for block in past.tolist() if block >= 4 and (block - 4) % 8 == 3]
    assert set(range(3)) <= set(blocks)
    assert 4 + 4 * 8 + 5 in past, "frame 4 is the last without"
    threshold = PackCache(selection="changed", history_frames=2, window=10, changed_tokens=2)
    assert 4 + 4 * 8 + 5 not in retention(layout, threshold, size, ids).past(9)


def shown(scenes: str, changes: int = 0) -> tuple[VideoLayout, np.ndarray]:
    """A video whose frames of 32 tokens show these scenes, in blocks of 4; one place more changes with every frame."""
    layout = VideoLayout(FrameLayout(32), 16)
    frames = np.array([np.full(32, ord(scene)) for scene in scenes])
    for number in range(changes and len(frames)):
        frames[number, : number % 8] = number
    return layout, np.concatenate([np.zeros(16, dtype=np.int64), frames.ravel()])


def kept_of(layout: VideoLayout, ids: np.ndarray, frame: int, **options: Any) -> dict[int, int]:
    """How many blocks live of each frame while ``frame`` is made."""
    policy = PackCache(**options)
    computed = retention(layout, policy, 4, ids)
    tags = computed.blocks.tags(computed.past(frame)[4:])
    return {int(tag): int((tags == tag).sum()) for tag in np.unique(tags)}


@pytest.mark.parametrize("changes", [0, 1])
def test_of_a_scene_that_has_ended_an_anchor_stays(changes):
    layout, ids = shown("aaaabbbbbbbbbbbb", changes)
    options = {"history_frames": 2.5, "window": 4}
    # Twelve blocks besides those of the newest frame, half of them for the scene that ended with frame 3.
    assert kept_of(layout, ids, 15, **options, episodes=1)[3] == 6
    assert 3 not in kept_of(layout, ids, 15, **options)
    assert kept_of(layout, ids, 15, **options, episodes=2)[3] == 4


def test_the_newest_scenes_have_anchors():
    layout, ids = shown("aabbccdddddd")
    assert {1, 3, 5} & set(kept_of(layout, ids, 11, history_frames=2, window=2, episodes=2)) == {3, 5}
    assert {1, 3, 5} & set(kept_of(layout, ids, 11, history_frames=2, window=2, episodes=1)) == {5}


def test_a_scene_that_comes_back_is_no_new_one():
    layout, ids = shown("aabbccbbbbbbaaaaaa")
    options = {"history_frames": 2, "window": 2, "episodes": 2}
    # While b is shown again, a and c have the anchors; and when a is, b and c.
    assert {1, 3, 5} & set(kept_of(layout, ids, 11, **options)) == {1, 5}
    assert {1, 3, 5, 11} & set(kept_of(layout, ids, 17, **options)) == {5, 11}


def test_a_window_takes_along_what_is_in_it():
    layout, ids = shown("aaaabbbbbbbbbbbb")
    policy = PackCache(selection="changed", history_frames=2, window=4, episodes=1)
    computed = retention(layout, policy, 4, ids)
    anchor = set(computed.blocks.frame_blocks(3))

    def of_anchor(found: np.ndarray) -> set[int]:
        return anchor & set(found.tolist())

    # Frame 3 is in the window for the last time while frame 7 is made.
    assert of_anchor(computed.sliding_blocks(7)) == of_anchor(computed.past(7)) != set()
    for frame in (8, 12):
        assert of_anchor(computed.past(frame))
        window = computed.blocks.frame_blocks(frame - 4).start
        history = computed.history_blocks(frame)
        assert computed.sliding_blocks(frame).tolist() == history[history >= window].tolist()


def test_options_that_cannot_work_together_are_refused_by_name():
    def refused(options: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as error:
            ServerConfig.parse("packcache", options)
        return str(error.value)

    assert "changed_tokens is for selection = changed, not for spatial" in refused(
        {"selection": "spatial", "changed_tokens": 3}
    )
    assert "history_frames of selection = changed must be 1 or more, not 0.5" in refused(
        {"selection": "changed", "history_frames": 0.5}
    )
    assert "episodes is for selection = changed, not for spatial" in refused({"selection": "spatial", "episodes": 1})
    assert "history_frames of episodes must be above 1, not 1" in refused(
        {"selection": "changed", "history_frames": 1.0, "episodes": 1}
    )
    assert "changed_tokens must be 1 or more" in refused({"selection": "changed", "changed_tokens": 0})
