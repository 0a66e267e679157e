"""The routes over jobs without an engine: the real store, and frames that a test makes when it wants them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI

from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.media.processors.base import Asked
from vllm_packcache.serving.server import free_port
from vllm_packcache.videos.files import GROWING, preview_name
from vllm_packcache.videos.objects import TERMINAL, video_object
from vllm_packcache.videos.request import VideoBody, asked
from vllm_packcache.videos.routes import _JOBS, VARIANTS, add_routes
from vllm_packcache.videos.store import Event, Job, Store

MODEL = "demo"
TOKENS = 10
"""Of a frame."""

CONTENT = {variant: f"the {variant} ".encode() * 50 for variant in VARIANTS}


class FakeJobs:
    """Jobs that are made by whoever calls `make`.

    Args:
        folder: of the store.
        config: what the operator says.
        at_once: a video is finished when it has been asked for.
    """

    def __init__(self, folder: Path, config: VideosConfig | None = None, at_once: bool = False) -> None:
        self.store = Store(folder, expire_seconds=None, quota_bytes=None)
        self.limits = VideosConfig(heartbeat_seconds=0.02) if config is None else config
        self.at_once = at_once
        self.bodies: list[VideoBody] = []
        self.asked: list[Asked] = []
        self.stopped = False

    def about(self) -> dict[str, Any]:
        return {"object": "playground", "model": MODEL}

    async def create(self, body: VideoBody) -> Job:
        return self._begun(body)

    async def extend(self, id: str, body: VideoBody) -> Job:
        before = self.store.get(id)
        assert before is not None
        return self._begun(body, extended_from=id, more=before.request["frames"])

    async def remix(self, id: str, prompt: str) -> Job:
        before = self.store.get(id)
        assert before is not None
        return self._begun(VideoBody(prompt=prompt), remixed_from=id, more=before.request["frames"] - 4)

    async def delete(self, id: str) -> bool:
        return self.store.delete(id)

    async def follow(self, id: str, after: int) -> AsyncGenerator[Event | None, None]:
        while (found := self.store.events(id, after)) is not None:
            for event in found:
                after = event.seq
                yield event
                if event.kind in TERMINAL:
                    return
            if not found:
                await asyncio.sleep(self.limits.heartbeat_seconds)
                yield None

    def shown(self, job: Job) -> dict[str, Any]:
        return video_object(job)

    async def stop(self) -> None:
        self.stopped = True

    def _begun(self, body: VideoBody, more: int = 0, **whence: str) -> Job:
        self.bodies.append(body)
        self.asked.append(wanted := asked(body))
        frames = (wanted.frames or int((wanted.seconds or 1) * 4)) + more
        request = {
            "model": MODEL,
            "prompt": body.prompt,
            "size": "64x64",
            "seconds": f"{frames / 4:g}",
            "fps": 4,
            "frames": frames,
            "options": body.options,
            **whence,
        }
        job = self.store.create(request, frames * TOKENS, most_waiting=self.limits.most_unfinished)
        if self.at_once:
            self.make(job.id, frames)
            self.complete(job.id)
        return job

    def make(self, id: str, frames: int) -> None:
        """The first frames of a video, or as many more."""
        growing = self.store.path(id, GROWING)
        job = self.store.get(id)
        assert job is not None
        for number in range(job.tokens // TOKENS, job.tokens // TOKENS + frames):
            self.store.path(id, preview_name(number)).write_bytes(b"webp of %d" % number)
            with growing.open("ab") as file:
                file.write(piece(number))
            assert self.store.advance(id, (number + 1) * TOKENS, {"object": "video.frame", "frame": number})

    def complete(self, id: str) -> None:
        """All of its files."""
        for variant, (name, _) in VARIANTS.items():
            self.store.path(id, name).write_bytes(CONTENT[variant])
        assert self.store.complete(id, {"pictures": 4, "resident_tokens": 544, "inference_time_s": 1.5})


def piece(number: int) -> bytes:
    """What a frame adds to the growing file."""
    return b"<%03d>" % number


def make_app(jobs: FakeJobs | None) -> FastAPI:
    """A server that has come up."""
    app = FastAPI()
    add_routes(app)
    app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name=MODEL)])
    if jobs is not None:
        setattr(app.state, _JOBS, jobs)
    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve it in a thread.

    Yields:
        Its address.
    """
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
