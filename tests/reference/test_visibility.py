"""The mask of the oracle, against a statement in loops and against the one of xformers; its positions, by hand."""

import pytest
import torch

from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.positions import AxisScale, Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.reference import positions, visibility

POLICIES = [
    PackCache(window=4, selection="spatial"),
    PackCache(history_frames=1, window=3, gamma_text=0.5, selection="spatial"),
    SlidingWindow(window=2),
    AttentionSink(sink_tokens=20, recent_tokens=100),
    Full(),
]
SHAPES = [(70, 100, 32), (64, 96, 32), (5, 11, 16), (0, 50, 16), (130, 77, 100)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
shapes = pytest.mark.parametrize(("condition", "tokens_per_frame", "block_size"), SHAPES)


def video(policy: Policy, condition: int, tokens_per_frame: int) -> Plan:
    layout = VideoLayout(FrameLayout(tokens_per_frame), condition)
    return Plan(layout, policy, Positions(layout, policy.history_window))


def test_without_a_plan_every_query_sees_what_is_not_later():
    assert torch.equal(visibility(None, 16, 40), torch.ones(40, 40).tril().bool())


@policies
@shapes
def test_a_query_sees_the_blocks_that_live_while_its_frame_is_made(policy, condition, tokens_per_frame, block_size):
    plan = video(policy, condition, tokens_per_frame)
    num_tokens = condition + 7 * tokens_per_frame + 3
    retention = Retention(plan.layout, policy, block_size)

    mask = visibility(plan, block_size, num_tokens)

    for query in range(num_tokens):
        frame = plan.layout.frame_of(query)
        if frame == CONDITION:
            seen = list(range(query + 1))
        else:
            own = retention.blocks.tail_start(frame) * block_size
            past = set(retention.past(frame).tolist())
            seen = [key for key in range(query + 1) if key // block_size in past or key >= own]
        assert mask[query].nonzero().flatten().tolist() == seen


@policies
@shapes
def test_what_once_became_invisible_stays_so(policy, condition, tokens_per_frame, block_size):
    num_tokens = condition + 7 * tokens_per_frame
    mask = visibility(video(policy, condition, tokens_per_frame), block_size, num_tokens)

    for key in range(num_tokens):
        seen_by = mask[key:, key].int()
        assert seen_by[0] == 1
        assert (seen_by.diff() <= 0).all()


@policies
@shapes
def test_the_mask_is_that_of_xformers_over_compacted_live_blocks(policy, condition, tokens_per_frame, block_size):
    """The queries of each frame are one request whose keys are the live blocks, side by side."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is optional")
    plan = video(policy, condition, tokens_per_frame)
    num_tokens = condition + 7 * tokens_per_frame + 3
    segments = list(Retention(plan.layout, policy, block_size).segments(0, num_tokens))

    # Token held by each slot of the compacted keys, a gap of a block between one frame's keys and the next's.
    slots: list[int] = []
    starts = []
    for segment in segments:
        starts.append(len(slots))
        for block in segment.past.tolist():
            slots.extend(range(block * block_size, (block + 1) * block_size))
        slots.extend(range(segment.tail_start * block_size, segment.stop))
        slots.extend([-1] * block_size)
    stated = bias.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
        q_seqlen=[segment.stop - segment.start for segment in segments],
        kv_seqstarts=[*starts, len(slots)],
        kv_seqlen=[segment.live_tokens(block_size) for segment in segments],
        device=torch.device("cpu"),
    ).materialize((num_tokens, len(slots)))

    expected = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    queries, seen = (stated == 0).nonzero(as_tuple=True)
    keys = torch.tensor(slots)[seen]
    assert (keys >= 0).all()
    expected[queries, keys] = True
    assert torch.equal(visibility(plan, block_size, num_tokens), expected)


@policies
@shapes
def test_the_mask_is_that_of_xformers_over_paged_live_blocks(policy, condition, tokens_per_frame, block_size):
    """The same by way of a block table: pages are logical blocks, a table lists the live ones of a frame."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is optional")
    plan = video(policy, condition, tokens_per_frame)
    num_tokens = condition + 7 * tokens_per_frame + 3
    segments = list(Retention(plan.layout, policy, block_size).segments(0, num_tokens))
    pages = -(-num_tokens // block_size)
    tables = [
        [*segment.past.tolist(), *range(segment.tail_start, -(-segment.stop // block_size))] for segment in segments
    ]
    width = max(map(len, tables))

    # A table that is shorter than the longest is padded with a page that holds no token.
    block_tables = torch.tensor([table + [pages] * (width - len(table)) for table in tables])
    padding = width * block_size

    unpaged = bias.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
        q_seqlen=[segment.stop - segment.start for segment in segments],
        kv_seqstarts=[frame * padding for frame in range(len(segments) + 1)],
        kv_seqlen=[segment.live_tokens(block_size) for segment in segments],
        device=torch.device("cpu"),
    )
    stated = unpaged.make_paged(
        block_tables, block_size, padding, bias.PagedBlockDiagonalCausalWithOffsetGappyKeysMask
    ).materialize((num_tokens, len(segments) * padding))

    assert torch.equal(visibility(plan, block_size, num_tokens), (stated == 0)[:, :num_tokens])


def sliding(layout: VideoLayout, window: int | None, scale: AxisScale | None = None) -> Plan:
    return Plan(layout, SlidingWindow(window=window or 1), Positions(layout, window, scale))


def test_positions_are_indices_without_a_plan_and_without_a_window():
    plan = sliding(VideoLayout(FrameLayout(4), 5), None)

    assert positions(None, 4, 6, 3).tolist() == [[0, 1, 2, 3, 4, 5]]
    for frame in (CONDITION, 0, 3, 9):
        assert positions(plan, 4, 60, frame).tolist() == [[*range(60)]]


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (CONDITION, [*range(21)]),
        (0, [*range(21)]),
        (1, [*range(21)]),
        # Tokens 5 to 7 share a block with the condition, token 8 one with frame 1: it keeps its distance to that.
        (2, [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_positions_of_a_window_of_one_frame(frame, expected):
    """Five tokens of condition, frames of four, blocks of four."""
    plan = sliding(VideoLayout(FrameLayout(4), 5), 1)

    assert positions(plan, 4, 21, frame).tolist() == [expected]


def test_a_window_slides_by_one_frame_after_it_is_full():
    plan = sliding(VideoLayout(FrameLayout(4), 4), 2)
    last_frame_at = [positions(plan, 4, 40, frame)[0, 4 + 4 * frame].item() for frame in range(7)]

    assert last_frame_at == [4, 8, 12, 12, 12, 12, 12]
    assert positions(plan, 4, 20, 3).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("frame", [CONDITION, 0, 2, 5])
def test_frames_in_a_block_of_the_condition_stay_where_they_were_made(frame):
    """Frames of two tokens; every frame from the third on was made in the second place of the window."""
    plan = sliding(VideoLayout(FrameLayout(2), 3), 1)

    assert positions(plan, 16, 16, frame).tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 5, 6, 5, 6, 5]]


def test_positions_on_three_axes():
    """Two tokens of text, an image, three frames: a start, then two rows of one visual token and an end of row.

    The first visual token is token 3.
    """
    layout = VideoLayout(FrameLayout.from_grid((2, 1), 1, 1), 7, 5)
    text = [(0, 0, 0), (1, 1, 1)]
    image = [(2, 2, 2), (3, 3, 3), (3, 3, 103), (3, 13, 3), (3, 13, 103)]

    def frame(start: int, time: int) -> list[tuple[int, int, int]]:
        return [(start,) * 3, (time, 3, 3), (time, 3, 103), (time, 13, 3), (time, 13, 103)]

    absolute = [*text, *image, *frame(7, 7), *frame(12, 11), *frame(17, 15)]
    # The start of frame 0 shares a block with the image and stays, the rest is left behind.
    rebased = [*text, *image, (7, 7, 7), *frame(2, 3)[1:], *frame(7, 7), *frame(12, 11)]

    plan = sliding(layout, 1, (4, 10, 100))
    for made in (CONDITION, 0, 1):
        assert [tuple(at) for at in positions(plan, 4, 22, made).T.tolist()] == absolute
    assert [tuple(at) for at in positions(plan, 4, 22, 2).T.tolist()] == rebased
    stays = sliding(layout, None, (4, 10, 100))
    assert [tuple(at) for at in positions(stays, 4, 22, 2).T.tolist()] == absolute


@pytest.mark.parametrize("scale", [None, (4, 8, 8)], ids=["one axis", "three axes"])
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_positions_are_those_of_the_core_but_for_blocks_of_the_condition(scale, block_size):
    layout = VideoLayout(FrameLayout.from_grid((3, 4), 2, 1, 1), 41, 36)
    plan = sliding(layout, 2, scale)
    tokens = torch.arange(layout.frame_start(8))
    in_condition = tokens // block_size * block_size < 41

    for frame in range(8):
        core = torch.from_numpy(plan.positions.of(tokens.numpy(), plan.positions.window_start(frame)))
        stated = positions(plan, block_size, len(tokens), frame)
        assert torch.equal(stated[:, ~in_condition], core[:, ~in_condition])
        assert torch.equal(stated[:, in_condition], positions(plan, block_size, len(tokens), 0)[:, in_condition])
