"""A session beside an engine that is made up: what it is sent, and what becomes of a session when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.sessions.house import House, NoRoom
from vllm_packcache.sessions.messages import Create, Reset, Step, read
from vllm_packcache.sessions.session import Session, SessionError

LAYOUT = {"grid": [2, 3], "frame_end_tokens": 2, "frame_end_ids": [50, [60, 69]], "visual_ids": [0, 9]}
"""Six visual tokens, one that is fixed, and an action: 8 tokens."""


class Engine:
    """Makes ids that follow from what it has been sent; ``fails`` is raised instead, once.

    Attributes:
        turns: prompt and parameters of every turn, and the request that it was of.
        closed: requests that were let go.
    """

    def __init__(self, most: int = 400, blocks: int = 100, slots: int = 8) -> None:
        self.turns: list[tuple[str, list[int], Any]] = []
        self.closed: list[str] = []
        self.fails: Exception | None = None
        self.stops: asyncio.Event | None = None
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=most, get_vocab_size=lambda: 100),
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=blocks + 1),
            scheduler_config=SimpleNamespace(max_num_seqs=slots),
            parallel_config=SimpleNamespace(
                data_parallel_size=1, data_parallel_size_local=1, local_engines_only=False,
                data_parallel_rank_local=None,
            ),
            max_concurrent_batches=1,
        )  # fmt: skip

    async def generate(
        self, turns: Any, params: Any, request_id: str, data_parallel_rank: int | None = None
    ) -> AsyncGenerator[Any, None]:
        assert params.extra_args is None
        known: list[int] = []
        try:
            async for turn in turns:
                ids, own = list(turn.prompt["prompt_token_ids"]), turn.sampling_params
                self.turns.append((request_id, ids, own))
                if self.fails is not None:
                    error, self.fails = self.fails, None
                    raise error
                if self.stops is not None:
                    await self.stops.wait()
                known += ids
                for number in range(own.max_tokens):
                    made = (sum(known[-8:]) + number) % 10
                    last = number == own.max_tokens - 1
                    known.append(made)
                    answer = SimpleNamespace(token_ids=[made], finish_reason="length" if last else None)
                    yield SimpleNamespace(outputs=[answer])
                    await asyncio.sleep(0)
                known.pop()
        finally:
            self.closed.append(request_id)


def house(engine: Engine, policy: str = "packcache", sessions: dict[str, Any] | None = None, **options: Any) -> House:
    usual = {"window": 2, "history_frames": 1} if policy == "packcache" else {}
    config = {"layout": LAYOUT, "sessions": sessions or {}, **usual, **options}
    return House(engine, ServerConfig.parse(policy, config))  # type: ignore[arg-type]


def opening(**more: Any) -> Create:
    return Create(ids=[1, 2, 3], **more)


def played(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def frames(session: Session, count: int) -> list[Any]:
    return [await session.begin([61] * session.needed()).whole() for _ in range(count)]


def test_a_turn_begins_with_the_last_token_and_what_stands_between() -> None:
    async def work() -> None:
        engine = Engine()
        session = house(engine).create(opening())
        first, second = await frames(session, 2)
        (_, prompt, params), (_, later, more) = engine.turns
        assert prompt == [1, 2, 3]
        assert params.max_tokens == 6
        assert later == [first.ids[-1], 50, 61]
        assert more.extra_args["packcache_condition_tokens"] == 3
        assert (params.extra_args["packcache_session_tokens"], more.extra_args["packcache_session_tokens"]) == (0, 8)
        assert params.ignore_eos
        assert session.ids == [1, 2, 3, *first.ids, 50, 61, *second.ids]
        assert (first.number, second.number, session.frames, session.needed()) == (0, 1, 2, 1)
        session.end(SessionError(404, "over"))
        while not engine.closed:
            await asyncio.sleep(0.01)

    played(work)


def test_seeds_are_of_frames() -> None:
    async def work() -> None:
        engine = Engine()
        own = house(engine)
        session = own.create(opening(sampling={"seed": 7, "temperature": 1.0}))
        await frames(session, 3)
        session.reset(0)
        await frames(session, 2)
        seeds = [params.seed for _, _, params in engine.turns]
        assert len(set(seeds[:3])) == 3
        assert seeds[3:] == seeds[1:3]
        session.end(SessionError(404, "over"))

    played(work)


def test_what_is_forgotten_is_said_with_the_turn() -> None:
    async def work() -> None:
        engine = Engine(most=120)
        session = house(engine).create(opening())
        made = await frames(session, 60)
        assert [frame.number for frame in made] == list(range(60))
        assert not any(frame.began_anew for frame in made)
        assert len({request for request, _, _ in engine.turns}) == 1
        assert len(session.ids) <= 120
        counted = 0
        for _, prompt, params in engine.turns:
            options = params.extra_args
            assert options["packcache_session_tokens"] == counted
            counted += len(prompt) + params.max_tokens - 1 - 8 * options["packcache_forget_frames"]
            assert counted < 120
        assert session.exact
        assert session.state_after(59) == (session.ids, session.forgotten)
        with pytest.raises(SessionError, match=r"frame must be -1 \(the opening\) or from \d+ to 59"):
            session.reset(2)
        fork = session.fork("other", None)
        assert not fork.exact
        session.end(SessionError(404, "over"))

    played(work)


@pytest.mark.parametrize(
    ("policy", "options", "begins", "keeps"),
    [("reset", {"reset_frames": 6, "kept_frames": 2}, 6, 2), ("full", {}, 14, 7)],
    ids=["reset", "full"],
)
def test_a_policy_that_never_settles_begins_anew(policy: str, options: Any, begins: int, keeps: int) -> None:
    async def work() -> None:
        engine = Engine(most=3 + 8 * 14)
        session = house(engine, policy, **options).create(opening())
        made = await frames(session, 40)
        assert [frame.number for frame in made] == list(range(40))
        anew = [frame.number for frame in made if frame.began_anew]
        assert anew == list(range(begins, 40, begins - keeps))
        # The condition, and the last frames with what stands behind them.
        later = next(prompt for request, prompt, _ in engine.turns if request.endswith("-2"))
        assert len(later) == 3 + 8 * keeps
        assert later[:3] == [1, 2, 3]
        assert later[3:9] == made[begins - keeps].ids
        assert not session.exact
        session.end(SessionError(404, "over"))

    played(work)


@pytest.mark.parametrize("error", [RuntimeError("the engine stumbled"), ValueError("no such id")])
def test_a_frame_that_fails_leaves_the_session_as_it_was(error: Exception) -> None:
    async def work() -> None:
        engine, other = Engine(), Engine()
        session, straight = house(engine).create(opening()), house(other).create(opening())
        await frames(session, 2)
        before = list(session.ids)
        engine.fails = error
        with pytest.raises(SessionError) as raised:
            await session.begin([61]).whole()
        assert raised.value.status == (400 if isinstance(error, ValueError) else 500)
        assert session.ids == before
        again = await session.begin([61]).whole()
        # It is another request, which is sent all there is.
        assert engine.turns[-1][1] == [*before, 50, 61]
        assert again.number == 2
        assert len(straight.ids) == 3
        session.end(SessionError(404, "over"))

    played(work)


def test_the_engines_death_ends_them_all() -> None:
    async def work() -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = Engine()
        own = house(engine)
        session = own.create(opening())
        engine.fails = EngineDeadError()
        with pytest.raises(SessionError, match="the engine has stopped") as raised:
            await session.begin([]).whole()
        assert raised.value.status == 500
        with pytest.raises(SessionError, match="the engine has stopped"):
            session.begin([])
        own.look()
        assert own.all() == []

    played(work)


def test_one_frame_at_a_time_and_whoever_waits_hears_of_the_end() -> None:
    async def work() -> None:
        engine = Engine()
        engine.stops = asyncio.Event()
        own = house(engine)
        session = own.create(opening())
        frame = session.begin([])
        await asyncio.sleep(0.01)
        for refused in (lambda: session.begin([]), lambda: session.reset(-1), lambda: own.fork(session.name)):
            with pytest.raises(SessionError) as raised:
                refused()
            assert raised.value.status == 409
        own.delete(session.name)
        with pytest.raises(SessionError, match="this session has been deleted"):
            await frame.whole()
        with pytest.raises(SessionError, match="there is no session of this id"):
            own.find(session.name)

    played(work)


def test_sessions_are_let_in_by_what_they_hold_and_by_slots() -> None:
    async def work() -> None:
        # Of the history a frame, of the frame being made one that begins anywhere: 1 + 1 + 2 blocks.
        own = house(Engine(blocks=13))
        sessions = [own.create(opening()) for _ in range(3)]
        with pytest.raises(NoRoom) as raised:
            own.create(opening())
        assert 1 <= raised.value.wait <= 60
        with pytest.raises(NoRoom):
            own.fork(sessions[0].name)
        own.delete(sessions[0].name)
        own.fork(sessions[1].name)
        # A slot is left to others.
        own = house(Engine(blocks=1000, slots=3))
        for _ in range(2):
            own.create(opening())
        with pytest.raises(NoRoom):
            own.create(opening())
        with pytest.raises(SessionError, match="a session holds 4 blocks of 16 tokens, and the KV cache has 3"):
            house(Engine(blocks=3)).create(opening())

    played(work)


def test_who_waits_or_lives_too_long_has_to_go() -> None:
    async def work() -> None:
        own = house(Engine(), sessions={"idle_seconds": 0.05})
        waiting = own.create(opening())
        while own.all():
            await asyncio.sleep(0.02)
        with pytest.raises(SessionError, match=r"this session has waited for 0\.05 s"):
            waiting.begin([])
        own = house(Engine(), sessions={"lifetime_seconds": 0.05})
        living = own.create(opening())
        own.limits = own.limits.model_copy(update={"idle_seconds": 0.2})
        while living.ended is None:
            await asyncio.sleep(0.01)
        assert "has lived for 0.05 s" in str(living.ended)

    played(work)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Step, "{", "this must be a JSON object: Invalid JSON"),
        (Step, "3", "this must be a JSON object, not 3"),
        (Step, '{"given_ids": [1.5]}', "given_ids.0: input should be a valid integer"),
        (Step, '{"stream": "yes"}', "stream: input should be a valid boolean"),
        (Create, '{"sampling": {"seed": -1}}', "sampling.seed: input should be greater than or equal to 0"),
        (Reset, '{"frame": -2}', "frame: input should be greater than or equal to -1"),
        (Reset, '{"frames": 2}', "frames is no known option: known are type, frame"),
    ],
)
def test_messages_are_checked(kind: Any, text: str, words: str) -> None:
    with pytest.raises(SessionError) as raised:
        read(kind, text)
    assert raised.value.status == 400
    assert str(raised.value).startswith(words)


@pytest.mark.parametrize("name", ["condition_tokens", "session_tokens", "forget_frames", "forget_from", "frames"])
def test_what_a_session_says_itself_is_no_option_of_a_client(name: str) -> None:
    async def work() -> None:
        with pytest.raises(SessionError, match=rf"options\.{name} is not for a session: leave it out"):
            house(Engine()).create(opening(options={name: 1}))

    played(work)


GUIDED = {"guidance": 3.0, "negative_prompt_ids": list(range(20))}


def test_a_guided_session_is_let_in_by_what_both_of_its_streams_hold() -> None:
    async def work() -> None:
        # Of the history a frame, and of the frame being made one that begins anywhere: 4 blocks in a stream,
        # and 5 with a condition of 20 tokens.
        own = house(Engine(blocks=13), guidance=True)
        own.create(opening(options=GUIDED))
        own.create(opening())
        with pytest.raises(NoRoom):
            own.create(opening())
        with pytest.raises(SessionError, match="a session holds 9 blocks of 16 tokens, and the KV cache has 8"):
            house(Engine(blocks=8), guidance=True).create(opening(options=GUIDED))

    played(work)


def test_a_guided_session_says_so_with_every_turn_and_never_outgrows_the_server() -> None:
    async def work() -> None:
        engine = Engine(most=140)
        session = house(engine, guidance=True).create(opening(options=GUIDED))
        made = await frames(session, 40)
        assert not any(frame.began_anew for frame in made)
        assert {params.extra_args["packcache_guidance"] for _, _, params in engine.turns} == {3.0}
        assert all(params.extra_args["packcache_negative_prompt_ids"] == [*range(20)] for _, _, params in engine.turns)
        # The second stream's condition is longer by 17 tokens.
        assert len(session.ids) + 17 <= 140
        plain = house(Engine(most=140), guidance=True).create(opening())
        await frames(plain, 40)
        assert len(plain.ids) < session.resident_tokens + len(session.ids)
        assert plain.resident_tokens < session.resident_tokens <= 2 * plain.resident_tokens + 17
        for own in (session, plain):
            own.end(SessionError(404, "over"))

    played(work)


def test_what_guidance_leads_away_from_is_said_once_for_all_turns() -> None:
    async def work() -> None:
        engine = Engine()
        session = house(engine, guidance={"scale": 2.0, "negative_prompt_ids": [7, 8]}).create(opening())
        await frames(session, 2)
        assert [params.extra_args["packcache_negative_prompt_ids"] for _, _, params in engine.turns] == [[7, 8], [7, 8]]
        session.end(SessionError(404, "over"))
        for options, words in (
            ({"guidance": 2.0}, r"options\.negative_prompt_ids is needed"),
            (
                {**GUIDED, "negative_prompt_ids": [3, 100]},
                r"options\.negative_prompt_ids must be below 100, .*, not 100",
            ),
        ):
            with pytest.raises(SessionError, match=words):
                house(Engine(), guidance=True).create(opening(options=options))
        with pytest.raises(SessionError, match=r"options\.guidance is 3, and this server has no room"):
            house(Engine()).create(opening(options=GUIDED))

    played(work)
