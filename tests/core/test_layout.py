"""Which token lies where, against a token-by-token enumeration; tags of blocks against their stated rule."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import block_sizes, layouts, quick
from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout


@quick
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)),
    condition=st.integers(0, 20),
)
def test_places_are_those_of_writing_the_sequence_down(grid, extra, condition):
    rows, columns = grid
    start, row_end, end = extra
    special = (None, None)
    one_frame = [special] * start
    for row in range(rows):
        one_frame += [(row, column) for column in range(columns)] + [special] * row_end
    one_frame += [special] * end
    written = [(CONDITION, *special)] * condition
    for frame in range(3):
        written += [(frame, *place) for place in one_frame]

    layout = VideoLayout(FrameLayout.from_grid(grid, *extra), condition)

    assert layout.tokens_per_frame == len(one_frame)
    assert [tuple(layout.place(token)) for token in range(len(written))] == written
    assert [layout.frame_of(token) for token in range(len(written))] == [place[0] for place in written]
    for frame in range(3):
        assert layout.frame_start(frame) == condition + frame * len(one_frame)


@quick
@given(layout=layouts(), start=st.integers(0, 900), length=st.integers(0, 900))
def test_segments_partition_the_tokens_by_frame(layout, start, length):
    segments = list(layout.segments(start, start + length))

    tokens = [(segment.frame, token) for segment in segments for token in range(segment.start, segment.stop)]
    assert tokens == [(layout.frame_of(token), token) for token in range(start, start + length)]
    assert len({segment.frame for segment in segments}) == len(segments)


def test_a_layout_without_a_grid_places_no_token_of_a_frame():
    layout = VideoLayout(FrameLayout(5), 2)

    assert layout.place(1) == (CONDITION, None, None)
    with pytest.raises(ValueError, match="no grid"):
        layout.place(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrameLayout(0), "tokens_per_frame must be 1 or more, not 0"),
        (lambda: FrameLayout(2**20 + 1), "tokens_per_frame must be at most 1048576, not 1048577"),
        (lambda: FrameLayout(4, frame_start_tokens=-1), "frame_start_tokens must be 0 or more, not -1"),
        (lambda: FrameLayout(4, row_end_tokens=-1), "row_end_tokens must be 0 or more, not -1"),
        (lambda: FrameLayout(4, frame_end_tokens=-1), "frame_end_tokens must be 0 or more, not -1"),
        (lambda: FrameLayout.from_grid((0, 4)), "grid must have at least one row and one column, not 0 x 4"),
        (
            lambda: FrameLayout(7, (2, 3)),
            "tokens_per_frame is 7, but the grid of 2 x 3 with its extra tokens makes 6: "
            "give one of the two, or make them agree",
        ),
        (lambda: VideoLayout(FrameLayout(4), -1), "condition_tokens must be 0 or more, not -1"),
        (
            lambda: VideoLayout(FrameLayout(4), 3, 4),
            "condition_image_tokens must lie between 0 and condition_tokens (3), not 4",
        ),
    ],
)
def test_impossible_layouts_are_refused(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        make()
    assert str(error.value) == message


def tag_by_the_rule(layout: VideoLayout, block_size: int, block: int) -> int:
    """The newest token's segment, except that any condition token makes the block condition."""
    segments = [layout.frame_of(token) for token in range(block * block_size, (block + 1) * block_size)]
    return CONDITION if CONDITION in segments else segments[-1]


@quick
@given(layout=layouts(), block_size=block_sizes)
def test_tags_follow_the_stated_rule(layout, block_size):
    blocks = BlockMap(layout, block_size)
    count = layout.frame_start(6) // block_size
    tags = [tag_by_the_rule(layout, block_size, block) for block in range(count)]

    assert [blocks.tag(block) for block in range(count)] == tags
    assert list(blocks.condition_blocks)[:count] == [b for b, tag in enumerate(tags) if tag == CONDITION]
    for frame in range(6):
        assert list(blocks.frame_blocks(frame)) == [b for b, tag in enumerate(tags) if tag == frame]


@quick
@given(layout=layouts(), block_size=block_sizes)
def test_condition_blocks_split_into_text_and_image(layout, block_size):
    blocks = BlockMap(layout, block_size)
    text_tokens = layout.condition_tokens - layout.condition_image_tokens
    with_image = {token // block_size for token in range(text_tokens, layout.condition_tokens)}

    assert [*blocks.text_blocks, *blocks.image_blocks] == list(blocks.condition_blocks)
    assert set(blocks.image_blocks) == with_image


@quick
@given(layout=layouts(), block_size=block_sizes, frame=st.integers(0, 10**6))
def test_the_tail_of_a_frame_starts_with_the_block_of_its_first_token(layout, block_size, frame):
    first = layout.frame_start(frame)
    tail = BlockMap(layout, block_size).tail_start(frame)

    assert tail * block_size <= first < (tail + 1) * block_size


def test_segments_of_an_endless_range_come_one_by_one():
    layout = VideoLayout(FrameLayout(10), 4)

    assert [tuple(segment) for segment in islice(layout.segments(2, 10**18), 3)] == [
        (CONDITION, 2, 4),
        (0, 4, 14),
        (1, 14, 24),
    ]
