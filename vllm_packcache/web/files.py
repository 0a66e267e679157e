"""Files that are sent: whole or from where a client has been cut off, and whatever becomes of their names meanwhile."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from vllm_packcache.web.refusals import Refusal

PIECE = 2**18
"""Bytes that are read of a file at a time."""

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def sent(request: Request, path: Path, kind: str, name: str) -> Response:
    """A file that does not change any more.

    It is opened before anything is answered: one that is deleted while it is sent still comes whole.

    Args:
        request: whose ``Range`` is heeded where it names one range; of several, all of the file is sent.
        path: of the file.
        kind: media type.
        name: that a client may keep it under, in ASCII.

    Raises:
        FileNotFoundError: there is no such file.
        Refusal: the range begins behind the end of the file.
    """
    file = await asyncio.to_thread(path.open, "rb")
    found = os.fstat(file.fileno())
    tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Content-Disposition": f'inline; filename="{name}"',
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    asked = request.headers.get("range", "") if request.headers.get("if-range", tag) == tag else ""
    span = _span(asked, found.st_size)
    start, stop = span or (0, found.st_size)
    if span is not None and start >= found.st_size:
        file.close()
        raise Refusal(416, f"Range must begin before byte {found.st_size}, where the file ends: ask for less")
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.st_size}"
    headers["Content-Length"] = str(stop - start)
    status = 200 if span is None else 206
    return StreamingResponse(_pieces(file, start, stop), status, headers=headers, media_type=kind)


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last, of one range; None: it is none that is understood."""
    match = _RANGE.fullmatch(asked.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)) if int(last) else size, size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


async def _pieces(file: BinaryIO, start: int, stop: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(start)
        while start < stop and (piece := await asyncio.to_thread(file.read, min(PIECE, stop - start))):
            start += len(piece)
            yield piece
