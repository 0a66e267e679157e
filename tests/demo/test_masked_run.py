"""The masked demo as a user runs it: what a server makes is what the reference makes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from benchmarks.training import masked_evaluate as evaluate
from benchmarks.training.masked_model import Lumos
from tests.demo.test_run import ENVIRONMENT, SHORT, SHORTER, planned, processes_of
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.masked import run
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.masked.bundle import OPTIONS, request_options
from vllm_packcache.demo.run import CACHES
from vllm_packcache.demo.scores import sightings
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import GRID, make_world
from vllm_packcache.families import LUMOS
from vllm_packcache.serving.log import record_of
from vllm_packcache.tools.explain import explain


@pytest.mark.timeout(500)
def test_the_example_is_what_the_evaluation_measures(tmp_path: Path, loaded: Lumos) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [*SHORTER, "demo-masked", "--out", str(out)], capture_output=True, text=True, env=ENVIRONMENT, timeout=450
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = iio.imread(out / "video.gif")
    assert shown.shape == (SHORT, 256, 256, 3)
    assert iio.imread(out / "story.mp4").shape == (SHORT, 396, 4 * 272 + 16, 3)
    assert Image.open(out / "story.png").width == pytest.approx(1606, abs=2)
    # What the engine has recorded is what the plans of both streams keep.
    example = make_world(run.EXAMPLE)
    ids = masked_tokenizer.prompt(example.prompt, SHORT, masked_tokenizer.build_text_tokenizer())
    ids += masked_tokenizer.world_frame(example, 0).tolist()
    server = ServerConfig.parse("packcache", run.PRESET, family=LUMOS)
    seen = sightings(example, np.zeros((SHORT, GRID, GRID), int)).visible.sum()
    for cache in CACHES:
        request = server.request(request_options(SHORT, OPTIONS, **cache.options), ids)
        assert request is not None
        held = planned(request)
        assert record_of(out / "server.log", f"cmpl-{cache.name}-")["peak_tokens_by_frame"] == held
        assert re.search(rf"{cache.label} +│ +{held[-1]:,} │ +\d+% │ +[\d.]+ │ +\d+ of {seen} │", done.stdout)
    assert processes_of(out / "server.log") == []
    assert done.stdout.splitlines()[-1] == "make playground PLAYGROUND=demo_masked: make videos like these in a browser"
    # What explain --sequence reads: of both streams.
    explanation = explain(run.PRESET, "packcache", sequence=out / "video.json")
    assert explanation.frames == SHORT
    assert [own.retention.layout for own in explanation.streams.values()] == [
        stream.plan.layout for stream in request.streams
    ]

    tokenizer = VideoTokenizer()
    codes = evaluate.generate(loaded, [example], SHORT, "packcache", [OPTIONS])[0]
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
    done = subprocess.run([*SHORTER, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the model does not know [zebra];" in done.stdout
    assert iio.imread(out / "story.mp4").shape == (SHORT, 396, 3 * 272 + 16, 3)
    assert "objects right (" not in done.stdout
