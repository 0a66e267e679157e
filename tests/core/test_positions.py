"""Positions against a video that is written down token by token; rotary axes against those of models."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import axis_scales, grid_layouts, one_axis, quick, small_layouts, three_axes
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.positions import Positions, contiguous_axes, interleaved_axes, mm_rope_axes, slide_angles

FRAMES = 9
SECTIONS = [(16, 24, 24), (24, 20, 20), (11, 11, 10), (2, 3, 3), (4, 0, 4), (1, 1, 1), (0, 5, 3)]

any_axes = pytest.mark.parametrize("kind", [one_axis, three_axes], ids=["one axis", "three axes"])


def written_down(positions: Positions, window_start: int, frames: int = FRAMES) -> list[tuple[int, ...]]:
    """Positions of the condition and of ``frames`` frames, one token after the other."""
    layout, frame = positions.layout, positions.layout.frame
    if positions.scale is None:
        video: list[tuple[int, ...]] = [(index,) for index in range(layout.condition_tokens)]
        for number in range(frames):
            slot = number - window_start
            video += [
                (layout.condition_tokens + slot * frame.tokens_per_frame + offset,)
                for offset in range(frame.tokens_per_frame)
            ]
        return video
    time, height, width = positions.scale
    rows, columns = frame.grid
    text = layout.condition_tokens - layout.condition_image_tokens
    images = layout.condition_image_tokens // frame.tokens_per_frame
    first_content = text + frame.frame_start_tokens
    video = [(index,) * 3 for index in range(text)]
    for picture in range(images + frames):
        gone = window_start if picture >= images else 0
        body: list[tuple[int, ...] | None] = [None] * frame.frame_start_tokens
        for row in range(rows):
            for column in range(columns + frame.row_end_tokens):
                place = (time * (picture - gone), height * row, width * column)
                body.append(tuple(first_content + moved for moved in place))
        body += [None] * frame.frame_end_tokens
        for content in body:
            index = len(video) - gone * frame.tokens_per_frame
            video.append((index,) * 3 if content is None else content)
    return video


def of(positions: Positions, tokens: range | list[int], window_start: int) -> list[tuple[int, ...]]:
    at = positions.of(np.array(tokens, dtype=np.int64), window_start)
    assert at.dtype == np.int64
    assert at.shape == (positions.axes, len(tokens))
    return [tuple(column) for column in at.T.tolist()]


def content_tokens(positions: Positions) -> set[int]:
    """Tokens of frames that the layout gives a row, and those at the end of one."""
    layout = positions.layout
    found = set()
    for token in range(layout.condition_tokens, layout.frame_start(FRAMES)):
        offset = (token - layout.condition_tokens) % layout.tokens_per_frame
        if layout.frame.frame_start_tokens <= offset < layout.tokens_per_frame - layout.frame.frame_end_tokens:
            found.add(token)
    return found


@any_axes
@quick
@given(data=st.data())
def test_positions_are_those_of_writing_the_video_down(kind, data):
    positions = data.draw(kind(st.none() | st.integers(1, 5)))
    window_start = data.draw(st.integers(0, FRAMES))
    expected = written_down(positions, window_start)

    assert of(positions, range(len(expected)), window_start) == expected
    # Any selection, in any order.
    some = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=8))
    assert of(positions, some, window_start) == [expected[token] for token in some]


@any_axes
@quick
@given(data=st.data())
def test_the_condition_stays_and_a_slide_moves_a_frame_by_its_shift(kind, data):
    positions = data.draw(kind())
    condition = range(positions.layout.condition_tokens)
    frames = np.arange(len(condition), positions.layout.frame_start(FRAMES))
    shifts = positions.slide_shifts[positions.slide_kinds(frames)]

    for start in range(FRAMES):
        assert of(positions, condition, start) == of(positions, condition, 0)
        moved = positions.of(frames, start + 1) - positions.of(frames, start)
        assert moved.T.tolist() == shifts.tolist()


@quick
@given(positions=three_axes(), window_start=st.integers(1, FRAMES))
def test_row_and_column_never_move_and_time_stays_contiguous(positions, window_start):
    content = sorted(content_tokens(positions))
    before = np.array(of(positions, content, 0))
    after = np.array(of(positions, content, window_start))

    assert (before[:, 1:] == after[:, 1:]).all()
    times = sorted(set(after[:, 0].tolist()))
    assert len(times) == FRAMES
    assert {later - earlier for earlier, later in pairwise(times)} == {positions.scale[0]}
    # The oldest frame of the window stands where frame 0 stood.
    assert times[window_start:] == sorted(set(before[:, 0].tolist()))[: FRAMES - window_start]


@quick
@given(positions=three_axes(), window_start=st.integers(0, FRAMES))
def test_special_tokens_are_indexed_as_if_the_dropped_frames_had_never_been(positions, window_start):
    layout = positions.layout
    content = content_tokens(positions)
    oldest = layout.frame_start(window_start)
    kept = [*range(layout.condition_tokens), *range(oldest, layout.frame_start(FRAMES))]

    for index, token in enumerate(kept):
        if token >= oldest and token not in content:
            assert of(positions, [token], window_start) == [(index,) * 3]


@any_axes
@quick
@given(data=st.data())
def test_while_nothing_is_dropped_positions_are_absolute(kind, data):
    positions = data.draw(kind())
    absolute = Positions(positions.layout, None, positions.scale)
    tokens = range(positions.layout.frame_start(FRAMES))

    for frame in range(CONDITION, positions.window + 1):
        start = positions.window_start(frame)
        assert start == 0
        assert of(positions, tokens, start) == of(absolute, tokens, absolute.window_start(frame))
    late = positions.window_start(positions.window + 1)
    assert of(positions, tokens, late) != of(absolute, tokens, absolute.window_start(positions.window + 1))


@quick
@given(layout=small_layouts(), scaled=three_axes(st.none()), window=st.integers(1, 5))
def test_only_one_axis_without_a_window_is_as_stock(layout, scaled, window):
    absolute = Positions(layout)
    tokens = range(layout.frame_start(FRAMES))

    assert absolute.as_stock
    assert of(absolute, tokens, absolute.window_start(FRAMES)) == [(token,) for token in tokens]
    assert not Positions(layout, window).as_stock
    assert not scaled.as_stock
    assert (absolute.axes, scaled.axes) == (1, 3)


@any_axes
@quick
@given(data=st.data())
def test_the_window_starts_at_the_oldest_of_the_last_w_frames_and_slides_where_that_moves(kind, data):
    positions = data.draw(kind())
    layout, window = positions.layout, positions.window
    starts = [next(iter([*range(frame)][-window:]), 0) for frame in range(FRAMES)]
    slides = [
        layout.frame_start(frame) for frame, (before, after) in enumerate(pairwise(starts), start=1) if after > before
    ]

    assert positions.window_start(CONDITION) == 0
    assert [positions.window_start(frame) for frame in range(FRAMES)] == starts
    tokens = range(layout.frame_start(FRAMES))
    assert [token for token in tokens if positions.slides(token)] == slides
    # While frame k is made, k frames lie behind it and all but W of them have left.
    for frame in range(FRAMES):
        assert sum(token <= layout.frame_start(frame) for token in slides) == max(0, frame - window)
    ahead = [*slides, layout.frame_start(max(FRAMES, window + 1))]
    for token in tokens:
        assert positions.next_slide(token) == min(slide for slide in ahead if slide > token)


@any_axes
@quick
@given(data=st.data())
def test_absolute_positions_never_slide(kind, data):
    positions = data.draw(kind(st.none()))

    for token in range(positions.layout.frame_start(FRAMES)):
        assert not positions.slides(token)
        assert positions.next_slide(token) is None
        assert positions.window_start(positions.layout.frame_of(token)) == 0


@any_axes
@quick
@given(data=st.data())
def test_the_limit_is_the_highest_position_of_the_whole_video_and_one(kind, data):
    positions = data.draw(kind(st.none() | st.integers(1, 5)))
    layout = positions.layout
    highest_up_to = {
        start: [*accumulate((max(at) for at in written_down(positions, start)), max)]
        for start in {positions.window_start(frame) for frame in range(FRAMES)}
    }

    needed = 0
    assert positions.limit(0) == 0
    for token in range(layout.frame_start(FRAMES)):
        needed = max(needed, 1 + highest_up_to[positions.window_start(layout.frame_of(token))][token])
        assert positions.limit(token + 1) == needed
    if positions.scale is None and positions.window is not None:
        assert needed <= layout.condition_tokens + (positions.window + 1) * layout.tokens_per_frame


@any_axes
@quick
@given(data=st.data())
def test_with_a_window_the_limit_does_not_grow_with_the_video(kind, data):
    positions = data.draw(kind())
    saturated = positions.limit(positions.layout.frame_start(positions.window + 1))

    assert positions.limit(positions.layout.frame_start(10**9) + 1) == saturated
    unbounded = Positions(positions.layout, None, positions.scale)
    assert unbounded.limit(positions.layout.frame_start(10**6)) > saturated


@quick
@given(layouts=st.tuples(grid_layouts(), grid_layouts()), scales=st.tuples(axis_scales, axis_scales))
def test_shared_tokens_are_positioned_alike_whatever_the_layout(layouts, scales):
    for wrap in (lambda layout, scale: Positions(layout, 2), lambda layout, scale: Positions(layout, 2, scale)):
        one, other = (wrap(layout, scale) for layout, scale in zip(layouts, scales, strict=True))
        shared = range(min(one.shared_tokens, other.shared_tokens))

        for start in (0, 3):
            assert of(one, shared, start) == of(other, shared, 0)


@pytest.mark.parametrize(("image", "three"), [(0, 10), (6, 4), (12, 0)])
def test_shared_tokens_end_where_pictures_begin_if_there_are_axes_for_them(image, three):
    layout = VideoLayout(FrameLayout.from_grid((2, 3)), max(10, image), image)

    assert Positions(layout, 2).shared_tokens == layout.condition_tokens
    assert Positions(layout, 2, (4, 8, 8)).shared_tokens == three


def test_three_axes_need_a_grid():
    with pytest.raises(ValueError, match=r"^grid is needed: .* axis_scale"):
        Positions(VideoLayout(FrameLayout(6), 4), 2, (4, 8, 8))
    Positions(VideoLayout(FrameLayout(6), 4), 2)


@pytest.mark.parametrize("image", [1, 5, 7, 13])
def test_three_axes_need_an_image_of_whole_frames(image):
    layout = VideoLayout(FrameLayout.from_grid((2, 3)), 20, image)

    with pytest.raises(ValueError, match=rf"^condition_image_tokens is {image}, .* whole number of frames of 6 tokens"):
        Positions(layout, 2, (4, 8, 8))
    Positions(layout, 2)


@pytest.mark.parametrize("image_to_video", [False, True])
def test_mm_rope_of_lumos1_at_84_by_48(image_to_video):
    """P is the index of the first visual token: text, then begin, height and width of the first picture."""
    server = ServerConfig.parse("packcache", "lumos1_384p")
    text, stride = 23, 4084
    plan = server.plan({"packcache_window": 3}, text + stride * image_to_video)
    positions, layout = plan.positions, plan.layout
    first = text + 3

    assert layout.condition_image_tokens == stride * image_to_video
    for picture in (0, 1, 5):
        if picture < image_to_video:
            continue
        begin = text + picture * stride
        frame = picture - image_to_video
        for gone in (0, min(2, frame)):
            slot = picture - gone
            for row in (0, 1, 47):
                for column in (0, 1, 83, 84):
                    token = begin + 3 + row * 85 + column
                    assert of(positions, [token], gone) == [(first + 4 * slot, first + 8 * row, first + 8 * column)]
            for token in (begin, begin + 1, begin + 2, begin + stride - 1):
                assert of(positions, [token], gone) == [(token - gone * stride,) * 3]
    if image_to_video:
        assert of(positions, [text + 3 + 85], 2) == [(first, first + 8, first)]
        assert of(positions, [text + stride - 1], 2) == [(text + stride - 1,) * 3]
    assert of(positions, range(text), 2) == [(token,) * 3 for token in range(text)]
    # Four frames at a time after the condition: the highest position is the index of the last end token.
    assert positions.limit(13 * stride) == layout.condition_tokens + 4 * stride


@pytest.mark.parametrize("sections", SECTIONS)
def test_contiguous_axes_are_those_of_a_loop(sections):
    expected = []
    for axis, section in enumerate(sections):
        expected += [axis] * section

    assert contiguous_axes(sections).tolist() == expected


@pytest.mark.parametrize("sections", SECTIONS)
def test_interleaved_axes_are_those_of_a_loop(sections):
    left = {1: sections[1], 2: sections[2]}
    expected = []
    for frequency in range(sum(sections)):
        turn = frequency % 3
        if left.get(turn):
            left[turn] -= 1
            expected.append(turn)
        else:
            expected.append(0)

    assert interleaved_axes(sections).tolist() == expected


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sections", [(16, 24, 24), (24, 20, 20), (11, 11, 10), (2, 3, 3)])
def test_axes_are_those_that_vllm_turns_with(sections, interleaved):
    import torch
    from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

    # [axes, frequencies]: every number is its own axis.
    numbered = torch.arange(3)[:, None].expand(3, sum(sections))
    if interleaved:
        expected, ours = apply_interleaved_rope(numbered, list(sections)), interleaved_axes(sections)
    else:
        runs = numbered.split(sections, dim=-1)
        expected, ours = torch.cat([run[axis] for axis, run in enumerate(runs)]), contiguous_axes(sections)

    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("frequencies", [16, 64, 40, 7])
def test_mm_rope_axes_are_those_of_lumos1(frequencies):
    """The axis by channel mod 16."""
    channels = {0: {0, 1, 2, 3}, 1: {4, 5, 8, 9, 12, 13}, 2: {6, 7, 10, 11, 14, 15}}

    axes = mm_rope_axes(frequencies)

    assert axes.shape == (frequencies,)
    for channel, axis in enumerate(axes.tolist()):
        assert channel % 16 in channels[axis]


AXES = {
    "contiguous": contiguous_axes((8, 12, 12)),
    "interleaved": interleaved_axes((12, 10, 10)),
    "mm_rope": mm_rope_axes(32),
}


@any_axes
@pytest.mark.parametrize("axis_of", AXES.values(), ids=AXES.keys())
@quick
@given(data=st.data())
def test_a_key_turned_on_by_a_slide_is_the_key_at_its_next_position(kind, axis_of, data):
    positions = data.draw(kind())
    layout = positions.layout
    frequencies = 10_000.0 ** (-np.arange(32) / 32)
    tokens = np.arange(layout.condition_tokens, layout.frame_start(FRAMES))
    generator = np.random.default_rng(0)
    # A pair of channels is a complex number.
    keys = generator.standard_normal((len(tokens), 32)) + 1j * generator.standard_normal((len(tokens), 32))
    start = data.draw(st.integers(0, FRAMES - 1))

    def rotated(window_start: int) -> np.ndarray:
        at = np.broadcast_to(positions.of(tokens, window_start), (3, len(tokens)))
        angles = np.array([at[axis] * theta for axis, theta in zip(axis_of, frequencies, strict=True)]).T
        return keys * np.exp(1j * angles)

    angles = slide_angles(positions, frequencies, axis_of)

    assert angles.shape == (len(positions.slide_shifts), 32)
    turned = rotated(start) * np.exp(1j * angles[positions.slide_kinds(tokens)])
    np.testing.assert_allclose(turned, rotated(start + 1), rtol=0, atol=1e-9)
