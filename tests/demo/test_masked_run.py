"""The masked demo as a user runs it: what a server makes is what the reference makes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from benchmarks.training import masked_evaluate as evaluate
from tests.demo.test_run import COMMAND, ENVIRONMENT, processes_of
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.masked import run
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.masked.bundle import OPTIONS, PRESET, request_options
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import LUMOS
from vllm_packcache.tools.explain import explain


@pytest.mark.timeout(500)
def test_the_example_is_what_the_evaluation_measures(tmp_path: Path, loaded: evaluate.FusedLumos) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [COMMAND, "demo-masked", "--out", str(out)], capture_output=True, text=True, env=ENVIRONMENT, timeout=450
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = iio.imread(out / "video.gif")
    assert shown.shape == (run.FRAMES, 256, 256, 3)
    for name in ("frames.png", "resident.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 0
    # What the engine has recorded of both streams, in blocks of 32: the full cache grows by a frame each time.
    xargs = request_options(run.FRAMES, "full", OPTIONS)
    example = make_world(run.EXAMPLE)
    ids = masked_tokenizer.prompt(example.prompt, run.FRAMES, masked_tokenizer.build_text_tokenizer())
    ids += masked_tokenizer.world_frame(example, 0).tolist()
    streams = ServerConfig.parse("packcache", PRESET, family=LUMOS).request(xargs, ids).streams
    rows = re.findall(r"(\d+) │ +([\d,]+) │ +([\d,]+) │ +(\d+)%", done.stdout)
    assert [int(row[1].replace(",", "")) for row in rows] == [
        sum(-(-own.plan.layout.frame_start(frame + 1) // 32) * 32 for own in streams) for frame in range(run.FRAMES)
    ]
    assert "tokens are true" in done.stdout
    assert processes_of(out / "server.log") == []
    # What explain --sequence reads: of both streams.
    source = json.dumps({"layout": PRESET, "selection": "changed"})
    explanation = explain(source, "packcache", sequence=out / "video.json")
    assert explanation.frames == run.FRAMES
    assert [own.retention.layout for own in explanation.streams.values()] == [own.plan.layout for own in streams]

    tokenizer = VideoTokenizer()
    codes = evaluate.generate(loaded, make_world(run.EXAMPLE), run.FRAMES, "packcache", OPTIONS)
    expected = tokenizer.decode_frames(codes + tokenizer.visual_offset).repeat(4, 1).repeat(4, 2)
    # GIF has 256 colours, and rounding may turn a token that is near a tie.
    near = np.abs(shown.astype(int) - expected).max(-1) <= 8
    assert near.mean() > 0.98


# Over HTTP text to video is in the suite (tests/serving/test_masked_http.py), and so is what a demo says of a prompt.
@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_sentence_alone_is_text_to_video(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo-masked", "--prompt", "a red [zebra] moves right at sea", "--out", str(out)]
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the model does not know [zebra];" in done.stdout
    assert iio.imread(out / "full.mp4").shape == (run.FRAMES, 256, 256, 3)
    assert "tokens are true" not in done.stdout
