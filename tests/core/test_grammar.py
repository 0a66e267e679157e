"""Which ids may stand at each place of a frame, against the statement place by place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.core.grammar import ANY, FrameIds, IdRange, VideoGrammar, grammar_of
from vllm_packcache.core.layout import FrameLayout, VideoLayout

ids = st.integers(0, 50)
ranges = st.tuples(ids, ids).map(lambda pair: IdRange(min(pair), max(pair)))


def special(count: int, row_end: bool = False) -> st.SearchStrategy[tuple[int | IdRange, ...] | None]:
    one = ids if row_end else st.one_of(ids, ranges)
    return st.one_of(st.none(), st.lists(one, min_size=count, max_size=count).map(tuple))


@st.composite
def frames(draw: st.DrawFn) -> tuple[FrameLayout, FrameIds]:
    start, row_end, end = (draw(st.integers(0, 3)) for _ in range(3))
    frame = FrameLayout.from_grid((draw(st.integers(1, 4)), draw(st.integers(1, 5))), start, row_end, end)
    visual = draw(st.one_of(st.none(), ranges))
    of_rows = special(row_end, True)
    return frame, FrameIds(visual, draw(special(start)), draw(of_rows), draw(special(end)), draw(of_rows))


def literally(frame: FrameLayout, said: FrameIds) -> list[int | IdRange]:
    """What may stand at each place, written out token by token: a number is fixed, a range of special tokens given."""
    assert frame.grid is not None
    made: list[int | IdRange] = [*(said.frame_start or [ANY] * frame.frame_start_tokens)]
    for row in range(frame.grid[0]):
        made += [said.visual or ANY] * frame.grid[1]
        last = said.last_row_end if row == frame.grid[0] - 1 else None
        made += last or said.row_end or [ANY] * frame.row_end_tokens
    return [*made, *(said.frame_end or [ANY] * frame.frame_end_tokens)]


@quick
@given(of=frames())
def test_a_frame_is_the_statement_place_by_place(of: tuple[FrameLayout, FrameIds]) -> None:
    frame, said = of
    grammar = grammar_of(frame, said)
    expected = literally(frame, said)
    assert len(expected) == frame.tokens_per_frame
    for offset, own in enumerate(expected):
        assert grammar.range_at(offset) == (IdRange(own, own) if isinstance(own, int) else own)
    before, after = frame.frame_start_tokens, frame.tokens_per_frame - frame.frame_end_tokens
    outside = [place for place in range(frame.tokens_per_frame) if not before <= place < after]
    of_client = [place for place in outside if isinstance(expected[place], IdRange) and expected[place] is not ANY]
    assert grammar.given.tolist() == of_client


@quick
@given(of=frames(), data=st.data(), condition=st.integers(0, 9), first=st.integers(0, 3))
def test_a_video_has_what_its_client_gives(
    of: tuple[FrameLayout, FrameIds], data: st.DataObject, condition: int, first: int
) -> None:
    frame, said = of
    grammar, layout = grammar_of(frame, said), VideoLayout(frame, condition)
    allowed = [grammar.range_at(int(place)) for place in grammar.given]
    rows = tuple(tuple(data.draw(st.integers(*own)) for own in allowed) for _ in range(2))
    for row in rows:
        grammar.check_given(row)
    video = VideoGrammar(layout, grammar, first, rows)
    made = [video.allowed(token) for token in range(layout.frame_start(first + 3))]
    assert made[:condition] == [ANY] * condition
    for number in range(first + 3):
        expected = [grammar.range_at(place) for place in range(frame.tokens_per_frame)]
        if 0 <= number - first < len(rows):
            for place, own in zip(grammar.given.tolist(), rows[number - first], strict=True):
                expected[place] = IdRange(own, own)
        start = layout.frame_start(number)
        assert made[start : start + frame.tokens_per_frame] == expected
    # A sequence of what may stand there has no wrong token, and one that is changed is found.
    tokens = [data.draw(st.integers(own.first, min(own.last, 60))) for own in made]
    assert video.first_wrong(tokens) is None
    assert video.first_wrong(tokens[:condition]) is None
    narrow = [token for token, own in enumerate(made) if own != ANY and token < layout.frame_start(first + 1)]
    if narrow:
        wrong = data.draw(st.sampled_from(narrow))
        tokens[wrong] = made[wrong].last + 1
        assert video.first_wrong(tokens[: wrong + 1 + data.draw(st.integers(0, 3))]) == wrong


def test_what_a_client_gives_must_be_all_of_a_frame_and_in_range() -> None:
    frame = FrameLayout.from_grid((2, 3), frame_end_tokens=3)
    grammar = grammar_of(frame, FrameIds(IdRange(0, 7), frame_end=(8, IdRange(10, 12), IdRange(20, 20))))
    assert grammar.given.tolist() == [7, 8]
    with pytest.raises(ValueError, match="must have 2 ids for each frame, not 1"):
        grammar.check_given([10])
    with pytest.raises(ValueError, match="must have ids from 10 to 12 as number 1, not 13"):
        grammar.check_given([13, 20])
    grammar.check_given([12, 20])


def test_ids_need_rows_and_as_many_tokens_as_there_are() -> None:
    with pytest.raises(ValueError, match="ids of a frame need grid, not tokens_per_frame alone"):
        grammar_of(FrameLayout(6), FrameIds(IdRange(0, 7)))
    with pytest.raises(ValueError, match=r"row_end_ids must be of 1 tokens, as many as row_end_tokens, not of 2"):
        grammar_of(FrameLayout.from_grid((2, 3), row_end_tokens=1), FrameIds(row_end=(1, 2)))


def test_one_grammar_serves_all_requests() -> None:
    frame, said = FrameLayout.from_grid((2, 3)), FrameIds(IdRange(0, 7))
    assert grammar_of(frame, said) is grammar_of(FrameLayout.from_grid((2, 3)), FrameIds(IdRange(0, 7)))
    assert np.array_equal(grammar_of(frame, said).last, [7] * 6)
