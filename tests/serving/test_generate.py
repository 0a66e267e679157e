"""``vllm-packcache generate``: of a server without a model, of one that fails, and once as a user of one of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import av
import httpcore
import httpx
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image, ImageSequence
from typer.testing import CliRunner

from tests.demo.test_run import processes_of
from tests.margins import numbers, refuse_masked_ties
from tests.media.tokenizer_files import CODES, random_video, write_text_tokenizer, write_video_tokenizer
from tests.videos.dialect import served
from vllm_packcache.cli import app
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.demo.processor import ASSETS
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.media import growing
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import CosmosTokenizer
from vllm_packcache.media.videos import read_video
from vllm_packcache.reference import LumosReference, generate_masked, make_random_lumos
from vllm_packcache.serving import generate as generating
from vllm_packcache.videos import jobs as room
from vllm_packcache.videos.routes import _JOBS, add_routes

INPUTS = Path(__file__).parents[1] / "media" / "inputs"
WIDTH, HEIGHT = 64, 32
GRID = (4, 8)
EXAMPLE = ASSETS / "example.png"
PROMPT = "a red [bus], très vite"
SIZE = ("--width", str(WIDTH), "--height", str(HEIGHT))
CLOSE = 12
"""Mean difference of colours after a palette, of 255; of two pictures of `random_video` it is about 90."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_text_tokenizer(write_video_tokenizer(folder))


class Engine:
    """Makes frames of a Lumos-1 at random, and remembers what it was asked; ``before`` is awaited before each.

    Attributes:
        prompt: ids of the last request.
        options: the same request's own.
        codes: that it made of it.
        let_go: the request, whether it was made or not.
    """

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.options: dict[str, Any] = {}
        self.codes = np.empty(0)
        self.let_go = threading.Event()
        self.errored = False
        self.fewer = 0
        self.before: Callable[[int], Coroutine[Any, Any, None]] | None = None
        self.input_processor = SimpleNamespace(process_inputs=lambda *args, **options: None)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100_000), cache_config=SimpleNamespace(block_size=128)
        )

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self) -> None:
        pass

    @property
    def plan(self) -> Any:
        """Of the last request."""
        return ServerConfig.parse("packcache", {}, family=LUMOS).request(self.options, self.prompt)

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        self.prompt, self.options = list(prompt["prompt_token_ids"]), params.extra_args
        count = self.options["packcache_frames"] - self.fewer
        self.codes = np.random.default_rng(1).integers(0, CODES, (count, *self.options["packcache_grid"]))
        try:
            for number, codes in enumerate(self.codes):
                if self.before is not None:
                    await self.before(number)
                ids = lumos.frame_of_codes(codes).tolist()
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=None)])
        finally:
            self.let_go.set()


SERVED = ServerConfig.parse("packcache", {"layout": {"grid": [48, 84]}}, family=LUMOS)


class Server(Engine):
    """A server of videos without a model.

    Attributes:
        url: its address.
        key: that it asks for.
        keys: that it was given.
        followed: somebody sees the video being made.
        jobs: what makes its videos.
    """

    url: str
    jobs: room.Jobs

    def __init__(self) -> None:
        super().__init__()
        self.followed = asyncio.Event()
        self.key: str | None = None
        self.keys: list[str | None] = []

    @contextmanager
    def running(self, store: Path, tokenizer: Path | str, config: ServerConfig = SERVED) -> Iterator[Server]:
        videos = VideosConfig(store=str(store), tokenizer=str(tokenizer), heartbeat_seconds=0.2)

        @asynccontextmanager
        async def lifespan(own: FastAPI) -> AsyncIterator[None]:
            self.jobs = room.Jobs(self, dataclasses.replace(config, videos=videos), "lumos")  # type: ignore[arg-type]
            follow = self.jobs.follow

            async def followed(*which: Any) -> AsyncGenerator[Any, None]:
                async with aclosing(follow(*which)) as events:
                    async for event in events:
                        yield event
                        self.followed.set()

            self.jobs.follow = followed  # type: ignore[method-assign]
            await self.jobs.start()
            setattr(own.state, _JOBS, self.jobs)
            yield
            await self.jobs.stop()

        application = FastAPI(lifespan=lifespan)
        add_routes(application)
        application.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="lumos")])

        @application.middleware("http")
        async def guard(request: Any, call_next: Any) -> Any:
            self.keys.append(request.headers.get("Authorization"))
            if self.key is not None and self.keys[-1] != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

        with served(application) as self.url:
            yield self


@pytest.fixture
def server(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    # A registry has a metric once.
    monkeypatch.setattr(room, "JobMetrics", Mock())
    with Server().running(tmp_path_factory.mktemp("store"), tokenizer) as running:
        yield running


class CausalServer(Server):
    """Makes frames of the bundled causal model."""

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        self.prompt, self.options, self.params = list(prompt["prompt_token_ids"]), params.extra_args, params
        for frame in range(self.options["packcache_frames"]):
            ids = [5, *((np.arange(256) * (frame + 1)) % 60 + 62).tolist()]
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=None)])


@pytest.fixture(params=[True, None], ids=["guiding", "not guiding"])
def causal(request: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(room, "JobMetrics", Mock())
    config = ServerConfig.parse("packcache", {"layout": "demo", "guidance": request.param})
    with CausalServer().running(tmp_path_factory.mktemp("store"), "demo", config) as running:
        yield running


def ask_causal(server: Server, out: Path, *arguments: str) -> Any:
    given = ["--prompt", "a red circle", "--out", str(out), "--url", server.url, "--image", str(EXAMPLE), *arguments]
    return CliRunner().invoke(app, ["generate", *given])


def test_a_causal_model_is_asked_for_what_is_said_alone(causal: CausalServer, tmp_path: Path) -> None:
    result = ask_causal(causal, tmp_path / "video.mp4")
    assert result.exit_code == 0, result.stderr
    assert causal.options == {"packcache_grid": [16, 16], "packcache_frames": 19}
    assert read_mp4(tmp_path / "video.mp4").shape == (20, 64, 64, 3)
    said = result.stdout.splitlines()[-2:]
    assert said[0] == f"wrote {tmp_path / 'video.mp4'}, 20 frames at 4 a second"
    assert re.match(r"took \d+\.\d s: 19 frames \d", said[1])
    how = ["--frames", "5", "--fps", "4", "--width", "64", "--height", "64", "--seed", "7"]
    result = ask_causal(causal, tmp_path / "video.gif", *how)
    assert result.exit_code == 0, result.stderr
    assert (causal.options["packcache_frames"], causal.params.seed) == (4, 7)


def test_a_causal_model_is_guided_where_the_server_guides(causal: CausalServer, tmp_path: Path) -> None:
    result = ask_causal(causal, tmp_path / "video.mp4", "--guidance", "3.5", "--negative-prompt", "night")
    if causal.jobs.config.guidance is None:
        assert result.exit_code == 2
        assert "negative_prompt must be left out: this server guides no videos" in result.stderr
        return
    assert result.exit_code == 0, result.stderr
    assert causal.options["packcache_guidance"] == 3.5
    negative = VideoTokenizer().build_prompt("night", np.asarray(Image.open(EXAMPLE).convert("RGB")))
    assert causal.options["packcache_negative_prompt_ids"] == negative


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "5"], "--steps is of models that make frames in passes, as this server's does not: leave it out"),
        (["--guidance-interval", "2"], "--guidance-interval is of models that make frames in passes"),
        (["--width", "64"], "--width and --height: give both, or leave both to the server"),
        (["--width", "32", "--height", "64"], "size must be 64x64, not 32x64"),
        (["--image", "no.png"], "--image no.png cannot be read: No such file or directory"),
        (["--image", str(INPUTS / "t.gif")], "a server takes this for a video"),
        (["--guidance", "-1"], "guidance_scale must be"),
    ],
)
def test_what_a_causal_model_has_not(arguments: list[str], sentence: str, causal: CausalServer, tmp_path: Path) -> None:
    result = ask_causal(causal, tmp_path / "video.mp4", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def call(out: Path, *arguments: str, to: str | tuple[str, ...] = "http://server:1") -> Any:
    whom = ("--url", to) if isinstance(to, str) else to
    given = ["--prompt", PROMPT, "--out", str(out), *SIZE, *whom, *arguments]
    return CliRunner().invoke(app, ["generate", *given])


def read_gif(path: Path) -> np.ndarray:
    """Frames at 8 a second: a frame takes 12 hundredths, in which GIF counts. Like frames are one that takes longer."""
    with Image.open(path) as picture:
        frames = []
        for frame in ImageSequence.Iterator(picture):
            frames += [np.asarray(frame.convert("RGB"))] * round(frame.info["duration"] / 120)
    return np.stack(frames)


def read_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def written(frames: np.ndarray, folder: Path) -> np.ndarray:
    """Frames [T, H, W, 3] as they are seen once a server has written them: one thread encodes alike every time."""
    with growing.GrowingVideo(folder / "growing.mp4", (frames.shape[2], frames.shape[1]), 8) as video:
        video.add(frames)
    growing.finish(folder / "growing.mp4", folder / "expected.mp4")
    return read_mp4(folder / "expected.mp4")


def text(tokenizer: Path, seconds: int, rate: int) -> list[int]:
    question = lumos.question(PROMPT, WIDTH, HEIGHT, seconds, rate)
    return lumos.text_prompt(TextTokenizer(tokenizer).encode(question), seconds, rate)


def ids_of(codes: np.ndarray) -> list[int]:
    return [id for frame in codes for id in lumos.frame_of_codes(frame).tolist()]


def test_text_to_video(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "new" / "video.mp4"
    how = ["--frames", "24", "--fps", "8", "--seed", "5", "--steps", "9", "--guidance", "3.5"]
    how += ["--refresh", "4", "--reuse", "0.02", "--guidance-interval", "2", "--guidance-until", "0.75"]
    result = call(out, *how, to=server.url)
    assert result.exit_code == 0, result.stderr
    assert server.prompt == text(tokenizer, 3, 8)
    assert server.options == {
        **{"packcache_grid": [4, 8], "packcache_frames": 7, "packcache_condition_frames": 0},
        **{"packcache_seed": 5, "packcache_steps": 9, "packcache_guidance": 3.5},
        **{"packcache_refresh": 4, "packcache_reuse": 0.02},
        **{"packcache_guidance_interval": 2, "packcache_guidance_until": 0.75},
    }
    assert server.plan.options == lumos.MaskedOptions(
        seed=5, steps=9, guidance=3.5, refresh=4, reuse=0.02, guidance_interval=2, guidance_until=0.75
    )
    # 7 latent frames are 25 frames, of which 24 were asked for.
    expected = CosmosTokenizer(tokenizer).decode(server.codes)[:24]
    np.testing.assert_array_equal(read_mp4(out), written(expected, tmp_path))
    said = result.stdout.splitlines()[-2:]
    assert said[0] == f"wrote {out}, 24 frames at 8 a second"
    number = r"\d+\.\d s"
    laps = f"7 latent frames {number}, decoding {number}, writing {number}"
    assert re.fullmatch(f"took {number}: {laps}", said[1])


def test_a_gif_has_the_frames_of_the_video(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    result = call(tmp_path / "video.gif", "--frames", "24", to=server.url)
    assert result.exit_code == 0, result.stderr
    expected = CosmosTokenizer(tokenizer).decode(server.codes)[:24]
    assert np.abs(read_gif(tmp_path / "video.gif").astype(int) - expected).mean() < CLOSE


def test_the_published_options_are_the_defaults(server: Server, tmp_path: Path) -> None:
    given = ["--prompt", PROMPT, "--url", server.url, "--out", str(tmp_path / "video.mp4")]
    result = CliRunner().invoke(app, ["generate", *given])
    assert result.exit_code == 0, result.stderr
    assert server.plan.options == lumos.MaskedOptions()
    assert server.plan.conditional.layout.frame == lumos.frame_layout((48, 84))
    assert server.plan.frames == 13
    assert read_mp4(tmp_path / "video.mp4").shape == (48, 384, 672, 3)
    assert iio.immeta(tmp_path / "video.mp4", plugin="pyav")["fps"] == 8


def test_a_picture_is_the_first_latent_frame(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    picture = random_video(1, *GRID)[0]
    Image.fromarray(picture).save(tmp_path / "a picture.png")
    out = tmp_path / "video.mp4"
    result = call(out, "--frames", "8", "--image", str(tmp_path / "a picture.png"), to=server.url)
    assert result.exit_code == 0, result.stderr
    codes = CosmosTokenizer(tokenizer).encode(picture[None])
    assert server.prompt == text(tokenizer, 1, 8) + ids_of(codes)
    assert server.options["packcache_frames"] == 2
    assert server.plan.first_frame == 0
    assert server.plan.conditional.layout.condition_image_tokens == lumos.frame_layout(GRID).tokens_per_frame
    expected = CosmosTokenizer(tokenizer).decode(np.concatenate([codes, server.codes]))[:8]
    np.testing.assert_array_equal(expected[0], picture)
    np.testing.assert_array_equal(read_mp4(out), written(expected, tmp_path))
    assert " 2 latent frames " in result.stdout


@pytest.mark.parametrize(("rate", "every"), [(8, 1), (24, 3)])
def test_a_video_is_continued(rate: int, every: int, tokenizer: Path, server: Server, tmp_path: Path) -> None:
    """Of 11 frames at 8 a second the last 9 are used: 3 latent frames."""
    video = random_video(9, *GRID)
    source = np.concatenate([random_video(1, *GRID, seed=7).repeat(2, 0), video]).repeat(every, 0)
    iio.imwrite(tmp_path / "old.mkv", source, plugin="pyav", codec="ffv1", fps=rate, out_pixel_format="bgr0")
    out = tmp_path / "video.mp4"
    result = call(out, "--frames", "16", "--video", str(tmp_path / "old.mkv"), to=server.url)
    assert result.exit_code == 0, result.stderr
    given = CosmosTokenizer(tokenizer).encode(video)
    assert server.prompt == text(tokenizer, 2, 8) + ids_of(given)
    assert server.options["packcache_frames"] == 2
    assert server.plan.first_frame == 2, "the first of the three is the conditioning image"
    expected = CosmosTokenizer(tokenizer).decode(np.concatenate([given, server.codes]))[:16]
    np.testing.assert_array_equal(expected[:9], video)
    np.testing.assert_array_equal(read_mp4(out), written(expected, tmp_path))
    used = "used: the last 9 of 11 frames at 8 a second, all of 64 x 32 pixels, as 64 x 32\n"
    assert f"video: {11 * every} frames in 1.4 s; {used}" in result.stdout


def test_what_is_used_of_a_picture_is_said(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "a [b].png")
    result = call(tmp_path / "a.gif", "--frames", "8", "--image", str(tmp_path / "a [b].png"), to=server.url)
    assert result.exit_code == 0, result.stderr
    assert "picture: the middle 300 x 150 of 300 x 200 pixels, as 64 x 32\n" in result.stdout


def test_a_sideways_video_is_continued_upright(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    old = INPUTS / "rot.mp4"
    size = ("--width", "32", "--height", "64")
    result = call(tmp_path / "a.gif", "--frames", "32", "--video", str(old), *size, to=server.url)
    assert result.exit_code == 0, result.stderr
    said = "video: 24 frames in 3.0 s, turned upright; used: the last 21 of 24 frames at 8 a second, "
    assert said + "all of 64 x 128 pixels, as 32 x 64\n" in result.stdout
    given = CosmosTokenizer(tokenizer).encode(read_video(old, 32, 64, 8, 32).frames[3:])
    assert server.prompt[-6 * len(lumos.frame_of_codes(given[0])) :] == ids_of(given)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--width", "768", "--height", "480"], "size: frames of 768x480 have"),
        (["--prompt", "a <video>"], "no id of text for this model"),
        (["--prompt", ""], "prompt must say what is to be seen"),
    ],
)
def test_what_the_server_refuses(arguments: list[str], sentence: str, server: Server, tmp_path: Path) -> None:
    result = call(tmp_path / "video.mp4", *arguments, to=server.url)
    assert result.exit_code == 2
    assert result.stderr.startswith("vllm-packcache: the server refused the request: ")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not server.prompt
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_decoded_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "JobMetrics", Mock())
    write_text_tokenizer(write_video_tokenizer(tmp_path))
    (tmp_path / "decoder.jit").write_bytes((tmp_path / "encoder.jit").read_bytes())
    with Server().running(tmp_path / "store", tmp_path) as server:
        result = call(tmp_path / "video.mp4", to=server.url)
        assert result.exit_code == 2
        assert "the server's video tokenizer failed" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not server.prompt


def test_a_video_that_fails(server: Server, tmp_path: Path) -> None:
    server.fewer = 1
    result = call(tmp_path / "video.mp4", to=server.url)
    assert result.exit_code == 2
    said = "the server could not make this video: the engine ended this video after 12 of 13 frames"
    assert result.stderr == f"vllm-packcache: {said}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_somebody_deletes(server: Server, tmp_path: Path) -> None:
    async def before(frame: int) -> None:
        if frame == 2:
            await server.followed.wait()
            ((job,), _) = server.jobs.store.list(after=None, limit=1, order="desc")
            await asyncio.to_thread(server.jobs.store.delete, job.id)
            await asyncio.Event().wait()

    server.before = before
    result = call(tmp_path / "video.mp4", to=server.url)
    assert result.exit_code == 2
    assert result.stderr.startswith("vllm-packcache: the server does not make this video any more: there is no video ")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, though what a shell runs in the background ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_leaves_stops_the_video(number: signal.Signals, server: Server, tmp_path: Path) -> None:
    leaving = threading.get_ident()

    async def before(frame: int) -> None:
        if frame == 2:
            await server.followed.wait()
            signal.pthread_kill(leaving, number)
            await asyncio.Event().wait()

    server.before = before
    result = call(tmp_path / "video.mp4", to=server.url)
    assert result.exit_code == (130 if number == signal.SIGINT else 143)
    assert server.let_go.wait(60)
    assert server.jobs.store.list(after=None, limit=1, order="desc") == ([], False)
    assert list(tmp_path.iterdir()) == []


class Answers:
    """A server that answers as a test says, and remembers what it was asked.

    Attributes:
        asked: requests, as method and path.
        events: answers to those who follow, one after another; the last one again and again.
        seen: numbers of the last events that these had seen.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.seen: list[str | None] = []
        self.events: list[Callable[[], httpx.Response]] = []
        self.about = answer({"tokenizer": {"options": {"num_inference_steps": {}}}})
        self.create = answer({"id": "video_1", "frames": 48, "fps": 8})
        self.content: Callable[[], httpx.Response] = lambda: httpx.Response(200, content=b"the video")

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path))
        match request.method, request.url.path:
            case "GET", "/v1/playground":
                return self.about()
            case "POST", "/v1/videos":
                return self.create()
            case "GET", "/v1/videos/video_1/events":
                self.seen.append(request.headers["Last-Event-ID"])
                return self.events.pop(0)() if len(self.events) > 1 else self.events[0]()
            case "GET", "/v1/videos/video_1/content":
                return self.content()
        raise AssertionError(self.asked[-1])


def answer(json: Any) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, json=json)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    fake = Answers()
    mocked = httpx.MockTransport(fake)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda self, request: mocked.handle_request(request))
    monkeypatch.setattr(generating, "_WAITS", (0.0, 0.0))
    return fake


class Cut(httpx.SyncByteStream):
    """What comes before a connection is lost."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __iter__(self) -> Iterator[bytes]:
        yield self._text.encode()
        raise httpx.ReadError("peer closed connection")


def event(number: int, kind: str, data: dict[str, Any] | None = None) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data or {})}\n\n"


def frame(number: int) -> str:
    return event(number + 2, "frame", {"frame": number, "frames": 2, "given": False})


def lost() -> httpx.Response:
    raise httpx.ConnectError("nobody there")


def said(code: int, message: str) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(code, json={"error": {"message": message}})


BUSY = "event: error\ndata: " + json.dumps({"error": {"message": "locked", "type": "server_error"}}) + "\n\n"


def test_a_connection_that_is_lost_is_made_again(answers: Answers, tmp_path: Path) -> None:
    answers.events = [
        lambda: httpx.Response(200, text=event(1, "status") + frame(0)[:-5]),
        lost,
        lambda: httpx.Response(200, stream=Cut(": heartbeat\n\n" + frame(0))),
        lambda: httpx.Response(502, text="<html>"),
        lambda: httpx.Response(200, text=": heartbeat\n\n"),
        lambda: httpx.Response(200, text=BUSY),
        lambda: httpx.Response(200, text=frame(1) + event(4, "completed")),
    ]
    result = call(tmp_path / "video.mp4", to="http://server:1")
    assert result.exit_code == 0, result.stderr
    assert answers.seen == ["0", "1", "1", "2", "2", "2", "2"]
    assert (tmp_path / "video.mp4").read_bytes() == b"the video"
    assert " 2 latent frames " in result.stdout


GONE = "the server at http://server:1 does not answer any more, asked for video_1: "


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        (lambda: httpx.Response(200, text=""), GONE + "it ended the connection"),
        (lambda: httpx.Response(200, text=BUSY), GONE + "locked"),
        (lambda: httpx.Response(200, stream=Cut(": hea")), GONE + "peer closed connection"),
        (lost, GONE + "nobody there"),
        (lambda: httpx.Response(502), GONE + "the server refused the request: 502"),
        (said(404, "there is\nno video"), "the server refused the request: there is no video"),
    ],
)
def test_a_server_that_goes_away(
    events: Callable[[], httpx.Response], sentence: str, answers: Answers, tmp_path: Path
) -> None:
    answers.events = [events]
    result = call(tmp_path / "video.mp4")
    assert result.exit_code == 2
    assert result.stderr == f"vllm-packcache: {sentence}\n"
    assert len(answers.seen) == (1 if "refused the request: there" in sentence else 3)
    assert list(tmp_path.iterdir()) == []


NONE = "the server at http://server:1 makes no videos: start it with --video-store and --video-tokenizer"


@pytest.mark.parametrize(
    ("which", "answer", "sentence"),
    [
        ("about", lambda: httpx.Response(404, json={"detail": "Not Found"}), NONE),
        ("about", said(501, "this server makes no videos"), NONE),
        ("about", lambda: httpx.Response(502), "the server refused the request: 502"),
        ("about", lost, "the server at http://server:1 does not answer: nobody there"),
        ("about", answer({"object": "list"}), NONE),
        ("create", said(429, "20 videos wait"), "the server refused the request: 20 videos wait"),
        ("create", lambda: httpx.Response(413, text="too\nlarge"), "the server refused the request: too large"),
        ("create", lost, "the server at http://server:1 does not answer: nobody there"),
        ("content", said(404, "it is gone"), "the server refused the request: it is gone"),
        ("content", lost, "the server at http://server:1 does not answer: nobody there"),
    ],
)
def test_a_server_that_fails(
    which: str, answer: Callable[[], httpx.Response], sentence: str, answers: Answers, tmp_path: Path
) -> None:
    answers.events = [lambda: httpx.Response(200, text=event(1, "completed"))]
    setattr(answers, which, answer)
    result = call(tmp_path / "video.mp4")
    assert result.exit_code == 2
    assert result.stderr == f"vllm-packcache: {sentence}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "variable", "sentence"),
    [
        ("secret", None, None),
        (None, "secret", None),
        ("secret", "other", None),
        (None, None, "asks for an API key: give its own with --api-key, or in VLLM_API_KEY"),
        ("guess", "secret", "does not take this API key: give its own with --api-key, or in VLLM_API_KEY"),
        (None, "guess", "does not take this API key: give its own with --api-key, or in VLLM_API_KEY"),
    ],
)
def test_a_server_that_asks_for_a_key(
    option: str | None,
    variable: str | None,
    sentence: str | None,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.key = "secret"
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    result = call(tmp_path / "video.mp4", *([] if option is None else ["--api-key", option]), to=server.url)
    if sentence is None:
        assert result.exit_code == 0, result.stderr
        assert set(server.keys) == {"Bearer secret"}
    else:
        assert result.exit_code == 2
        assert result.stderr == f"vllm-packcache: the server at {server.url} {sentence}\n"
        assert not server.prompt


@pytest.mark.parametrize(
    ("host", "direct"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("server", False), ("10.0.0.1", False)],
)
def test_a_proxy_is_for_other_machines(
    host: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def request(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        asked.append((request.url.host, isinstance(self._pool, httpcore.HTTPProxy)))
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", request)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    result = call(tmp_path / "video.mp4", to=f"http://{host}:8000")
    assert result.exit_code == 2
    assert asked == [(host.strip("[]"), not direct)]


def test_two_runs_do_not_share_a_file(answers: Answers, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    seen: list[Any] = []

    def create() -> httpx.Response:
        seen.append(call(out))
        return httpx.Response(502)

    answers.create = create
    assert call(out).exit_code == 2
    (second,) = seen
    assert second.exit_code == 2
    assert second.stderr.startswith(f"vllm-packcache: {out} cannot be written: another run is going to write it")
    assert answers.asked == [("GET", "/v1/playground"), ("POST", "/v1/videos")], "the second asked for nothing"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("folder.mp4", "folder.mp4 cannot be written: it is a folder, name a file in it"),
        ("file/video.mp4", "file is no folder"),
        ("video", "--out ends with .mp4 or .gif, not 'video'"),
    ],
)
def test_where_no_video_can_be_written(out: str, sentence: str, answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    result = call(tmp_path / out)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not answers.asked


def test_no_server(tmp_path: Path) -> None:
    result = call(tmp_path / "video.mp4", to="http://127.0.0.1:9")
    assert result.exit_code == 2
    assert result.stderr.startswith("vllm-packcache: the server at http://127.0.0.1:9 does not answer: ")
    result = call(tmp_path / "video.mp4", to="localhost")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--frames", "20"], "--frames 20 at --fps 8: a prompt states whole seconds"),
        (["--frames", "0"], "give --frames a multiple of 8 up to 1584"),
        (["--frames", "1592"], "give --frames a multiple of 8 up to 1584"),
        (["--fps", "0"], "--fps lies between 1 and 198, not 0"),
        (["--fps", "199", "--frames", "199"], "--fps lies between 1 and 198, not 199"),
        (["--width", "100"], "multiples of 32 pixels, not 100 x 32"),
        (["--width", "6368"], "6336 at most"),
        (["--steps", "0"], "--steps must be 1 or more and at most 1000, not 0"),
        (["--seed", "-1"], "--seed must lie between"),
        (["--refresh", "0"], "--refresh must be 1 or more and at most 1000, not 0"),
        (["--guidance", "1", "--guidance-from", "0.5"], "--guidance-from is 0.5, and with a guidance of 1"),
        (["--guidance", "nan"], "--guidance must lie between -1000 and 1000, not nan"),
        (["--negative-prompt", "rain"], "--negative-prompt is of models that make one token after the other"),
        (["--out", "video.avi"], "--out ends with .mp4 or .gif, not 'video.avi'"),
        (["--image", "no.png", "--video", "no.mp4"], "leave one out"),
        (["--image", "no.png"], "--image no.png cannot be read: No such file or directory"),
        (["--video", "no.mp4"], "--video no.mp4 cannot be read: No such file or directory"),
        (["--video", __file__], "cannot be read as a video"),
        (["--tokenizer", "nowhere"], "--tokenizer is of a server of your own"),
        (["--model", "nowhere"], "give the folder of a model to serve, or the address"),
        (["--config", "demo"], "--config is of a server of your own"),
        (["--image", str(INPUTS / "trunc.png")], "trunc.png: the picture cannot be read: it is cut off or damaged"),
        (["--image", str(INPUTS / "empty.png")], "empty.png: the picture cannot be read: it is empty"),
        (["--image", str(INPUTS / "t.gif")], "a server takes this for a video"),
        (["--video", str(INPUTS / "empty.png")], "empty.png cannot be read as a video: it is empty"),
        (["--video", str(INPUTS / "a.h264")], "a.h264: a server reads MP4, WebM and GIF: convert it"),
    ],
    ids=str,
)
def test_mistakes_get_a_sentence(arguments: list[str], sentence: str, answers: Answers, tmp_path: Path) -> None:
    result = call(tmp_path / "video.mp4", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert ("POST", "/v1/videos") not in answers.asked


def test_a_file_that_no_server_takes(answers: Answers, tmp_path: Path) -> None:
    with (tmp_path / "long.mp4").open("wb") as file:
        file.truncate(64 * 2**20)
    result = call(tmp_path / "video.mp4", "--video", str(tmp_path / "long.mp4"))
    assert result.exit_code == 2
    assert "long.mp4 has 67,108,864 bytes, and a server takes 66,060,288: give less of it" in result.stderr
    assert ("POST", "/v1/videos") not in answers.asked


@pytest.mark.parametrize(
    ("frames", "rate", "arguments", "sentence"),
    [
        (5, 5, ["--frames", "8"], "has 8 frames at --fps 8 (1.0 s), and --frames asks for 8 in all"),
        (40, 8, ["--frames", "8"], "has 40 frames at --fps 8 (5.0 s), and --frames asks for 8 in all"),
        (8, 8, ["--frames", "8"], "has 8 frames at --fps 8 (1.0 s), and --frames asks for 8 in all"),
        (7, 8, ["--frames", "5", "--fps", "5"], "has 5 frames at --fps 5 (0.9 s)"),
    ],
)
def test_videos_that_cannot_be_continued(
    frames: int, rate: int, arguments: list[str], sentence: str, answers: Answers, tmp_path: Path
) -> None:
    old = tmp_path / "old.mp4"
    iio.imwrite(old, np.zeros((frames, 32, 64, 3), np.uint8), plugin="pyav", codec="libx264", fps=rate)
    result = call(tmp_path / "video.mp4", "--video", str(old), *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert ("POST", "/v1/videos") not in answers.asked


def test_a_picture_alone_is_no_video(answers: Answers, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    result = call(tmp_path / "a.gif", "--image", str(tmp_path / "a.png"), "--frames", "1", "--fps", "1")
    assert result.exit_code == 2
    assert "--frames 1 are 1 latent frames, of which 1 are given" in result.stderr


LUMOS_CONFIG = {"architectures": list(lumos.ARCHITECTURES[:1])}


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, [], "is of architecture LlamaForCausalLM: generate is for"),
        ({}, [], "is of architecture unknown"),
        ({}, ["--api-key", "secret"], "--api-key is of a server that runs (--url)"),
        (None, [], "its config.json cannot be read"),
        (LUMOS_CONFIG, ["--prompt", "a <video>"], "no id of text for this model"),
        (LUMOS_CONFIG, ["--tokenizer", "nowhere"], "--tokenizer nowhere: tokenizer.json is missing"),
        (LUMOS_CONFIG, None, "--tokenizer is needed with --model: give a folder with tokenizer.json, encoder.jit"),
        (LUMOS_CONFIG, ["--image", "no.png"], "--image no.png cannot be read: No such file or directory"),
        (LUMOS_CONFIG, ["--config", '{"widow": 3}'], "widow"),
        (
            LUMOS_CONFIG,
            ["--config", '{"layout": {"grid": [2, 2]}}'],
            "give grid: [4, 8], or no layout",
        ),
    ],
)
def test_models_that_are_not_served(
    config: dict[str, Any] | None,
    arguments: list[str] | None,
    sentence: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generating, "serving", lambda *args, **kwargs: pytest.fail("a server was started"))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    own = [] if arguments is None else ["--tokenizer", str(tokenizer), *arguments]
    result = call(tmp_path / "video.mp4", *own, to=("--model", str(tmp_path)))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("grid", "config"),
    [((48, 84), "lumos1_384p"), ((32, 56), "lumos1_256p"), ((60, 96), "lumos1_480p"), ((4, 8), None)],
)
def test_the_preset_of_a_size_is_its_servers(grid: tuple[int, int], config: str | None) -> None:
    assert generating.fitting_config(grid) == (config or '{"layout": {"grid": [4, 8]}}')


def test_a_configuration_without_a_layout_is_of_the_size_that_is_asked_for() -> None:
    asked = generating.Asked(prompt=PROMPT, width=WIDTH, height=HEIGHT, frames=8, rate=8, options=lumos.MaskedOptions())
    assert generating.server_config(asked, '{"window": 2}') == {"window": 2, "layout": {"grid": [4, 8]}}


@pytest.mark.parametrize(
    ("size", "layout", "length"),
    [(("--width", "448", "--height", "256"), "lumos1_256p", 12 * 1828), (SIZE, None, 12 * 40)],
)
@pytest.mark.parametrize("config", [None, {"policy": "sliding_window", "window": 3}])
def test_what_a_server_of_its_own_is_told(
    config: dict[str, Any] | None,
    size: tuple[str, ...],
    layout: str | None,
    length: int,
    tokenizer: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []

    @contextmanager
    def serving(model: Path, arguments: list[str], log: Path, waiting: Any, **options: Any) -> Iterator[str]:
        started.append((model, dict(zip(arguments[::2], arguments[1::2], strict=False)), log, options))
        assert Path(started[0][1]["--video-store"]).is_dir()
        yield server.url

    monkeypatch.setattr(generating, "serving", serving)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": [lumos.ARCHITECTURES[1]], "torch_dtype": "float32"})
    )
    server.fewer = 1
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    given = ["--model", str(tmp_path), "--tokenizer", str(tokenizer), "--image", str(tmp_path / "a.png"), *size]
    if config is not None:
        config = {**config, **({"layout": load_mapping(layout)["layout"]} if layout else {})}
        given += ["--config", json.dumps(config)]
    result = call(tmp_path / "video.mp4", to=tuple(given))
    assert result.exit_code == 2
    log = tmp_path / "video.log"
    said = "the server could not make this video: the engine ended this video after 11 of 12 frames"
    assert result.stderr == f"vllm-packcache: {said}; its log is {log}\n"
    ((model, arguments, own_log, options),) = started
    assert (model, own_log, options) == (tmp_path, log, {"interpreted": not torch.cuda.is_available()})
    expected = load_mapping(layout) if config is None and layout else {"layout": {"grid": list(GRID)}, **(config or {})}
    assert json.loads(arguments["--kv-cache-policy-config"]) == expected
    assert arguments["--kv-cache-policy"] == ("packcache" if config is None else "sliding_window")
    assert int(arguments["--max-model-len"]) == len(server.prompt) + length
    assert arguments["--dtype"] == ("auto" if torch.cuda.is_available() else "float32")
    assert arguments["--video-tokenizer"] == str(tokenizer)
    assert arguments.get("--gpu-memory-utilization") == ("0.8" if torch.cuda.is_available() else None)
    assert not Path(arguments["--video-store"]).exists()


def test_a_server_of_its_own(tokenizer: Path, tmp_path: Path) -> None:
    """As a user: the frames that are seen are those of the published loop."""
    model = make_random_lumos(tmp_path / "model", visual_codes=CODES)
    picture = random_video(1, *GRID, seed=int(numbers(0).integers(1000)))[0]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    out = tmp_path / "video.mp4"
    config = {"window": 2, "history_frames": 1}
    options = ["--frames", "16", "--seed", "3", "--steps", "2", "--guidance", "2", "--config", json.dumps(config)]
    own = ("--model", str(model), "--tokenizer", str(tokenizer))
    result = call(out, "--image", str(tmp_path / "picture.png"), *options, to=own)
    assert result.exit_code == 0, result.output
    assert processes_of(tmp_path / "video.log") == []

    ids = text(tokenizer, 2, 8)
    given = CosmosTokenizer(tokenizer).encode(picture[None])
    ids += lumos.frame_of_codes(given[0]).tolist()
    server = ServerConfig.parse("packcache", {**config, "layout": {"grid": list(GRID)}}, family=LUMOS)
    plan = server.request({"packcache_seed": 3, "packcache_steps": 2, "packcache_guidance": 2}, ids)
    made = generate_masked(LumosReference.load(model), ids, 4, plan.conditional, plan.options, block_size=128)
    refuse_masked_ties(made)
    codes = np.stack([lumos.codes_of_frame(frame, GRID) for frame in made.frames.numpy()])
    expected = CosmosTokenizer(tokenizer).decode(np.concatenate([given, codes]))[:16]
    np.testing.assert_array_equal(read_mp4(out), written(expected, tmp_path))
