"""``vllm-packcache generate``: against a server that is none, and once as a user with one of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpcore
import httpx
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from typer.testing import CliRunner

from tests.demo.test_run import processes_of
from tests.margins import numbers, refuse_masked_ties
from tests.media.tokenizer_files import CODES, random_video, write_text_tokenizer, write_video_tokenizer
from vllm_packcache.cli import app
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import CosmosTokenizer
from vllm_packcache.media.videos import read_video
from vllm_packcache.reference import LumosReference, generate_masked, make_random_lumos
from vllm_packcache.serving import generate as generating

INPUTS = Path(__file__).parents[1] / "media" / "inputs"
WIDTH, HEIGHT = 64, 32
GRID = (4, 8)
PROMPT = "a red [bus], très vite"
SIZE = ("--width", str(WIDTH), "--height", str(HEIGHT))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_text_tokenizer(write_video_tokenizer(folder))


class Server:
    """Answers as the server of a masked model does, without one, and remembers what it was asked."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}
        self.codes = np.empty(0)
        self.answer: Callable[[], httpx.Response] | None = None
        self.fewer = 0
        self.key: str | None = None
        self.keys: list[str | None] = []
        self.arrive_at_once = 1.0
        """Share of a frame's ids that come at a time."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("Authorization"))
        if self.key is not None and self.keys[-1] != f"Bearer {self.key}":
            return httpx.Response(401, json={"error": "Unauthorized"})
        if request.url.path == "/v1/models":
            return httpx.Response(200)
        assert request.url.path == "/v1/completions"
        self.body = json.loads(request.content)
        if self.answer is not None:
            return self.answer()
        options = self.body["vllm_xargs"]
        count = options["packcache_frames"] - self.fewer
        self.codes = np.random.default_rng(1).integers(0, CODES, (count, *options["packcache_grid"]))
        ids = [id for codes in self.codes for id in lumos.frame_of_codes(codes).tolist()]
        size = max(1, round(len(ids) / max(count, 1) * self.arrive_at_once))
        events = [{"choices": [{"token_ids": ids[start : start + size]}]} for start in range(0, len(ids), size)]
        lines = [*(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        return httpx.Response(200, text="\n\n".join(lines))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    mocked = httpx.MockTransport(fake)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda self, request: mocked.handle_request(request))
    return fake


def call(tokenizer: Path, out: Path, *arguments: str, to: tuple[str, ...] = ("--url", "http://server:1")) -> Any:
    given = ["--prompt", PROMPT, "--tokenizer", str(tokenizer), "--out", str(out), *SIZE, *to, *arguments]
    return CliRunner().invoke(app, ["generate", *given])


def read_gif(path: Path) -> np.ndarray:
    """Frames at 8 a second: a frame takes 12 hundredths, in which GIF counts. Like frames are one that takes longer."""
    with Image.open(path) as picture:
        frames = []
        for frame in ImageSequence.Iterator(picture):
            frames += [np.asarray(frame.convert("RGB"))] * round(frame.info["duration"] / 120)
    return np.stack(frames)


def text(tokenizer: Path, seconds: int, rate: int) -> list[int]:
    question = lumos.question(PROMPT, WIDTH, HEIGHT, seconds, rate)
    return lumos.text_prompt(TextTokenizer(tokenizer).encode(question), seconds, rate)


@pytest.mark.parametrize("arrive_at_once", [1.0, 0.3, 7.0])
def test_text_to_video(arrive_at_once: float, tokenizer: Path, server: Server, tmp_path: Path) -> None:
    server.arrive_at_once = arrive_at_once
    out = tmp_path / "new" / "video.gif"
    result = call(tokenizer, out, "--frames", "24", "--fps", "8", "--seed", "5", "--steps", "9", "--guidance", "3")
    assert result.exit_code == 0, result.stderr
    assert server.body["prompt"] == text(tokenizer, 3, 8)
    assert server.body["vllm_xargs"] == {
        **{"packcache_grid": [4, 8], "packcache_frames": 7, "packcache_condition_frames": 0},
        **{"packcache_seed": 5, "packcache_steps": 9, "packcache_guidance": 3},
        **{"packcache_temperature": 1, "packcache_remask": 0.7},
        **{"packcache_reset_temperature": 0, "packcache_share_history": 1},
    }
    plan = ServerConfig.parse("packcache", {}, family=LUMOS).request(server.body["vllm_xargs"], server.body["prompt"])
    assert plan.options == lumos.MaskedOptions(seed=5, steps=9, guidance=3)
    # 7 latent frames are 25 frames, of which 24 were asked for. The colours are few: GIF keeps them.
    np.testing.assert_array_equal(read_gif(out), CosmosTokenizer(tokenizer).decode(server.codes)[:24])
    said = result.stdout.splitlines()[-2:]
    assert said[0] == f"wrote {out}, 24 frames at 8 a second"
    number = r"\d+\.\d s"
    laps = f"tokenizers {number}, server {number}, 7 latent frames {number}, decoding {number}, writing {number}"
    assert re.fullmatch(f"took {number}: {laps}", said[1])


def test_the_published_options_are_the_defaults(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    given = ["--prompt", PROMPT, "--tokenizer", str(tokenizer), "--url", "http://server:1"]
    result = CliRunner().invoke(app, ["generate", *given, "--out", str(tmp_path / "video.mp4")])
    assert result.exit_code == 0, result.stderr
    plan = ServerConfig.parse("packcache", {}, family=LUMOS).request(server.body["vllm_xargs"], server.body["prompt"])
    assert plan.options == lumos.MaskedOptions()
    assert plan.conditional.layout.frame == lumos.frame_layout((48, 84))
    assert plan.frames == 13
    frames = iio.imread(tmp_path / "video.mp4", plugin="pyav")
    assert frames.shape == (48, 384, 672, 3)
    assert iio.immeta(tmp_path / "video.mp4", plugin="pyav")["fps"] == 8


def test_a_picture_is_the_first_latent_frame(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    picture = random_video(1, *GRID)[0]
    Image.fromarray(picture).save(tmp_path / "a picture.png")
    out = tmp_path / "video.gif"
    result = call(tokenizer, out, "--frames", "8", "--image", str(tmp_path / "a picture.png"))
    assert result.exit_code == 0, result.stderr
    codes = CosmosTokenizer(tokenizer).encode(picture[None])
    assert server.body["prompt"] == text(tokenizer, 1, 8) + lumos.frame_of_codes(codes[0]).tolist()
    assert server.body["vllm_xargs"]["packcache_frames"] == 2
    plan = ServerConfig.parse("packcache", {}, family=LUMOS).request(server.body["vllm_xargs"], server.body["prompt"])
    assert plan.first_frame == 0
    assert plan.conditional.layout.condition_image_tokens == lumos.frame_layout(GRID).tokens_per_frame
    frames = read_gif(out)
    assert len(frames) == 8
    np.testing.assert_array_equal(frames[0], picture)
    np.testing.assert_array_equal(frames[1:5], CosmosTokenizer(tokenizer).decode(server.codes)[:1].repeat(4, 0))


@pytest.mark.parametrize(("rate", "every"), [(8, 1), (24, 3)])
def test_a_video_is_continued(rate: int, every: int, tokenizer: Path, server: Server, tmp_path: Path) -> None:
    """Of 11 frames at 8 a second the last 9 are used: 3 latent frames."""
    video = random_video(9, *GRID)
    source = np.concatenate([random_video(1, *GRID, seed=7).repeat(2, 0), video]).repeat(every, 0)
    iio.imwrite(tmp_path / "old.mkv", source, plugin="pyav", codec="ffv1", fps=rate, out_pixel_format="bgr0")
    out = tmp_path / "video.gif"
    result = call(tokenizer, out, "--frames", "16", "--video", str(tmp_path / "old.mkv"))
    assert result.exit_code == 0, result.stderr
    given = CosmosTokenizer(tokenizer).encode(video)
    frames = [id for codes in given for id in lumos.frame_of_codes(codes).tolist()]
    assert server.body["prompt"] == text(tokenizer, 2, 8) + frames
    assert server.body["vllm_xargs"]["packcache_frames"] == 2
    plan = ServerConfig.parse("packcache", {}, family=LUMOS).request(server.body["vllm_xargs"], server.body["prompt"])
    assert plan.first_frame == 2, "the first of the three is the conditioning image"
    shown = read_gif(out)
    assert len(shown) == 16
    np.testing.assert_array_equal(shown[:9], video)
    old = f"video {tmp_path / 'old.mkv'}: {11 * every} frames in 1.4 s"
    assert f"{old}; used: the last 9 of 11 frames at 8 a second, all of 64 x 32 pixels, as 64 x 32\n" in result.stdout


def test_what_is_used_of_a_picture_is_said(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "a [b].png")
    result = call(tokenizer, tmp_path / "a.gif", "--frames", "8", "--image", str(tmp_path / "a [b].png"))
    assert result.exit_code == 0, result.stderr
    said = f"picture {tmp_path / 'a [b].png'}: the middle 300 x 150 of 300 x 200 pixels, as 64 x 32\n"
    assert said in result.stdout


def test_a_sideways_video_is_continued_upright(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    old = INPUTS / "rot.mp4"
    size = ("--width", "32", "--height", "64")
    result = call(tokenizer, tmp_path / "a.gif", "--frames", "32", "--video", str(old), *size)
    assert result.exit_code == 0, result.stderr
    said = f"video {old}: 24 frames in 3.0 s, turned upright; used: the last 21 of 24 frames at 8 a second, "
    assert said + "all of 64 x 128 pixels, as 32 x 64\n" in result.stdout
    given = CosmosTokenizer(tokenizer).encode(read_video(old, 32, 64, 8, 32).frames[3:])
    assert server.body["prompt"][-6 * len(lumos.frame_of_codes(given[0])) :] == [
        id for codes in given for id in lumos.frame_of_codes(codes).tolist()
    ]


@pytest.mark.parametrize("in_stream", [True, False])
def test_what_the_server_says(in_stream: bool, tokenizer: Path, server: Server, tmp_path: Path) -> None:
    """vLLM begins a stream before it admits the request: what it refuses then, it refuses there."""
    error = {"error": {"message": "packcache_grid makes frames that are too large", "code": 400}}
    streamed = httpx.Response(200, text=f"data: {json.dumps(error)}\n\ndata: [DONE]")
    server.answer = lambda: streamed if in_stream else httpx.Response(400, json=error)
    result = call(tokenizer, tmp_path / "video.mp4")
    assert result.exit_code == 2
    said = "vllm-packcache: the server refused the request: packcache_grid makes frames that are too large\n"
    assert result.stderr == said
    assert not (tmp_path / "video.mp4").exists()


def _lost() -> httpx.Response:
    raise httpx.ReadError("peer closed connection")


@pytest.mark.parametrize(
    ("answer", "fewer", "sentence"),
    [
        (lambda: httpx.Response(404, text="nothing here"), 0, "refused the request: nothing here"),
        (lambda: httpx.Response(502), 0, "refused the request: 502"),
        (_lost, 0, "the server at http://server:1 does not answer: peer closed connection"),
        (lambda: httpx.Response(200, text='data: {"error": "no memory"}'), 0, "gave up on the request: no memory"),
        (
            lambda: httpx.Response(200, text=f"data: {json.dumps({'choices': [{'token_ids': [7] * 40}]})}"),
            0,
            "makes no frames of this grid",
        ),
        (None, 1, "ended the video after 12 of 13 frames"),
    ],
)
def test_a_server_that_fails(
    answer: Any, fewer: int, sentence: str, tokenizer: Path, server: Server, tmp_path: Path
) -> None:
    server.answer, server.fewer = answer, fewer
    result = call(tokenizer, tmp_path / "video.mp4")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


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
    tokenizer: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.key = "secret"
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    result = call(tokenizer, tmp_path / "video.mp4", *([] if option is None else ["--api-key", option]))
    if sentence is None:
        assert result.exit_code == 0, result.stderr
        assert set(server.keys) == {"Bearer secret"}
    else:
        assert result.exit_code == 2
        assert result.stderr == f"vllm-packcache: the server at http://server:1 {sentence}\n"
        assert not server.body


@pytest.mark.parametrize(
    ("host", "direct"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("server", False), ("10.0.0.1", False)],
)
def test_a_proxy_is_for_other_machines(
    host: str, direct: bool, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    result = call(tokenizer, tmp_path / "video.mp4", to=("--url", f"http://{host}:8000"))
    assert result.exit_code == 2
    assert asked == [(host.strip("[]"), not direct)]


def test_two_runs_do_not_share_a_file(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    seen: list[Any] = []

    def answer() -> httpx.Response:
        server.answer = None
        seen.append(call(tokenizer, out))
        seen.append(server.body)
        return httpx.Response(502)

    server.answer = answer
    assert call(tokenizer, out).exit_code == 2
    second, body = seen
    assert second.exit_code == 2
    assert second.stderr.startswith(f"vllm-packcache: {out} cannot be written: another run is going to write it")
    assert body == server.body, "the second asked for nothing"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("folder.mp4", "folder.mp4 cannot be written: it is a folder, name a file in it"),
        ("file/video.mp4", "file is no folder"),
        ("video", "--out ends with .mp4 or .gif, not 'video'"),
    ],
)
def test_where_no_video_can_be_written(
    out: str, sentence: str, tokenizer: Path, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    result = call(tokenizer, tmp_path / out)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not server.body


def test_no_server(tokenizer: Path, tmp_path: Path) -> None:
    result = call(tokenizer, tmp_path / "video.mp4", to=("--url", "http://127.0.0.1:9"))
    assert result.exit_code == 2
    assert result.stderr.startswith("vllm-packcache: the server at http://127.0.0.1:9 does not answer: ")
    result = call(tokenizer, tmp_path / "video.mp4", to=("--url", "localhost"))
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
        (["--guidance", "nan"], "--guidance must lie between -1000 and 1000, not nan"),
        (["--out", "video.avi"], "--out ends with .mp4 or .gif, not 'video.avi'"),
        (["--image", "no.png", "--video", "no.mp4"], "leave one out"),
        (["--image", "no.png"], "no.png cannot be read as a picture"),
        (["--video", "no.mp4"], "no.mp4 cannot be read as a video"),
        (["--video", __file__], "cannot be read as a video"),
        (["--tokenizer", "nowhere"], "tokenizer.json is missing"),
        (["--model", "nowhere"], "give the folder of a model to serve, or the address"),
        (["--config", "demo"], "--config is of a server of your own"),
        (["--image", str(INPUTS / "trunc.png")], "trunc.png cannot be read as a picture: it is cut off or damaged"),
        (["--image", str(INPUTS / "empty.png")], "empty.png cannot be read as a picture: it is empty"),
        (["--video", str(INPUTS / "empty.png")], "empty.png cannot be read as a video: it is empty"),
        (["--prompt", "a <video>"], "no id of text for this model"),
    ],
    ids=str,
)
def test_mistakes_get_a_sentence(
    arguments: list[str], sentence: str, tokenizer: Path, server: Server, tmp_path: Path
) -> None:
    result = call(tokenizer, tmp_path / "video.mp4", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not server.body, "nothing was asked for"


def test_what_cannot_be_decoded_is_not_made(server: Server, tmp_path: Path) -> None:
    write_text_tokenizer(write_video_tokenizer(tmp_path))
    (tmp_path / "decoder.jit").write_bytes((tmp_path / "encoder.jit").read_bytes())
    result = call(tmp_path, tmp_path / "video.mp4")
    assert result.exit_code == 2
    assert "decoder.jit fails with an input of shape [1, 1, 4, 8]" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not server.body


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
    frames: int, rate: int, arguments: list[str], sentence: str, tokenizer: Path, server: Server, tmp_path: Path
) -> None:
    old = tmp_path / "old.mp4"
    iio.imwrite(old, np.zeros((frames, 32, 64, 3), np.uint8), plugin="pyav", codec="libx264", fps=rate)
    result = call(tokenizer, tmp_path / "video.mp4", "--video", str(old), *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert not server.body


def test_a_picture_alone_is_no_video(tokenizer: Path, server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    result = call(tokenizer, tmp_path / "a.gif", "--image", str(tmp_path / "a.png"), "--frames", "1", "--fps", "1")
    assert result.exit_code == 2
    assert "--frames 1 are 1 latent frames, of which 1 are given" in result.stderr


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, [], "is of architecture LlamaForCausalLM: generate is for"),
        ({}, [], "is of architecture unknown"),
        ({}, ["--api-key", "secret"], "--api-key is of a server that runs (--url)"),
        (None, [], "its config.json cannot be read"),
        ({"architectures": list(lumos.ARCHITECTURES[:1])}, ["--config", '{"widow": 3}'], "widow"),
        (
            {"architectures": list(lumos.ARCHITECTURES[:1])},
            ["--config", '{"layout": {"grid": [2, 2]}}'],
            "give grid: [4, 8], or no layout",
        ),
    ],
)
def test_models_that_are_not_served(
    config: dict[str, Any] | None,
    arguments: list[str],
    sentence: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generating, "serving", lambda *args, **kwargs: pytest.fail("a server was started"))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    result = call(tokenizer, tmp_path / "video.mp4", *arguments, to=("--model", str(tmp_path)))
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
        yield "http://server:1"

    monkeypatch.setattr(generating, "serving", serving)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": [lumos.ARCHITECTURES[1]], "torch_dtype": "float32"})
    )
    server.fewer = 1
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    given = ["--model", str(tmp_path), "--image", str(tmp_path / "a.png"), *size]
    if config is not None:
        config = {**config, **({"layout": load_mapping(layout)["layout"]} if layout else {})}
        given += ["--config", json.dumps(config)]
    result = call(tokenizer, tmp_path / "video.mp4", to=tuple(given))
    assert result.exit_code == 2
    log = tmp_path / "video.log"
    assert result.stderr == f"vllm-packcache: the server ended the video after 11 of 12 frames; its log is {log}\n"
    ((model, arguments, own_log, options),) = started
    assert (model, own_log, options) == (tmp_path, log, {"interpreted": not torch.cuda.is_available()})
    expected = load_mapping(layout) if config is None and layout else {"layout": {"grid": list(GRID)}, **(config or {})}
    assert json.loads(arguments["--kv-cache-policy-config"]) == expected
    assert arguments["--kv-cache-policy"] == ("packcache" if config is None else "sliding_window")
    assert int(arguments["--max-model-len"]) == len(server.body["prompt"]) + length
    assert arguments["--dtype"] == ("auto" if torch.cuda.is_available() else "float32")


def test_a_server_of_its_own(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user: the codes that are decoded are those of the published loop."""
    model = make_random_lumos(tmp_path / "model", visual_codes=CODES)
    picture = random_video(1, *GRID, seed=int(numbers(0).integers(1000)))[0]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    shown = tmp_path / "shown.npy"
    encode = generating.encode_video
    monkeypatch.setattr(
        generating, "encode_video", lambda frames, *args: (np.save(shown, frames), encode(frames, *args))[1]
    )
    out = tmp_path / "video.mp4"
    config = {"window": 2, "history_frames": 1}
    options = ["--frames", "16", "--seed", "3", "--steps", "2", "--guidance", "2", "--config", json.dumps(config)]
    result = call(tokenizer, out, "--image", str(tmp_path / "picture.png"), *options, to=("--model", str(model)))
    assert result.exit_code == 0, result.output
    assert processes_of(tmp_path / "video.log") == []
    assert iio.imread(out, plugin="pyav").shape == (16, HEIGHT, WIDTH, 3)

    ids = text(tokenizer, 2, 8)
    given = CosmosTokenizer(tokenizer).encode(picture[None])
    ids += lumos.frame_of_codes(given[0]).tolist()
    server = ServerConfig.parse("packcache", {**config, "layout": {"grid": list(GRID)}}, family=LUMOS)
    plan = server.request({"packcache_seed": 3, "packcache_steps": 2, "packcache_guidance": 2}, ids)
    made = generate_masked(LumosReference.load(model), ids, 4, plan.conditional, plan.options, block_size=128)
    refuse_masked_ties(made)
    codes = np.stack([lumos.codes_of_frame(frame, GRID) for frame in made.frames.numpy()])
    expected = CosmosTokenizer(tokenizer).decode(np.concatenate([given, codes]))
    np.testing.assert_array_equal(np.load(shown), expected[:16])
