"""What clients send for a video: multipart, forms and JSON, of every shape that clients of the dialect give them.

A form's values are text: numbers, lists and objects are read as JSON would, whatever kind of body they come in. A name
in brackets, ``packcache_grid[]`` or ``input_reference[image_url]``, is a part of a list or of an object.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import tempfile
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from vllm_packcache.config.errors import named, shown
from vllm_packcache.config.server import DEEPEST, REQUEST_PREFIX
from vllm_packcache.core.grammar import LARGEST_ID
from vllm_packcache.media.pictures import read_picture_bytes
from vllm_packcache.media.processors.base import Asked
from vllm_packcache.web import bodies
from vllm_packcache.web.refusals import Refusal

LARGEST_BODY = 64 * 2**20
"""Bytes of a request."""

LARGEST_FIELD = 16 * 2**20
"""Bytes of a field of it that is no file, and of a picture that is fetched."""

LONGEST_PROMPT = 32_000
"""Characters, as OpenAI's API takes."""

_MOST_FIELDS, _MOST_FILES = 10_000, 4

_FETCH_SECONDS = 10.0

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_NAME, _PART = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)(\[\])?"), re.compile(r"\[([^\[\]]+)\]")
_STILL = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
"""Brands of pictures in the container that videos have too."""


_Side = Annotated[int, Field(ge=1, le=99_999)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Id = Annotated[int, Field(ge=0, le=LARGEST_ID)]


class VideoBody(BaseModel):
    """A video that is asked for. What is left out is up to the server.

    Fields are called as on the wire. ``picture`` is a file that it begins with, ``clip`` the path of a video that it
    continues, which whoever reads the body removes with `discard`; ``options`` are the request's own, without prefix.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] = ""
    model: str | None = None
    size: tuple[_Side, _Side] | None = None
    seconds: Annotated[_Number, Field(gt=0, le=10**6)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1, le=1000)] | None = None
    seed: int | None = None
    guidance_scale: _Number | None = None
    negative_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] | None = None
    num_inference_steps: int | None = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: int | None = None
    prompt_ids: tuple[_Id, ...] | None = None
    picture: bytes | None = None
    clip: Path | None = None
    options: dict[str, Any] = {}

    def discard(self) -> None:
        """Remove what was written of it."""
        if self.clip is not None:
            self.clip.unlink(missing_ok=True)


_TEXTS = ("prompt", "model", "size", "negative_prompt", "user")
_NUMBERS = (
    "seconds", "num_frames", "fps", "seed", "guidance_scale", "num_inference_steps", "temperature", "top_p", "top_k",
    "width", "height", "n",
)  # fmt: skip
_FIELDS = (*_TEXTS, *_NUMBERS, "prompt_ids", "input_reference")

Fields = dict[str, Any]
"""Of a body, by name: text, numbers, lists, objects, files."""


async def read(request: Request, allowed_hosts: Collection[str] = ()) -> VideoBody:
    """The body of a request for a video.

    Args:
        request: as it comes.
        allowed_hosts: that a picture may be fetched from.

    Raises:
        Refusal: something of it is wrong; the message names the field.
    """
    fields = await _fields(request, _FIELDS)
    if not fields.get("prompt") and "prompt_ids" not in fields:
        raise Refusal(400, "prompt must say what is to be seen, in one character or more", param="prompt")
    return await _body(fields, allowed_hosts)


async def read_extension(request: Request, allowed_hosts: Collection[str] = ()) -> tuple[str, VideoBody]:
    """The body of a request that continues a video: the id of that, and what is added.

    Raises:
        Refusal: as `read`.
    """
    fields = await _fields(request, ("video", *_FIELDS))
    video = fields.pop("video", None)
    if isinstance(video, Mapping) and set(video) == {"id"}:
        video = video["id"]
    if isinstance(video, UploadFile):
        raise Refusal(
            400,
            "video must be the id of a video that was made here: to continue a file, give it as input_reference of a "
            "new video",
            param="video",
        )
    if not isinstance(video, str):
        raise Refusal(400, f"video must be the id of a video, or an object with it, not {shown(video)}", param="video")
    return video, await _body(fields, allowed_hosts)


async def read_remix(request: Request) -> str:
    """The new prompt of a video that is made once more.

    Raises:
        Refusal: as `read`.
    """
    body = await _body(await _fields(request, ("prompt",)), ())
    if not body.prompt:
        raise Refusal(400, "prompt must say what is to be seen, in one character or more", param="prompt")
    return body.prompt


def asked(body: VideoBody) -> Asked:
    """What a processor is asked for. It decodes the picture, and so may take a while.

    Raises:
        Refusal: the picture cannot be read.
    """
    picture = None
    if body.picture is not None:
        try:
            picture = read_picture_bytes(body.picture)
        except ValueError as error:
            raise Refusal(400, f"input_reference: {error}", param="input_reference") from None
    return Asked(
        prompt=body.prompt,
        size=body.size,
        frames=body.num_frames,
        seconds=body.seconds,
        fps=body.fps,
        picture=picture,
        clip=body.clip,
        seed=body.seed,
        guidance=body.guidance_scale,
        steps=body.num_inference_steps,
        negative_prompt=body.negative_prompt,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        ids=body.prompt_ids,
        options=body.options,
    )


# Bodies to fields


async def _fields(request: Request, known: Sequence[str]) -> Fields:
    """Fields of a body; of none that is not known, and none that is left empty.

    Raises:
        Refusal: it is no body, or has other fields.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        fields = _tree((await _form(request, _multipart)).multi_items())
    elif kind == "application/x-www-form-urlencoded":
        fields = _tree((await _form(request, _urlencoded)).multi_items())
    elif kind == "application/json" or not kind:
        fields = _object(await bodies.body(request, LARGEST_BODY))
    else:
        raise Refusal(
            415, f"Content-Type must be multipart/form-data or application/json, not {shown(kind)}: send one of them"
        )
    for name in fields:
        if name not in known and not (name.startswith(REQUEST_PREFIX) and "model" in known):
            more = f", and options that begin with {REQUEST_PREFIX}" if "model" in known else ""
            raise Refusal(
                400, f"{named(name)} is no known field: known are {', '.join(known)}{more}", param=named(name)
            )
    return {name: value for name, value in fields.items() if name.startswith(REQUEST_PREFIX) or _says(value)}


def _says(value: Any) -> bool:
    """Whether a field says anything: null does not, nor does what a browser sends of an empty form."""
    if isinstance(value, UploadFile):
        return bool(value.filename or value.size)
    return value is not None and value != ""


def _multipart(request: Request, stream: AsyncGenerator[bytes, None]) -> MultiPartParser:
    return MultiPartParser(
        request.headers, stream, max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=LARGEST_FIELD
    )


def _urlencoded(request: Request, stream: AsyncGenerator[bytes, None]) -> FormParser:
    return FormParser(request.headers, stream, max_fields=_MOST_FIELDS, max_part_size=LARGEST_FIELD)


async def _form(
    request: Request, parser: Callable[[Request, AsyncGenerator[bytes, None]], MultiPartParser | FormParser]
) -> FormData:
    """A form.

    Raises:
        Refusal: it is none, or too large.
    """
    try:
        return await parser(request, bodies.parts(request, LARGEST_BODY)).parse()
    except MultiPartException as error:
        if "exceeded" in error.message:
            raise Refusal(413, f"a field must have at most {LARGEST_FIELD} bytes: send a file as a file") from None
        raise Refusal(
            400, f"the body must be a form that can be read: {' '.join(error.message.split())[:80]}"
        ) from None
    except FormParserError as error:
        raise Refusal(400, f"the body must be a form that can be read: {' '.join(str(error).split())[:80]}") from None


def _object(data: bytes) -> Fields:
    """A JSON object.

    Raises:
        Refusal: it is none.
    """
    try:
        found = json.loads(data or b"{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body must be a JSON object: {' '.join(str(error).split())[:80]}") from None
    if not isinstance(found, dict):
        raise Refusal(400, f"the body must be a JSON object, not {shown(found)}")
    if b"\\u" in data:
        # Half of a character can be written as JSON, and not be sent back.
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refusal(400, "the body must be text, and has half of a character: send whole ones") from None
    for name, value in found.items():
        if isinstance(value, str) and len(value) > LARGEST_FIELD:
            raise Refusal(413, f"a field must have at most {LARGEST_FIELD} characters: send a file as a file")
        if name.startswith(REQUEST_PREFIX):
            _check_depth(name, value)
    return found


def _check_depth(name: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, dict | list):
        if depth == DEEPEST:
            raise Refusal(
                400, f"{named(name)} is nested too deep: at most {DEEPEST} inside each other", param=named(name)
            )
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(name, part, depth + 1)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _json(text: str) -> Any:
    """What a text says as JSON; any other text is itself."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


class _Several(list[Any]):
    """Values of ``name[]``, in the order they came in."""


class _Parts(dict[str, Any]):
    """Values of ``name[part]``."""


def _tree(items: Iterable[tuple[str, str | UploadFile]]) -> Fields:
    """Fields of a form, those in brackets put together.

    Raises:
        Refusal: a name has no meaning, or two fields contradict each other.
    """
    tree = _Parts()
    for name, value in items:
        match = _NAME.fullmatch(name)
        if match is None or name.count("[") > DEEPEST:
            raise Refusal(
                400,
                f"{named(name)} is no name of a field: it must be like name, name[] or name[part]",
                param=named(name),
            )
        path = [match[1], *_PART.findall(match[2])]
        said: Any = value
        if isinstance(value, str) and name.startswith(REQUEST_PREFIX):
            said = _json(value)
            _check_depth(name, said, len(path) - 1)
        if not _put(tree, path, said, several=match[3] is not None):
            raise Refusal(400, f"{named(name)} is given twice, or in two ways: give it once", param=named(name))
    found: Fields = _plain(tree)
    return found


def _put(node: _Parts, path: list[str], value: Any, several: bool) -> bool:
    """Put a value where its name says; False: something else is there."""
    *within, last = path
    for part in within:
        node = node.setdefault(part, _Parts())
        if not isinstance(node, _Parts):
            return False
    if several:
        values = node.setdefault(last, _Several())
        if isinstance(values, _Several):
            values.append(value)
        return isinstance(values, _Several)
    if last in node:
        return False
    node[last] = value
    return True


def _plain(value: Any) -> Any:
    """The same of plain lists and mappings."""
    if isinstance(value, _Several):
        return list(value)
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, _Parts) else value


# Fields to what they say


async def _body(fields: Fields, allowed_hosts: Collection[str]) -> VideoBody:
    """What the fields say.

    Raises:
        Refusal: something of it is wrong.
    """
    fields = dict(fields)
    options = {
        name.removeprefix(REQUEST_PREFIX): fields.pop(name) for name in list(fields) if name.startswith(REQUEST_PREFIX)
    }
    for name in (*_NUMBERS, "prompt_ids"):
        if isinstance(fields.get(name), str):
            fields[name] = _json(fields[name])
    if (ids := fields.get("prompt_ids")) is not None:
        if not isinstance(ids, list):
            raise Refusal(400, f"prompt_ids must be a list of token ids, not {shown(ids)}", param="prompt_ids")
        fields["prompt_ids"] = tuple(_json(part) if isinstance(part, str) else part for part in ids)
    user = fields.pop("user", "")
    if not isinstance(user, str):
        raise Refusal(400, f"user must be text, not {shown(user)}", param="user")
    if (count := fields.pop("n", 1)) != 1 or isinstance(count, bool):
        raise Refusal(400, f"n must be 1, not {shown(count)}: ask once for each video", param="n")
    fields["size"] = _size(fields)
    reference = fields.pop("input_reference", None)
    # Before anything is fetched or written.
    body = _checked({**fields, "options": options})
    if reference is None:
        return body
    data = await _reference(reference, allowed_hosts)
    if (suffix := clip_suffix(data)) is None:
        return body.model_copy(update={"picture": data})
    return body.model_copy(update={"clip": await asyncio.to_thread(_written, data, suffix)})


def _checked(fields: Fields) -> VideoBody:
    try:
        return VideoBody.model_validate(fields)
    except ValidationError as error:
        where, fault = bodies.fault(error)
        name = where.partition(".")[0]
        raise Refusal(400, f"{where}: {fault}", param=name) from None


def _size(fields: Fields) -> tuple[int, int] | None:
    """Width and height; of ``size`` where it is given, with which ``width`` and ``height`` must agree.

    Raises:
        Refusal: they do not, or are no size.
    """
    size, width, height = fields.pop("size", None), fields.pop("width", None), fields.pop("height", None)
    if (width is None) != (height is None):
        missing = "width" if width is None else "height"
        raise Refusal(400, f"{missing} is missing: give width and height, or size", param=missing)
    for name, value in (("width", width), ("height", height)):
        if value is not None and (type(value) is not int or not 1 <= value <= 99_999):
            raise Refusal(400, f"{name} must be a number of pixels from 1 to 99999, not {shown(value)}", param=name)
    if size is None:
        return None if width is None else (width, height)
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise Refusal(400, f"size must be width x height in pixels, such as 256x256, not {shown(size)}", param="size")
    found = int(match[1]), int(match[2])
    if width is not None and found != (width, height):
        raise Refusal(400, f"size is {size}, and width and height are {width} and {height}: give one", param="size")
    return found


# What it begins with


async def _reference(given: Any, allowed_hosts: Collection[str]) -> bytes:
    """The file that ``input_reference`` is.

    Raises:
        Refusal: it is none.
    """
    if isinstance(given, UploadFile):
        data = await given.read()
        await given.close()
        if not data:
            raise _no_reference("is an empty file")
        return data
    if isinstance(given, Mapping):
        if "image_url" not in given or len(given) > 1:
            raise _no_reference(f"has {', '.join(named(str(name)) for name in list(given)[:5]) or 'nothing'}")
        given = given["image_url"]
        # As OpenAI's other APIs write it.
        if isinstance(given, Mapping) and "url" in given:
            given = given["url"]
    if not isinstance(given, str):
        raise _no_reference(f"is {shown(given)}")
    if given.lower().startswith(("http://", "https://")):
        return await _fetched(given, allowed_hosts)
    text = given
    if given.startswith("data:"):
        head, _, text = given.partition(",")
        if not head.endswith(";base64"):
            raise _no_reference(f"is {shown(given)}")
    try:
        found = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _no_reference(f"is {shown(given)}") from None
    if not found:
        raise _no_reference("is empty")
    return found


def _no_reference(what: str) -> Refusal:
    return Refusal(
        400,
        "input_reference must be a picture or a video: a file, a data URL, base64, or an object with one of them as "
        f"image_url; this {what}",
        param="input_reference",
    )


async def _fetched(url: str, allowed_hosts: Collection[str]) -> bytes:
    """A file from a host that the operator allows. No redirect is followed: it may lead anywhere.

    Raises:
        Refusal: the host is not allowed, or does not give it.
    """
    import httpx

    try:
        # What is connected to is what is checked.
        address = httpx.URL(url)
        host, port = address.host, address.port
    except (httpx.InvalidURL, ValueError):
        raise _no_reference(f"is {shown(url)}") from None
    if (host if port is None else f"{host}:{port}") not in {own.lower() for own in allowed_hosts}:
        raise Refusal(
            400,
            f"input_reference must be a file or a data URL: this server fetches nothing from {shown(host)}",
            param="input_reference",
        )
    data = bytearray()
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, timeout=_FETCH_SECONDS) as client,
            asyncio.timeout(_FETCH_SECONDS),
            # As it comes: what is packed may be a thousand times larger.
            client.stream("GET", address, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise _not_fetched(f"its host answers {answer.status_code}")
            async for part in answer.aiter_raw():
                data += part
                if len(data) > LARGEST_FIELD:
                    raise _not_fetched(f"it has more than {LARGEST_FIELD} bytes")
    except (httpx.HTTPError, TimeoutError) as error:
        raise _not_fetched(f"its host does not answer ({type(error).__name__})") from None
    if not data:
        raise _not_fetched("it is empty")
    return bytes(data)


def _not_fetched(why: str) -> Refusal:
    return Refusal(
        400, f"input_reference cannot be fetched: {why}; send it as a file or a data URL", param="input_reference"
    )


def clip_suffix(data: bytes) -> str | None:
    """How files of that kind end, where it is a video's; None: it is a picture, or nothing that is known."""
    if data[4:8] == b"ftyp" and data[8:12] not in _STILL:
        return ".mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return ".webm"
    return ".gif" if data.startswith((b"GIF87a", b"GIF89a")) else None


def _written(data: bytes, suffix: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=suffix, prefix="packcache_clip_")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return Path(name)
