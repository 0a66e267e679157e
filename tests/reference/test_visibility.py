"""The mask of the oracle, against a statement in loops and against the one of xformers."""

import pytest
import torch

from vllm_packcache.config import VideoPlan
from vllm_packcache.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.reference import positions, visibility
from vllm_packcache.retention import Retention

POLICIES = [
    PackCache(window=4),
    PackCache(history_frames=1, window=3, gamma_text=0.5),
    SlidingWindow(window=2),
    AttentionSink(sink_tokens=20, recent_tokens=100),
    Full(),
]
SHAPES = [(70, 100, 32), (64, 96, 32), (5, 11, 16), (0, 50, 16), (130, 77, 100)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
shapes = pytest.mark.parametrize(("condition", "tokens_per_frame", "block_size"), SHAPES)


def video(policy: Policy, condition: int, tokens_per_frame: int) -> VideoPlan:
    return VideoPlan(VideoLayout(FrameLayout(tokens_per_frame), condition), policy)


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


def test_positions_are_absolute():
    tokens = torch.tensor([0, 5, 900])

    assert torch.equal(positions(tokens, 3), tokens)
