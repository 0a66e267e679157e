"""What a video's record says: peaks by frame, frames that were made, and how long they took."""

from __future__ import annotations

import pytest

from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.engine.record import MOST_PEAKS, VideoRecord, read_line

CONDITION_TOKENS, FRAME = 10, 5


def record(prompt_tokens: int = CONDITION_TOKENS) -> VideoRecord:
    return VideoRecord(VideoLayout(FrameLayout(FRAME), CONDITION_TOKENS), 4, prompt_tokens)


def compute(video: VideoRecord, tokens: int, now: float) -> list[float]:
    """As of a model that decodes: the last token says which frame is being made."""
    return video.compute(tokens, video.layout.frame_of(tokens - 1), now)


def run(video: VideoRecord, start: int, stop: int, now: float = 0.0) -> list[float]:
    """Compute tokens one by one, one a second; seconds of the frames that ended."""
    ended = []
    for tokens in range(start, stop):
        ended += compute(video, tokens + 1, now + tokens - start)
    return ended


def test_a_frame_takes_from_its_begin_to_the_next() -> None:
    video = record()
    assert compute(video, CONDITION_TOKENS, 100.0) == []
    # The first frame has waited for the last of the prompt.
    assert run(video, 10, 25, 101.0) == [FRAME + 1, FRAME]
    assert video.frames == 2
    assert video.computed == 25
    # The last token of a request is sampled and never computed.
    assert video.end(25, 120.0) == [9.0]
    assert (video.frames, video.seconds) == (3, 20.0)


def test_a_frame_that_is_made_whole_ends_when_the_next_one_is_begun() -> None:
    """Tokens of a masked model count when their frame is finished; it is computed many times before."""
    video = record()
    ended = []
    for now in range(9):
        tokens = CONDITION_TOKENS + now // 3 * FRAME
        ended.append(video.compute(tokens, video.layout.frame_of(tokens), float(now)))
    assert [seconds for own in ended for seconds in own] == [3.0, 3.0]
    assert video.end(CONDITION_TOKENS + 3 * FRAME, 9.0) == [3.0]
    assert video.frames == 3


def test_part_of_a_frame_is_no_frame() -> None:
    video = record()
    compute(video, CONDITION_TOKENS, 0.0)
    run(video, 10, 22)
    assert video.end(24, 50.0) == []
    assert video.frames == 2


def test_given_frames_are_not_made() -> None:
    prompt = CONDITION_TOKENS + 2 * FRAME + 3
    video = record(prompt)
    assert run(video, 0, prompt - 4) == []
    assert compute(video, prompt, 30.0) == []
    assert run(video, prompt, prompt + 3, 31.0) == [3.0]
    assert video.frames == 1


def test_a_preempted_video_makes_no_frame_twice() -> None:
    video = record()
    compute(video, CONDITION_TOKENS, 0.0)
    run(video, 10, 18, 1.0)
    assert video.frames == 1
    # Computed again in two chunks, and on.
    assert compute(video, 12, 50.0) == []
    assert compute(video, 18, 51.0) == []
    assert compute(video, 21, 60.0) == [54.0]
    assert video.frames == 2


def test_a_request_that_ends_before_its_prompt_has_made_nothing() -> None:
    video = record()
    compute(video, 4, 0.0)
    assert video.end(10, 5.0) == []
    found = read_line(video.line("r", "abort", 10, 0), "r")
    assert found is not None
    assert found["seconds_per_frame"] is None


def test_peaks_are_those_of_both_streams_at_once() -> None:
    video = record()
    video.hold(0, 3, CONDITION)
    for frame, blocks, other in [(0, 4, 2), (0, 5, 2), (1, 4, 1), (1, 6, 2)]:
        video.hold(0, blocks, frame)
        video.hold(1, other, frame)
    assert video.peaks == [7, 8]
    assert video.peak_blocks == 8
    video.free(1, 2)
    assert (video.held, video.freed_blocks) == (6, 2)
    # What the policy has freed is not held when the next frame's blocks are.
    video.hold(0, 7, 2)
    assert video.peaks[2] == 7


def test_frames_of_one_step_held_the_same() -> None:
    video = record()
    video.hold(0, 9, 3)
    assert video.peaks == [9, 9, 9, 9]


@pytest.mark.parametrize("frames", [MOST_PEAKS, MOST_PEAKS + 1, 1000])
def test_a_record_is_bounded_and_loses_no_peak(frames: int) -> None:
    video = record()
    for frame in range(frames):
        video.hold(0, 100 if frame == 37 else 5, frame)
    assert len(video.peaks) <= MOST_PEAKS
    assert len(video.peaks) == -(-frames // video.frames_per_peak)
    assert video.peaks.index(100) == 37 // video.frames_per_peak
    assert sorted(set(video.peaks)) == [5, 100]


def test_a_line_is_read_as_it_is_written() -> None:
    video = record()
    compute(video, CONDITION_TOKENS, 0.0)
    for tokens in range(11, 26):
        video.hold(0, tokens // 4, (tokens - 1 - CONDITION_TOKENS) // FRAME)
        compute(video, tokens, float(tokens - 10))
    video.free(0, 2)
    video.end(25, 18.0)
    line = video.line("cmpl-full-0-b6c1", "length", 25, 1)
    assert "3 frames made, 6 s each, 25 tokens, of which at most 24 were held" in line
    found = read_line(f"(EngineCore pid=7) INFO 11-25 21:00:00 [metrics.py:1] {line}\x1b[0m", "cmpl-full-")
    assert found == {
        "request_id": "cmpl-full-0-b6c1",
        "reason": "length",
        "frames": 3,
        "seconds_per_frame": 6.0,
        "tokens": 25,
        "peak_tokens": 24,
        "peak_tokens_by_frame": [12, 20, 24],
        "frames_per_peak": 1,
        "freed_blocks": 2,
        "preemptions": 1,
    }
    assert read_line(line, "cmpl-packcache-") is None
    assert read_line("INFO Video cmpl-full-0 is something else", "cmpl-full-") is None
