"""What a client is told that cannot have what it asks for."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response

_IN_VAIN = (409, 501, 507)
"""Statuses that clients ask again after by themselves, though the same will be said."""


class Refusal(Exception):
    """A request is refused.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the request that is wrong.
        code: by which a program tells it from others.
        wait: seconds after which to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.wait = status, param, code, wait

    def said(self) -> dict[str, Any]:
        """As the body of an answer has it under ``error``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}

    def answer(self) -> Response:
        """What is sent."""
        headers = {}
        if self.wait is not None:
            headers["Retry-After"] = str(self.wait)
        elif self.status in _IN_VAIN:
            headers["X-Should-Retry"] = "false"
        return JSONResponse({"error": self.said()}, self.status, headers=headers)
