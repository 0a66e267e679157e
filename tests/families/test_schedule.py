"""Which passes of a frame the model computes, and of how many rows: all of it known before the frame is begun."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.families.lumos import MaskedOptions, frame_layout
from vllm_packcache.families.schedule import Pass, computed_passes, most_unknown, schedule

WIDE = (48, 84)
"""The published grid: frames of 4,084 tokens, 4,032 of them visual."""


def rows(**changed: object) -> float:
    """The share of all rows of 50 passes that is computed."""
    return sum(sum(own.rows) for own in schedule(MaskedOptions(**changed), WIDE)) / (2 * 50 * 4084)


def test_as_published_every_pass_computes_the_whole_frame_in_both_streams():
    assert schedule(MaskedOptions(), WIDE) == (Pass((4084, 4084), True),) * 50
    assert schedule(MaskedOptions(guidance=1, steps=3), WIDE) == (Pass((4084, 0), False),) * 3
    assert computed_passes(MaskedOptions(), WIDE) == 51


def test_what_is_left_out_at_the_published_grid():
    computed = {share: computed_passes(MaskedOptions(reuse=share), WIDE) - 1 for share in (0.005, 0.01, 0.02, 0.03, 1)}
    assert computed == {0.005: 46, 0.01: 43, 0.02: 36, 0.03: 25, 1: 1}
    shares = [rows(refresh=interval) for interval in (1, 2, 4, 8, 1000)]
    assert shares == pytest.approx([1, 0.824, 0.745, 0.706, 0.658], abs=1e-3)
    assert rows(guidance_interval=2) == 0.75
    assert rows(refresh=8, reuse=0.02, guidance_interval=2) == pytest.approx(0.346, abs=1e-3)


def test_a_small_frame_in_words():
    # Of 24 tokens 24, 23, 22, 19, 16, 13, 9, 4 are unknown before the passes.
    assert most_unknown(8, 24) == (24, 23, 22, 19, 16, 13, 9, 4)
    options = MaskedOptions(steps=8, refresh=3, reuse=0.1, guidance_interval=2, guidance_from=0.25)
    assert schedule(options, (4, 6)) == (
        Pass((32, 0), False),
        Pass((0, 0), False),
        # Guidance begins: it is computed whatever has changed, and its stream for the first time.
        Pass((24, 32), True),
        Pass((22, 0), True),
        Pass((32, 22), True),
        Pass((16, 0), True),
        # The stream has been whole two passes before it was computed last, and four before it is now.
        Pass((13, 32), True),
        Pass((32, 0), True),
    )
    assert computed_passes(options, (4, 6)) == 8


@quick
@given(
    steps=st.integers(1, 60),
    grid=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    refresh=st.integers(1, 12),
    reuse=st.floats(0, 1),
    interval=st.integers(1, 6),
    share=st.floats(0, 0.9),
)
def test_what_is_drawn_by_has_been_computed(steps, grid, refresh, reuse, interval, share):
    start = int(share * steps) / steps
    options = MaskedOptions(
        steps=steps, refresh=refresh, reuse=reuse, guidance_interval=interval, guidance_from=start, guidance_until=1
    )
    passes, unknown = schedule(options, grid), most_unknown(steps, grid[0] * grid[1])
    whole = frame_layout(grid).tokens_per_frame

    assert len(passes) == steps
    for stream in range(2):
        seen = [own.rows[stream] for own in passes]
        first = next(step for step, rows in enumerate(seen) if rows)
        assert seen[first] == whole
        assert first == (0 if stream == 0 else next(step for step, own in enumerate(passes) if own.guided))
        # The last step so far in which the stream was computed.
        last = list(accumulate((step if rows else 0 for step, rows in enumerate(seen)), max))
        for step in range(first + 1, steps):
            assert seen[step] in {0, whole, unknown[last[step - 1]]}
            assert seen[step] == 0 or seen[step] >= unknown[step]
        computed = [rows for rows in seen if rows]
        assert computed.count(whole) >= len(computed) / refresh
    assert all(own.computed or not own.rows[1] for own in passes)
    assert computed_passes(options, grid) == 1 + sum(own.computed for own in passes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refresh": 0}, "^refresh must be 1 or more and at most 1000, not 0$"),
        ({"refresh": 1001}, "^refresh must"),
        ({"guidance_interval": 0}, "^guidance_interval must be 1 or more"),
        ({"reuse": 1.5}, "^reuse must lie between 0 and 1, not 1.5$"),
        ({"reuse": float("nan")}, "^reuse must"),
        ({"guidance_from": -0.1}, "^guidance_from must"),
        ({"guidance_until": 2.0}, "^guidance_until must"),
        ({"guidance": 1, "guidance_interval": 2}, "^guidance_interval is 2, and with a guidance of 1 there is no"),
        ({"guidance": 1, "guidance_until": 0.5}, "^guidance_until is 0.5, and with a guidance of 1"),
        ({"guidance_from": 0.5, "guidance_until": 0.5}, "leave none of 50 passes with guidance: give a guidance of 1"),
        ({"steps": 2, "guidance_from": 0.6}, "leave none of 2 passes with guidance"),
    ],
    ids=str,
)
def test_what_would_do_nothing_or_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MaskedOptions(**options)
