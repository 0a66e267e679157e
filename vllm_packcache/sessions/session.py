"""One session: a resumable request of the engine that makes a frame a turn, and what it takes to begin it again.

The ids that the engine counts of it are kept here too, the same and no more. So whatever becomes of the engine's
request, the next turn begins another one with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import REQUEST_PREFIX, Plan, Turn, VideoRequest
from vllm_packcache.core.session import Resident, Turns
from vllm_packcache.web.refusals import Refusal

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.protocol import EngineClient, StreamingInput


class SessionError(Refusal):
    """A session cannot do what it is asked to, or cannot go on.

    Args:
        status: of HTTP.
        message: one sentence.
        wait: seconds after which to ask again.
    """

    def __init__(self, status: int, message: str, wait: int | None = None) -> None:
        super().__init__(status, message, code=status, wait=wait)


class Frame:
    """A frame in the making: whoever waits for it reads ids as they come.

    Args:
        number: of the frame in its session.
        given: ids that the client has given before it.
        began_anew: whether older frames were left out for it, so that it saw less than it would have.
    """

    def __init__(self, number: int, given: Sequence[int], began_anew: bool) -> None:
        self.number, self.given, self.began_anew = number, list(given), began_anew
        self.ids: list[int] = []
        self.visual: list[int] = []
        self.seconds = 0.0
        self.error: SessionError | None = None
        self.done = False
        self._changed = asyncio.Event()

    def add(self, ids: Sequence[int]) -> None:
        """More has been made."""
        self.ids += ids
        self._changed.set()

    def end(self, error: SessionError | None = None) -> None:
        """Nothing comes any more."""
        self.error, self.done = error, True
        self._changed.set()

    async def parts(self) -> AsyncIterator[list[int]]:
        """Ids as they are made.

        Raises:
            SessionError: the frame cannot be finished.
        """
        seen = 0
        while True:
            if seen < len(self.ids):
                part, seen = self.ids[seen:], len(self.ids)
                yield part
            elif self.error is not None:
                raise self.error
            elif self.done:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def whole(self) -> Frame:
        """The frame when it is finished.

        Raises:
            SessionError: it cannot be finished.
        """
        async for _ in self.parts():
            pass
        return self


class Session:
    """One session.

    Args:
        name: its id.
        engine: of the server.
        made: what its turns make, as its first one says.
        options: of the request, with their prefix.
        ids: of the sequence so far.
        sampling: sampling parameters by name.
        most_tokens: that the engine may count of it.
        block_size: tokens of a KV-cache block.
        rank: the engine that it is on, of several; None: there is one.
    """

    def __init__(
        self,
        name: str,
        engine: EngineClient,
        made: VideoRequest,
        options: Mapping[str, Any],
        ids: Sequence[int],
        sampling: Mapping[str, Any],
        most_tokens: int,
        block_size: int,
        rank: int | None = None,
    ) -> None:
        self.name, self.made, self.options, self.sampling = name, made, dict(options), dict(sampling)
        self.turns = Turns.of(made)
        self.ids, self.opening = list(ids), list(ids)
        self.most_tokens, self.block_size, self.rank = most_tokens, block_size, rank
        self.forgotten, self.exact = 0, True
        # Frames before this one are followed by such as have been forgotten.
        self._gap = 0
        self.frame: Frame | None = None
        self.created = self.used = time.monotonic()
        self.ended: SessionError | None = None
        self._engine = engine
        self._inputs: asyncio.Queue[StreamingInput | None] | None = None
        self._outputs: AsyncGenerator[RequestOutput, None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._counted = 0
        self._opened = 0
        self._resident = self._nothing()

    @property
    def plan(self) -> Plan:
        """What it keeps."""
        return self.turns.plan

    @property
    def frames(self) -> int:
        """Number of the frame that is made next, from 0; frames that were given count."""
        return self.forgotten + self.turns.next_picture(len(self.ids))[0]

    @property
    def first_frame(self) -> int:
        """Number of the oldest frame that it can be reset to, besides its opening."""
        return self.forgotten + self._gap

    @property
    def busy(self) -> bool:
        """Whether a frame is being made."""
        return self.frame is not None and not self.frame.done

    @property
    def resident_tokens(self) -> int:
        """Tokens of KV cache that it holds between two turns."""
        return 0 if self._outputs is None else self._resident.live_tokens(self._counted)

    def needed(self) -> int:
        """How many ids a client gives for the next frame."""
        return len(self.turns.needed(len(self.ids)))

    def begin(self, given: Sequence[int]) -> Frame:
        """Begin the next frame, which is made whether anybody waits for it or not.

        Args:
            given: ids that the client gives before it.

        Raises:
            SessionError: one is being made (409), the ids are wrong (400), or the session has ended.
        """
        if self.ended is not None:
            raise self.ended
        if self.busy:
            raise SessionError(409, "a frame of this session is being made: wait for it, then ask for the next one")
        try:
            # The same wherever whole frames are left out before it.
            between = self.turns.given(len(self.ids), given)
        except ValueError as error:
            raise SessionError(400, f"given_ids {error}") from None
        self.used = time.monotonic()
        forget, anew = self._make_room()
        number, start, stop = self.turns.next_picture(len(self.ids))
        self.frame = Frame(self.forgotten + number, given, anew)
        self._task = asyncio.create_task(self._make(self.frame, number, between, stop - start, forget))
        return self.frame

    def _make_room(self) -> tuple[Turn, bool]:
        """Leave out old frames where the next one has no room.

        Returns:
            Which of them the engine forgets with this turn, and whether instead the session begins anew with fewer.
        """
        layout, length = self.plan.layout, len(self.ids)
        frame, _, stop = self.turns.next_picture(length)
        anew = self.plan.policy.begins_anew
        begins, keeps = anew or (
            None,
            max(1, (self.most_tokens - layout.condition_tokens) // layout.tokens_per_frame // 2),
        )
        if anew is None and stop > self.most_tokens:
            first, most, step = 0, 0, self._resident.step or 1
            if self._outputs is not None:
                first, most = self._resident.room(layout.frame_of(length - 1))
            frames = min(-(-(stop - self.most_tokens) // (layout.tokens_per_frame * step)) * step, most)
            if frames * layout.tokens_per_frame >= stop - self.most_tokens:
                self._drop(frames, first)
                return Turn(0, frames, first), False
        elif begins is None or frame < begins:
            return Turn(0, 0), False
        self._drop(max(0, frame - keeps))
        self._close()
        return Turn(0, 0), True

    def _drop(self, frames: int, first: int = 0) -> None:
        layout = self.plan.layout
        start = layout.frame_start(first)
        del self.ids[start : start + frames * layout.tokens_per_frame]
        self.forgotten, self._gap = self.forgotten + frames, max(first, self._gap - frames)
        if frames and self._resident.step and frames % self._resident.step == 0:
            self._resident.forget(frames, first)

    def _nothing(self) -> Resident:
        """Before the engine has computed anything of it."""
        return Resident(self.made.streams, self.block_size, lambda: self.ids)

    async def _make(self, frame: Frame, number: int, between: list[int], wanted: int, forget: Turn) -> None:
        began, before, error = time.monotonic(), len(self.ids), None
        try:
            await self._turn(frame, between, wanted, forget)
            self.ids += between + frame.ids
            self._counted = len(self.ids) - 1
            # One frame after the other, and of what lives now.
            self._resident.decide(number)
            frame.visual = self.turns.pictures(self.ids, number)
        except asyncio.CancelledError:
            error = self.ended or SessionError(404, "this session has been deleted")
        except SessionError as own:
            error = own
        except Exception as other:
            error = self._failed(other)
        if error is not None:
            # As it was: the next turn begins another request of the engine.
            del self.ids[before:]
            self._close()
        self.used = time.monotonic()
        frame.seconds = self.used - began
        frame.end(error)

    def _failed(self, error: Exception) -> SessionError:
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, VLLMValidationError | ValueError):
            return SessionError(400, str(error))
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, EngineDeadError):
            self.ended = SessionError(500, "the engine has stopped, and this session with it: start the server again")
            return self.ended
        return SessionError(500, f"the frame was not finished ({said[:80]}): ask for it again")

    async def _turn(self, frame: Frame, between: list[int], wanted: int, forget: Turn) -> None:
        from vllm.engine.protocol import StreamingInput
        from vllm.inputs.engine import tokens_input

        anew = self._outputs is None
        if anew:
            self._open(frame.number)
        assert self._inputs is not None
        assert self._outputs is not None
        size = self.plan.layout.tokens_per_frame
        before = 0 if anew else len(self.ids) + forget.forget_frames * size - 1
        prompt = [*(self.ids if anew else self.ids[-1:]), *between]
        turn = {"session_tokens": before, "forget_frames": forget.forget_frames, "forget_from": forget.forget_from}
        params = self._params(frame.number, wanted, **turn)
        self._inputs.put_nowait(StreamingInput(tokens_input(prompt), params))
        async for output in self._outputs:
            (answer,) = output.outputs
            frame.add(list(answer.token_ids))
            if answer.finish_reason is not None:
                break
        if len(frame.ids) != wanted:
            raise SessionError(
                500, f"the engine ended a frame after {len(frame.ids)} of {wanted} tokens: ask for it again"
            )

    def _open(self, number: int) -> None:
        """Begin a request of the engine."""
        inputs: asyncio.Queue[StreamingInput | None] = asyncio.Queue()

        async def turns() -> AsyncGenerator[StreamingInput, None]:
            while (turn := await inputs.get()) is not None:
                yield turn

        self._inputs, self._opened = inputs, self._opened + 1
        self._resident = self._nothing()
        # These parameters close the request, as one of text: options of a session are in each turn's own.
        params = self._params(number, 1)
        params.extra_args = None
        self._outputs = self._engine.generate(
            turns(), params, f"{self.name}-{self._opened}", data_parallel_rank=self.rank
        )

    def _params(self, frame: int, max_tokens: int, **turn: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = dict(self.sampling)
        if sampling.get("seed") is not None:
            # Of each frame its own: a frame that is made again comes out the same.
            digest = hashlib.sha256(f"{sampling['seed']} {frame}".encode()).digest()
            sampling["seed"] = int.from_bytes(digest[:7], "big")
        grid = self.plan.layout.frame.grid
        return SamplingParams(
            **sampling,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=grid[1] if grid is not None else None,
            extra_args={**self.options, **{REQUEST_PREFIX + name: value for name, value in turn.items()}},
        )

    def state_after(self, frame: int) -> tuple[list[int], int]:
        """The ids that the sequence had when a frame was finished, and how many frames were forgotten by then.

        Raises:
            SessionError: it is none that is remembered.
        """
        if frame == CONDITION:
            return list(self.opening), 0
        end = self.turns.after(frame - self.forgotten)
        if frame < self.first_frame or end > len(self.ids):
            raise SessionError(
                400,
                f"frame must be {CONDITION} (the opening) or from {self.first_frame} to {self.frames - 1}, which are "
                f"remembered, not {frame}",
            )
        return self.ids[:end], self.forgotten

    def reset(self, frame: int) -> None:
        """Go back to where ``frame`` was finished; `CONDITION`: to the opening.

        Raises:
            SessionError: a frame is being made (409), or that one is not remembered (400).
        """
        if self.busy:
            raise SessionError(409, "a frame of this session is being made: wait for it, then reset")
        self.ids, self.forgotten = self.state_after(frame)
        self._gap = 0 if frame == CONDITION else self._gap
        self.exact = self.exact or frame == CONDITION
        self.used = time.monotonic()
        self._close()

    def fork(self, name: str, rank: int | None) -> Session:
        """Another session that goes on from here.

        Raises:
            SessionError: a frame is being made (409).
        """
        if self.busy:
            raise SessionError(409, "a frame of this session is being made: wait for it, then fork")
        other = Session(
            name,
            self._engine,
            self.made,
            self.options,
            self.ids,
            self.sampling,
            self.most_tokens,
            self.block_size,
            rank,
        )
        other.opening, other.forgotten, other._gap = list(self.opening), self.forgotten, self._gap
        other.exact = self.exact and not self.forgotten
        return other

    def end(self, error: SessionError) -> None:
        """End it; whoever waits for a frame is told why."""
        self.ended = self.ended or error
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._close()

    def _close(self) -> None:
        """Let the engine's request go, and its blocks with it: another one computes what is left of the sequence."""
        outputs, self._outputs, self._inputs = self._outputs, None, None
        self.exact, self._counted = self.exact and not self.forgotten, 0
        if outputs is not None:
            self._closing = asyncio.create_task(_close(outputs))


async def _close(outputs: AsyncGenerator[Any, None]) -> None:
    # Where it is being read, the task that reads it is cancelled, which closes it.
    with contextlib.suppress(RuntimeError):
        await outputs.aclose()


def ids_of(data: bytes) -> list[int]:
    """Ids that a client sends as bytes: int32, the lowest byte first.

    Raises:
        SessionError: they are no whole number of ids.
    """
    if len(data) % 4:
        raise SessionError(
            400, f"raw ids must be 4 bytes each, int32 with the lowest byte first, not {len(data)} bytes"
        )
    return np.frombuffer(data, dtype="<i4").tolist()
