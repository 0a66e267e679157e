"""All sessions of a server: who is let in, and who has to go."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.core.retention import PolicyError
from vllm_packcache.core.session import Forgetting, Turns
from vllm_packcache.hooks.roles import held_blocks, pool_blocks, steps_ahead
from vllm_packcache.sessions.messages import Create
from vllm_packcache.sessions.pictures import pictures_of, read_picture
from vllm_packcache.sessions.playing import Opening, play_of
from vllm_packcache.sessions.session import Session, SessionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient

_LONGEST_WAIT = 60
"""Seconds after which a client that was sent away may ask again, at most."""

_LOOKS = 1.0
"""Seconds between two looks at who has waited too long, at most."""


class House:
    """The sessions of one server.

    A session is let in if what all of them hold at most fits into the KV cache, so that each can always go on: a paused
    session cannot be preempted, and two that wait for each other's blocks would wait for ever.

    Args:
        engine: of the server.
        config: of the server.

    Raises:
        ConfigError: what the configuration names for pictures, or to play, is not to be had or does not fit.
    """

    def __init__(self, engine: EngineClient, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        self.limits = config.sessions
        self.coding = None if config.layout is None else config.layout.coding()
        self.pictures = pictures_of(self.limits.pictures)
        self.play = play_of(self.limits.play, self.coding)
        for opening in () if self.play is None else self.play.openings:
            self._check(opening)
        self._sessions: dict[str, Session] = {}
        self._held: dict[str, int] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def _vllm(self) -> VllmConfig:
        return self.engine.vllm_config

    @property
    def _ranks(self) -> int:
        return self._vllm.parallel_config.data_parallel_size

    def find(self, name: str) -> Session:
        """The session of that id.

        Raises:
            SessionError: there is none, or it has ended.
        """
        session = self._sessions.get(name)
        if session is None:
            raise SessionError(404, "there is no session of this id: it was never begun, deleted, or waited too long")
        return session

    def all(self) -> list[Session]:
        """Every session, the oldest first."""
        return list(self._sessions.values())

    def create(self, message: Create) -> Session:
        """Begin a session; its first frame is made when it is asked for.

        Raises:
            SessionError: something of it is wrong (400), or there is no room (503).
        """
        ids, options, made, most = self._begun(message)
        sampling = message.sampling.model_dump()
        return self._admit(made, lambda name, rank: Session(
            name, self.engine, made, options, ids, sampling, most, self._block_size, rank
        ), most)  # fmt: skip

    def _begun(self, message: Create) -> tuple[list[int], dict[str, Any], VideoRequest, int]:
        ids = self._opening(message)
        options = self._options(message, ids)
        made = self._video(options, ids)
        for stream in made.streams[1:]:
            self._check_ids(stream.condition, "options.negative_prompt_ids")
        return ids, options, made, self._most_tokens(made, ids)

    def _check(self, opening: Opening) -> None:
        try:
            self._begun(opening.session)
        except SessionError as error:
            raise ConfigError(f"sessions: play: opening {shown(opening.name)}: {error}") from None

    def fork(self, name: str) -> Session:
        """Another session that goes on where this one is.

        Raises:
            SessionError: there is no such session (404), a frame is being made (409), or there is no room (503).
        """
        session = self.find(name)
        return self._admit(session.made, session.fork, session.most_tokens)

    def delete(self, name: str) -> None:
        """End a session.

        Raises:
            SessionError: there is none.
        """
        self._end(self.find(name), SessionError(404, "this session has been deleted"))

    def given(self, session: Session, action: Mapping[str, Any] | None, ids: Sequence[int] | None) -> list[int]:
        """Ids that a client gives before the next frame, by an action or as they are.

        Raises:
            SessionError: it gives both, or an action that is not known.
        """
        if action is None:
            return list(ids or ())
        if ids is not None:
            raise SessionError(400, "action and given_ids say the same: give one of them")
        if self.coding is None:
            raise SessionError(
                400, "this server's layout has no actions: give given_ids, or start it with one that has"
            )
        if session.needed() == 0:
            raise SessionError(400, "nothing is given before this frame: leave action out")
        try:
            return self.coding.ids(action)
        except ValueError as error:
            raise SessionError(400, f"action: {error}") from None

    def start(self) -> None:
        """Begin to look for sessions that have waited too long."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())

    def stop(self) -> None:
        """End all of them: the server stops."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for session in self.all():
            self._end(session, SessionError(503, "the server is stopping"))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_LOOKS, self.limits.idle_seconds / 4))
            self.look()

    def look(self) -> None:
        """End sessions that have waited too long, lived too long, or lost their engine."""
        now = time.monotonic()
        for session in self.all():
            if session.ended is not None:
                self._end(session, session.ended)
            elif now - session.created > self.limits.lifetime_seconds:
                self._end(session, SessionError(404, f"this session has lived for {self.limits.lifetime_seconds:g} s"))
            elif not session.busy and now - session.used > self.limits.idle_seconds:
                self._end(session, SessionError(404, f"this session has waited for {self.limits.idle_seconds:g} s"))

    def _end(self, session: Session, why: SessionError) -> None:
        self._sessions.pop(session.name, None)
        self._held.pop(session.name, None)
        session.end(why)

    @property
    def _block_size(self) -> int:
        return self._vllm.cache_config.block_size

    def _opening(self, message: Create) -> list[int]:
        if (message.ids is None) == (message.picture is None):
            raise SessionError(400, "a session begins with ids or with a picture: give one of the two")
        if message.ids is not None:
            if not message.ids:
                raise SessionError(400, "ids must have at least one id")
            self._check_ids(message.ids, "ids")
            return list(message.ids)
        assert message.picture is not None
        if self.pictures is None or not hasattr(self.pictures, "encode"):
            raise SessionError(
                400, "this server makes no ids of pictures: give ids, or start it with sessions: pictures"
            )
        try:
            return np.asarray(self.pictures.encode(read_picture(message.picture, self.pictures.size))).ravel().tolist()
        except ValueError as error:
            raise SessionError(400, str(error)) from None

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        vocabulary = self._vllm.model_config.get_vocab_size()
        if max(ids) >= vocabulary:
            raise SessionError(400, f"{where} must be below {vocabulary}, the ids of the model, not {max(ids)}")

    def _options(self, message: Create, ids: list[int]) -> dict[str, Any]:
        for name in ("condition_tokens", "session_tokens", "forget_frames", "forget_from", "frames", "given_ids"):
            if name in message.options:
                raise SessionError(400, f"options.{name} is not for a session: leave it out")
        options = {REQUEST_PREFIX + str(name): value for name, value in message.options.items()}
        condition = message.condition_tokens
        if condition is None:
            condition = self._usual_condition(options, ids)
        return self._with_negative({**options, f"{REQUEST_PREFIX}condition_tokens": condition}, ids)

    def _with_negative(self, options: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """``options`` with the negative prompt: a family's follows from the condition, which no later turn has."""
        if options[f"{REQUEST_PREFIX}condition_tokens"] > len(ids):
            return options
        try:
            made = self.config.request(options, ids)
        except ValueError as error:
            raise _refused(error) from None
        if made is None or len(made.streams) == 1:
            return options
        return {**options, f"{REQUEST_PREFIX}negative_prompt_ids": list(made.streams[1].condition)}

    def _usual_condition(self, options: dict[str, Any], ids: list[int]) -> int:
        """All of the opening; where it ends with the picture of a frame that has an end, with that end."""
        condition = {f"{REQUEST_PREFIX}condition_tokens": len(ids), f"{REQUEST_PREFIX}guidance": 1}
        turns = Turns.of(self._video({**options, **condition}, ids))
        layout = turns.plan.layout
        image, frame = layout.condition_image_tokens, layout.tokens_per_frame
        rest = frame - 1 - turns.picture[1]
        if image and image % frame == 0 and len(ids) % frame == frame - rest:
            return len(ids) + rest
        return len(ids)

    def _video(self, options: dict[str, Any], ids: list[int]) -> VideoRequest:
        try:
            # What the client gives behind the opening may belong to the condition.
            made = self.config.video({**options, f"{REQUEST_PREFIX}session_tokens": 2**20}, len(ids))
            if made is None:
                raise ConfigError("a session needs a layout: start the server with one, or give options.grid")
            turns = Turns.of(made)
            start = turns.next_picture(len(ids))[1]
            layout = made.streams[0].plan.layout
            # What a frame has behind its picture comes with the first step.
            end = layout.tokens_per_frame - 1 - turns.picture[1]
            if layout.condition_tokens > min(start, len(ids) + end):
                raise ConfigError(
                    f"condition_tokens is {layout.condition_tokens}, and the opening has {len(ids)} ids: give more, or "
                    "lower it"
                )
            if made.grammar is not None and (wrong := made.grammar.first_wrong(ids)) is not None:
                allowed = made.grammar.allowed(wrong)
                raise ConfigError(
                    f"id {wrong} of the opening is in a frame, where it must be from {allowed.first} to "
                    f"{allowed.last}, not {ids[wrong]}: see layout, and condition_tokens"
                )
        except ValueError as error:
            raise _refused(error) from None
        return made

    def _most_tokens(self, made: VideoRequest, ids: list[int]) -> int:
        """Tokens that the engine may count of a session.

        Raises:
            SessionError: there is no room for two frames.
        """
        plan, layout = made.streams[0].plan, made.streams[0].plan.layout
        most = self._vllm.model_config.max_model_len
        if plan.positions.window is None and self.config.position_limit is not None:
            most = min(most, self.config.position_limit)
        # Tokens are counted in the first stream, and another may have a longer condition.
        most -= max(0, *(-stream.start for stream in made.streams))
        if plan.policy.begins_anew is not None:
            most = min(most, layout.frame_start(plan.policy.begins_anew[0] + 1))
        shortest = Forgetting(plan, self._block_size).shortest
        wanted = max(shortest or 0, layout.frame_start(self.limits.remembered_frames), layout.frame_start(2))
        opening = Turns.of(made).next_picture(len(ids))[2]
        least = max(opening, layout.frame_start(2))
        if least > most:
            raise SessionError(
                400,
                f"a session of this opening needs {least} tokens, and the server makes {most}: give fewer, make frames "
                "smaller, or start it with a larger --max-model-len",
            )
        window = plan.positions.window
        if window is not None and self.config.position_limit is not None:
            slid = layout.frame_start(window + 2)
            limits = [
                (
                    own.plan.positions.limit(own.own_tokens(min(most, wanted))),
                    own.plan.positions.window_tokens(own.own_tokens(slid)),
                )
                for own in made.streams
            ]
            limit = max(chain.from_iterable(limits))
            if limit > self.config.position_limit:
                raise SessionError(
                    400,
                    f"this session needs {limit} positions, and the model has {self.config.position_limit}: lower "
                    "options.window or the size of a frame, or shorten the condition",
                )
        return min(most, max(wanted, least))

    def _blocks(self, made: VideoRequest, most_tokens: int) -> int:
        try:
            return held_blocks(made.streams, most_tokens, self._block_size, steps_ahead(self._vllm))
        except PolicyError as error:
            raise SessionError(400, str(error)) from None

    def _admit(self, made: VideoRequest, begin: Any, most_tokens: int) -> Session:
        blocks, pool = self._blocks(made, most_tokens), pool_blocks(self._vllm)
        slots = self._vllm.scheduler_config.max_num_seqs
        if pool is not None and blocks > pool:
            raise SessionError(
                400,
                f"a session holds {blocks} blocks of {self._block_size} tokens, and the KV cache has {pool}: let the "
                "policy keep less, make frames smaller, or start the server with a larger KV cache",
            )
        rooms = []
        for rank in range(self._ranks):
            of_rank = [own for own in self.all() if self._ranks == 1 or own.rank == rank]
            held = sum(self._held[own.name] for own in of_rank)
            # One slot is left to others, which would else wait as long as somebody plays.
            if len(of_rank) < max(1, slots - 1) and (pool is None or held + blocks <= pool):
                rooms.append((held, rank))
        if not rooms:
            raise NoRoom(self._wait())
        rank = min(rooms)[1]
        session: Session = begin(f"session-{secrets.token_hex(12)}", rank if self._ranks > 1 else None)
        self._sessions[session.name], self._held[session.name] = session, blocks
        self.start()
        return session

    def _wait(self) -> int:
        """Seconds until the first session has waited too long, if nobody plays on."""
        now = time.monotonic()
        left = [self.limits.idle_seconds - (now - own.used) for own in self.all()]
        return max(1, min(_LONGEST_WAIT, math.ceil(min(left, default=1))))


def _refused(error: ValueError) -> SessionError:
    """What is wrong with a request, as clients of sessions call its options."""
    return SessionError(400, str(error).replace(REQUEST_PREFIX, "options."))


def check_names(config: ServerConfig) -> None:
    """Check that what an operator has named for sessions can be imported, and is what it must be.

    Raises:
        ConfigError: it cannot, or is not.
    """
    pictures_of(config.sessions.pictures)
    play_of(config.sessions.play, None if config.layout is None else config.layout.coding())


class NoRoom(SessionError):
    """There is no room for another session.

    Args:
        wait: seconds after which to ask again.
    """

    def __init__(self, wait: int) -> None:
        super().__init__(503, "the KV cache has no room for another session now: end one, or try again later", wait)
