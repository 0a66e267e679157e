"""What an operator says of videos over HTTP."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

STORE_KEY, TOKENIZER_KEY = "video_store", "video_tokenizer"
"""Keys of ``additional_config`` (and, with dashes, the flags) for where videos are kept, and what makes ids of them."""

STORE_FLAG, TOKENIZER_FLAG = ("--" + key.replace("_", "-") for key in (STORE_KEY, TOKENIZER_KEY))

_Seconds = Annotated[float, Field(gt=0, le=10**9)]

SECRET_KEY = "secret"
"""Of a webhook: what is under it is shown to nobody."""

SECRET_PREFIX = "whsec_"


def _address(url: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise ValueError("must begin with https:// or http://")
    return url


def _secret(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not text.startswith(SECRET_PREFIX) or len(key) < 16:
        raise ValueError(f"must be {SECRET_PREFIX} and base64 of 16 bytes or more")
    return secret


class Webhook(BaseModel):
    """An address that is told of videos that have ended, as Standard Webhooks says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: Annotated[str, AfterValidator(_address), Field(max_length=2000)]
    secret: Annotated[SecretStr, AfterValidator(_secret)]
    events: tuple[Literal["video.completed", "video.failed"], ...] = ("video.completed", "video.failed")


class VideosConfig(BaseModel):
    """Videos over HTTP: how long they are kept, how many may wait, who is told of them.

    ``expire_seconds`` after its end a video is deleted; none: never. If ``quota_bytes`` are kept, those that ended
    first are deleted before their time. ``most_unfinished`` may wait or be made at once. ``allowed_hosts`` are those
    that a picture may be fetched from.

    ``store`` is the folder that they are kept in, by which the routes are switched on; ``tokenizer`` says what makes
    token ids of a request and pictures of ids, see `vllm_packcache.media.processors`. Both are set by flags.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    expire_seconds: _Seconds | None = 604_800.0
    quota_bytes: Annotated[int, Field(ge=2**20)] | None = 10 * 2**30
    most_unfinished: Annotated[int, Field(ge=1, le=10**6)] = 1000
    heartbeat_seconds: _Seconds = 15.0
    webhooks: tuple[Webhook, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    store: str | None = None
    tokenizer: str | None = None
