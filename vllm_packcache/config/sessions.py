"""What an operator says of sessions."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Seconds = Annotated[float, Field(gt=0, le=10**9)]
_Name = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


class SessionsConfig(BaseModel):
    """Sessions of world models: how long they may wait and live, and what of them is remembered.

    ``remembered_frames`` are those that a session may be forked or reset to, and that it is computed from again where
    vLLM takes its blocks away. ``pictures`` is ``module:object`` of what turns a frame's ids into a picture, see
    `vllm_packcache.media.processors.pictures`; ``play`` of what the page at ``/play`` needs to know, see
    `vllm_packcache.sessions.playing`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    idle_seconds: _Seconds = 300.0
    lifetime_seconds: _Seconds = 86_400.0
    heartbeat_seconds: _Seconds = 15.0
    remembered_frames: Annotated[int, Field(ge=1, le=2**20)] = 256
    pictures: _Name | None = None
    play: _Name | None = None

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        if self.play is not None and self.pictures is None:
            raise ValueError("play needs pictures, which draws what is played: name module:object of it too")
        return self
