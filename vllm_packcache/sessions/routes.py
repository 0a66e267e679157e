"""Sessions over HTTP and WebSocket, on vLLM's own server and behind its key.

======  ============================  ============================================================
POST    /v1/sessions                  begin one
GET     /v1/sessions                  all of them
GET     /v1/sessions/{id}             one
POST    /v1/sessions/{id}/steps       an action in, a frame out: JSON, raw ids, a PNG, or events
POST    /v1/sessions/{id}/fork        another one that goes on from here
POST    /v1/sessions/{id}/reset       back to an earlier frame
DELETE  /v1/sessions/{id}             end one
WS      /v1/sessions/{id}/play        the same, message by message; the newest action waiting wins
GET     /v1/play                      what the operator has named to play: openings, keys
GET     /play                         a page that plays it; it holds no secret, and asks for the key where there is one
======  ============================  ============================================================
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, WebSocket
from fastapi.datastructures import State
from fastapi.responses import JSONResponse, Response
from fastapi.websockets import WebSocketDisconnect, WebSocketState

from vllm_packcache.config.server import config_of
from vllm_packcache.sessions.house import House
from vllm_packcache.sessions.messages import Create, Reset, Step, read
from vllm_packcache.sessions.pictures import png
from vllm_packcache.sessions.session import Frame, Session, SessionError, ids_of
from vllm_packcache.web import bodies, events, pages
from vllm_packcache.web.refusals import Refusal

PATH = "/v1/sessions"

LARGEST_BODY = 16 * 2**20
"""Bytes of a request, as vLLM's WebSockets take."""

RAW, PNG = "application/octet-stream", "image/png"

PAGE = {
    "play.html": ("/play", "text/html"),
    "play.css": ("/play/play.css", "text/css"),
    "play.js": ("/play/play.js", "text/javascript"),
    "icon.svg": ("/play/icon.svg", "image/svg+xml"),
}
"""Files of the page in the folder ``page``: where they are, and what."""

_HOUSE = "packcache_house"

_GOING_AWAY, _REFUSED = 1001, 4400


class Routes:
    """Sessions as vLLM's endpoint plugin."""

    name = "packcache_sessions"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, before there is an engine."""
        add_routes(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Open the house where a policy is on."""
        del args
        config = None if engine_client is None else config_of(engine_client)
        if config is not None and config.family.role == "causal":
            setattr(state, _HOUSE, House(engine_client, config))


def add_routes(app: FastAPI) -> None:
    """Add the routes of sessions to a server."""
    for path, method, answer in (
        ("", "POST", _create),
        ("", "GET", _list),
        ("/{name}", "GET", _show),
        ("/{name}", "DELETE", _delete),
        ("/{name}/steps", "POST", _step),
        ("/{name}/fork", "POST", _fork),
        ("/{name}/reset", "POST", _reset),
    ):
        app.add_api_route(PATH + path, _answering(answer), methods=[method], response_model=None)
    app.add_api_websocket_route(PATH + "/{name}/play", _play)
    app.add_api_route("/v1/play", _answering(_world), methods=["GET"], response_model=None)
    pages.add_page(app, files(__package__).joinpath("page"), PAGE, pages.headers())
    within = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(own: Any) -> AsyncIterator[Any]:
        house = getattr(app.state, _HOUSE, None)
        async with within(own) as state:
            yield state
            if house is not None:
                house.stop()

    app.router.lifespan_context = lifespan


def _house(state: State) -> House:
    house: House | None = getattr(state, _HOUSE, None)
    if house is None:
        raise SessionError(
            501,
            "this server plays no sessions: start it with --kv-cache-policy and a model that makes tokens one by one",
        )
    if house.engine.vllm_config.parallel_config._api_process_count > 1:
        raise SessionError(501, "sessions need one API server, which knows them: start with --api-server-count 1")
    return house


def _answering(answer: Callable[[House, Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def wrapper(request: Request) -> Response:
        try:
            return await answer(_house(request.app.state), request)
        except Refusal as refusal:
            return refusal.answer()

    return wrapper


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        SessionError: it is too large.
    """
    try:
        return await bodies.body(request, LARGEST_BODY)
    except Refusal as error:
        raise SessionError(error.status, str(error)) from None


def _logical_tokens(session: Session) -> int:
    """Of all that has been played, forgotten frames included."""
    return len(session.ids) + session.forgotten * session.plan.layout.tokens_per_frame


def _shown(session: Session) -> dict[str, Any]:
    now = time.monotonic()
    layout = session.plan.layout
    return {
        "id": session.name,
        "object": "session",
        "next_frame": session.frames,
        "oldest_frame": session.first_frame,
        "exact": session.exact,
        "busy": session.busy,
        "given_ids": session.needed(),
        "resident_tokens": session.resident_tokens,
        "logical_tokens": _logical_tokens(session),
        "idle_seconds": 0.0 if session.busy else round(now - session.used, 3),
        "age_seconds": round(now - session.created, 3),
        "grid": None if layout.frame.grid is None else list(layout.frame.grid),
    }


async def _world(house: House, request: Request) -> Response:
    del request
    if house.play is None:
        raise SessionError(
            404,
            "this server has no world to play: start it with a --kv-cache-policy-config that has sessions: {pictures: "
            "module:object, play: module:object}",
        )
    world = house.play.model_dump(mode="json", exclude_none=True)
    return JSONResponse({"object": "play", **world, "actions": house.coding is not None})


async def _create(house: House, request: Request) -> Response:
    message = read(Create, await _body(request))
    served = [path.name for path in request.app.state.openai_serving_models.base_model_paths]
    if message.model is not None and message.model not in served:
        raise SessionError(404, f"model must be {' or '.join(served)}, which is served here")
    return JSONResponse(_shown(house.create(message)), 201)


async def _list(house: House, request: Request) -> Response:
    del request
    return JSONResponse({"object": "list", "data": [_shown(session) for session in house.all()]})


def _named(house: House, request: Request | WebSocket) -> Session:
    return house.find(request.path_params["name"])


async def _show(house: House, request: Request) -> Response:
    return JSONResponse(_shown(_named(house, request)))


async def _delete(house: House, request: Request) -> Response:
    house.delete(_named(house, request).name)
    return Response(status_code=204)


async def _fork(house: House, request: Request) -> Response:
    return JSONResponse(_shown(house.fork(_named(house, request).name)), 201)


async def _reset(house: House, request: Request) -> Response:
    session = _named(house, request)
    session.reset(read(Reset, await _body(request)).frame)
    return JSONResponse(_shown(session))


async def _step(house: House, request: Request) -> Response:
    session = _named(house, request)
    body = await _body(request)
    raw = request.headers.get("content-type", "").startswith(RAW)
    message = Step(given_ids=ids_of(body)) if raw else read(Step, body)
    frame = session.begin(house.given(session, message.action, message.given_ids))
    if message.stream:
        return events.answer(_events(house, session, frame, message))
    await frame.whole()
    accept = request.headers.get("accept", "")
    headers = {"X-Frame": str(frame.number), "X-Resident-Tokens": str(session.resident_tokens)}
    if PNG in accept:
        return Response(await _picture(house, session, frame), media_type=PNG, headers=headers)
    if RAW in accept:
        return Response(np.array(frame.visual, dtype="<i4").tobytes(), media_type=RAW, headers=headers)
    return JSONResponse(await _made(house, session, frame, message.picture))


async def _made(house: House, session: Session, frame: Frame, picture: bool) -> dict[str, Any]:
    made = {
        "object": "session.frame",
        "session": session.name,
        "frame": frame.number,
        "given_ids": frame.given,
        "ids": frame.visual,
        "seconds": round(frame.seconds, 6),
        "resident_tokens": session.resident_tokens,
        "logical_tokens": _logical_tokens(session),
        "began_anew": frame.began_anew,
    }
    if picture and house.pictures is not None:
        made["picture"] = base64.b64encode(await _picture(house, session, frame)).decode()
    return made


async def _picture(house: House, session: Session, frame: Frame) -> bytes:
    """A frame as a PNG file.

    Raises:
        SessionError: nobody has said how, or the ids are no picture.
    """
    grid, pictures = session.plan.layout.frame.grid, house.pictures
    if pictures is None or grid is None:
        raise SessionError(406, "this server makes no pictures of ids: start it with sessions: pictures, and a grid")
    ids = np.array(frame.visual, dtype=np.int64).reshape(grid)

    def drawn() -> bytes:
        return png(pictures.decode(ids))

    try:
        return await asyncio.to_thread(drawn)
    except Exception as error:  # It is the operator's.
        raise SessionError(500, f"frame {frame.number} cannot be drawn: {' '.join(str(error).split())[:80]}") from None


async def _events(house: House, session: Session, frame: Frame, message: Step) -> AsyncIterator[str]:
    """A frame as server-sent events: ids as they are made, and in the end the frame."""
    try:
        async for part in events.with_heartbeat(frame.parts(), house.limits.heartbeat_seconds):
            if part is None:
                yield events.HEARTBEAT
            else:
                yield events.event("tokens", {"frame": frame.number, "ids": part})
        yield events.event("frame", await _made(house, session, frame, message.picture))
    except SessionError as error:
        yield events.event("error", {"error": error.said()})


async def _play(socket: WebSocket) -> None:
    """Play a session: the client sends steps, the server frames.

    One frame is made at a time. Of the steps that come meanwhile the newest waits, and those before it are told that
    they were left out.
    """
    try:
        house = _house(socket.app.state)
        session = _named(house, socket)
    except SessionError as error:
        await socket.accept()
        await socket.send_json({"type": "error", "error": error.said()})
        await socket.close(_REFUSED)
        return
    await socket.accept()
    await _Player(house, session, socket, socket.query_params.get("format", "json")).play()


class _Player:
    """One WebSocket and its session.

    Args:
        house: of all sessions.
        session: that is played.
        socket: of the client.
        form: what frames come as: ``json``; ``raw``, the number of the frame and its ids, int32 each, the lowest byte
            first; or ``png``, the number and a PNG file.
    """

    def __init__(self, house: House, session: Session, socket: WebSocket, form: str) -> None:
        self.house, self.session, self.socket, self.form = house, session, socket, form
        self._waiting: Step | Reset | None = None
        self._came = asyncio.Event()
        self._left_out = 0

    async def play(self) -> None:
        """Until one of them goes."""
        if self.form not in ("json", "raw", "png"):
            await self._tell(SessionError(400, f"format must be json, raw or png, not {self.form[:80]!r}"))
            await self.socket.close(_REFUSED)
            return
        await self._send({"type": "session", **_shown(self.session)})
        tasks = [asyncio.create_task(own) for own in (self._listen(), self._make(), self._live())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self.socket.client_state is WebSocketState.CONNECTED:
            ended = self.session.ended or SessionError(500, "the connection was ended")
            try:
                await self._send({"type": "ended", "error": ended.said()})
                await self.socket.close(_GOING_AWAY)
            except (RuntimeError, WebSocketDisconnect):
                return

    async def _listen(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                self._take(message)
            except SessionError as error:
                await self._tell(error)

    def _take(self, message: Any) -> None:
        text, data = message.get("text"), message.get("bytes")
        wanted: Step | Reset
        if text is None:
            wanted = Step(given_ids=ids_of(data or b""))
        else:
            try:
                kind = json.loads(text).get("type", "step")
            except (ValueError, AttributeError, RecursionError):
                raise SessionError(400, 'a message must be a JSON object with "type": "step" or "reset"') from None
            if kind not in ("step", "reset"):
                raise SessionError(400, f"type must be step or reset, not {str(kind)[:80]!r}")
            wanted = read(Step, text) if kind == "step" else read(Reset, text)
        if self._waiting is not None:
            self._left_out += 1
        self._waiting = wanted
        self._came.set()

    async def _make(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            wanted, self._waiting = self._waiting, None
            if wanted is None:
                continue
            try:
                if isinstance(wanted, Reset):
                    self.session.reset(wanted.frame)
                    await self._send({"type": "session", **_shown(self.session)})
                else:
                    await self._frame(wanted)
            except SessionError as error:
                await self._tell(error)

    async def _frame(self, wanted: Step) -> None:
        given = self.house.given(self.session, wanted.action, wanted.given_ids)
        frame = self.session.begin(given)
        left_out, self._left_out = self._left_out, 0
        if wanted.stream:
            async for part in frame.parts():
                await self._send({"type": "tokens", "frame": frame.number, "ids": part})
        await frame.whole()
        if self.form == "raw":
            head = struct.pack("<i", frame.number)
            await self.socket.send_bytes(head + np.array(frame.visual, dtype="<i4").tobytes())
        elif self.form == "png":
            head = struct.pack("<i", frame.number)
            await self.socket.send_bytes(head + await _picture(self.house, self.session, frame))
        else:
            made = await _made(self.house, self.session, frame, wanted.picture)
            await self._send({"type": "frame", **made, "left_out": left_out})

    async def _live(self) -> None:
        """A sign of life now and then, and the end with the session's."""
        beat = time.monotonic()
        while self.session.ended is None:
            await asyncio.sleep(min(0.5, self.house.limits.heartbeat_seconds))
            if time.monotonic() - beat >= self.house.limits.heartbeat_seconds:
                await self._send({"type": "heartbeat"})
                beat = time.monotonic()

    async def _send(self, message: dict[str, Any]) -> None:
        await self.socket.send_text(json.dumps(message))

    async def _tell(self, error: SessionError) -> None:
        await self._send({"type": "error", "error": error.said()})
