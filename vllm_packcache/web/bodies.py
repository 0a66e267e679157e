"""Bodies of requests: no more of them is read than a room takes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from vllm_packcache.config.errors import named, shown
from vllm_packcache.web.refusals import Refusal


async def parts(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """A body as it comes.

    Args:
        request: whose body it is.
        most: bytes that are taken of it.

    Raises:
        Refusal: it is larger, or its client has gone.
    """
    count = 0
    try:
        async for part in request.stream():
            count += len(part)
            if count > most:
                raise Refusal(413, f"the body must have at most {most} bytes: send less")
            yield part
    except ClientDisconnect:
        raise Refusal(400, "the client has gone before its request was whole") from None


async def body(request: Request, most: int) -> bytes:
    """A whole body.

    Raises:
        Refusal: it has more bytes than ``most``, or its client has gone.
    """
    data = bytearray()
    async for part in parts(request, most):
        data += part
    return bytes(data)


def fault(error: ValidationError) -> tuple[str, str]:
    """The first fault that was found: where it is, which may be anybody's text, and what is wrong there."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(named(str(part)) for part in first["loc"])
    return where, f"{message[0].lower()}{message[1:]}, not {shown(first['input'])}"
