"""Videos over HTTP, on vLLM's own server and behind its key, as clients of the OpenAI dialect ask for them.

======  ================================  ========================================================
POST    /v1/videos                        ask for one
GET     /v1/videos                        all of them, page by page
GET     /v1/videos/{id}                   one
DELETE  /v1/videos/{id}                   forget it, whatever its state; what is being made stops
GET     /v1/videos/{id}/content           its files: ?variant=video, thumbnail, spritesheet, ids, or live
GET     /v1/videos/{id}/events            frames as they are made, as server-sent events
POST    /v1/videos/{id}/remix             the same once more, with another prompt
POST    /v1/videos/extensions             another one that goes on where it ends
POST    /v1/videos/edits                  refused: no model here changes a video
GET     /v1/playground                    what a page needs to know to ask for one
GET     /playground                       a page; it holds no secret, and asks for the key where there is one
======  ================================  ========================================================
"""

from __future__ import annotations

import asyncio
import base64
import errno
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any, BinaryIO, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.datastructures import State
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_packcache.config.errors import shown
from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.videos.files import GROWING, IDS, SPRITESHEET, THUMBNAIL, VIDEO, preview_name
from vllm_packcache.videos.objects import TERMINAL, as_it_was
from vllm_packcache.videos.request import VideoBody, read, read_extension, read_remix
from vllm_packcache.videos.store import Event, Full, Job, NoSpace, Store, StoreBusy, StoreError, StoreFull
from vllm_packcache.web import events, pages
from vllm_packcache.web.files import PIECE, sent
from vllm_packcache.web.refusals import Refusal

PATH = "/v1/videos"

VARIANTS = {
    "video": (VIDEO, "video/mp4"),
    "thumbnail": (THUMBNAIL, "image/webp"),
    "spritesheet": (SPRITESHEET, "image/jpeg"),
    "ids": (IDS, "application/octet-stream"),
}
"""Files of a finished video by ``variant``, and what they are."""

POLL = 500
"""Milliseconds after which a client that polls may look again."""

_MOST_LISTED = 100

_JOBS = "packcache_videos"


class Jobs(Protocol):
    """What makes videos. Its methods raise `Refusal`, and `StoreError` as its store does."""

    store: Store
    limits: VideosConfig

    def about(self) -> dict[str, Any]:
        """What a page needs to know to ask for a video, as JSON."""
        ...

    async def create(self, body: VideoBody) -> Job:
        """Begin a video. When this returns, the body's files are not needed any more."""
        ...

    async def extend(self, id: str, body: VideoBody) -> Job:
        """Begin one that goes on where another ends."""
        ...

    async def remix(self, id: str, prompt: str) -> Job:
        """Begin one like another, with another prompt."""
        ...

    async def delete(self, id: str) -> bool:
        """Forget a video and stop its making; whether there was one."""
        ...

    def follow(self, id: str, after: int) -> AsyncGenerator[Event | None, None]:
        """Events of a video behind that number as they come; None: a heartbeat is due.

        It ends after the last event, and where the video is gone.
        """
        ...

    def shown(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        ...

    async def stop(self) -> None:
        """The server stops."""
        ...


class Routes:
    """Videos as vLLM's endpoint plugin.

    Args:
        opened: makes the jobs of a server from its engine client and its arguments; None: it makes no videos.
    """

    name = "packcache_videos"
    required_tasks = ("generate",)

    def __init__(self, opened: Callable[[Any, Namespace], Awaitable[Jobs | None]]) -> None:
        self._opened = opened
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Remember the server: whether it makes videos is known when it has an engine."""
        self._app = app

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Add the routes, and begin to take jobs, where the server makes videos; others are as they were."""
        jobs = None if engine_client is None else await self._opened(engine_client, args)
        if jobs is not None:
            assert self._app is not None
            setattr(state, _JOBS, jobs)
            add_routes(self._app)


def add_routes(app: FastAPI) -> None:
    """Add the routes of videos to a server."""
    for path, method, answer in (
        (PATH, "POST", _create),
        (PATH, "GET", _list),
        (f"{PATH}/extensions", "POST", _extend),
        (f"{PATH}/edits", "POST", _edit),
        (f"{PATH}/{{id}}", "GET", _show),
        (f"{PATH}/{{id}}", "DELETE", _delete),
        (f"{PATH}/{{id}}/content", "GET", _content),
        (f"{PATH}/{{id}}/events", "GET", _events),
        (f"{PATH}/{{id}}/remix", "POST", _remix),
        ("/v1/playground", "GET", _about),
    ):
        app.add_api_route(path, _answering(answer), methods=[method], response_model=None)
    # Whatever else is below it, such as an id with a slash.
    for method in ("GET", "POST", "DELETE"):
        app.add_api_route(
            f"{PATH}/{{rest:path}}",
            _answering(_nothing),
            methods=[method],
            response_model=None,
            include_in_schema=False,
        )
    folder = files(__package__).joinpath("page")
    page = pages.page_of(folder, "playground.html", "/playground")
    pages.add_page(app, folder, page, pages.headers(img="data: blob:", media="blob:"))
    within = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(own: Any) -> AsyncIterator[Any]:
        # vLLM forgets its state before this ends.
        jobs = getattr(app.state, _JOBS, None)
        async with within(own) as state:
            yield state
            if jobs is not None:
                await jobs.stop()

    app.router.lifespan_context = lifespan


def _jobs(state: State) -> Jobs:
    jobs: Jobs = getattr(state, _JOBS)
    return jobs


def _answering(answer: Callable[[Jobs, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def wrapper(request: Request) -> Response:
        try:
            return await answer(_jobs(request.app.state), request)
        except Refusal as refusal:
            return refusal.answer()
        except StoreError as error:
            return _refused(error).answer()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return _refused(StoreFull("the disk is full: delete videos, or ask for a smaller one")).answer()

    return wrapper


_STORE_ERRORS: dict[type[StoreError], tuple[int, str, int | None]] = {
    Full: (429, "queue_full", 5),
    NoSpace: (507, "quota_used_up", None),
    StoreFull: (507, "disk_full", None),
    StoreBusy: (503, "store_busy", 1),
}
"""Status, code, and seconds after which to ask again."""


def _refused(error: StoreError) -> Refusal:
    status, code, wait = _STORE_ERRORS.get(type(error), (500, "store_error", None))
    return Refusal(status, str(error), code=code, wait=wait)


async def _nothing(jobs: Jobs, request: Request) -> Response:
    del jobs, request
    raise Refusal(404, f"there is nothing at this path: see GET {PATH}, and GET {PATH}/{{id}}", code="not_found")


async def _about(jobs: Jobs, request: Request) -> Response:
    del request
    return JSONResponse(jobs.about())


async def _create(jobs: Jobs, request: Request) -> Response:
    body = await read(request, jobs.limits.allowed_hosts)
    return await _made(jobs, request, body, jobs.create)


async def _extend(jobs: Jobs, request: Request) -> Response:
    video, body = await read_extension(request, jobs.limits.allowed_hosts)

    async def extended(own: VideoBody) -> Job:
        await _ready(jobs, video, param="video")
        return await jobs.extend(video, own)

    return await _made(jobs, request, body, extended)


async def _made(jobs: Jobs, request: Request, body: VideoBody, make: Callable[[VideoBody], Awaitable[Job]]) -> Response:
    try:
        _check_model(request.app.state, body.model)
        return _video(jobs, await make(body))
    finally:
        await asyncio.to_thread(body.discard)


def _check_model(state: State, model: str | None) -> None:
    """Check that a client means the model that is served.

    Raises:
        Refusal: it does not.
    """
    served = [path.name for path in state.openai_serving_models.base_model_paths]
    if model is not None and model not in served:
        raise Refusal(
            404, f"model must be {' or '.join(served)}, which is served here", param="model", code="model_not_found"
        )


async def _remix(jobs: Jobs, request: Request) -> Response:
    prompt = await read_remix(request)
    job = await _found(jobs, request.path_params["id"])
    return _video(jobs, await jobs.remix(job.id, prompt))


async def _edit(jobs: Jobs, request: Request) -> Response:
    del jobs, request
    raise Refusal(
        400,
        f"no model that is served here changes a video: remix it ({PATH}/{{id}}/remix: the same seed, another prompt), "
        "or extend it",
        code="not_supported",
    )


async def _list(jobs: Jobs, request: Request) -> Response:
    query = request.query_params
    limit = _whole(query.get("limit", "20"), "limit", _MOST_LISTED)
    order, after = query.get("order", "desc"), query.get("after") or None
    if order not in ("asc", "desc"):
        raise Refusal(400, f"order must be asc or desc, not {shown(order)}", param="order")
    ordered: Literal["asc", "desc"] = "asc" if order == "asc" else "desc"
    try:
        found, more = await asyncio.to_thread(jobs.store.list, after=after, limit=limit, order=ordered)
    except KeyError:
        raise Refusal(
            400, f"after must be the id of a video, and there is none {shown(after)}", param="after"
        ) from None
    data = [jobs.shown(job) for job in found]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})


def _whole(text: str, name: str, most: int) -> int:
    """A number that a client gives in an address.

    Raises:
        Refusal: it is none, or too large.
    """
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= number <= most:
        raise Refusal(400, f"{name} must be a number from 0 to {most}, not {shown(text)}", param=name)
    return number


async def _show(jobs: Jobs, request: Request) -> Response:
    return _video(jobs, await _found(jobs, request.path_params["id"]))


def _video(jobs: Jobs, job: Job) -> Response:
    headers = {} if job.ended else {"OpenAI-Poll-After-Ms": str(POLL)}
    return JSONResponse(jobs.shown(job), headers=headers)


async def _found(jobs: Jobs, id: str, param: str | None = None) -> Job:
    """The job of that id.

    Raises:
        Refusal: there is none.
    """
    job = await asyncio.to_thread(jobs.store.get, id)
    if job is None:
        raise _gone(param)
    return job


def _gone(param: str | None = None) -> Refusal:
    return Refusal(
        404,
        "there is no video of this id: it was never asked for, deleted, or has expired",
        param=param,
        code="video_not_found",
    )


async def _ready(jobs: Jobs, id: str, param: str | None = None) -> Job:
    """The job of that id, whose video is there.

    Raises:
        Refusal: it is not, yet or at all.
    """
    job = await _found(jobs, id, param)
    if job.status == "failed":
        raise _failed(job)
    if not job.ended:
        raise Refusal(
            409, f"this video is {job.progress} percent made: wait until it is completed", param=param, code="not_ready"
        )
    return job


def _failed(job: Job) -> Refusal:
    error = job.error or {}
    return Refusal(422, f"this video could not be made: {error.get('message')}", code=error.get("code"))


async def _delete(jobs: Jobs, request: Request) -> Response:
    id = request.path_params["id"]
    if not await jobs.delete(id):
        raise _gone()
    return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})


async def _content(jobs: Jobs, request: Request) -> Response:
    id, variant = request.path_params["id"], request.query_params.get("variant", "video")
    if variant == "live":
        job = await _found(jobs, id)
        if job.status == "failed":
            raise _failed(job)
        if not job.ended:
            headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
            return StreamingResponse(_live(jobs, job), media_type="video/mp4", headers=headers)
        # What has grown is finished, and better as a whole.
        variant = "video"
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise Refusal(400, f"variant must be {known} or live, not {shown(variant)}", param="variant")
    job = await _ready(jobs, id)
    file, kind = VARIANTS[variant]
    path = jobs.store.path(job.id, file)
    try:
        return await sent(request, path, kind, f"{job.id}{path.suffix}")
    except FileNotFoundError:
        await _found(jobs, id)
        raise Refusal(
            404,
            f"this video has no {variant}: its server makes no pictures of token ids; ask for variant=ids",
            param="variant",
            code="no_pictures",
        ) from None


async def _live(jobs: Jobs, job: Job) -> AsyncIterator[bytes]:
    """A video as it grows, until it does not any more; one that fails or is deleted ends where it is."""
    file: BinaryIO | None = None
    try:
        async with aclosing(jobs.follow(job.id, 0)) as following:
            # Whatever happens, there may be more of the file.
            async for _ in following:
                file = file or await _opened_of(jobs, job, GROWING)
                while file is not None and (piece := await asyncio.to_thread(file.read, PIECE)):
                    yield piece
        # Where it was finished before it could be seen to grow.
        file = file or await _opened_of(jobs, job, VIDEO)
        while file is not None and (piece := await asyncio.to_thread(file.read, PIECE)):
            yield piece
    except (Refusal, StoreError):
        return
    finally:
        if file is not None:
            file.close()


async def _opened_of(jobs: Jobs, job: Job, name: str) -> BinaryIO | None:
    try:
        return await asyncio.to_thread(jobs.store.path(job.id, name).open, "rb")
    except FileNotFoundError:
        return None


async def _events(jobs: Jobs, request: Request) -> Response:
    id = request.path_params["id"]
    # A client that comes back says in the header what it has seen, whatever it first asked for.
    seen = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    after = _whole(seen, "after", 2**53)
    job = await _found(jobs, id)
    if job.ended and await asyncio.to_thread(jobs.store.events, id, after, 1) == []:
        # By this, clients that would come back for ever learn that nothing more comes.
        return Response(status_code=204)
    return events.answer(_told(jobs, id, after))


async def _told(jobs: Jobs, id: str, after: int) -> AsyncIterator[str]:
    """Events of a video; the last one is ``completed`` or ``failed``, or ``error`` where it is deleted."""
    try:
        async with aclosing(jobs.follow(id, after)) as following:
            async for event in following:
                if event is None:
                    yield events.HEARTBEAT
                    continue
                yield events.event(event.kind, await asyncio.to_thread(_data, jobs, id, event), event.seq)
                if event.kind in TERMINAL:
                    return
        # Otherwise the server stops, and the client comes back to another one.
        if not await asyncio.to_thread(jobs.store.exists, id):
            raise _gone()
    except Refusal as refusal:
        yield events.event("error", {"error": refusal.said()})
    except StoreError as error:
        yield events.event("error", {"error": _refused(error).said()})


def _data(jobs: Jobs, id: str, event: Event) -> dict[str, Any]:
    """What an event says: of a frame its picture too, of anything else the video as it was then.

    Raises:
        Refusal: the video is gone.
    """
    if event.kind == "frame":
        try:
            picture = jobs.store.path(id, preview_name(event.data["frame"])).read_bytes()
        except FileNotFoundError:
            return event.data
        return {**event.data, "picture": "data:image/webp;base64," + base64.b64encode(picture).decode()}
    job = jobs.store.get(id)
    if job is None:
        raise _gone()
    return jobs.shown(job if event.kind in TERMINAL else as_it_was(job, event))
