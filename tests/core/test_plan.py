"""Which of a request's tokens are in a stream, and which ids they have."""

from __future__ import annotations

import pytest

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan, Stream
from vllm_packcache.core.policies import Full
from vllm_packcache.core.positions import Positions

REQUEST = list(range(100, 130))
CONDITION = 10


def stream(start: int, condition: tuple[int, ...] = ()) -> Stream:
    layout = VideoLayout(FrameLayout(4), max(1, CONDITION - start))
    return Stream(Plan(layout, Full(), Positions(layout)), start, condition)


@pytest.mark.parametrize("length", [1, 4, 10, 17])
def test_a_condition_stands_in_place_of_the_requests(length: int) -> None:
    own = stream(CONDITION - length, tuple(range(length)))
    expected = [*range(length), *REQUEST[CONDITION:]]
    assert own.own_tokens(len(REQUEST)) == len(expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 4):
            assert own.ids(REQUEST, start, stop) == expected[start:stop], (start, stop)


def test_a_stream_without_one_is_a_part_of_the_request() -> None:
    assert stream(6).ids(REQUEST, 2, 5) == REQUEST[8:11]


@pytest.mark.parametrize(("start", "tokens"), [(0, [0, 1, 5]), (3, [0, 0, 2]), (-7, [0, 8, 12])])
def test_a_stream_begins_later_or_is_longer(start: int, tokens: list[int]) -> None:
    assert [stream(start).own_tokens(count) for count in (0, 1, 5)] == tokens
