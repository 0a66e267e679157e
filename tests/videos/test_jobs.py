"""Jobs beside an engine that is made up: what it is sent, what becomes of its ids, and what of a job when it fails."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS
from vllm_packcache.media import growing
from vllm_packcache.videos import jobs as room
from vllm_packcache.videos.jobs import Jobs
from vllm_packcache.videos.metrics import JobMetrics
from vllm_packcache.videos.request import VideoBody
from vllm_packcache.videos.store import Event, Store, StoreFull
from vllm_packcache.web.refusals import Refusal

EXAMPLE = Path(room.__file__).parents[1] / "demo" / "assets" / "example.png"
BODY = VideoBody(prompt="a red circle moves right", num_frames=5, picture=EXAMPLE.read_bytes())
MADE = 4
"""Frames of it that are made: the first picture is given."""


class Engine:
    """Makes ids that follow from what it is sent, a frame at a time; ``before`` is awaited before each.

    Attributes:
        asked: prompt and parameters of every request.
        closed: requests that were let go.
    """

    def __init__(self) -> None:
        self.asked: dict[str, tuple[list[int], Any]] = {}
        self.closed: list[str] = []
        self.errored = False
        self.refuses: Exception | None = None
        self.before: Callable[[int], Coroutine[Any, Any, None]] | None = None
        self.frames: int | None = None
        self.input_processor = SimpleNamespace(process_inputs=self._process)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=8192), cache_config=SimpleNamespace(block_size=32)
        )

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self) -> None:
        pass

    def _process(self, request_id: str, prompt: Any, params: Any, supported_tasks: Any) -> None:
        if self.refuses is not None:
            raise self.refuses

    def made(self, frame: int) -> list[int]:
        return [5, *((np.arange(256) * (frame + 1)) % 60 + 62).tolist()]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        ids = list(prompt["prompt_token_ids"])
        self.asked[request_id] = (ids, params)
        try:
            frames = params.max_tokens // FRAME_TOKENS if self.frames is None else self.frames
            for frame in range(frames):
                if self.before is not None:
                    await self.before(frame)
                tokens = self.made(frame)
                # As vLLM gives it out: the first token alone, and what is left of the last frame at the end.
                for part in (tokens[:1], tokens[1:]) if frame == 0 else (tokens,):
                    yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=part, finish_reason=None)])
                    await asyncio.sleep(0)
        finally:
            self.closed.append(request_id)


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry has a metric once."""
    made: list[JobMetrics] = []

    def once(model: str) -> JobMetrics:
        for collector in list(REGISTRY._collector_to_names):
            if any("packcache_job" in name for name in REGISTRY._collector_to_names[collector]):
                REGISTRY.unregister(collector)
        made.append(JobMetrics(model))
        return made[-1]

    monkeypatch.setattr(room, "JobMetrics", once)
    monkeypatch.setattr(room, "_OWN_LOOKS", 0.0)


def run(
    folder: Path, play: Callable[[Jobs, Engine], Coroutine[Any, Any, Any]], guidance: Any = None, **limits: Any
) -> Any:
    async def main() -> Any:
        engine = Engine()
        videos = VideosConfig(store=str(folder), tokenizer="demo", **limits)
        config = dataclasses.replace(
            ServerConfig.parse("packcache", {"layout": "demo", "guidance": guidance}), videos=videos
        )
        jobs = Jobs(engine, config, "m")  # type: ignore[arg-type]
        await jobs.start()
        try:
            async with asyncio.timeout(60):
                return await play(jobs, engine)
        finally:
            await jobs.stop()

    return asyncio.run(main())


async def events(jobs: Jobs, name: str, after: int = 0) -> list[Event]:
    return [event async for event in jobs.follow(name, after) if event is not None]


def test_a_video_is_made(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        job = await jobs.create(BODY)
        assert job.status == "queued"
        assert (job.request["size"], job.request["seconds"], job.request["frames"]) == ("64x64", "1.25", 5)
        said = await events(jobs, job.id)
        assert [event.kind for event in said] == ["status", "status", *["frame"] * 5, "completed"]
        assert [event.data["status"] for event in said[:2]] == ["queued", "in_progress"]
        frames = [event.data for event in said if event.kind == "frame"]
        assert [frame["given"] for frame in frames] == [True, *[False] * MADE]
        assert [frame["tokens"] for frame in frames] == [FRAME_TOKENS * number for number in range(5)]
        assert [frame["full_tokens"] for frame in frames[1:]] == [
            CONDITION_TOKENS + FRAME_TOKENS * number for number in range(1, 5)
        ]
        assert all(sum(count for _, count in frame["blocks"]) == -(-frame["full_tokens"] // 32) for frame in frames[1:])
        prompt, params = engine.asked[job.id]
        assert len(prompt) == CONDITION_TOKENS
        assert params.max_tokens == MADE * FRAME_TOKENS
        assert params.extra_args["packcache_grid"] == [16, 16]
        ids = np.fromfile(jobs.store.path(job.id, "ids.i4"), "<i4").reshape(MADE, FRAME_TOKENS)
        assert ids.tolist() == [engine.made(frame) for frame in range(MADE)]
        with av.open(str(jobs.store.path(job.id, "video.mp4"))) as video:
            assert sum(1 for _ in video.decode(video=0)) == 5
        names = {file.name for file in jobs.store.path(job.id, "x").parent.iterdir()}
        assert {"thumbnail.webp", "spritesheet.jpg", "input.png", "frame_00004.webp"} <= names
        assert "growing.mp4" not in names
        done = jobs.store.get(job.id)
        assert done is not None
        assert (done.status, done.progress, done.tokens) == ("completed", 100, MADE * FRAME_TOKENS)
        assert done.result["full_tokens"] == CONDITION_TOKENS + MADE * FRAME_TOKENS
        # Who comes late sees the same; who has seen all sees no more.
        assert [event.seq for event in await events(jobs, job.id, 5)] == [6, 7, 8]
        assert await events(jobs, job.id, 8) == []

    run(tmp_path, play)


def test_who_watches_hears_signs_of_life(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        going = asyncio.Event()
        engine.before = lambda frame: _waits(going)
        job = await jobs.create(BODY)
        heard = []
        async for event in jobs.follow(job.id, 0):
            heard.append(event)
            if event is None:
                going.set()
        assert None in heard
        assert heard[-1] is not None
        assert heard[-1].kind == "completed"

    run(tmp_path, play, heartbeat_seconds=0.2)


async def _waits(event: asyncio.Event) -> None:
    await event.wait()


def test_what_the_engine_has_admitted_is_in_progress(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        going = asyncio.Event()
        engine.before = lambda frame: _waits(going)
        job = await jobs.create(BODY)
        jobs.admitted(["cmpl-1", f"{job.id}-0123abcd", "video_x-1"])
        async for event in jobs.follow(job.id, 0):
            if event is not None and event.data.get("status") == "in_progress":
                # Before anything of it was made.
                assert not going.is_set()
                going.set()
        assert going.is_set()

    run(tmp_path, play)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "by another server"])
def test_what_is_deleted_is_not_made_any_more(tmp_path: Path, elsewhere: bool) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        going, reached = asyncio.Event(), asyncio.Event()

        async def before(frame: int) -> None:
            if frame == 2:
                reached.set()
                await going.wait()

        engine.before = before
        job = await jobs.create(BODY)
        await reached.wait()
        if elsewhere:
            other = Store(tmp_path, expire_seconds=None, quota_bytes=None)
            assert await asyncio.to_thread(other.delete, job.id)
            other.close()
        else:
            assert await jobs.delete(job.id)
        while engine.closed != [job.id] or jobs._making:
            await asyncio.sleep(0.01)
        assert not jobs.store.path(job.id, "x").parent.exists()
        assert jobs.store.get(job.id) is None
        assert await jobs.delete(job.id) is False
        # Another one is made as if nothing had been.
        engine.before = None
        assert (await events(jobs, (await jobs.create(BODY)).id))[-1].kind == "completed"

    run(tmp_path, play)


FAILURES = [
    (EngineDeadError(), "engine_dead", "the engine stopped while this video was made"),
    (RuntimeError("out\nof memory"), "server_error", "RuntimeError: out of memory"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES)
def test_a_job_fails_with_its_engine(tmp_path: Path, error: Exception, code: str, words: str) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        async def before(frame: int) -> None:
            if frame == 1:
                raise error

        engine.before = before
        job = await jobs.create(BODY)
        last = (await events(jobs, job.id))[-1]
        assert (last.kind, last.data["error"]["code"]) == ("failed", code)
        assert words in last.data["error"]["message"]
        assert list(jobs.store.path(job.id, "x").parent.iterdir()) == []

    run(tmp_path, play)


def test_a_video_that_ends_too_early_has_failed(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        engine.frames = 2
        last = (await events(jobs, (await jobs.create(BODY)).id))[-1]
        assert last.data["error"]["message"] == "the engine ended this video after 2 of 4 frames"

    run(tmp_path, play)


def test_a_full_disk_fails_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        add, left = growing.GrowingVideo.add, [3]

        def full(self: Any, pixels: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(self, pixels)

        monkeypatch.setattr(growing.GrowingVideo, "add", full)
        last = (await events(jobs, (await jobs.create(BODY)).id))[-1]
        assert last.data["error"]["code"] == "storage_failed"
        assert "No space left on device" in last.data["error"]["message"]
        assert (await events(jobs, (await jobs.create(BODY)).id))[-1].kind == "completed"

    run(tmp_path, play)


def test_a_server_that_stops_fails_what_it_makes(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> str:
        reached = asyncio.Event()

        async def before(frame: int) -> None:
            if frame == 1:
                reached.set()
                await asyncio.Event().wait()

        engine.before = before
        job = await jobs.create(BODY)
        await reached.wait()
        return job.id

    name = run(tmp_path, play)
    store = Store(tmp_path, expire_seconds=None, quota_bytes=None)
    job = store.get(name)
    assert job is not None
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "server_stopped")
    store.close()


def test_what_cannot_be_made_is_refused_before_there_is_a_job(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        for body, words in (
            (BODY.model_copy(update={"picture": None}), "input_reference is needed"),
            (BODY.model_copy(update={"size": (100, 64)}), "size"),
            (BODY.model_copy(update={"options": {"window": 0}}), "window"),
            (BODY.model_copy(update={"negative_prompt": "a dog"}), "negative_prompt"),
        ):
            with pytest.raises(Refusal, match=words) as refused:
                await jobs.create(body)
            assert refused.value.status == 400
            assert "\n" not in str(refused.value)
        engine.refuses = ValueError("this video holds 99 blocks")
        with pytest.raises(Refusal, match="99 blocks"):
            await jobs.create(BODY)
        engine.refuses, engine.errored = None, True
        with pytest.raises(Refusal, match="the engine has stopped") as refused:
            await jobs.create(BODY)
        assert refused.value.status == 503
        assert jobs.store.list(after=None, limit=5, order="desc") == ([], False)
        assert engine.asked == {}

    run(tmp_path, play)


def test_a_video_goes_on_where_it_ended(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        first = await jobs.create(BODY)
        with pytest.raises(Refusal, match="only a finished video"):
            await jobs.extend(first.id, BODY)
        await events(jobs, first.id)
        body = VideoBody(prompt=BODY.prompt, num_frames=2)
        longer = await jobs.extend(first.id, body)
        assert (longer.request["extended_from"], longer.request["frames"]) == (first.id, 7)
        said = [event.data for event in await events(jobs, longer.id) if event.kind == "frame"]
        assert [frame["given"] for frame in said] == [*[True] * 5, False, False]
        prompt, params = engine.asked[longer.id]
        assert prompt[:CONDITION_TOKENS] == engine.asked[first.id][0]
        assert prompt[CONDITION_TOKENS:] == [id for frame in range(MADE) for id in engine.made(frame)]
        assert params.extra_args["packcache_condition_tokens"] == CONDITION_TOKENS
        with av.open(str(jobs.store.path(longer.id, "video.mp4"))) as video:
            assert sum(1 for _ in video.decode(video=0)) == 7
        # Once more, from there.
        again = await jobs.extend(longer.id, body)
        await events(jobs, again.id)
        assert len(engine.asked[again.id][0]) == CONDITION_TOKENS + 6 * FRAME_TOKENS
        with pytest.raises(Refusal, match="continues another one"):
            await jobs.remix(longer.id, "a blue square")

    run(tmp_path, play)


def test_a_remix_is_the_same_of_another_prompt(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        body = BODY.model_copy(
            update={"seed": 7, "temperature": 0.5, "size": (64, 64), "options": {"window": 3, "history_frames": 1.5}}
        )
        first = await jobs.create(body)
        other = await jobs.remix(first.id, "a blue square moves left")
        assert other.request["remixed_from"] == first.id
        assert other.request["prompt"] == "a blue square moves left"
        for job in (first, other):
            await events(jobs, job.id)
        (prompt, params), (remixed, again) = engine.asked[first.id], engine.asked[other.id]
        assert prompt != remixed
        assert prompt[32:] == remixed[32:]
        assert again.extra_args == params.extra_args
        assert (again.seed, again.temperature) == (7, 0.5)
        # What a remix was made of is known of it too.
        assert (await jobs.remix(other.id, body.prompt)).request["options"] == {"policy": "packcache", **body.options}
        jobs.model = "another"
        for make in (jobs.remix(first.id, "a dog"), jobs.extend(first.id, body)):
            with pytest.raises(Refusal, match="made by 'm', and another is served here"):
                await make

    run(tmp_path, play)


@pytest.mark.parametrize("negative", [None, "night"])
def test_a_guided_video_stays_guided(tmp_path: Path, negative: str | None) -> None:
    """Both streams are seen, the job says what guides it, and so it is when it goes on or is made of another prompt."""

    async def play(jobs: Jobs, engine: Engine) -> None:
        first = await jobs.create(BODY.model_copy(update={"guidance_scale": 3.0, "negative_prompt": negative}))
        frames = [event.data for event in await events(jobs, first.id) if event.kind == "frame"]
        streams = frames[-1]["streams"]
        assert streams.keys() == {"conditional", "unconditional"}
        assert {own["full_tokens"] for own in streams.values()} == {CONDITION_TOKENS + MADE * FRAME_TOKENS}
        assert frames[-1]["full_tokens"] == 2 * (CONDITION_TOKENS + MADE * FRAME_TOKENS)
        longer = await jobs.extend(first.id, VideoBody(num_frames=2))
        other = await jobs.remix(first.id, "a blue square moves left")
        said = {"policy": "packcache", "guidance": 3.0, **({"negative_prompt": negative} if negative else {})}
        for job in (first, longer, other):
            await events(jobs, job.id)
            assert job.request["options"] == said
        (prompt, params), (_, more), (remixed, again) = (engine.asked[job.id] for job in (first, longer, other))
        condition = params.extra_args["packcache_negative_prompt_ids"]
        # The same picture behind another text.
        assert (condition[32:], condition[:32] != prompt[:32]) == (prompt[32:], True)
        assert prompt != remixed
        for own in (params, more, again):
            assert own.extra_args["packcache_guidance"] == 3
            assert own.extra_args["packcache_negative_prompt_ids"] == condition
        # Whoever does not want it any more says so.
        plain = await jobs.extend(first.id, VideoBody(num_frames=2, guidance_scale=1.0))
        assert plain.request["options"] == {"policy": "packcache"}
        assert "streams" not in (await events(jobs, plain.id))[-2].data
        with pytest.raises(Refusal, match="negative_prompt is for guided videos: give guidance_scale too"):
            await jobs.create(BODY.model_copy(update={"negative_prompt": "night"}))

    run(tmp_path, play, guidance=True)


@pytest.mark.parametrize("scale", [None, 2.0, 1.0])
def test_a_server_that_guides_by_itself(tmp_path: Path, scale: float | None) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        assert jobs.about()["tokenizer"]["options"]["guidance_scale"]["default"] == 4
        job = await jobs.create(BODY.model_copy(update={"guidance_scale": scale}))
        await events(jobs, job.id)
        used = 4 if scale is None else scale
        assert job.request["options"].get("guidance", 1) == used
        assert engine.asked[job.id][1].extra_args["packcache_guidance"] == used

    run(tmp_path, play, guidance={"scale": 4})


def test_a_server_that_guides_no_videos_says_so(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        assert "guidance_scale" not in jobs.about()["tokenizer"]["options"]
        for changed in ({"guidance_scale": 3.0}, {"negative_prompt": "night"}):
            sentence = f"{next(iter(changed))} must be left out: this server guides no videos"
            with pytest.raises(Refusal, match=sentence) as refused:
                await jobs.create(BODY.model_copy(update=changed))
            assert refused.value.status == 400

    run(tmp_path, play)


def test_many_at_once_are_all_made(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        going = asyncio.Event()
        engine.before = lambda frame: _waits(going)
        made = [await jobs.create(BODY) for _ in range(40)]
        with pytest.raises(room.StoreError, match="40 videos wait"):
            await jobs.create(BODY)
        going.set()
        ends = await asyncio.gather(*(events(jobs, job.id) for job in made))
        assert [own[-1].kind for own in ends] == ["completed"] * 40

    run(tmp_path, play, most_unfinished=40)


def test_a_store_that_is_full_takes_nothing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise StoreFull("the disk is full")

        monkeypatch.setattr(jobs.store, "create", full)
        with pytest.raises(StoreFull):
            await jobs.create(BODY)
        assert engine.asked == {}

    run(tmp_path, play)


def test_what_the_page_needs_is_json(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        about = json.loads(json.dumps(jobs.about()))
        assert about["policies"].keys() == {"packcache", "full"}
        assert about["policies"]["packcache"]["window"] == 12
        assert (about["model"], about["block_size"], about["tokens_per_frame"]) == ("m", 32, FRAME_TOKENS)

    run(tmp_path, play)


def test_an_address_is_told_of_what_ends(tmp_path: Path) -> None:
    heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        heard.put_nowait((head, json.loads(await reader.readexactly(length))))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(hear, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        webhook = {"url": address, "secret": "whsec_" + "A" * 32}
        videos = VideosConfig.model_validate_json(
            json.dumps({"store": str(tmp_path), "tokenizer": "demo", "webhooks": [webhook]})
        )
        config = dataclasses.replace(ServerConfig.parse("packcache", {"layout": "demo"}), videos=videos)
        engine = Engine()
        jobs = Jobs(engine, config, "m")  # type: ignore[arg-type]
        await jobs.start()
        try:
            job = await jobs.create(BODY)
            head, said = await heard.get()
            assert (said["type"], said["data"]) == ("video.completed", {"id": job.id})
            assert "webhook-signature: v1," in head
            engine.frames = 0
            failed = await jobs.create(BODY)
            said = (await heard.get())[1]
            assert (said["type"], said["data"]) == ("video.failed", {"id": failed.id})
        finally:
            await jobs.stop()
            server.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_metrics_count_jobs(tmp_path: Path) -> None:
    async def play(jobs: Jobs, engine: Engine) -> None:
        await events(jobs, (await jobs.create(BODY)).id)
        engine.frames = 1
        await events(jobs, (await jobs.create(BODY)).id)
        while jobs._making:
            await asyncio.sleep(0.01)
        labels = {"model_name": "m"}

        def of(name: str, **more: str) -> float | None:
            return REGISTRY.get_sample_value(f"vllm:packcache_{name}", {**labels, **more})

        assert of("jobs", state="completed") == of("jobs", state="failed") == 1
        assert of("jobs_ended_total", state="completed") == of("jobs_ended_total", state="failed") == 1
        assert of("job_queue_seconds_count") == 2
        assert of("job_frame_seconds_count") == MADE - 1
        assert of("job_seconds_count") == 1
        assert (of("jobs_bytes") or 0) > 1000

    run(tmp_path, play)
