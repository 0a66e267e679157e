"""The example of videos over HTTP: asked for, followed over connections that break, and downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av

from tests.videos.fake import Fake, serving

EXAMPLE = Path(__file__).parents[2] / "examples" / "videos.py"


def test_a_video_is_followed_and_kept(tmp_path: Path) -> None:
    fake = Fake(key="a key")
    # A connection ends after three events, of which the first one has at least one that is no frame.
    fake.connections = 3
    with serving(fake) as page:
        url = page.removesuffix("/playground")
        environment = {**os.environ, "VLLM_API_KEY": "a key"}
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), url, "out.mp4"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frames = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in frames] == [f"frame {number} of 8" for number in range(1, 9)]
    assert "tokens held" in frames[-1]
    assert [int(number) for number in fake.resumed] == list(range(0, 3 * len(fake.resumed), 3))
    assert len(fake.resumed) > 2
    (asked,) = fake.asked
    assert (asked["num_frames"], asked["packcache_history_frames"]) == ("8", "2")
    assert asked["input_reference"] == "image/png"
    with av.open(tmp_path / "out.mp4") as file:
        assert sum(1 for _ in file.decode(video=0)) == 8


def test_why_one_failed_is_said(tmp_path: Path) -> None:
    fake = Fake()
    fake.allowed, fake.failing = 2, True
    with serving(fake) as page:
        command = [sys.executable, str(EXAMPLE), page.removesuffix("/playground"), "out.mp4"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (failed,) = [data for kind, data in next(iter(fake.videos.values())).events if kind == "failed"]
    assert done.stderr.splitlines()[-1] == failed["error"]["message"]
    assert not (tmp_path / "out.mp4").exists()
