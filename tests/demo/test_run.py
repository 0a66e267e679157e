"""The demo as a user runs it, and a server that is always stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from vllm_packcache.demo import run
from vllm_packcache.demo.server import ServerError, serving
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, MODEL_DIR

COMMAND = str(Path(sys.executable).with_name("vllm-packcache"))
ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}


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
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "zebra" in done.stdout, "words the model does not know are named"
    for name in ("video", "full"):
        for suffix in ("gif", "mp4"):
            frames = iio.imread(out / f"{name}.{suffix}")
            assert frames.shape == (run.FRAMES, 256, 256, 3)
            assert frames.std() > 0
    for name in ("frames.png", "resident.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 0
    assert "most KV-cache tokens" in done.stdout
    assert processes_of(out / "server.log") == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
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
        pytest.raises(ServerError, match=r"(?s)the server stopped with status 2; .*invalid choice: 'nope'"),
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


def test_condition_of_the_demo_fits_its_preset() -> None:
    from vllm_packcache.config import ServerConfig

    plan = ServerConfig.parse("packcache", "demo").plan({"packcache_policy": "packcache"}, CONDITION_TOKENS)
    assert plan is not None
    assert plan.layout.tokens_per_frame == FRAME_TOKENS
