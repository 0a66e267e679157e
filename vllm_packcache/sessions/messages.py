"""What clients of sessions send: bodies of requests and messages of WebSockets, checked before anything is done."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_packcache.config.errors import shown
from vllm_packcache.core.grammar import LARGEST_ID
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.sessions.session import SessionError
from vllm_packcache.web import bodies

_Id = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sampling(_Message):
    """How tokens are drawn: names and meaning are those of vLLM."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=LARGEST_ID)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class Create(_Message):
    """A new session: its opening as ids or as a picture, and what is kept of it."""

    model: str | None = None
    ids: list[_Id] | None = None
    picture: str | None = None
    condition_tokens: Annotated[int, Field(ge=0)] | None = None
    options: dict[str, Any] = {}
    sampling: Sampling = Sampling()


class Step(_Message):
    """The next frame: what the client gives before it, as an action or as ids."""

    type: Literal["step"] = "step"
    action: dict[str, Any] | None = None
    given_ids: list[_Id] | None = None
    stream: bool = False
    picture: bool = True


class Reset(_Message):
    """Back to where a frame was finished; -1: to the opening."""

    type: Literal["reset"] = "reset"
    frame: Annotated[int, Field(ge=CONDITION)] = CONDITION


_M = TypeVar("_M", bound=_Message)


def read(kind: type[_M], data: bytes | str) -> _M:
    """A message.

    Args:
        kind: what it must be.
        data: JSON; nothing at all is the empty message.

    Raises:
        SessionError: it is no JSON, or says something that is not known.
    """
    try:
        return kind.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise SessionError(400, _sentence(kind, error)) from None


def _sentence(kind: type[_Message], error: ValidationError) -> str:
    first = error.errors()[0]
    where, fault = bodies.fault(error)
    if first["type"] == "extra_forbidden":
        model: type[BaseModel] = Sampling if first["loc"][0] == "sampling" and len(first["loc"]) > 1 else kind
        return f"{where} is no known option: known are {', '.join(model.model_fields)}"
    if first["type"] == "json_invalid":
        return f"this must be a JSON object: {first['msg'][:80]}"
    if not where:
        return f"this must be a JSON object, not {shown(first['input'])}"
    return f"{where}: {fault}"
