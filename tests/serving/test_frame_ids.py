"""Frames whose ids the layout says: what is sampled equals a plain loop that masks logits and inserts what is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from tests.margins import TIE, Tie, numbers
from tests.runner import V2, shorter
from tests.serving.conftest import prompt, run, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig

GRID = shorter((4, 5), (2, 4))
ACTIONS = (210, 219), (220, 229)
LAYOUT = {
    "grid": list(GRID),
    "frame_start_ids": [200, "rows", 201, "columns"],
    "digit_ids": list(range(240, 250)),
    "row_end_tokens": 1,
    "row_end_ids": [202],
    "frame_end_tokens": 3,
    "frame_end_ids": [203, *map(list, ACTIONS)],
    "visual_ids": [20, 119],
}
CONFIG: dict[str, Any] = {"layout": LAYOUT, "window": 3, "history_frames": 1.5}


def literally(rows: int, columns: int, actions: tuple[int, int]) -> list[range]:
    """What may stand at each place of a frame, token by token."""
    digits = [[range(240 + int(digit), 241 + int(digit)) for digit in str(number)] for number in (rows, columns)]
    frame = [range(200, 201), *digits[0], range(201, 202), *digits[1]]
    for _ in range(rows):
        frame += [*[range(20, 120)] * columns, range(202, 203)]
    return [*frame, range(203, 204), *(range(own, own + 1) for own in actions)]


def played(seed: int, frames: int) -> list[tuple[int, int]]:
    """Actions of some frames."""
    random = numbers(seed)
    return [tuple(int(random.integers(first, last + 1)) for first, last in ACTIONS) for _ in range(frames)]  # type: ignore[misc]


def video(seed: int, condition: int, frames: int, grid: tuple[int, int] = GRID, **options: Any) -> Any:
    """A request, and what may stand at each of the tokens that it makes."""
    actions = played(seed, frames)
    allowed = [place for own in actions for place in literally(*grid, own)]
    given = [token for own in actions for token in own]
    more = {} if grid == GRID else {"grid": list(grid)}
    params = sampling(len(allowed), given_ids=given, **more, **options)
    return prompt(condition, seed=seed), params, allowed


def check(
    reference: Any, config: dict[str, Any], ids: list[int], params: Any, allowed: list[range], made: list[int]
) -> None:
    """Each token is the likeliest of those that may stand where it is."""
    plan = ServerConfig.parse("packcache", config).plan(params.extra_args, len(ids))
    logits = reference.logits([*ids, *made[:-1]], plan, 32)[len(ids) - 1 :]
    assert len(made) == len(allowed) == len(logits)
    for number, (own, may, token) in enumerate(zip(logits, allowed, made, strict=True)):
        best = own[may.start : may.stop].topk(min(2, len(may))).values
        if len(may) > 1 and best[0] - best[1] < TIE:
            raise Tie(f"token {number}")
        assert token == may.start + int(own[may.start : may.stop].argmax()), f"token {number} of {len(made)}"


def check_all(llm: Any, reference: Any, config: dict[str, Any], requests: list[Any]) -> None:
    answers = run(llm, [ids for ids, _, _ in requests], [params for _, params, _ in requests])
    for (ids, params, allowed), made in zip(requests, answers, strict=True):
        if allowed is None:
            reference.check(ids, made, params.max_tokens)
        else:
            check(reference, config, ids, params, allowed, made)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turn", "ahead"])
def test_frames_have_the_ids_of_their_layout(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Two sizes, one that opts out, and a text, in one batch."""
    schedule_asynchronously(monkeypatch, asynchronous)
    llm = engine("packcache", CONFIG, variant=f"ids {asynchronous}", max_num_batched_tokens=128)
    frames = shorter(9, 3)
    requests = [
        video(1, 70, frames),
        video(2, 5, frames, (3, 11), condition_tokens=5),
        video(3, 41, shorter(5, 2), policy="full"),
        (prompt(50, seed=9), sampling(shorter(60, 20)), None),
    ]
    check_all(llm, reference, CONFIG, requests)


def test_frames_that_are_given_first_are_followed_by_others(engine: Any, reference: Any) -> None:
    """A prompt that ends inside a frame, behind what a client gives of another."""
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    first, params, allowed = video(4, 33, shorter(7, 3))
    (made,) = run(llm, [first], [params])
    length = len(literally(*GRID, (0, 0)))
    for cut in (length, length - 1, length // 2, 2 * length + 1):
        frames = played(4, shorter(7, 3))[cut // length :]
        given = [token for own in frames for token in own]
        rest = sampling(len(made) - cut, given_ids=given, condition_tokens=33)
        ids = first + made[:cut]
        check_all(llm, reference, CONFIG, [(ids, rest, allowed[cut:])])


def test_preempted_videos_come_out_the_same(engine: Any, reference: Any, preemptions: list[int]) -> None:
    frames, blocks = shorter((16, 44), (4, 9))
    crowded = engine(
        "packcache", CONFIG, variant="ids crowded", num_gpu_blocks_override=blocks, max_model_len=shorter(1024, 192),
        max_num_batched_tokens=256,
    )  # fmt: skip
    check_all(crowded, reference, CONFIG, [video(20 + i, 70 + i, frames, policy="full") for i in range(4)])
    assert preemptions


def test_a_bias_chooses_among_what_may_stand_there(engine: Any, reference: Any) -> None:
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    ids, params, allowed = video(5, 30, 2)
    params.logit_bias = {25: 100.0, 5: 100.0}
    (made,) = run(llm, [ids], [params])
    assert made == [25 if 25 in may else token for may, token in zip(allowed, made, strict=True)]
    assert all(token in may for may, token in zip(allowed, made, strict=True))
    # What forbids all that may stand there gives way.
    params.logit_bias, params.allowed_token_ids = None, [5, 6]
    (made,) = run(llm, [ids], [params])
    assert all(token in may for may, token in zip(allowed, made, strict=True))


@pytest.mark.skipif(V2, reason="the V2 runner's kernel for random numbers cannot be interpreted")
def test_what_is_drawn_obeys_too(engine: Any) -> None:
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    ids, params, allowed = video(6, 30, 4)
    params.temperature, params.top_p, params.seed = 1.0, 0.8, 7
    (made,) = run(llm, [ids], [params])
    assert all(token in may for may, token in zip(allowed, made, strict=True))
    assert len({token for may, token in zip(allowed, made, strict=True) if len(may) > 1}) > 30
    assert run(llm, [ids], [params]) == [made]


def test_structured_outputs_are_refused_to_a_video(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # They need a tokenizer, and this engine has none.
    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", lambda *_: None)
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    ids, params, _ = video(7, 30, 1)
    params.structured_outputs = StructuredOutputsParams(choice=["a", "b"])
    refused(llm, ids, params, "leave structured outputs out of a video")


def refused(llm: Any, ids: list[int], params: Any, words: str) -> None:
    with pytest.raises(VLLMValidationError, match=words):
        run(llm, [ids], [params])


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one id too few": (
        lambda own: own["packcache_given_ids"].pop(),
        "frame 2: it must have 2 ids for each frame, not 1",
    ),
    "one frame too few": (
        lambda own: own.update(packcache_given_ids=own["packcache_given_ids"][:2]),
        "packcache_given_ids must have 2 ids for each frame that is made, 4 for 2 of them, not 2",
    ),
    "none": (lambda own: own.update(packcache_given_ids=[]), "4 for 2 of them, not 0"),
    "outside its range": (
        lambda own: own["packcache_given_ids"].__setitem__(3, 219),
        "packcache_given_ids, frame 2: it must have ids from 220 to 229 as number 2, not 219",
    ),
    "a frame without rows": (
        lambda own: own.update(packcache_tokens_per_frame=40),
        "packcache_tokens_per_frame says nothing of rows, by which this server knows which ids may stand where",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_request_that_leaves_ids_out_is_refused(engine: Any, what: str) -> None:
    change, words = CHANGES[what]
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    ids, params, _ = video(8, 30, 2)
    change(params.extra_args)
    refused(llm, ids, params, words)


def test_frames_of_a_prompt_must_have_such_ids_too(engine: Any) -> None:
    llm = engine("packcache", CONFIG, variant="ids False", max_num_batched_tokens=128)
    frame = [may.start for may in literally(*GRID, (210, 220))]
    ids, params, _ = video(9, 30, 1)
    params.extra_args["packcache_condition_tokens"] = 30
    wrong = [*frame]
    wrong[6] = 19
    words = "token 36 of the prompt is in a frame, where it must be from 20 to 119, not 19"
    refused(llm, [*ids, *wrong], params, words)
    # Another that has begun: what the prompt has of it is what the client says.
    params.extra_args["packcache_given_ids"] = [211, 221]
    params.max_tokens, behind = 1, 30 + len(frame)
    last = behind + len(frame) - 2
    refused(llm, [*ids, *frame, *frame[:-1]], params, f"token {last} of the prompt .* must be 211, not 210")
    refused(
        llm, [*ids, *frame, 201], params, f"token {behind} of the prompt is in a frame, where it must be 200, not 201"
    )
