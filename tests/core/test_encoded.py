"""Retention of videos whose older frames are encoded: what is held, freed and read, and how much of it at most."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_packcache.core.encoded import EncodedRetention, Encoding, retention_of
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.packing import HISTORY_FORMATS, Packing
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.retention import PolicyError, Retention

HEADS, CHANNELS, NUMBER = 4, 64, 2


def encoding(history: str, block_size: int) -> Encoding:
    return Encoding(Packing(history, HEADS, CHANNELS), block_size * HEADS * 2 * CHANNELS * NUMBER)


WHOLE: list[Policy] = [
    Full(),
    SlidingWindow(window=1),
    SlidingWindow(window=5),
    PackCache(window=4, history_frames=4, selection="spatial"),
    PackCache(window=3, history_frames=3, selection="tail", gamma_text=0.5),
]


@given(
    st.sampled_from(WHOLE),
    st.sampled_from(HISTORY_FORMATS),
    st.integers(16, 300),
    st.integers(0, 90),
    st.sampled_from([16, 32]),
)
def test_what_is_read_is_what_the_policy_keeps(
    policy: Policy, history: str, tokens: int, condition: int, block_size: int
) -> None:
    layout = VideoLayout(FrameLayout(tokens), condition)
    plain, encoded = (retention_of(layout, policy, block_size, own) for own in (None, encoding(history, block_size)))
    assert isinstance(encoded, EncodedRetention)
    encoded.check()
    bound, held = encoded.most_blocks(), set()
    for frame in range(12):
        units = encoded.units(frame)
        read = [*encoded.plain(frame), *(block for unit in units for block in unit.blocks)]
        assert sorted(read) == plain.past(frame).tolist()
        assert all(unit.frame <= frame - 2 for unit in units)
        # The newest frame and the condition are as they were written.
        newest = encoded.blocks.frame_blocks(frame - 1) if frame else range(0)
        assert set(newest) & set(plain.past(frame).tolist()) <= set(encoded.plain(frame).tolist())
        past = encoded.past(frame).tolist()
        assert past == sorted([*encoded.plain(frame), *(block for unit in units for block in unit.held)])
        assert all(len(unit.held) <= len(unit.blocks) for unit in units)
        # What lives has lived before, and what does not is freed once.
        stop = layout.frame_start(frame + 1)
        dropped = encoded.dropped_blocks(frame - 1, frame).tolist()
        assert not held & set(dropped)
        held |= set(dropped)
        assert not held & set(past)
        leaves = encoded.leaving(frame)
        assert [unit.frame for unit in encoded.units(frame + 1) if unit not in units] == (
            [leaves.frame] if leaves is not None else []
        )
        if bound is not None:
            assert len(encoded.live_blocks(stop - 1)) <= bound
        # A request that ends with this frame has held no more than one of its length may.
        assert len(encoded.live_blocks(stop - 1)) <= encoded.most_of(stop) <= plain.most_of(stop)
        rotated = encoded.sliding_blocks(frame).tolist()
        assert not {block for unit in units for block in unit.held} & set(rotated)


def test_a_real_frame_in_fewer_bits() -> None:
    """4,084 tokens of 128 channels in blocks of 16: what 13 latent frames of the paper hold at most."""
    layout = VideoLayout(FrameLayout(4084), 4084 + 40, 4084)
    encodings = {history: Encoding(Packing(history, 8, 128), 16 * 8 * 2 * 128 * 2) for history in HISTORY_FORMATS}
    policy = PackCache(window=12, history_frames=12, selection="spatial")
    most = {history: retention_of(layout, policy, 16, own).most_blocks() for history, own in encodings.items()}
    # The condition, the newest frame and the one being made, and eleven frames in fewer bits.
    rest = 258 + 256 + 257
    for history, own in encodings.items():
        # Twelve frames before the thirteenth: so does a policy without a bound.
        assert retention_of(layout, Full(), 16, own).most_of(layout.frame_start(13)) == most[history]
    older = {history: (blocks - rest) / 11 / 256 for history, blocks in most.items() if blocks}
    assert older["int8"] == pytest.approx(0.516, abs=0.01)
    assert older["int4"] == pytest.approx(0.297, abs=0.01)
    assert older["int2"] == pytest.approx(0.172, abs=0.01)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (PackCache(window=4, history_frames=2, selection="spatial"), "an older frame is kept whole or dropped"),
        (PackCache(window=4, history_frames=4), "for policies that keep whole frames"),
        (AttentionSink(sink_tokens=64, recent_tokens=200), "an older frame is kept whole or dropped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else None,
)
def test_parts_of_frames_are_refused(policy: Policy, sentence: str) -> None:
    layout = VideoLayout(FrameLayout(150), 64)
    with pytest.raises(ValueError, match=sentence):
        EncodedRetention(layout, policy, 16, encoding("int2", 16)).check()


def test_a_frame_without_room_is_refused() -> None:
    layout = VideoLayout(FrameLayout(33), 0)
    with pytest.raises(ValueError, match="an encoded frame of 1 blocks takes 2"):
        EncodedRetention(layout, Full(), 32, Encoding(Packing("int8", 4, 8), 32 * 4 * 2 * 8)).check()


def test_the_policy_is_asked_as_ever() -> None:
    """The split is of its decisions, which are checked as they are without."""

    class Forgetful(SlidingWindow):
        def past_blocks(self, blocks: object, frame: int) -> np.ndarray:
            return np.arange(3) if frame == 4 else np.arange(0)

    layout = VideoLayout(FrameLayout(64), 0)
    for retention in (
        Retention(layout, Forgetful(window=2), 32),
        EncodedRetention(layout, Forgetful(window=2), 32, encoding("int8", 32)),
    ):
        retention.past(3)
        with pytest.raises(PolicyError):
            retention.past(4)
