"""The retention manager inside vLLM's real KV cache manager: prefix hits, frees, memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.harness import BLOCK, Harness, Served, prompt, video_options
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.engine.manager import bound_chunks

FRAME = 18
# Four whole blocks and two tokens: the fifth is shared with frame 0.
CONDITION = 4 * BLOCK + 2

PACKCACHE = ServerConfig.parse("packcache", {"history_frames": 1.0, "window": 2, "selection": "spatial"})
SLIDING_WINDOW = ServerConfig.parse("sliding_window", {"window": 1})
ATTENTION_SINK = ServerConfig.parse("attention_sink", {"sink_tokens": 4, "recent_tokens": 9})
FULL = ServerConfig.parse("full")
OPTED_OUT = {**video_options(FRAME), f"{REQUEST_PREFIX}policy": "full"}


def harness(config: ServerConfig = PACKCACHE, *, enable_caching: bool = True, num_blocks: int = 400) -> Harness:
    return Harness(config, enable_caching=enable_caching, num_blocks=num_blocks)


def tokens_before(frame: int, condition: int = CONDITION) -> int:
    return condition + frame * FRAME


# --------------------------------------------------------------------------- prefix hits


@pytest.mark.parametrize("first", ["text", "opted out", "video"])
def test_a_hit_of_a_video_covers_the_whole_blocks_of_its_condition_and_nothing_else(first: str) -> None:
    kv = harness()
    length = tokens_before(3)
    token_ids = prompt(0, length)
    extra = {"text": None, "opted out": OPTED_OUT, "video": video_options(FRAME, CONDITION)}[first]
    writer = kv.add(token_ids, extra)
    kv.run(writer, length)
    reader = kv.add(token_ids, video_options(FRAME, CONDITION))

    assert kv.admit(reader, 64) == CONDITION // BLOCK * BLOCK

    kv.check()
    shared = kv.blocks(reader)[: CONDITION // BLOCK]
    assert shared == kv.blocks(writer)[: CONDITION // BLOCK]
    assert {block.ref_cnt for block in shared} == {2}
    kv.check_empty()


def test_a_condition_that_ends_with_a_block_is_hit_whole() -> None:
    kv = harness()
    condition = 5 * BLOCK
    length = tokens_before(2, condition)
    kv.run(kv.add(prompt(0, length), None), length)
    reader = kv.add(prompt(0, length), video_options(FRAME, condition))
    assert kv.admit(reader, 64) == condition
    kv.check()


def test_a_condition_below_one_block_is_never_hit() -> None:
    kv = harness()
    length = tokens_before(2, 3)
    kv.run(kv.add(prompt(0, length), None), length)
    reader = kv.add(prompt(0, length), video_options(FRAME, 3))
    assert kv.admit(reader, 64) == 0
    kv.check()


def test_two_samples_of_one_prompt_share_it() -> None:
    # The prompt is the condition; vLLM computes its last token anew, so a whole last block is left out.
    for length, hit in ((CONDITION, CONDITION // BLOCK * BLOCK), (4 * BLOCK, 3 * BLOCK)):
        kv = harness()
        first = kv.add(prompt(0, length), video_options(FRAME))
        kv.run(first, tokens_before(4, length))
        second = kv.add(prompt(0, length), video_options(FRAME))
        assert kv.admit(second, 64) == hit
        kv.run(second, tokens_before(4, length))
        kv.check()
        kv.check_empty()


def test_a_hit_outlives_the_request_that_wrote_it() -> None:
    kv = harness()
    first = kv.add(prompt(0, CONDITION), video_options(FRAME))
    kv.run(first, tokens_before(6))
    kv.end(first)
    second = kv.add(prompt(0, CONDITION), video_options(FRAME))
    assert kv.admit(second, 64) == CONDITION // BLOCK * BLOCK
    kv.check()


def test_text_hits_the_condition_of_a_video_but_none_of_its_frames() -> None:
    kv = harness(FULL)
    length = tokens_before(4)
    # The full policy drops nothing, and a video under it is a stock request: it may be shared whole.
    kv.run(kv.add(prompt(0, length), video_options(FRAME, CONDITION)), length)
    assert kv.admit(kv.add(prompt(0, length + 1), None), 64) == length // BLOCK * BLOCK

    for config in (PACKCACHE, SLIDING_WINDOW, ATTENTION_SINK):
        kv = harness(config)
        kv.run(kv.add(prompt(0, length), video_options(FRAME, CONDITION)), length)
        text = kv.add(prompt(0, length + 1), None)
        assert kv.admit(text, 64) == CONDITION // BLOCK * BLOCK
        kv.run(text, length + 1)
        kv.check()
        kv.check_empty()


def test_a_dropped_block_of_the_condition_stays_with_whoever_shares_it() -> None:
    kv = harness(ATTENTION_SINK)
    options = video_options(FRAME)
    first, second = (kv.add(prompt(0, CONDITION), options) for _ in range(2))
    kv.run(first, CONDITION + 1)
    kv.run(second, CONDITION + 1)
    shared = kv.blocks(second)[: CONDITION // BLOCK]
    # The sink keeps one block of the condition; the first video moves on, the second stays.
    kv.run(first, tokens_before(3))
    assert kv.held(first)[0] == 0
    assert 1 in kv.evictions(first)
    assert kv.blocks(second)[: CONDITION // BLOCK] == shared
    kv.check()
    kv.check_empty()


def test_without_prefix_caching_nothing_is_hashed_and_the_same_is_freed() -> None:
    evictions = []
    for enable_caching in (True, False):
        kv = harness(enable_caching=enable_caching)
        video = kv.add(prompt(0, CONDITION), video_options(FRAME))
        kv.run(video, tokens_before(5))
        evictions.append(kv.evictions(video))
        hashed = [block for block in kv.pool.blocks if block.block_hash is not None]
        assert bool(hashed) == enable_caching
        again = kv.add(prompt(0, CONDITION), video_options(FRAME))
        assert kv.admit(again, 64) == (CONDITION // BLOCK * BLOCK if enable_caching else 0)
        kv.check_empty()
    assert evictions[0] == evictions[1] != []


# --------------------------------------------------------------------------- what is freed, and when


def test_requests_that_keep_their_whole_cache_lose_nothing() -> None:
    kv = harness()
    text = kv.add(prompt(0, 30))
    opted_out = kv.add(prompt(1, 30), OPTED_OUT)
    for request in (text, opted_out):
        kv.run(request, tokens_before(8))
        assert kv.evictions(request) == []
    kv.check()


def test_a_chunk_over_several_frames_frees_nothing_that_it_reads() -> None:
    # One chunk takes in the condition and four frames; the queries of frame 1 still read all of frame 0.
    kv = harness()
    video = kv.add(prompt(0, tokens_before(4)), video_options(FRAME, CONDITION))
    assert kv.admit(video, 4096) == 0
    assert kv.evictions(video) == []
    kv.check()
    # Its output is processed, the next token is asked for: now all that went by is let go at once.
    kv.step(video, 1)
    kv.step(video, 1)
    assert video.retention is not None
    assert kv.held(video) == video.retention.live_blocks(tokens_before(4) + 2).tolist()
    assert kv.evictions(video) != []
    kv.check()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_blocks_go_when_the_last_step_that_reads_them_has_been_processed(lag: int) -> None:
    kv = harness(SLIDING_WINDOW)
    video = kv.add(prompt(0, CONDITION), video_options(FRAME))
    freed_at = {}
    kv.run(video, CONDITION)
    while video.request.num_computed_tokens < tokens_before(3):
        kv.step(video, 1, lag)
        kv.check()
        for index in kv.evictions(video):
            freed_at.setdefault(index, video.request.num_computed_tokens)
    # Frame 0 goes when frame 2 begins: with the step for its first token, or later by the steps in flight.
    frame_0 = range(-(-CONDITION // BLOCK), tokens_before(1) // BLOCK)
    assert freed_at == dict.fromkeys(frame_0, tokens_before(2) + 1 + lag)


def test_a_preempted_request_replays_the_same_evictions() -> None:
    for config in (PACKCACHE, SLIDING_WINDOW, ATTENTION_SINK):
        kv = harness(config)
        video = kv.add(prompt(0, CONDITION), video_options(FRAME))
        kv.run(video, tokens_before(6) + 3, lag=2)
        evictions = kv.evictions(video)
        assert evictions
        kv.preempt(video)
        kv.check()
        # Replayed in chunks of another size, output tokens and all.
        kv.run(video, tokens_before(6) + 3, chunk=7)
        assert kv.evictions(video) == evictions
        kv.check()
        kv.check_empty()


def test_a_request_that_finds_no_room_leaves_nothing_behind() -> None:
    kv = harness(num_blocks=8)
    video = kv.add(prompt(0, 100), video_options(FRAME, CONDITION))
    assert kv.admit(video, 100) is None
    kv.check()
    kv.check_empty()


# --------------------------------------------------------------------------- memory


def test_a_video_holds_as_much_at_frame_100_as_at_frame_10() -> None:
    for config, boundaries in ((PACKCACHE, 3), (SLIDING_WINDOW, 2), (ATTENTION_SINK, 2)):
        kv = harness(config)
        video = kv.add(prompt(0, CONDITION), video_options(FRAME))
        held = []
        for frame in (10, 100):
            kv.run(video, tokens_before(frame) + FRAME // 2)
            held.append(len(kv.held(video)))
        # Frames are no multiple of a block: each boundary between kept frames falls differently.
        assert abs(held[1] - held[0]) <= boundaries
        kv.check()
        kv.check_empty()


def test_a_pool_for_the_live_blocks_serves_a_video_of_any_length() -> None:
    # 100 frames are 450 blocks; without freeing, 40 blocks would not do.
    kv = harness(num_blocks=40)
    video = kv.add(prompt(0, CONDITION), video_options(FRAME))
    kv.run(video, tokens_before(100), chunk=FRAME)
    kv.check()


@pytest.mark.parametrize("enable_caching", [True, False])
def test_nothing_is_remembered_of_requests_that_have_ended(enable_caching: bool) -> None:
    kv = harness(enable_caching=enable_caching)
    for index in range(30):
        request = kv.add(prompt(index % 3, CONDITION), video_options(FRAME) if index % 3 else None)
        kv.run(request, tokens_before(index % 4) + 1, lag=index % 3)
        if index % 2:
            kv.preempt(request)
        else:
            # Finished: the last output is processed, and its tokens cached, before the blocks are freed.
            while request.in_flight:
                kv.process(request)
        kv.end(request)
        assert not kv.manager._videos
    kv.check_empty()


def test_a_request_id_that_comes_again_starts_anew() -> None:
    kv = harness()
    first = kv.add(prompt(0, CONDITION), video_options(FRAME))
    kv.run(first, tokens_before(5))
    kv.end(first)
    second = kv.add(prompt(1, CONDITION), None)
    second.request.request_id = first.request.request_id
    kv.served = {second.request.request_id: second}
    kv.run(second, tokens_before(5))
    assert kv.evictions(second) == []
    kv.check()


# --------------------------------------------------------------------------- positions


@pytest.mark.parametrize("computed", [0, 5, 24, 25, 33, 34, 35, 41, 42, 43, 100])
@pytest.mark.parametrize("frame_by_frame", [False, True])
def test_chunks_end_where_the_window_slides(computed: int, frame_by_frame: bool) -> None:
    pool = {"enable_caching": True, "num_blocks": 60, "frame_by_frame": frame_by_frame}
    kv = Harness(ServerConfig.parse("packcache", {"window": 2}), **pool)
    video = kv.add(prompt(1, 200), video_options(8, condition_tokens=10))
    text = kv.add(prompt(2, 200))
    roomy = {"positions": "absolute", "window": 64, "history_frames": 64}
    absolute = Harness(ServerConfig.parse("packcache", roomy), **pool)
    still = absolute.add(prompt(1, 200), video_options(8, condition_tokens=10))
    stock_choices: list[int] = []

    def stock(scheduler: Any, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        stock_choices.append(num_new_tokens)
        return num_new_tokens - 1 if num_new_tokens > 60 else num_new_tokens

    def chunk(kv: Harness, served: Served, wanted: int) -> int:
        scheduler = SimpleNamespace(kv_cache_manager=kv.kv)
        return bound_chunks(stock)(scheduler, served.request, computed, wanted)

    # Frames 3, 4, ... begin at 34, 42, ..., and with each of them the window slides. Two whole frames and the third
    # are what the policy keeps: there is room for all of it.
    ends = range(10 if frame_by_frame else 34, 300, 8)
    for wanted in range(61):
        expected = min(wanted, next(end for end in ends if end > computed) - computed)
        assert chunk(kv, video, wanted) == expected
        assert chunk(absolute, still, wanted) == (expected if frame_by_frame else wanted)
        assert chunk(kv, text, wanted) == wanted
    assert chunk(kv, text, 70) == 69, "what vLLM says holds"
    assert set(stock_choices) == {*range(61), 70}
    kv.check_empty()
    absolute.check_empty()


# --------------------------------------------------------------------------- room


def most_blocks(served: Served) -> int:
    assert served.retention is not None
    most = served.retention.most_blocks()
    assert most is not None
    return most


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
@pytest.mark.parametrize("config", [{"window": 2}, {"window": 3, "history_frames": 1}, {"window": 1}], ids=str)
def test_a_long_video_is_admitted_again_where_what_it_keeps_fits(config: dict[str, Any], positions: str) -> None:
    def admitted(spare: int) -> bool:
        # One block of the pool is the null block.
        kv = harness(ServerConfig.parse("packcache", {**config, "positions": positions}), num_blocks=most + 1 + spare)
        video = kv.add(prompt(1, 400), video_options(20, 10))
        kv.manager.video(video.request)
        return kv.kv.allocate_slots(video.request, BLOCK, full_sequence_must_fit=True) is not None

    served = harness(ServerConfig.parse("packcache", config)).add(prompt(1, 400), video_options(20, 10))
    most = most_blocks(served)
    assert most < 400 // BLOCK / 2
    assert admitted(0)
    assert not admitted(-1)


def test_a_server_says_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("vllm_packcache.engine.manager.logger.info", lambda text, *values: lines.append(text % values))
    harness(ServerConfig.parse("packcache", {"window": 2, "layout": {"tokens_per_frame": 20}}), num_blocks=101)
    (line,) = lines
    assert line.startswith("100 KV-cache blocks of 4 tokens: the longest video holds at most 16 of them (text ")
    assert line.endswith(", a request that keeps its whole cache ends at 400 tokens")


def test_room_is_reserved_for_what_a_video_may_still_take_and_not_for_what_it_has_freed() -> None:
    kv = harness(enable_caching=False)
    video, text = kv.add(prompt(1, 400), video_options(FRAME, CONDITION)), kv.add(prompt(2, 400))

    def remaining(served: Served) -> int:
        """What vLLM's scheduler reserves for a prefill that is under way."""
        request = served.request
        return kv.manager.get_num_blocks_to_allocate(
            request.request_id, 400, [], request.num_computed_tokens, 0, 400, apply_admission_cap=True
        )

    for served in (video, text):
        kv.run(served, tokens_before(10) + 3, chunk=FRAME)
    held = len(kv.held(video))
    assert held < len(kv.blocks(video))
    assert remaining(video) == most_blocks(video) - held
    assert remaining(text) == 400 // BLOCK - len(kv.blocks(text))


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("wanted", [1, 7, 64, 1000])
@pytest.mark.parametrize("frame_by_frame", [False, True])
def test_a_prompt_of_many_frames_holds_no_more_than_a_video_that_is_decoded(
    positions: str, lag: int, wanted: int, frame_by_frame: bool
) -> None:
    config = ServerConfig.parse("packcache", {"history_frames": 1.5, "window": 3, "positions": positions})
    kv = Harness(config, enable_caching=False, num_blocks=400, steps_ahead=lag, frame_by_frame=frame_by_frame)
    video = kv.add(prompt(1, 700), video_options(FRAME, CONDITION))
    assert video.retention is not None
    most = video.retention.most_blocks(lag)
    assert most is not None
    scheduler = SimpleNamespace(kv_cache_manager=kv.kv)
    choose = bound_chunks(lambda scheduler, request, computed, wanted: wanted)
    held = []
    while video.request.num_computed_tokens < 800:
        computed = video.request.num_computed_tokens
        known = video.request.num_tokens + video.request.num_output_placeholders - computed
        count = choose(scheduler, video.request, computed, min(wanted, known))
        if not video.running:
            assert kv.admit(video, count) is not None
        elif count:
            kv.step(video, count, lag)
        else:
            assert video.in_flight, "nothing is in flight, and nothing may be run"
            kv.process(video)
        held.append(len(kv.held(video)))
        kv.check()
    assert max(held) <= most
    assert wanted == 1 or max(held) == max(held[:20]), "as much is held early on as later"
    kv.check_empty()


def test_a_picture_positioned_by_row_and_column_is_no_shared_prefix() -> None:
    layout = {"grid": [4, 8], "axis_scale": [4, 8, 8], "condition_image_tokens": 32}
    kv = Harness(ServerConfig.parse("packcache", {"layout": layout}), enable_caching=True, num_blocks=50)
    ids = prompt(1, 80)
    for _ in range(2):
        video = kv.add(ids, {"packcache_condition_tokens": 80})
        hit = kv.admit(video, 200)
        kv.run(video, 10)
        kv.end(video)
    assert hit == 48, "the text before the picture"
    text = kv.add(prompt(1, 100))
    assert kv.admit(text, 200) == 48
