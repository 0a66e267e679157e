"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi.responses import Response, StreamingResponse

HEARTBEAT = ": heartbeat\n\n"
"""A comment, which clients leave out: it keeps the connection from being taken for dead."""

_P = TypeVar("_P")


def event(name: str, data: dict[str, Any], number: int | None = None) -> str:
    """One event; with a number, a client that comes back says up to where it has seen."""
    identified = "" if number is None else f"id: {number}\n"
    return f"{identified}event: {name}\ndata: {json.dumps(data)}\n\n"


def answer(events: AsyncIterator[str]) -> Response:
    """Events as they come, which nothing on the way may keep back."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def with_heartbeat(items: AsyncIterator[_P], seconds: float) -> AsyncIterator[_P | None]:
    """The same, and None where nothing has come for so many seconds."""
    following: asyncio.Future[_P | None] = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=seconds)
            if not done:
                yield None
                continue
            if (item := following.result()) is None:
                return
            yield item
            following = asyncio.ensure_future(anext(items, None))
    finally:
        following.cancel()
