"""The demo as a user runs it, and a server that is always stopped."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vllm_packcache.cli import app
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.demo import run
from vllm_packcache.demo.masked import run as masked
from vllm_packcache.demo.scores import sightings
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, MODEL_DIR, TRAINED_FRAMES, VideoTokenizer
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import LUMOS
from vllm_packcache.serving.log import record_of
from vllm_packcache.serving.server import ServerError, serving
from vllm_packcache.tools.explain import explain
from vllm_packcache.tools.sequences import read_video

COMMAND = str(Path(sys.executable).with_name("vllm-packcache"))
SHORT = 6
SHORTER = [
    *(sys.executable, "-c"),
    "from vllm_packcache.demo import run; from vllm_packcache.demo.masked import run as masked; "
    f"run.FRAMES = masked.FRAMES = {SHORT}; from vllm_packcache.cli import main; main()",
]
"""The command with fewer frames."""
ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# As on a company's laptop: nobody listens there, the other proxy is of a kind that needs a package, and the key is of
# other servers.
LAPTOP = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "VLLM_API_KEY": "secret",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def processes_of(log: Path) -> list[int]:
    """Processes whose output goes to ``log``: the server and whatever it has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.readlink(folder / "fd" / "1") == str(log):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def planned(request: VideoRequest) -> list[int]:
    """Tokens, in whole blocks of 32, that the plan of a video keeps while each of `SHORT` frames is made."""
    held = np.zeros(SHORT, int)
    for stream in request.streams:
        retention = Retention(stream.plan.layout, stream.plan.policy, 32, some_tokens)
        for frame in range(SHORT):
            own = -(-retention.layout.frame_start(frame + 1) // 32) - retention.blocks.tail_start(frame)
            held[frame] += 32 * (len(retention.past(frame)) + own)
    return held.tolist()


def test_demo_makes_a_video_of_a_users_picture(tmp_path: Path) -> None:
    picture = tmp_path / "a picture.jpg"
    Image.effect_mandelbrot((300, 200), (-2, -1.2, 1, 1.2), 50).convert("RGB").save(picture)
    out = tmp_path / "out"
    arguments = [
        "demo",
        "--image",
        str(picture),
        "--prompt",
        'a [red] zebra\'s "circle" moves right',
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*SHORTER, *arguments], capture_output=True, text=True, env={**ENVIRONMENT, **LAPTOP}, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the model does not know [red], zebra's" not in done.stdout
    assert "the model does not know zebra's;" in done.stdout
    assert "sees plain colours in 100% of this picture" in done.stdout
    for suffix in ("gif", "mp4"):
        assert iio.imread(out / f"video.{suffix}").shape == (SHORT, 256, 256, 3)
        assert iio.imread(out / f"story.{suffix}").shape == (SHORT, 396, 3 * 272 + 16, 3)
    assert Image.open(out / "story.png").width == pytest.approx(1606, abs=2)
    server = ServerConfig.parse("packcache", run.PRESET)
    for cache in run.CACHES:
        request = server.video({f"packcache_{name}": value for name, value in cache.options.items()}, CONDITION_TOKENS)
        assert request is not None
        held = planned(request)
        assert record_of(out / "server.log", f"cmpl-{cache.name}-")["peak_tokens_by_frame"] == held
        assert re.search(rf"{cache.label} +│ +{held[-1]:,} │ +\d+% │ +[\d.]+ │ +not known │", done.stdout)
    assert processes_of(out / "server.log") == []
    assert done.stdout.splitlines()[-1] == "make playground: make videos like these in a browser"
    # What explain --sequence reads.
    video = read_video(out / "video.json", 0)
    assert video.condition_tokens == CONDITION_TOKENS
    assert len(video.token_ids) == CONDITION_TOKENS + SHORT * FRAME_TOKENS
    explanation = explain(run.PRESET, "packcache", sequence=out / "video.json")
    assert explanation.frames == SHORT


@pytest.mark.parametrize(
    ("command", "config", "words"),
    [
        ("demo", "emu3", "--config: 'emu3' has not the layout of the bundled model's videos: give a configuration with "
         "layout: demo"),
        ("demo-masked", "lumos1_256p", "--config: 'lumos1_256p' has not the layout of the bundled model's videos: "
         "give a configuration with layout: demo_masked"),
        ("demo", "nope", "'nope' is neither a file nor a preset"),
        ("demo", '{"layout": "demo", "selection": "rows", "episodes": 2}', "episodes is for selection = changed"),
    ],
)  # fmt: skip
def test_a_configuration_for_other_videos_is_one_sentence(
    command: str, config: str, words: str, tmp_path: Path
) -> None:
    """Before a server is started."""
    result = CliRunner().invoke(app, [command, "--config", config, "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("vllm-packcache: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_the_configurations_of_the_demos_are_for_their_videos() -> None:
    assert run.fitting(run.PRESET, run.PRESET).policy.reads_tokens
    assert masked.fitting(masked.PRESET, masked.PRESET, LUMOS).policy.reads_tokens


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_interrupted_demo_stops_its_server(tmp_path: Path, sign: signal.Signals) -> None:
    log = tmp_path / "server.log"
    demo = subprocess.Popen(
        [COMMAND, "demo", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        # A shell starts background jobs with Ctrl-C ignored, and a suite that runs in one hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not (log.exists() and "EngineCore" in log.read_text()):
        assert demo.poll() is None, "the demo stopped by itself"
        assert time.monotonic() < deadline, "the server never got to start its engine"
        time.sleep(0.2)
    assert len(processes_of(log)) >= 2
    demo.send_signal(sign)
    demo.wait(60)
    assert demo.returncode != 0
    assert processes_of(log) == []


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(ServerError, match=r"^the server did not start: argument .*invalid choice: 'nope'[^\n]*$"),
        serving(MODEL_DIR, ["--kv-cache-policy", "nope"], log, lambda line: None),
    ):
        pytest.fail("it started")
    assert processes_of(log) == []


def test_unreadable_picture_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    done = subprocess.run(
        [COMMAND, "demo", "--image", str(text), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"vllm-packcache: {text} cannot be read as a picture")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_is_one_runs_own(tmp_path: Path) -> None:
    with run.claimed(tmp_path / "new" / "out") as log:
        log.write_text("what the server says")
        with pytest.raises(OSError, match="another run writes to this folder"), run.claimed(log.parent):
            pytest.fail("two runs write to one folder")
        assert log.read_text() == "what the server says"
    with run.claimed(log.parent):
        """It is free again."""


@pytest.mark.parametrize("command", ["demo", "demo-masked"])
@pytest.mark.parametrize("below", ["", "folder"])
def test_out_that_is_a_file_is_one_sentence(tmp_path: Path, command: str, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = subprocess.run(
        [COMMAND, command, "--out", str(file / below)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"vllm-packcache: --out {file / below}: it, or a folder that it lies in, is a file")
    assert file.read_text() == "mine"


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


def remarks(tokenizer: VideoTokenizer, prompt: str, codes: np.ndarray | None = None) -> list[str]:
    """What a demo notes about what it is asked."""
    console = Console(file=io.StringIO(), width=10_000)
    run.tell(console, "mine.png", run.readable(prompt), tokenizer.encode_text, tokenizer.unk_id, codes)
    told = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(told[0]) < 200
    return [line.removeprefix("note: ") for line in told[1:]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle moves right at night", []),
        ("A red CIRCLE, moves; right!", []),
        ("", ["finds no word .* it has nothing to go by"]),
        (" \n\t ", ["finds no word"]),
        ("!?", ["finds no word"]),
        ("красный круг", ["finds no word", "does not know красный, круг; its words are a, an, the,"]),
        ("一个 red 2 circles!", ["does not know 一个, 2, circles!;"]),
        ("красный! red", ["does not know красный!;"]),
        (" ".join(f"word{i}" for i in range(99)), ["finds no word", "word7 and 91 more;", "the last 168"]),
        ("red " * 30, []),
        ("red " * 1000, ["reads 30 words: the last 970"]),
        ("x" * 5000, ["finds no word", r"does not know xxxxxxxxxxxxxxxx \.\.\.;"]),
        ("a \ud800 red circle", []),
    ],
    ids=lambda value: value[:20].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else "",
)
def test_what_a_model_cannot_read_is_said(tokenizer: VideoTokenizer, prompt: str, expected: list[str]) -> None:
    found = remarks(tokenizer, prompt)
    assert len(found) == len(expected), found
    for remark, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, remark)
        assert len(remark) < 500


def test_what_a_model_cannot_see_is_said(tokenizer: VideoTokenizer) -> None:
    world = make_world(run.EXAMPLE)
    drawn = world.frame_ids(0)
    assert remarks(tokenizer, "red", drawn) == []
    (remark,) = remarks(tokenizer, "red", world.background)
    assert remark == "there is no shape in this picture that the model knows how to move"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    (remark,) = remarks(tokenizer, "red", tokenizer.encode_image(noise) - tokenizer.visual_offset)
    assert "plain colours in 100% of this picture, and no shape" in remark
    collage = np.where(np.arange(16)[:, None] < 4, 0, drawn)
    (remark,) = remarks(tokenizer, "red", collage)
    assert "plain colours in 25% of this picture, and shapes that it knows" in remark


def test_the_example_is_the_world_whose_truth_is_shown(tokenizer: VideoTokenizer) -> None:
    world = make_world(run.EXAMPLE)
    assert (run.ASSETS / "example_prompt.txt").read_text(encoding="utf-8").strip() == world.prompt
    picture = tokenizer.encode_image(np.asarray(Image.open(run.ASSETS / "example.png").convert("RGB")))
    assert np.array_equal(picture - tokenizer.visual_offset, world.frame_ids(0))
    # Objects hide and return in it, also in frames that are beyond those of training.
    found = sightings(world, np.stack([world.frame_ids(k) for k in range(1, run.FRAMES + 1)]))
    assert found.hidden.any()
    assert found.returned[TRAINED_FRAMES:].any()


def test_condition_of_the_demo_fits_its_preset() -> None:
    plan = ServerConfig.parse("packcache", "demo").plan({"packcache_policy": "packcache"}, CONDITION_TOKENS)
    assert plan is not None
    assert plan.layout.tokens_per_frame == FRAME_TOKENS
