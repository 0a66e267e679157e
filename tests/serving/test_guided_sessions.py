"""Guided sessions, on vLLM's V2 runner: frame after frame equals one long guided request and the loop, to the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.margins import TIE, CarefulReference, Tie, numbers
from tests.runner import needs_v2
from tests.serving.conftest import prompt, run, sampling, schedule_asynchronously
from tests.serving.turns import Played, finish
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.engine.manager import retention_managers
from vllm_packcache.reference.guided import GuidedVideo

pytestmark = needs_v2

BLOCK, FRAME, GIVEN = 32, 32, 22
CONFIG: dict[str, Any] = {
    "guidance": True,
    "window": 2,
    "history_frames": 1,
    "layout": {
        "grid": [2, 3], "frame_start_tokens": 1, "frame_start_ids": [201], "visual_ids": [20, 119],
        "frame_end_tokens": FRAME - 7, "frame_end_ids": [202, 203, *[[20, 119]] * GIVEN, 204],
    },
}  # fmt: skip
"""Of the 32 tokens of a frame the model makes six, and most of the others are a client's."""

SCALE = 3.0


def given(seed: int, number: int) -> list[int]:
    """What the client gives before frame ``number`` of a session."""
    return numbers(seed, number).integers(20, 120, GIVEN).tolist() if number else []


def opened(llm: Any, name: str, seed: int, condition: int = 37, negative: int = 50, **options: Any) -> Played:
    """A guided session; with ``negative=0`` one that is not."""
    if negative:
        options = {"guidance": SCALE, "negative_prompt_ids": prompt(negative, seed=1000 + seed), **options}
    return Played(llm, name, CONFIG, prompt(condition, seed=seed), condition, **options)


def follow(sessions: Sequence[tuple[Played, int]], frames: range, others: Any = None) -> None:
    """Play some frames of sessions, each of a seed, side by side."""
    for number in frames:
        for session, seed in sessions:
            session.begin(given(seed, number))
        finish([session for session, _ in sessions], others)


def check(reference: CarefulReference, session: Played, policy: str = "packcache") -> GuidedVideo:
    """Assert that what the model has made of a session is what the loop makes of it, and return what the loop makes."""
    extra = {f"packcache_{name}": value for name, value in session.extra(0, 0).items()}
    made = ServerConfig.parse(policy, CONFIG).request(extra, session.ids)
    assert made is not None
    assert made.grammar is not None
    first, second = made.streams
    video = GuidedVideo(session.condition, second.condition, SCALE, first.plan, second.plan, BLOCK)
    assert not wrong(reference, session, video)
    return video


def wrong(reference: CarefulReference, session: Played, video: GuidedVideo, ties: bool = False) -> list[int]:
    """Tokens that the loop would have made otherwise."""
    picture = range(20, 120)
    logits = video.logits(reference, session.ids[:-1])[:, picture.start : picture.stop]
    begun, found = session.condition, []
    for frame in range((len(session.ids) - begun) // FRAME + 1):
        for place in range(begun + frame * FRAME + 1, begun + frame * FRAME + 7):
            if place >= len(session.ids):
                break
            best = logits[place - begun].topk(2)
            if best.values[0] - best.values[1] >= 2 * SCALE * TIE:
                found += [place] * (session.ids[place] - picture.start != int(best.indices[0]))
            elif not ties:
                raise Tie(f"token {place}")
    return found


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_session_equals_one_long_request(
    engine: Any, reference: CarefulReference, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Beside it one that is not guided, and a text."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = engine("packcache", CONFIG, variant=f"guided sessions {ahead}", max_num_batched_tokens=128)
    frames = 4
    session, plain = opened(llm, "one", 61), opened(llm, "plain", 62, negative=0)
    texts: list[list[int]] = []
    llm.llm_engine.add_request("text", {"prompt_token_ids": prompt(60, seed=63)}, sampling(18))
    follow([(session, 61), (plain, 62)], range(frames), lambda output: texts.append(list(output.outputs[0].token_ids)))
    video = check(reference, session)
    others = {
        "not guided": video._replace(scale=1.0),
        "nothing of the second stream is dropped": video._replace(negative_plan=None),
        "nothing of the first stream is dropped": video._replace(plan=None),
    }
    assert [name for name, other in others.items() if not wrong(reference, session, other, ties=True)] == []
    for own in (session, plain):
        own.end()
    made, ids = session.ids[37:], session.ids[:37]
    params = sampling(
        len(made), condition_tokens=37, given_ids=[own for number in range(1, frames + 1) for own in given(61, number)],
        guidance=SCALE, negative_prompt_ids=prompt(50, seed=1061),
    )  # fmt: skip
    assert run(llm, [ids], [params]) == [made]
    alone = opened(llm, "alone", 62, negative=0)
    follow([(alone, 62)], range(2))
    alone.end()
    assert alone.ids == plain.ids[: len(alone.ids)]
    reference.check(prompt(60, seed=63), texts[-1], 18)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize(
    ("condition", "negative", "options"),
    [(37, 50, {}), (70, 9, {"episodes": 1, "history_frames": 2})],
    ids=["what changed", "episodes"],
)
def test_what_is_forgotten_changes_nothing(
    engine: Any, reference: CarefulReference, condition: int, negative: int, options: dict[str, Any]
) -> None:
    """Frames go out of both streams; a session that forgets none makes the same."""
    llm = engine("packcache", CONFIG, variant="guided sessions False", max_num_batched_tokens=128)
    lengths = {"condition": condition, "negative": negative}
    long = opened(llm, "long", 64, **lengths, **options)
    short = opened(llm, "short", 64, longest=condition + FRAME * 7 + 8, **lengths, **options)
    plain = opened(llm, "plain", 65, condition=condition, negative=0, longest=condition + FRAME * 7 + 8, **options)
    sessions = [(long, 64), (short, 64), (plain, 65)]
    follow(sessions, range(11))
    assert short.forgotten >= 2
    assert short.made == long.made
    check(reference, long)
    managers = retention_managers(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager)
    tables = [[len(manager.req_to_blocks[own.internal]) for manager in managers] for own in (long, short)]
    gone = short.forgotten * FRAME // BLOCK
    assert [most - least for most, least in zip(*tables, strict=True)] == [gone, gone]
    for session, _ in sessions:
        session.end()


def test_a_turn_that_is_preempted_comes_out_the_same(engine: Any, reference: CarefulReference) -> None:
    """In the middle of a turn both streams are computed again, the condition of the first found in the cache or not."""
    for caching in (False, True):
        llm = engine(
            "packcache", CONFIG, variant="guided sessions False", max_num_batched_tokens=128,
            enable_prefix_caching=caching,
        )  # fmt: skip
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        session = opened(llm, "preempted", 66, condition=70)
        follow([(session, 66)], range(4))
        session.begin(given(66, 4))
        (request,) = scheduler.requests.values()
        while request.num_output_tokens < 2:
            for output in llm.llm_engine.step():
                session.made[-1] += output.outputs[0].token_ids
                session.ids += output.outputs[0].token_ids
                session.counted += output.outputs[0].token_ids
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        assert (scheduler.kv_cache_manager.get_computed_blocks(request)[1] > 0) == caching
        finish([session])
        follow([(session, 66)], range(5, 6))
        check(reference, session)
        session.end()


def test_a_turn_that_gives_another_negative_prompt_ends_its_session_alone(engine: Any) -> None:
    llm = engine("packcache", CONFIG, variant="guided sessions False", max_num_batched_tokens=128)
    good, bad = opened(llm, "good", 67), opened(llm, "bad", 68)
    follow([(good, 67), (bad, 68)], range(2))
    bad.options["negative_prompt_ids"] = bad.options["negative_prompt_ids"][::-1]
    for session, seed in ((bad, 68), (good, 67)):
        session.begin(given(seed, 2))
    ended: list[str] = []
    finish([good], lambda output: ended.append(output.outputs[0].finish_reason))
    assert ended[-1:] == ["error"]
    good.end()
