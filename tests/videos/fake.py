"""A server of videos without a model, for the page: worlds of the demo instead of what a model makes, real maps.

Preview: ``python -m tests.videos.fake --port 8100 --seconds 0.2``, and open http://127.0.0.1:8100/playground
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image

from vllm_packcache.config.sources import load_mapping
from vllm_packcache.core import policies
from vllm_packcache.demo.run import ASSETS, EXAMPLE
from vllm_packcache.demo.world import World, make_world, opening
from vllm_packcache.media.videos import encode_video
from vllm_packcache.serving.server import free_port
from vllm_packcache.tools.explain import Explanation, explain

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
BLOCK_SIZE = 32
FPS = 4
POLL = 0.005
"""Seconds between two looks at what changed."""


def _file(picture: np.ndarray, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@lru_cache
def _world(seed: int) -> World:
    return opening(make_world(seed))


@lru_cache
def _explanation(policy: str, options: str, frames: int) -> Explanation:
    source = {"layout": load_mapping("demo")["layout"], **json.loads(options)}
    if policy == "packcache":
        source = {**load_mapping("demo"), **source}
    return explain(json.dumps(source), policy, frames=frames, block_size=BLOCK_SIZE)


@dataclass
class FakeVideo:
    """One video: its object, its events, and how it is made."""

    shown: dict[str, Any]
    seed: int
    given: int = 0
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    deleted: bool = False

    def picture(self, frame: int) -> np.ndarray:
        return _world(self.seed).frame(frame)

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        self.events.append((kind, dict(data)))


class Fake:
    """What the server has, and what a test wants of it.

    Args:
        key: that requests must have; None: none.
        seconds: that a frame takes.
        tokenizer: what is to be different in what the page is told of it.
    """

    def __init__(self, key: str | None = None, seconds: float = 0.0, tokenizer: dict[str, Any] | None = None) -> None:
        self.key, self.seconds = key, seconds
        self.videos: dict[str, FakeVideo] = {}
        self.asked: list[dict[str, Any]] = []
        """Fields of each request for a video; a file is its type."""
        self.resumed: list[str] = []
        """``Last-Event-ID`` of each request for events."""
        self.allowed: float = float("inf")
        """Frames that a video may have by now."""
        self.connections: float = float("inf")
        """Events after which a connection is cut."""
        self.refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
        """Status, error and headers of the answer to the next request for a video."""
        self.failing = False
        """Whether a video fails when it has all of the frames that it may have."""
        example = {
            "prompt": (ASSETS / "example_prompt.txt").read_text().strip(),
            "picture": _data_url("image/png", (ASSETS / "example.png").read_bytes()),
        }
        other = {"prompt": make_world(4).prompt, "picture": _data_url("image/png", _file(_world(4).frame(0), "PNG"))}
        named = {name: policies.find(name)() for name in ("packcache", "full")}
        self.about = {
            "object": "playground",
            "model": "demo",
            "policy": "packcache",
            "policies": {name: dict(vars(policy)) for name, policy in named.items()},
            "options": {
                name: value for name, value in load_mapping("demo").items() if hasattr(named["packcache"], name)
            },
            "tokenizer": {
                "name": "demo",
                "text": True,
                "sizes": ["64x64"],
                "size": "64x64",
                "fps": FPS,
                "frames": 20,
                "most_frames": 64,
                "picture": "required",
                "clip": False,
                "options": {
                    "seed": {"default": 0, "least": 0, "most": 2**31 - 1, "step": 1},
                    "temperature": {"default": 0, "least": 0, "most": 2, "step": 0.1},
                },
                "examples": [example, other],
                **(tokenizer or {}),
            },
            "block_size": BLOCK_SIZE,
            "tokens_per_frame": 257,
        }

    # What is made

    def create(self, asked: dict[str, Any], given: FakeVideo | None = None) -> FakeVideo:
        frames = int(asked["num_frames"]) + (given.shown["frames"] if given else 0)
        policy = asked.get("packcache_policy", "packcache")
        options = {
            name.removeprefix("packcache_"): yaml.safe_load(str(value))
            for name, value in asked.items()
            if name.startswith("packcache_") and name != "packcache_policy"
        }
        shown = {
            "id": f"video_{uuid.uuid4().hex}",
            "object": "video",
            "model": "demo",
            "status": "queued",
            "progress": 0,
            "created_at": int(time.time()),
            "completed_at": None,
            "expires_at": None,
            "prompt": asked.get("prompt"),
            "size": "64x64",
            "seconds": f"{frames / FPS:g}",
            "remixed_from_video_id": None,
            "error": None,
            "fps": self.about["tokenizer"]["fps"],
            "frames": frames,
            "options": {"policy": policy, **options} if given is None else given.shown["options"],
        }
        example = (ASSETS / "example_prompt.txt").read_text().strip()
        seed = given.seed if given else EXAMPLE if asked.get("prompt") == example else 4
        video = FakeVideo(shown, seed, given.shown["frames"] if given else 0)
        video.tell("status", shown)
        self.videos[shown["id"]] = video
        return video

    async def make(self, video: FakeVideo) -> None:
        """All of its frames, one after the other."""
        shown, began = video.shown, time.monotonic()
        options = {name: value for name, value in shown["options"].items() if name != "policy"}
        explanation = _explanation(shown["options"]["policy"], json.dumps(options), shown["frames"])
        for frame in range(shown["frames"]):
            given = frame < video.given
            while frame >= self.allowed and not given and not video.deleted and not self.failing:
                await asyncio.sleep(POLL)
            if self.failing and not given and frame >= self.allowed:
                shown.update(status="failed", error={"code": "out_of_memory", "message": "the GPU is <b>full</b>"})
                video.tell("failed", shown)
                return
            if not given:
                await asyncio.sleep(self.seconds)
            if video.deleted:
                return
            if shown["status"] == "queued":
                shown["status"] = "in_progress"
                video.tell("status", shown)
            view = explanation.view(frame)
            progress = min(99, round(100 * (frame + 1) / shown["frames"]))
            shown["progress"] = progress
            runs = [[int(state), len(list(own))] for state, own in groupby(view.states.tolist())]
            resident = sum(count for state, count in runs if state >= -1)
            picture = {}
            if self.about["tokenizer"]["text"]:
                picture["picture"] = _data_url("image/webp", _file(video.picture(frame + 1), "WEBP", lossless=True))
            video.tell(
                "frame",
                {
                    "object": "video.frame",
                    "video": shown["id"],
                    "frame": frame,
                    "frames": shown["frames"],
                    "given": given,
                    "pictures": 1,
                    "seconds": 0.0 if given else self.seconds or 0.1,
                    "progress": progress,
                    "resident_blocks": resident,
                    "resident_tokens": view.tokens.live,
                    "full_tokens": view.tokens.full,
                    "positions": [0, min(view.tokens.full, 288 + 13 * 257)],
                    "block_size": BLOCK_SIZE,
                    "blocks": runs,
                    **picture,
                },
            )
        shown.update(
            status="completed",
            progress=100,
            completed_at=int(time.time()),
            pictures=shown["frames"],
            resident_tokens=view.tokens.live,
            full_tokens=view.tokens.full,
            inference_time_s=time.monotonic() - began,
        )
        video.tell("completed", shown)

    def content(self, video: FakeVideo, variant: str) -> Response:
        frames = np.stack([video.picture(frame + 1) for frame in range(video.shown["frames"])])
        if variant == "thumbnail":
            return Response(_file(frames[0], "WEBP", lossless=True), media_type="image/webp")
        if variant == "spritesheet":
            return Response(_file(np.concatenate(frames[:6], axis=1), "JPEG"), media_type="image/jpeg")
        if variant == "ids":
            return Response(np.arange(9, dtype="<i4").tobytes(), media_type="application/octet-stream")
        return Response(encode_video(frames, ".mp4", FPS), media_type="video/mp4")

    async def follow(self, video: FakeVideo, after: int) -> AsyncIterator[str]:
        sent = 0
        while not video.deleted:
            if after >= len(video.events):
                await asyncio.sleep(POLL)
                continue
            kind, data = video.events[after]
            after += 1
            yield f"id: {after}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
            yield ": heartbeat\n\n"
            sent += 1
            if kind in ("completed", "failed") or sent >= self.connections:
                return


def _refused(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}
    return JSONResponse({"error": error}, status, headers=headers)


async def _fields(request: Request) -> dict[str, Any]:
    if request.headers["content-type"].startswith("application/json"):
        return await request.json()
    form = await request.form(max_part_size=2**24)
    return {name: value if isinstance(value, str) else value.content_type for name, value in form.items()}


def make_app(fake: Fake, root_path: str = "") -> FastAPI:
    """The routes that the page uses, all of them below a path."""
    app = FastAPI()
    making: set[asyncio.Task[None]] = set()

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Response:
        wanted = f"Bearer {fake.key}"
        path = request.url.path.removeprefix(root_path)
        if fake.key is not None and path.startswith("/v1") and request.headers.get("authorization") != wanted:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    def begin(video: FakeVideo) -> dict[str, Any]:
        task = asyncio.create_task(fake.make(video))
        making.add(task)
        task.add_done_callback(making.discard)
        return video.shown

    @app.post("/v1/videos", response_model=None)
    async def create(request: Request) -> Any:
        fake.asked.append(asked := await _fields(request))
        if fake.refusal is not None:
            (status, error, headers), fake.refusal = fake.refusal, None
            return _refused(status, headers=headers, **error)
        return begin(fake.create(asked))

    @app.post("/v1/videos/extensions", response_model=None)
    async def extend(request: Request) -> Any:
        fake.asked.append(asked := await _fields(request))
        return begin(fake.create(asked, fake.videos[asked["video"]["id"]]))

    @app.get("/v1/videos")
    async def listed(limit: int = 20, after: str | None = None, order: str = "desc") -> dict[str, Any]:
        assert order == "desc"
        videos = [video.shown for video in reversed(fake.videos.values())]
        start = 0 if after is None else [own["id"] for own in videos].index(after) + 1
        page = videos[start : start + limit]
        ids = [own["id"] for own in page] or [None]
        more = start + limit < len(videos)
        return {"object": "list", "data": page, "first_id": ids[0], "last_id": ids[-1], "has_more": more}

    @app.get("/v1/videos/{name}", response_model=None)
    async def show(name: str) -> Any:
        return fake.videos[name].shown if name in fake.videos else _refused(404, "there is no such video")

    @app.delete("/v1/videos/{name}", response_model=None)
    async def delete(name: str) -> Any:
        if name not in fake.videos:
            return _refused(404, "there is no such video")
        fake.videos.pop(name).deleted = True
        return {"id": name, "object": "video.deleted", "deleted": True}

    @app.get("/v1/videos/{name}/content", response_model=None)
    async def content(name: str, variant: str = "video") -> Response:
        return fake.content(fake.videos[name], variant)

    @app.get("/v1/videos/{name}/events", response_model=None)
    async def events(name: str, request: Request) -> Response:
        if name not in fake.videos:
            return _refused(404, "there is no such video")
        last = request.headers.get("last-event-id", "")
        fake.resumed.append(last)
        return StreamingResponse(fake.follow(fake.videos[name], int(last or 0)), media_type="text/event-stream")

    @app.get("/v1/playground")
    async def about() -> dict[str, Any]:
        return fake.about

    @app.get("/playground/{name}", response_model=None)
    async def file(name: str) -> Response:
        return page_file(name)

    @app.get("/playground", response_model=None)
    async def page() -> Response:
        return page_file("playground.html")

    if not root_path:
        return app
    outer = FastAPI()
    outer.mount(root_path, app)
    return outer


def page_file(name: str) -> Response:
    """A file of the page, with the headers that the server gives it."""
    kind = KINDS["." + name.rpartition(".")[2]]
    content = files("vllm_packcache.videos").joinpath("page", name).read_bytes()
    return Response(content, media_type=kind, headers=PAGE_HEADERS)


@contextmanager
def serving(fake: Fake, root_path: str = "", port: int | None = None) -> Iterator[str]:
    """Serve it in a thread.

    Yields:
        The address of the page.
    """
    port = free_port() if port is None else port
    config = uvicorn.Config(
        make_app(fake, root_path), "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the fake server did not start"
            time.sleep(POLL)
        yield f"http://127.0.0.1:{port}{root_path}/playground"
    finally:
        server.should_exit = True
        thread.join(30)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--key")
    arguments = parser.parse_args()
    with serving(Fake(arguments.key, arguments.seconds), port=arguments.port) as address:
        print(f"the page is at {address}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
