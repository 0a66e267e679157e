"""What an operator says of videos over HTTP."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_Seconds = Annotated[float, Field(gt=0, le=10**9)]

SECRET_PREFIX = "whsec_"


def _address(url: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    return url


def _secret(secret: str) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) < 16:
        raise ValueError(f"must be {SECRET_PREFIX} and base64 of 16 bytes or more")
    return secret


class Webhook(BaseModel):
    """An address that is told of videos that have ended, as Standard Webhooks says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: Annotated[str, AfterValidator(_address), Field(max_length=2000)]
    secret: Annotated[str, AfterValidator(_secret)]
    events: tuple[Literal["video.completed", "video.failed"], ...] = ("video.completed", "video.failed")


class VideosConfig(BaseModel):
    """Videos over HTTP: how long they are kept, how many may wait, who is told of them.

    ``expire_seconds`` after its end a video is deleted; none: never. If ``quota_bytes`` are kept, those that ended first
    are deleted before their time. ``most_unfinished`` may wait or be made at once. ``allowed_hosts`` are those that a
    picture may be fetched from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    expire_seconds: _Seconds | None = 604_800.0
    quota_bytes: Annotated[int, Field(ge=2**20)] | None = 10 * 2**30
    most_unfinished: Annotated[int, Field(ge=1, le=10**6)] = 1000
    heartbeat_seconds: _Seconds = 15.0
    webhooks: tuple[Webhook, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
