"""Sessions in the engine of a test: resumable requests, as vLLM's asynchronous front end makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from tests.serving.conftest import sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.session import Resident, Turns


class Played:
    """One session: its ids so far are what a long request would have, of which the engine may have forgotten some.

    Args:
        llm: the engine.
        name: of the request.
        config: of the server.
        ids: the prompt of the first turn.
        longest: tokens that the engine's sequence may have; None: nothing is forgotten.
        more: sampling parameters.
        options: of the request, without their prefix.
    """

    def __init__(
        self,
        llm: Any,
        name: str,
        config: dict[str, Any],
        ids: list[int],
        condition: int,
        longest: int | None = None,
        more: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.engine, self.name, self.ids, self.condition = llm.llm_engine, name, list(ids), condition
        self.options, self.more, self.longest = options, more or {}, longest
        extra = {f"packcache_{name}": value for name, value in self.extra(0, 0).items()}
        made = ServerConfig.parse("packcache", config).video(extra, len(ids))
        assert made is not None
        self.plan, self.turns = made.streams[0].plan, Turns.of(made)
        self.forgotten, self.counted = 0, list(ids)
        """Frames that the engine has forgotten, and the ids that it counts."""
        block_size = llm.llm_engine.vllm_config.cache_config.block_size
        self.resident = Resident(made.streams, block_size, lambda: self.counted)
        self.internal: str | None = None
        self.made: list[list[int]] = []

    def extra(self, tokens: int, forget: int) -> dict[str, Any]:
        return {
            "condition_tokens": self.condition, "session_tokens": tokens, "forget_frames": forget, **self.options,
        }  # fmt: skip

    def begin(self, given: Sequence[int], **more: Any) -> None:
        """Add a turn to the engine."""
        frame = self.plan.layout.tokens_per_frame
        counted = len(self.ids) - self.forgotten * frame
        _, start, stop = self.turns.next_picture(counted)
        forget = gone = 0
        if self.longest is not None and stop > self.longest:
            step = self.resident.step or 1
            gone, room = self.resident.room(self.plan.layout.frame_of(counted - 1))
            forget = min(-(-(stop - self.longest) // (frame * step)) * step, room)
        between = self.turns.given(counted, given)
        carried = [] if self.internal is None else self.ids[-1:]
        before = 0 if self.internal is None else counted - 1
        first = list(self.ids) if self.internal is None else carried
        self.ids += between
        self.counted += between
        params = sampling(stop - start, **self.extra(before, forget), forget_from=gone)
        for name, value in {**self.more, **more}.items():
            setattr(params, name, value)
        params.output_kind = _delta()
        processor = self.engine.input_processor
        request = processor.process_inputs(
            self.internal or self.name, {"prompt_token_ids": [*first, *between]}, params,
            supported_tasks=self.engine.get_supported_tasks(), resumable=True,
        )  # fmt: skip
        if self.internal is None:
            processor.assign_request_id(request)
            self.internal = request.request_id
        else:
            request.external_req_id = self.name
        self.engine.output_processor.add_request(request, None, None, 0)
        # Both extend the list; between processes each has its own.
        self.engine.engine_core.add_request(replace(request, prompt_token_ids=[*first, *between]))
        if forget:
            at = self.plan.layout.frame_start(gone)
            del self.counted[at : at + forget * frame]
            self.resident.forget(forget, gone)
        self.forgotten += forget
        self.made.append([])
        self.wanted = stop - start

    def end(self) -> None:
        assert self.internal is not None
        self.engine.abort_request([self.internal], internal=True)


def _delta() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA


def finish(sessions: Sequence[Played], others: Any = None) -> None:
    """Step until the turns of all sessions have ended; ``others(output)`` gets what is of other requests."""
    engine, open_ = sessions[0].engine, {own.name: own for own in sessions}
    while open_:
        for output in engine.step():
            own = open_.get(output.request_id)
            if own is None:
                if others is not None:
                    others(output)
                continue
            (answer,) = output.outputs
            own.made[-1] += answer.token_ids
            own.ids += answer.token_ids
            own.counted += answer.token_ids
            if answer.finish_reason is not None:
                assert answer.finish_reason == "length", answer.finish_reason
                assert len(own.made[-1]) == own.wanted
                own.resident.decide(own.plan.layout.frame_of(len(own.counted) - 1))
                del open_[own.name]
