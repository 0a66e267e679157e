"""PackCache: its shares, its bounds, and the whole rule against a literal statement of it in plain lists."""

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import cost, layouts, packcaches, quick, retentions
from vllm_packcache.core.layout import CONDITION, MAX_FRAMES, FrameLayout, VideoLayout
from vllm_packcache.core.policies import PAPER, PackCache
from vllm_packcache.core.policies.packcache import MAX_WINDOW, allotment, shares
from vllm_packcache.core.retention import Retention


@quick
@given(decay=st.floats(0.01, 1), frames=st.integers(1, 40))
def test_shares_sum_to_one(decay, frames):
    assert len(shares(decay, frames)) == frames
    assert sum(shares(decay, frames)) == pytest.approx(1, abs=1e-12)
    assert sorted(shares(decay, frames), reverse=True) == pytest.approx(shares(decay, frames), abs=1e-15)


@quick
@given(decay=st.floats(0.01, 0.5), frames=st.integers(1, 40))
def test_shares_up_to_one_half_are_the_geometric_series(decay, frames):
    series = [(1 - decay) * decay ** (d - 1) for d in range(1, frames)]

    assert shares(decay, frames) == pytest.approx([*series, decay ** (frames - 1)], abs=1e-12)


def test_shares_without_decay_are_equal():
    assert shares(1, 4) == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("window", range(1, 65))
def test_shares_at_one_half_are_the_closed_form_of_the_paper(window):
    assert shares(0.5, window) == tuple(2.0 ** -min(d, window - 1) for d in range(1, window + 1))


@pytest.mark.parametrize(
    ("history_frames", "frame", "given"),
    [
        # Fill: as many whole frames as the budget holds.
        (2, 1, (1000,)),
        (2, 2, (1000, 1000)),
        # Pack: W_eff = 3 history frames, shares 1/2, 1/4, 1/4 of two frames.
        (2, 3, (1000, 500, 500)),
        (2, 4, (1000, 500, 250, 250)),
        # Slide: no more than W = 4 history frames, however late.
        (2, 5, (1000, 500, 250, 250)),
        (2, 10**6, (1000, 500, 250, 250)),
        (1, 2, (500, 500)),
        (1, 9, (500, 250, 125, 125)),
        # 1/2, 1/4, 1/8, 1/8 of three frames: half a frame too much for the newest goes to the next older one,
        # and what is too much there to the third.
        (3, 9, (1000, 1000, 625, 375)),
        (4, 9, (1000, 1000, 1000, 1000)),
    ],
)
def test_allotment_in_numbers(history_frames, frame, given):
    policy = PackCache(history_frames=history_frames, window=4, selection="spatial")

    assert allotment(policy, 1000, frame) == given


@quick
@given(policy=packcaches(), tokens_per_frame=st.integers(1, 5000), frame=st.integers(1, 30))
def test_allotment_spends_the_budget_and_no_more(policy, tokens_per_frame, frame):
    given_tokens = allotment(policy, tokens_per_frame, frame)
    history = min(frame, policy.window)
    budget = policy.history_frames * tokens_per_frame

    assert len(given_tokens) == history
    assert all(0 <= tokens <= tokens_per_frame for tokens in given_tokens)
    assert sum(given_tokens) <= budget + 1e-3
    if history <= policy.history_frames:
        assert given_tokens == (tokens_per_frame,) * history
    else:
        # Older frames get no more than newer ones, so no surplus is left over at the oldest.
        assert sorted(given_tokens, reverse=True) == list(given_tokens)
        assert sum(given_tokens) > min(budget, history * tokens_per_frame) - history - 1e-3


@quick
@given(data=st.data())
def test_live_tokens_stay_within_the_budget(data):
    retention = data.draw(retentions(packcaches()))
    layout, policy = retention.layout, retention.policy

    for frame in range(3 * policy.window + 3):
        first = layout.frame_start(frame)
        history = min(frame, policy.window)
        # Rounded up to a block: each history frame, the condition, and the start of the frame being made.
        bound = layout.condition_tokens + policy.history_frames * layout.tokens_per_frame
        bound += retention.block_size * (history + 2)
        for made in {0, layout.tokens_per_frame // 2, layout.tokens_per_frame - 1}:
            assert retention.live_tokens(first + made) <= bound + made


@quick
@given(data=st.data())
def test_each_frame_keeps_its_share_in_whole_blocks_and_leaves_after_the_window(data):
    retention = data.draw(retentions(packcaches()))
    policy, blocks = retention.policy, retention.blocks
    tokens_per_frame = retention.layout.tokens_per_frame

    for frame in range(3 * policy.window + 3):
        kept = policy.kept_tokens(tokens_per_frame, frame)
        past = retention.past(frame).tolist()
        for older in range(frame):
            tagged = [block for block in blocks.frame_blocks(older) if block < blocks.tail_start(frame)]
            live = [block for block in past if blocks.tag(block) == older]
            distance = frame - older
            if distance > policy.window:
                assert live == []
            elif kept[distance - 1] == tokens_per_frame:
                assert live == tagged
            else:
                assert len(live) == min(len(tagged), ceil(kept[distance - 1] / retention.block_size))


@quick
@given(layout=layouts(), block_size=st.integers(8, 128), text=st.integers(0, 20), image=st.integers(0, 20))
def test_quotas_keep_a_fraction_of_the_condition_in_whole_blocks(layout, block_size, text, image):
    policy = PackCache(
        history_frames=0.5, gamma_text=text / 20, gamma_condition=image / 20, window=4, selection="spatial"
    )
    retention = Retention(layout, policy, block_size)
    past = set(retention.past(1000).tolist())

    for blocks, twentieths in ((retention.blocks.text_blocks, text), (retention.blocks.image_blocks, image)):
        kept = past & set(blocks)
        assert len(kept) == ceil(Fraction(twentieths, 20) * len(blocks))
        if twentieths and blocks:
            assert blocks[0] in kept


def test_quotas_do_not_apply_while_everything_fits():
    retention = Retention(
        VideoLayout(FrameLayout(100), 320),
        PackCache(history_frames=2, gamma_text=0.5, window=4, selection="spatial"),
        16,
    )

    assert retention.past(2).tolist() == list(range(32))
    assert len(retention.past(3)) < 32


def literal_kept(policy: PackCache, tokens_per_frame: int, frames: int) -> list[list[int]]:
    """Tokens kept of the frames at distance 1, 2, ... while each frame is made, worked out number by number."""
    rho, rows = policy.decay, [[]]
    for frame in range(1, frames):
        history = min(frame, policy.window)
        weights = [rho ** (distance - 1) for distance in range(1, history)] or [1.0]
        if history > 1:
            weights.append(weights[-1] * min(1.0, rho / (1 - rho) if rho < 1 else 1.0))
        total = 0.0
        for weight in weights:
            total += weight
        given, surplus = [], 0.0
        for weight in weights:
            wanted = weight / total * policy.history_frames * tokens_per_frame + surplus
            tokens = float(tokens_per_frame) if history <= policy.history_frames else min(tokens_per_frame, wanted)
            surplus = wanted - tokens
            given.append(int(tokens + 1e-6))
        aged = [min(kept, now) for kept, now in zip(rows[-1], given[1:], strict=False)]
        rows.append([given[0], *aged])
    return rows


windows = st.one_of(st.integers(1, 12), st.integers(1, 48))
budgets = st.one_of(st.floats(0.01, 50), st.integers(1, 50).map(float), st.just(float(MAX_FRAMES)))
decays = st.one_of(st.sampled_from([1e-5, 1 / 3, 0.5, 2 / 3, 0.99, 1.0]), st.floats(0.001, 1))
frame_sizes = st.one_of(st.integers(1, 16), st.integers(1, 5000), st.just(2**20))


@quick
@given(window=windows, budget=budgets, decay=decays, size=frame_sizes, block_size=st.sampled_from([1, 8, 16, 100]))
def test_what_is_kept_is_the_number_by_number_statement(window, budget, decay, size, block_size):
    policy = PackCache(window=window, history_frames=budget, decay=decay, selection="spatial")
    stated = literal_kept(policy, size, 2 * window + 3)

    assert [list(policy.kept_tokens(size, frame)) for frame in range(len(stated))] == stated

    layout = VideoLayout(FrameLayout(size), 0)
    most = max(
        min(
            ceil(Fraction(newest * size, block_size)) + sum(ceil(Fraction(kept, block_size)) for kept in row[newest:])
            for newest in range(len(row) + 1)
        )
        for row in stated
    )
    assert policy.most_past_blocks(Retention(layout, policy, block_size).blocks) == most


@pytest.mark.parametrize("budget", [20.5, 130.25, 255.5])
def test_the_largest_window_is_planned_with_little_work(budget):
    """A request may choose it, and every process plans for every request."""
    layout = VideoLayout(FrameLayout(4084), 100)

    def plan():
        policy = PackCache(window=MAX_WINDOW, history_frames=budget, decay=0.99, selection="spatial")
        policy.check(layout.frame)
        Retention(layout, policy, 16).most_blocks()

    calls, peak = cost(plan)
    # Some for every distance and for every frame until nothing changes; not for every distance of every frame.
    assert calls < 40 * MAX_WINDOW
    assert peak < 8 * MAX_WINDOW * MAX_WINDOW * 16


def literal_packcache(
    *,
    condition: int,
    tokens_per_frame: int,
    block_size: int,
    history_frames: Fraction,
    window: int,
    decay: Fraction,
    frames: int,
) -> list[list[int]]:
    """Live blocks before each frame begins, from the text of the paper and the block rule; nothing imported.

    A frame is written, then the next begins: what is live is worked out anew from what was live before.
    """
    dropped: set[int] = set()
    past_of_frame = []
    for made in range(frames):
        begin = condition + made * tokens_per_frame
        # Every block that holds a token written so far, and was not dropped, is a candidate.
        written = range((begin + block_size - 1) // block_size)
        candidates = [block for block in written if block not in dropped]

        # Tag: the segment of the newest token in the block, unless a token of the condition is in it.
        tags = {}
        for block in candidates:
            if block * block_size < condition:
                tags[block] = "condition"
            else:
                tags[block] = ((block + 1) * block_size - 1 - condition) // tokens_per_frame

        history = min(made, window)
        budget = history_frames * tokens_per_frame
        if history * tokens_per_frame <= budget:
            keep_tokens = [Fraction(tokens_per_frame)] * history
        else:
            weights = [(1 - decay) * decay ** (d - 1) for d in range(1, history)] + [decay ** (history - 1)]
            if history > 1:
                # The oldest frame cannot have more than the one before it; what is over is divided in proportion.
                weights[-1] = min(weights[-2:])
            keep_tokens = []
            surplus = Fraction(0)
            for weight in weights:
                tokens = weight / sum(weights) * budget + surplus
                keep_tokens.append(min(Fraction(tokens_per_frame), tokens))
                surplus = tokens - keep_tokens[-1]

        live = []
        for block in candidates:
            tag = tags[block]
            if tag == "condition" or tag >= made:
                live.append(block)
                continue
            distance = made - tag
            if distance > window:
                continue
            tokens = floor(keep_tokens[distance - 1])
            siblings = [
                b
                for b in range(begin // block_size + 1)
                if b * block_size >= condition and ((b + 1) * block_size - 1 - condition) // tokens_per_frame == tag
            ]
            bits = max(1, len(bin(len(siblings) - 1)) - 2)
            order = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(2**bits)]
            order = [siblings[i] for i in order if i < len(siblings)]
            whole = tokens == tokens_per_frame
            if whole or block in order[: (tokens + block_size - 1) // block_size]:
                live.append(block)
        dropped |= set(candidates) - set(live)
        past_of_frame.append([block for block in live if block < begin // block_size])
    return past_of_frame


@quick
@given(
    layout=layouts(),
    block_size=st.integers(16, 128),
    quarters=st.integers(1, 24),
    window=st.integers(1, 6),
    decay=st.sampled_from([Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), Fraction(3, 4)]),
)
def test_packcache_is_the_literal_statement(layout, block_size, quarters, window, decay):
    policy = PackCache(history_frames=quarters / 4, window=window, decay=float(decay), selection="spatial")
    retention = Retention(layout, policy, block_size)
    frames = 3 * window + 2

    stated = literal_packcache(
        condition=layout.condition_tokens,
        tokens_per_frame=layout.tokens_per_frame,
        block_size=block_size,
        history_frames=Fraction(quarters, 4),
        window=window,
        decay=decay,
        frames=frames,
    )

    assert [retention.past(frame).tolist() for frame in range(frames)] == stated


def test_lumos_at_thirteen_latent_frames_in_numbers():
    """48 frames of 672x384 in the paper: 13 latent frames of 4,084 tokens."""
    layout = VideoLayout(FrameLayout(4084), 0)
    retention = Retention(layout, PAPER, 16)

    assert layout.frame_start(13) == 53_092
    # Two frames of history, rounded up to blocks, and the frame being made.
    assert 3 * 4084 - 1 <= retention.live_tokens(53_092 - 1) <= 3 * 4084 + 5 * 16
    assert {retention.blocks.tag(block) for block in retention.past(12)} == {8, 9, 10, 11}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_frames": 0}, "history_frames must be above 0 and at most 1048576, not 0"),
        ({"history_frames": float("inf")}, "history_frames must be above 0 and at most 1048576, not inf"),
        ({"window": 0}, "window must be 1 or more and at most 256, not 0"),
        ({"window": 10**30}, f"window must be 1 or more and at most 256, not {10**30}"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1, not 0.0"),
        ({"decay": 1.5}, "decay must be above 0 and at most 1, not 1.5"),
        ({"decay": float("nan")}, "decay must be above 0 and at most 1, not nan"),
        ({"gamma_text": -0.1}, "gamma_text must be 0 or more and at most 1, not -0.1"),
        ({"gamma_condition": 1.1}, "gamma_condition must be 0 or more and at most 1, not 1.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        PackCache(**options)
    assert str(error.value) == message


def test_before_the_first_frame_there_is_no_past():
    retention = Retention(VideoLayout(FrameLayout(64), 100), PAPER, 16)

    assert retention.past(CONDITION).size == 0
    assert retention.live_blocks(50).tolist() == [0, 1, 2, 3]
