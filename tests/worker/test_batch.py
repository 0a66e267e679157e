"""What a V1 batch reads, kept from step to step, against what is worked out anew for every step."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.blocks.batch import BatchReads
from vllm_packcache.worker.blocks.compaction import compact
from vllm_packcache.worker.step import Kept, position_shifts

BLOCK, COLUMNS = 8, 60

POLICIES: list[tuple[Policy, bool]] = [
    (PackCache(history_frames=1.0, window=2, selection="spatial"), True),
    (PackCache(history_frames=2.5, window=4, decay=0.4, selection="spatial"), False),
    (SlidingWindow(window=1), True),
    (AttentionSink(sink_tokens=5, recent_tokens=11), False),
    (Full(), False),
]


def kept(random: np.random.Generator, index: int) -> Kept | None:
    """A video with a policy of its own, or a text."""
    if index % 6 == 5:
        return None
    policy, rebases = POLICIES[index % 6]
    layout = VideoLayout(FrameLayout(int(random.integers(3, 40))), int(random.integers(0, 30)))
    window = policy.history_window if rebases else None
    return Kept(Retention(layout, policy, BLOCK), Positions(layout, window))


def assert_equal(reads: BatchReads, kernel_block_size: int) -> None:
    made, expected = reads.compact(kernel_block_size), compact(reads.step, kernel_block_size)
    assert made.seq_lens.tolist() == expected.seq_lens.tolist()
    assert made.query_start_loc.tolist() == expected.query_start_loc.tolist()
    assert made.source_rows.tolist() == expected.source_rows.tolist()
    assert made.block_table.dtype == expected.block_table.dtype
    width = expected.block_table.shape[1]
    assert np.array_equal(made.block_table[:, :width], expected.block_table)
    # Behind the longest row there is nothing.
    assert not made.block_table[:, width:].any()


def assert_everything(reads: BatchReads) -> None:
    stops = reads.computed + reads.scheduled
    expected = compact(reads.step, BLOCK)
    assert expected.seq_lens.tolist() == stops.tolist()
    for row, stop, blocks in zip(expected.block_table, stops, reads.block_table, strict=False):
        used = -(-stop // BLOCK)
        assert np.array_equal(row[:used], blocks[:used])


def test_a_batch_is_read_as_it_is_until_something_is_dropped() -> None:
    layout = VideoLayout(FrameLayout(16), 8)
    video = Kept(Retention(layout, SlidingWindow(window=1), BLOCK), Positions(layout, None))
    reads = BatchReads([video, None], BLOCK)
    table = np.arange(1, 1 + 2 * COLUMNS, dtype=np.int32).reshape(2, COLUMNS)

    def everything(computed: int, scheduled: int = 1) -> bool:
        reads.begin(np.array([computed, computed]), np.array([scheduled, scheduled]), table)
        return reads.reads_everything

    assert everything(0)
    assert everything(layout.frame_start(1) + 15)
    assert not everything(layout.frame_start(2))
    assert everything(layout.frame_start(1)), "it was preempted, and comes back"
    assert not everything(layout.frame_start(0), scheduled=40), "what its tokens read is not the same for all of them"


@pytest.mark.parametrize("kernel_block_size", [BLOCK, BLOCK // 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_step_reads_what_it_reads_worked_out_anew(seed: int, kernel_block_size: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 14))
    videos = [kept(random, index + seed) for index in range(count)]
    reads = BatchReads(videos, BLOCK)
    computed = random.integers(0, 60, count)
    table = random.permutation(np.arange(1, 1 + (count + 2) * COLUMNS, dtype=np.int32)).reshape(-1, COLUMNS)
    for step in range(150):
        # Now and then a chunk, which may span frames; a request starts anew; its blocks are others.
        scheduled = np.where(random.random(count) < 0.05, random.integers(1, 50, count), 1)
        if step % 40 == 39:
            again = int(random.integers(count))
            computed[again] = 0
            table[again] = random.permutation(table[again])
        scheduled = np.minimum(scheduled, COLUMNS * BLOCK - computed)
        if (scheduled < 1).any():
            break
        reads.begin(computed.copy(), scheduled, table)
        assert_equal(reads, kernel_block_size)
        if reads.reads_everything:
            assert_everything(reads)
        slides = [
            row
            for row, (own, at) in enumerate(zip(videos, computed.tolist(), strict=True))
            if own is not None and own.positions.slides(at)
        ]
        assert set(slides) <= set(reads.entered), "a window slides where a frame is entered"
        if not any(own is not None and crosses(own, *row) for own, row in zip(videos, pairs(reads), strict=True)):
            expected, shifts = position_shifts(reads.step.rows), reads.shifts()
            assert (shifts is None) == (expected is None)
            assert shifts is None or np.array_equal(shifts, expected)
        computed += scheduled


def pairs(reads: BatchReads) -> list[tuple[int, int]]:
    return list(zip(reads.computed.tolist(), reads.scheduled.tolist(), strict=True))


def crosses(own: Kept, computed: int, scheduled: int) -> bool:
    """Whether a chunk goes over a slide, which is an error."""
    slide = own.positions.next_slide(computed)
    return slide is not None and computed + scheduled > slide


def test_requests_that_stay_in_their_frames_are_not_looked_at() -> None:
    random = np.random.default_rng(0)
    videos = [kept(random, index) for index in range(6)]
    reads = BatchReads(videos, BLOCK)
    table = np.arange(6 * COLUMNS, dtype=np.int32).reshape(6, COLUMNS)
    computed = np.array([own.retention.layout.frame_start(4) if own else 7 for own in videos])
    reads.begin(computed, np.ones(6, dtype=np.int64), table)
    assert reads.entered == list(range(6))
    reads.begin(computed + 1, np.ones(6, dtype=np.int64), table)
    assert reads.entered == []


def test_a_wider_block_table_is_read_anew() -> None:
    reads = BatchReads([None], BLOCK)
    for columns in (4, 9):
        table = np.arange(1, 1 + 2 * columns, dtype=np.int32).reshape(2, columns)
        reads.begin(np.array([20]), np.array([1]), table)
        assert_equal(reads, BLOCK)
