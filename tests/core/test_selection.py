"""Which blocks of a frame are kept: nested whatever the selection, and each as it is told."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import block_sizes, grid_layouts, layouts, quick
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.policies.selection import Selection, keep_fraction, select, spread_order
from vllm_packcache.core.retention import Retention

SELECTIONS = get_args(Selection)


@quick
@given(count=st.integers(0, 400))
def test_spread_order_is_a_permutation_in_bit_reversed_order(count):
    bits = max(1, (count - 1).bit_length())
    reversed_numbers = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits)]

    assert spread_order(count).tolist() == [number for number in reversed_numbers if number < count]


@quick
@given(start=st.integers(0, 1000), count=st.integers(1, 200), hundredths=st.integers(0, 100))
def test_a_fraction_of_the_condition_is_even_and_nested(start, count, hundredths):
    blocks = range(start, start + count)
    kept = keep_fraction(blocks, hundredths / 100).tolist()

    assert len(kept) == -(-hundredths * count // 100)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(keep_fraction(blocks, min(1, hundredths / 100 + 0.01)).tolist()) <= set(blocks)
    if kept:
        assert kept[0] == start
        # 2^n kept blocks lie one in each of 2^n equal parts, so no gap exceeds two parts.
        part = 2 ** ((count - 1).bit_length() - (len(kept).bit_length() - 1)) if count > 1 else 1
        assert max(b - a for a, b in pairwise([*kept, start + count])) <= max(1, 2 * part)


@pytest.mark.parametrize("selection", SELECTIONS)
@quick
@given(layout=grid_layouts(), block_size=st.integers(1, 12), frame=st.integers(0, 12), keep=st.integers(0, 40))
def test_a_frame_that_shrinks_keeps_a_part_of_what_it_has(selection, layout, block_size, frame, keep):
    blocks = BlockMap(layout, block_size)
    tagged = blocks.frame_blocks(frame)
    kept = select(selection, blocks, frame, keep).tolist()

    assert kept == sorted(set(kept))
    assert len(kept) == min(keep, len(tagged))
    assert set(kept) <= set(select(selection, blocks, frame, keep + 1).tolist()) <= set(tagged)


@quick
@given(layout=layouts(), block_size=block_sizes, frame=st.integers(0, 50), keep=st.integers(0, 90))
def test_spatial_is_the_bit_reversed_order_and_tail_the_end(layout, block_size, frame, keep):
    blocks = BlockMap(layout, block_size)
    tagged = list(blocks.frame_blocks(frame))

    expected = sorted(tagged[i] for i in spread_order(len(tagged))[:keep])
    assert select("spatial", blocks, frame, keep).tolist() == expected
    assert select("tail", blocks, frame, keep).tolist() == tagged[max(0, len(tagged) - keep) :]


def test_rows_keeps_whole_rows_spread_over_the_picture():
    # 8 rows of 6 tokens and a line end each, in blocks of 2: a row and a half-block more or less is 3 or 4 blocks.
    layout = VideoLayout(FrameLayout.from_grid((8, 7), frame_start_tokens=1, row_end_tokens=1), 10)
    blocks = BlockMap(layout, 2)

    for frame in (0, 1, 5):
        kept_rows: list[int] = []
        for keep in range(len(blocks.frame_blocks(frame)) + 1):
            # The row of a block's middle token.
            offsets = select("rows", blocks, frame, keep) * 2 + 1 - layout.frame_start(frame) - 1
            rows = {min(7, max(0, offset // 8)) for offset in offsets.tolist()}
            kept_rows += [row for row in rows if row not in kept_rows]
            assert rows <= set(kept_rows)
        # A row is begun only when the one before it is whole, in bit-reversed order.
        assert kept_rows == [0, 4, 2, 6, 1, 5, 3, 7]


def test_random_differs_from_frame_to_frame_and_not_from_process_to_process():
    blocks = BlockMap(VideoLayout(FrameLayout(1600), 0), 16)

    drawn = [select("random", blocks, frame, 30) - 100 * frame for frame in range(5)]

    assert len({tuple(kept.tolist()) for kept in drawn}) == 5
    # Scheduler and workers each draw for themselves: a change of the generator must be seen.
    assert drawn[0][:5].tolist() == [1, 7, 8, 9, 15]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_is_an_option_and_decides_what_is_kept(selection):
    layout = {"grid": [16, 16], "frame_start_tokens": 1}
    policy = ServerConfig.parse("packcache", {"layout": layout, "selection": selection, "window": 4}).policy
    # Where nothing changed, what changed first is what is spread evenly.
    ids = np.zeros(288 + 9 * 257, dtype=np.int64)
    layout = VideoLayout(FrameLayout.from_grid((16, 16), 1), 288, 256)
    retention = Retention(layout, policy, 16, lambda start, stop: ids[start:stop])

    frame = 9
    for distance, keep in ((1, 17), (2, 8), (3, 4), (4, 4)):
        tagged = retention.blocks.frame_blocks(frame - distance)
        kept = [block for block in retention.past(frame).tolist() if block in tagged]
        assert kept == select(selection, retention.blocks, frame - distance, keep).tolist()


def test_an_unknown_selection_and_rows_without_a_grid_are_refused():
    with pytest.raises(
        ConfigError, match="selection: input should be 'spatial', 'rows', 'tail', 'random' or 'changed', not 'top'"
    ):
        ServerConfig.parse("packcache", {"selection": "top"})
    with pytest.raises(ConfigError, match="selection = rows needs grid in the layout"):
        ServerConfig.parse("packcache", {"selection": "rows", "layout": {"tokens_per_frame": 100}})
    server = ServerConfig.parse("packcache", {"selection": "rows"})
    assert server.policy == PackCache(selection="rows")
    with pytest.raises(ConfigError, match="packcache: selection = rows needs grid"):
        server.plan({"packcache_tokens_per_frame": 100}, 10)
