"""`vllm-packcache explain`: what it prints and draws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vllm_packcache.cli import app
from vllm_packcache.config import ConfigError, presets
from vllm_packcache.explain import DROPPED, NOT_YET, _shown_states, explain
from vllm_packcache.policies import available

TINY = json.dumps({"layout": {"tokens_per_frame": 16}, "window": 3})
TINY_OPTIONS = ["--frames", "6", "--condition-tokens", "8", "--block-size", "8"]
TINY_TEXT = """\
JSON: packcache (history_frames 2, window 3, decay 0.5, gamma_text 1, gamma_condition 1)
condition 8 tokens, 6 frames of 16 tokens, 13 blocks of 8
C condition   # frame being made   1 previous frame   2 the one before that, and so on   · dropped

        ┌blocks───────┐ live of full
frame 0 │C##          │  24  100 %
frame 1 │C11##        │  40  100 %
frame 2 │C2211##      │  56  100 %
frame 3 │C3·2·11##    │  56   78 %
frame 4 │C··3·2·11##  │  56   64 %
frame 5 │C····3·2·11##│  56   54 %

Blocks are dropped from frame 3 on; frame 5 reads 56 of 104 tokens, 54 % of the full cache.
"""


def run(*arguments: str, columns: int = 120) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_of_a_small_video_is_exact() -> None:
    assert run(TINY, *TINY_OPTIONS) == TINY_TEXT


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("preset", ["demo", "lumos1_384p"])
def test_lines_fit_the_terminal(preset: str, columns: int) -> None:
    output = run(preset, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    assert sum("│" in line for line in output.splitlines()) == 12


@pytest.mark.parametrize("policy", sorted(available()))
@pytest.mark.parametrize("preset", sorted(presets()))
def test_numbers_and_blocks_agree_with_each_other(preset: str, policy: str) -> None:
    explanation = explain(preset, policy, frames=7, condition_tokens=100, block_size=32)
    retention = explanation.retention
    for view in explanation.views():
        live = int(np.count_nonzero(view.states > DROPPED))
        assert live == -(-view.tokens.live // 32)
        made = -(-view.tokens.full // 32)
        assert np.all(view.states[made:] == NOT_YET)
        assert np.all(view.states[:made] != NOT_YET)
        for block in np.flatnonzero(view.states >= 0):
            assert view.states[block] == max(0, view.tokens.frame - retention.blocks.tag(int(block)))


@pytest.mark.parametrize("columns", [20, 60, 100, 333])
def test_narrow_lines_keep_the_share_of_live_blocks(columns: int) -> None:
    explanation = explain("lumos1_384p", "packcache", frames=12)
    for view in explanation.views():
        shown = np.array(_shown_states(view, columns))
        assert len(shown) == columns
        live_shown = np.mean(shown > DROPPED)
        live = np.mean(view.states > DROPPED)
        # One character is the smallest step, and each of the six segments may be off by one.
        assert abs(live_shown - live) <= 6 / columns


def test_whole_frames_have_no_holes_when_narrow() -> None:
    for view in explain("lumos1_384p", "sliding_window", frames=9).views():
        line = "".join("x" if state > DROPPED else "." for state in _shown_states(view, 61))
        # The condition and, after at most one gap, the whole frames.
        assert len(re.findall("x+", line)) <= 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["demo"], "demo"),
        (["lumos1_480p", "--policy", "attention_sink", "--frames", "3"], "wide"),
        ([TINY, *TINY_OPTIONS], "tiny"),
        (["demo", "--policy", "full", "--frames", "70", "--block-size", "64"], "tall"),
        (["demo", "--frames", "1", "--condition-tokens", "0"], "one"),
    ],
)
def test_picture_is_valid_and_not_blank(arguments: list[str], name: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / f"{name}.png"
    assert f"{path}" in run(*arguments, "--out", str(path)).replace("\n", "")
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert picture.height > 300
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # The frame being made is in every picture, in its own red.
    red = np.count_nonzero(np.all(pixels == (0xC8, 0x10, 0x2E), axis=1))
    assert red > 100
    assert np.count_nonzero(np.any(pixels != 255, axis=1)) > 0.02 * len(pixels)


def test_other_policies_take_a_presets_layout_only() -> None:
    explanation = explain("demo", "sliding_window", frames=4)
    assert explanation.options == "window 2"
    assert explanation.retention.layout.tokens_per_frame == 257


def test_a_short_condition_has_no_image() -> None:
    assert explain("demo", "packcache", frames=2).retention.layout.condition_image_tokens == 256
    layout = explain("demo", "packcache", frames=2, condition_tokens=10).retention.layout
    assert (layout.condition_tokens, layout.condition_image_tokens) == (10, 0)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("{}", {}, "no layout"),
        ("demo", {"frames": 0}, "frames"),
        ("demo", {"block_size": 0}, "block size"),
        ("demo", {"condition_tokens": -1}, "condition_tokens"),
    ],
)
def test_impossible_numbers_are_named(source: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(source, "packcache", **{"frames": 3, **options})


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        "import sys, vllm_packcache.cli, vllm_packcache.explain;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
