"""`vllm-packcache explain`: what it prints and draws."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.guidance import GuidanceConfig
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping, presets
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import names
from vllm_packcache.core.positions import TIME
from vllm_packcache.demo.tokenizer import VideoTokenizer, video_ids
from vllm_packcache.demo.world import make_world
from vllm_packcache.reference.visibility import frame_visibility
from vllm_packcache.tools.explain import (
    DROPPED,
    IN_CONDITION,
    NOT_YET,
    _pixels,
    _position_bars,
    _shown_states,
    draw,
    explain,
)
from vllm_packcache.tools.sequences import write_video

TINY = json.dumps({"layout": {"tokens_per_frame": 16}, "window": 3, "selection": "spatial"})
TINY_OPTIONS = ["--frames", "6", "--condition-tokens", "8", "--block-size", "8"]
TINY_TEXT = """\
JSON: packcache (history_frames 2, window 3, decay 0.5, gamma_text 1, gamma_condition 1, selection spatial,\x20
changed_tokens 1, episodes 0, positions rebase)
condition 8 tokens, 6 frames of 16 tokens, 13 blocks of 8
C condition   # frame being made   1 previous frame   2 the one before that, and so on   · dropped
positions: where the model sees each retained frame's first token, oldest first

        ┌blocks───────┐ live of full  positions
frame 0 │C##          │  24  100 %   8
frame 1 │C11##        │  40  100 %   8 24
frame 2 │C2211##      │  56  100 %   8 24 40
frame 3 │C3·2·11##    │  56   78 %   8 24 40 56
frame 4 │C··3·2·11##  │  56   64 %   8 24 40 56
frame 5 │C····3·2·11##│  56   54 %   8 24 40 56

Blocks are dropped from frame 3 on; frame 5 reads 56 of 104 tokens, 54 % of the full cache.
Positions stay below 72 however long the video gets.
"""


PAPERS = {"layout": "demo", "window": 4, "selection": "spatial"}
DEMO, ABSOLUTE = json.dumps(PAPERS), json.dumps({**PAPERS, "positions": "absolute"})
"""The rule of the paper, which does not depend on what is seen."""


def run(*arguments: str, columns: int = 120) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout


def moving(layout: VideoLayout, frames: int) -> list[int]:
    """Ids of a video in which one place after the other changes, more of them from frame to frame."""
    random = np.random.default_rng(0)
    frame = random.integers(0, 99, layout.tokens_per_frame)
    ids = [random.integers(0, 99, layout.condition_tokens)]
    for number in range(frames):
        start = number * layout.tokens_per_frame // frames
        frame = frame.copy()
        frame[start : start + 3 + number] += 1
        ids.append(frame)
    return np.concatenate(ids).tolist()


def written(path: Path, layout: VideoLayout, frames: int) -> Path:
    write_video(path, moving(layout, frames), layout.condition_tokens)
    return path


def shown_positions(output: str) -> list[list[str]]:
    """What is beside the blocks of every frame, word by word."""
    return [line.split("%")[1].split() for line in output.splitlines() if line.startswith("frame")]


def test_text_of_a_small_video_is_exact() -> None:
    assert run(TINY, *TINY_OPTIONS) == TINY_TEXT


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(("preset", "streams"), [("demo", 1), ("lumos1_384p", 2)])
def test_lines_fit_the_terminal(preset: str, streams: int, columns: int) -> None:
    output = run(preset, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    assert sum("│" in line for line in output.splitlines()) == 12 * streams


def test_a_picture_is_of_the_kind_that_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "x.SVG"
    run(TINY, *TINY_OPTIONS, "--out", str(path))
    assert path.read_text(encoding="utf-8").startswith("<?xml")


def test_a_picture_of_another_kind_is_refused_before_anything_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    result = CliRunner().invoke(app, ["explain", "demo", "--out", str(path)])
    assert (result.exit_code, result.stdout, path.exists()) == (2, "", False)
    assert result.stderr == "vllm-packcache: --out must name a file that ends in .png or .svg, not 'x.jpg'\n"


@pytest.mark.parametrize("blocks", [600, 601, 4800, 4801, 9601])
def test_groups_of_blocks_are_powers_of_two(blocks: int) -> None:
    """Blocks are dropped in bit-reversed order: each such group of a thinned frame keeps as many as the others."""
    explanation = explain(json.dumps({"layout": {"tokens_per_frame": blocks - 1}}), "packcache", frames=1,
                          condition_tokens=1, block_size=1)  # fmt: skip
    columns = _pixels(explanation).shape[1]
    group = next(group for group in (1, 8, 16, 32) if -(-blocks // group) <= 600)
    assert columns == -(-blocks // group)


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("preset", sorted(presets()))
def test_numbers_and_blocks_agree_with_each_other(preset: str, policy: str, tmp_path: Path) -> None:
    config = ServerConfig.parse(policy, preset)
    assert config.layout is not None
    sequence = None
    if config.policy.reads_tokens:
        layout = VideoLayout(config.layout.frame_layout(), 100)
        sequence = written(tmp_path / "video.json", layout, 7)
    explained = explain(preset, policy, frames=7, condition_tokens=100, block_size=32, sequence=sequence)
    for explanation in explained.streams.values():
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


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("preset", ["demo", "lumos1_256p", "emu3_5"])
def test_positions_are_those_of_the_retained_frames(preset: str, policy: str) -> None:
    rows = iter(shown_positions(run(preset, "--policy", policy, "--frames", "9", columns=300)))
    for explanation in explain(preset, policy, frames=9).streams.values():
        layout, positions = explanation.retention.layout, explanation.positions
        # Specification: with three axes a frame's picture begins after its special tokens.
        before = layout.frame.frame_start_tokens if preset == "lumos1_256p" else 0
        for view in explanation.views():
            made = view.tokens.frame
            owners = view.owners[view.states >= 0].tolist()
            retained = sorted({*owners, made})
            assert view.retained.tolist() == retained
            first_tokens = np.array([layout.frame_start(frame) + before for frame in retained])
            seen = positions.of(first_tokens, positions.window_start(made))[TIME]
            assert next(rows) == [f"{position:,}" for position in seen]
    assert not list(rows)


def test_positions_follow_the_configuration() -> None:
    rebased, absolute = explain(DEMO, "packcache", frames=3), explain(ABSOLUTE, "packcache", frames=3)
    assert (rebased.positions.window, absolute.positions.window) == (4, None)
    assert rebased.options.endswith("positions rebase")
    assert absolute.options.endswith("positions absolute")
    # As for a server: only packcache re-bases where nobody says.
    assert explain("demo", "sliding_window", frames=3).positions.window is None
    assert explain("lumos1_384p", "packcache", frames=3).positions.scale == (4, 8, 8)


def test_rebased_positions_stop_growing() -> None:
    output = run(DEMO, "--frames", "16")
    rows = shown_positions(output)
    assert rows[:4] == [["288"], ["288", "545"], ["288", "545", "802"], ["288", "545", "802", "1,059"]]
    assert rows[4:] == [["288", "545", "802", "1,059", "1,316"]] * 12
    assert "Positions stay below 1,573 however long the video gets." in output


def test_absolute_positions_grow() -> None:
    output = run(ABSOLUTE, "--frames", "16")
    rows = shown_positions(output)
    assert rows[4] == ["288", "545", "802", "1,059", "1,316"]
    assert rows[15] == ["3,115", "3,372", "3,629", "3,886", "4,143"]
    assert "Positions grow with the video: 4,400 after 16 frames." in output


def test_three_axes_show_time() -> None:
    output = run("lumos1_384p", columns=200)
    assert "times (t): time axis of each retained frame's first visual token" in output
    # 32 tokens of text, the three that begin a frame, and the conditioning image, 4 before frame 0.
    assert shown_positions(output)[11] == ["39", "43", "47", "51", "55"]
    # The index on all axes of a token that ends a frame: condition 4,116 + 5 frames of 4,084.
    assert "Positions stay below 56 in time (t), below 24,536 on all axes, however long the video gets." in output
    output = run(json.dumps({**PAPERS, "layout": "lumos1_384p", "positions": "absolute"}), columns=200)
    assert shown_positions(output)[11] == ["67", "71", "75", "79", "83"]
    assert "below 84 in time (t), below 53,124 on all axes, after 12 frames." in output


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("condition_tokens", [None, 100])
def test_both_streams_read_what_the_reference_sees(policy: str, condition_tokens: int | None) -> None:
    streams = explain("lumos1_256p", policy, frames=7, condition_tokens=condition_tokens, block_size=32).streams
    assert list(streams) == ["conditional stream", "unconditional stream"]
    for stream, text in zip(streams.values(), (32 if condition_tokens is None else 100, 3), strict=True):
        layout = stream.retention.layout
        assert layout.condition_tokens - layout.condition_image_tokens == text
        plan = Plan(layout, stream.retention.policy, stream.positions)
        for view in stream.views():
            assert view.tokens.live == frame_visibility(plan, 32, view.tokens.frame).sum()
            assert view.tokens.full == layout.frame_start(view.tokens.frame + 1)


def test_passes_of_a_masked_frame_are_counted() -> None:
    output = " ".join(run("lumos1_384p", "--frames", "8", columns=200).split())
    # 32 or 3 tokens before the conditioning image, and eight frames.
    conditional, unconditional = 32 + 9 * 4084, 3 + 9 * 4084
    live = [int(row.replace(",", "")) for row in re.findall(r"frame 7 reads ([\d,]+) of", output)]
    read, full = 51 * sum(live), 51 * (conditional + unconditional)
    assert (
        "A frame is made in 50 + 1 passes of both streams: 50 choose its tokens, the last commits it with 70 %"
        in output
    )
    assert f"51 x ({live[0]:,} + {live[1]:,}) = {read:,} keys" in output
    assert f"51 x ({conditional:,} + {unconditional:,}) = {full:,}: {100 * read / full:.0f} %." in output


@pytest.mark.parametrize("negative", [1, 20, 288, 400])
@pytest.mark.parametrize("policy", names())
def test_both_streams_of_a_guided_video_read_what_the_reference_sees(policy: str, negative: int) -> None:
    """As a server has them: no picture where there is no room for it."""
    source = json.dumps(PAPERS if policy == "packcache" else {"layout": "demo"})
    explanation = explain(source, policy, frames=7, negative_tokens=negative, block_size=32)
    assert list(explanation.streams) == ["conditional stream", "unconditional stream"]
    guiding = dataclasses.replace(ServerConfig.parse(policy, source), guidance=GuidanceConfig())
    made = guiding.request({"packcache_guidance": 3, "packcache_negative_prompt_ids": [5] * negative}, 288)
    assert made is not None
    for shown, stream in zip(explanation.streams.values(), made.streams, strict=True):
        assert (shown.retention.layout, shown.positions) == (stream.plan.layout, stream.plan.positions)
        if not stream.plan.policy.reads_tokens:
            for view in shown.views():
                assert view.tokens.live == frame_visibility(stream.plan, 32, view.tokens.frame).sum()


@pytest.mark.parametrize("negative", [20, 300])
def test_a_second_stream_reads_its_own_ids(negative: int, tmp_path: Path) -> None:
    source = json.dumps({"layout": "demo", "selection": "changed", "history_frames": 1.25, "window": 5})
    layout = VideoLayout(ServerConfig.parse("packcache", source).layout.frame_layout(), 288)  # type: ignore[union-attr]
    path = written(tmp_path / "video.json", layout, 8)
    ids = json.loads(path.read_text())["token_ids"]
    stream = explain(source, "packcache", sequence=path, negative_tokens=negative).streams["unconditional stream"]
    own = [*[0] * max(0, negative - 288), *ids[max(0, 288 - negative) :]]
    plan = Plan(stream.retention.layout, stream.retention.policy, stream.positions)
    assert stream.retention.layout.condition_tokens == negative
    for view in stream.views():
        assert view.tokens.live == frame_visibility(plan, 16, view.tokens.frame, own).sum()


def test_blocks_and_keys_of_both_streams_are_summed() -> None:
    output = " ".join(run(TINY, *TINY_OPTIONS, "--negative-tokens", "16", columns=200).split())
    # Of the shorter one as in `TINY_TEXT`; the other has a block more of condition.
    assert "Unconditional stream condition 16 tokens, 6 frames of 16 tokens, 14 blocks of 8" in output
    assert (
        "At the end of frame 5 attention reads 56 + 64 = 120 keys in 7 + 8 = 15 blocks; with the full cache "
        "104 + 112 = 216 keys: 56 %."
    ) in output


def test_a_configuration_that_guides_by_itself_shows_both_streams() -> None:
    guidance = {"scale": 2, "negative_prompt_ids": [3] * 24}
    source = json.dumps({**json.loads(TINY), "guidance": guidance})
    streams = explain(source, "packcache", frames=6, condition_tokens=8, block_size=8).streams
    assert [own.retention.layout.condition_tokens for own in streams.values()] == [8, 24]
    other = explain(source, "packcache", frames=6, condition_tokens=8, negative_tokens=5, block_size=8).streams
    assert [own.retention.layout.condition_tokens for own in other.values()] == [8, 5]
    for said in (True, {"scale": 2}, {"negative_prompt_ids": [3]}):
        source = json.dumps({**json.loads(TINY), "guidance": said})
        assert len(explain(source, "packcache", frames=6, condition_tokens=8).streams) == 1


@pytest.mark.parametrize("changed", [{"axis_scale": [4, 8, 4]}, {"frame_start_tokens": 2, "condition_image_tokens": 0}])
def test_a_layout_of_another_model_has_one_stream(changed: dict[str, Any]) -> None:
    layout = load_mapping("lumos1_256p")["layout"]
    assert len(explain(json.dumps({"layout": layout}), "packcache", frames=2).streams) == 2
    assert len(explain(json.dumps({"layout": layout | changed}), "packcache", frames=2).streams) == 1
    assert explain("demo", "packcache", frames=2).passes_summary == []


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_of_many_positions_the_first_and_the_last_are_shown(columns: int) -> None:
    rows = shown_positions(run("demo", "--policy", "full", "--frames", "100", columns=columns))
    for made, row in enumerate(rows[20:], 20):
        assert row[:2] == ["288", "…"]
        # The last ones, without a gap.
        last = [f"{288 + 257 * frame:,}" for frame in range(made + 1)][2 - len(row) :]
        assert row[2:] == last
        assert len(" ".join(row)) <= max(columns // 3, len("288 … 25,731"))


def test_positions_have_their_own_lines_where_it_is_narrow() -> None:
    lines = run("demo", "--frames", "6", columns=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "positions, below each row" in "\n".join(lines)
    assert lines[lines.index("         288 545 802 1,059 1,316") - 1].startswith("frame 4")


@pytest.mark.parametrize("policy", names())
@pytest.mark.parametrize("preset", ["demo", "lumos1_256p"])
def test_bars_of_positions_do_not_overlap(preset: str, policy: str) -> None:
    explanation = explain(preset, policy, frames=9)
    for view in explanation.views():
        bars = list(_position_bars(explanation, view.tokens.frame))
        states, starts, stops = map(list, zip(*bars, strict=True))
        assert (IN_CONDITION in states) == (IN_CONDITION in view.states)
        assert states[-1] == 0
        assert all(start < stop for start, stop in zip(starts, stops, strict=True))
        assert all(stop <= start for stop, start in zip(stops, starts[1:], strict=False))
        seen = explanation.seen_at(view.retained, view.tokens.frame)
        assert starts[-1] == seen[-1]
        # With three axes a frame is one moment.
        assert stops[-1] - starts[-1] == (257 if preset == "demo" else 1)


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
@pytest.mark.parametrize("preset", sorted(presets()))
def test_bars_of_positions_end_where_the_words_say(preset: str, positions: str) -> None:
    source = json.dumps({**PAPERS, "layout": preset, "positions": positions})
    for stream in explain(source, "packcache", frames=9).streams.values():
        bound = int(re.findall(r"below ([\d,]+)", stream.positions_bound)[0].replace(",", ""))
        assert bound == max(stop for made in range(9) for _, _, stop in _position_bars(stream, made))
        assert stream.positions_bound.removeprefix("below ") in stream.positions_summary


@pytest.mark.parametrize(("condition_tokens", "stop"), [(None, 36), (100, 100)])
def test_a_conditioning_image_is_one_moment_too(condition_tokens: int | None, stop: int) -> None:
    """32 tokens of text and the three that begin the image stand before it; text alone has an index a token."""
    explanation = explain("lumos1_256p", "packcache", frames=2, condition_tokens=condition_tokens)
    assert next(_position_bars(explanation, 1)) == (IN_CONDITION, 0, stop)


@pytest.mark.parametrize(
    ("source", "bars"),
    [
        (DEMO, [(-1, 0, 288), (4, 288, 545), (3, 545, 802), (2, 802, 1059), (1, 1059, 1316), (0, 1316, 1573)]),
        (ABSOLUTE, [(-1, 0, 288), (4, 802, 1059), (3, 1059, 1316), (2, 1316, 1573), (1, 1573, 1830), (0, 1830, 2087)]),
    ],
)
def test_bars_of_positions_are_exact(source: str, bars: list[tuple[int, int, int]]) -> None:
    assert list(_position_bars(explain(source, "packcache", frames=7), 6)) == bars


def test_old_frames_of_a_full_cache_are_one_bar() -> None:
    bars = list(_position_bars(explain("demo", "full", frames=50), 49))
    assert len(bars) == 1 + 1 + 5
    assert bars[1] == (5, 288, 288 + 45 * 257)


@pytest.mark.parametrize(
    ("source", "label", "streams"),
    [("demo", "position", [""]), ("lumos1_256p", "position in time (t); frames are 4 apart", ["con", "uncon"])],
)
def test_picture_has_three_panels_for_every_stream(
    source: str, label: str, streams: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(explain(source, "packcache", frames=8), tmp_path / "x.png")
    panels = figures[0].axes
    assert len(panels) == 3 * len(streams)
    title = figures[0].get_suptitle().splitlines()
    example = " for an example video" if source == "demo" else ""
    assert title[0].startswith(f"{source}: packcache{example} (history_frames 2, ")
    assert len(title) == len(streams)
    for stream, (blocks, positions, tokens) in zip(streams, np.reshape(panels, (-1, 3)), strict=True):
        assert blocks.get_xlabel().startswith("block of the sequence")
        # What is said of a stream stands above its own bars.
        shape, summary = blocks.get_title().splitlines()
        assert shape.startswith(f"{stream}ditional stream: condition ".capitalize() if stream else "condition ")
        assert summary.startswith("Blocks are dropped from frame 3 on; frame 7 reads ")
        assert positions.get_title().startswith("positions that the model sees:\nbelow ")
        assert blocks.get_ylabel() == (f"frame being made,\n{stream}ditional stream" if stream else "frame being made")
        assert positions.get_xlabel() == label
        assert tokens.get_xlabel() == "tokens"
        assert blocks.get_ylim() == positions.get_ylim() == tokens.get_ylim() == (7.5, -0.5)
        # A row a frame.
        assert len(positions.collections) == 8


def test_other_policies_take_a_presets_layout_only() -> None:
    explanation = explain("demo", "sliding_window", frames=4)
    assert explanation.options == "window 2, positions absolute"
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
        ("lumos1_256p", {"condition_tokens": 4}, "condition tokens must be 5 or more"),
        ("lumos1_256p", {"condition_tokens": 1832}, "condition tokens must be 1833 or more"),
        ("lumos1_256p", {"negative_tokens": 5}, "--negative-tokens is for models that make one token after the other"),
        ("demo", {"negative_tokens": 0}, "--negative-tokens must lie between 1 and 1,048,576, not 0"),
        ("demo", {"negative_tokens": 2**21}, "--negative-tokens must lie between 1 and 1,048,576, not 2097152"),
        ("demo", {"negative_tokens": 3, "condition_tokens": 0}, "needs a condition, and this video has none"),
    ],
)
def test_impossible_numbers_are_named(source: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(source, "packcache", **{"frames": 3, **options})


# ---------------------------------------------------------------------------------------------------------------------
# What depends on what is seen

CHANGED = json.dumps({"layout": {"tokens_per_frame": 16}, "window": 2, "history_frames": 1.5, "selection": "changed"})
SMALL = VideoLayout(FrameLayout(16), 8)
CHANGED_TEXT = """\
        ┌blocks────────────────┐ live of full  positions
frame 0 │CC####                │ 24  100 %   8
frame 1 │CC1111####            │ 40  100 %   8 24
frame 2 │CC2··21111####        │ 48   86 %   8 24 40
frame 3 │CC····2·2·1111####    │ 48   67 %   8 24 40
frame 4 │CC········2·2·1111####│ 48   55 %   8 24 40
"""


def small_video(path: Path) -> Path:
    """Frames of four blocks of 4. First the last block changes, then the first one, then nothing."""
    frames = np.zeros((4, 16), dtype=np.int64)
    frames[1:, 12:] = 1
    frames[2:, 0] = 1
    write_video(path, [*range(8), *frames.ravel().tolist()], 8)
    return path


def test_blocks_that_changed_are_shown(tmp_path: Path) -> None:
    """Six blocks are kept of the past: the last frame's four, what changed, and where room is left what is spread."""
    path = small_video(tmp_path / "video.json")
    output = run(CHANGED, "--sequence", str(path), "--frames", "5", "--block-size", "4")
    assert output.startswith("JSON: packcache for video.json (history_frames 1.5, window 2, ")
    assert CHANGED_TEXT in output


@pytest.mark.parametrize(
    "layout", [{"tokens_per_frame": 1}, {"tokens_per_frame": 16}, {"grid": [5, 7], "row_end_tokens": 1}, "demo_masked"]
)
def test_without_a_video_an_example_is_shown_in_which_something_moves(layout: Any) -> None:
    source = json.dumps({"layout": layout, "history_frames": 3, "window": 5})
    explanation = explain(source, "packcache", frames=9, block_size=1)
    assert explanation.title == "JSON: packcache for an example video"
    retention = explanation.retention
    frame, tokens = retention.layout.frame, retention._tokens
    assert tokens is not None
    ids = tokens(retention.layout.condition_tokens, retention.layout.frame_start(9)).reshape(9, -1)
    rows, columns = frame.grid or (1, frame.tokens_per_frame)
    assert np.all(np.count_nonzero(ids, axis=1) == -(-rows // 4) * -(-columns // 4))
    moves = (ids[1:] != ids[:-1]).any(axis=1)
    assert moves.all() if columns > 1 else not moves.any()
    row = np.arange(frame.tokens_per_frame) - frame.frame_start_tokens
    picture = (row >= 0) & (row < rows * (columns + frame.row_end_tokens))
    assert not ids[:, ~picture | (row % (columns + frame.row_end_tokens) >= columns)].any()
    # There is room for all that changed in the window.
    live = explanation.view(8).states[retention.layout.condition_tokens :].reshape(9, -1)[:8] > DROPPED
    assert np.all(live[3:7][ids[3:7] != ids[4:8]])
    assert np.all(live[7])
    assert columns == 1 or not np.all(live[3:7])


@pytest.mark.parametrize("condition_tokens", [None, 41])
@pytest.mark.parametrize("preset", ["demo", "demo_masked"])
def test_every_stream_reads_what_the_reference_sees(preset: str, condition_tokens: int | None, tmp_path: Path) -> None:
    source = json.dumps({"layout": preset, "selection": "changed", "history_frames": 1.25, "window": 5})
    config = ServerConfig.parse("packcache", source)
    assert config.layout is not None
    usual = 32 + config.layout.condition_image_tokens
    layout = VideoLayout(config.layout.frame_layout(), usual if condition_tokens is None else condition_tokens)
    path = written(tmp_path / "video.json", layout, 8)
    ids = json.loads(path.read_text())["token_ids"]
    for stream in explain(source, "packcache", sequence=path).streams.values():
        own = stream.retention.layout
        plan = Plan(own, stream.retention.policy, stream.positions)
        assert stream.frames == 8
        for view in stream.views():
            seen = frame_visibility(plan, 16, view.tokens.frame, ids[layout.condition_tokens - own.condition_tokens :])
            assert view.tokens.live == seen.sum()
            live = [block * 16 for block in np.flatnonzero(view.states > DROPPED).tolist()]
            assert np.all(seen.numpy()[live])


def test_a_video_of_the_demo_in_a_picture(tmp_path: Path) -> None:
    ids = video_ids(VideoTokenizer(), make_world(10_001), 9)
    write_video(tmp_path / "video.json", ids.tolist(), 288)
    source = '{"layout": "demo", "selection": "changed", "window": 12}'
    path = tmp_path / "x.png"
    output = run(source, "--sequence", str(tmp_path / "video.json"), "--out", str(path), columns=300)
    assert "9 frames of 257 tokens" in output
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # Blocks five frames old, which packcache's usual window of 4 has dropped.
    assert np.count_nonzero(np.all(pixels == (0x7F, 0xBF, 0x5A), axis=1)) > 100


def test_what_outlives_the_window_has_a_bar_at_the_place_of_its_oldest_frame(tmp_path: Path) -> None:
    """A scene of one picture, one of another: of the first an anchor stays."""
    pictures = [*[[1] * 16] * 3, *[[2] * 16] * 6]
    path = tmp_path / "video.json"
    write_video(path, [0] * 8 + [token for picture in pictures for token in picture], 8)
    source = json.dumps({**json.loads(CHANGED), "history_frames": 2, "episodes": 1})
    explanation = explain(source, "packcache", block_size=4, sequence=path)
    assert explanation.overview.retained[8].tolist() == [2, 6, 7, 8]
    assert list(_position_bars(explanation, 8)) == [(-1, 0, 8), (5, 8, 24), (2, 8, 24), (1, 24, 40), (0, 40, 56)]


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: json.dumps(ids),
        lambda ids: "\ufeff " + json.dumps({"condition_tokens": 8, "token_ids": ids}, indent=1),
        lambda ids: "\n".join(json.dumps({"token_ids": each, "condition_tokens": 8}) for each in (ids, ids[:8])),
    ],
    ids=["list", "object", "videos of calibrate"],
)
def test_forms_of_a_sequence(form: Callable[[list[int]], str], tmp_path: Path) -> None:
    ids = json.loads(small_video(tmp_path / "video.json").read_text())["token_ids"]
    path = tmp_path / "other"
    path.write_text(form(ids), encoding="utf-8")
    options = ["--block-size", "4", "--condition-tokens", "8", "--frames", "5"]
    assert CHANGED_TEXT in run(CHANGED, "--sequence", str(path), *options)
    # As many frames as there are, and one more, which is being made.
    assert "4 frames of 16 tokens" in run(CHANGED, "--sequence", str(path), *options[:-2])


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], "'video.json' cannot be read: No such file or directory: give a JSON list of all token ids, or {"),
        ("[1, 2, x]", [], "'video.json' must hold token ids, not '[1, 2, x]': give"),
        ("7", [], "'video.json' must hold token ids, not 7: give"),
        ("", [], "'video.json' must hold token ids, not '': give"),
        ("[" * 100_000, [], "must hold token ids, not '[["),
        ("[1, 2] [3]", [], "'video.json': behind the video stands '[3]': give"),
        ("[1, 2.5]", [], "'video.json': token_ids, item 2: input should be a valid integer, not 2.5: give"),
        ("[-1]", [], "token_ids, item 1: input should be greater than or equal to 0, not -1"),
        ("[2147483648]", [], "token_ids, item 1: input should be less than 2147483648, not 2147483648"),
        (f"[1{'0' * 5000}]", [], "'video.json' must hold token ids, not '[10000"),
        ('{"token_ids": [1]}', [], "'video.json': condition_tokens: field required: give"),
        ('{"token_ids": [1], "condition_tokens": "8"}', [], "condition_tokens: input should be a valid integer"),
        (
            json.dumps({"token_ids": [], "condition_tokens": 8, "y" * 99: "z" * 99}),
            [],
            "extra inputs are not permitted",
        ),
        ("\ud800", [], "'video.json' is not text: give"),
        (json.dumps([0] * 23), [], "23 token ids, of which 8 are condition, must have a whole frame of 16, not 0: "),
        (json.dumps([0] * 5), [], "5 token ids, of which 8 are condition, must have a whole frame of 16, not 0: "),
        (
            json.dumps([0] * 71),
            ["--frames", "5"],
            "must have 4 whole frames of 16, not 3: give a longer video or fewer",
        ),
        ('{"token_ids": [1], "condition_tokens": 9}', [], "--condition-tokens is 8, and 'video.json' says that its"),
    ],
)
def test_what_is_no_sequence_is_refused_in_a_sentence(
    content: str | None, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("video.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    arguments = ["explain", CHANGED, "--condition-tokens", "8", "--sequence", "video.json", *options]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("vllm-packcache: --")
    assert len(result.stderr) < 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([TINY, "--sequence", "x.json"], "what packcache keeps here does not depend on them: leave it out"),
        (["demo", "--policy", "full", "--sequence", "x.json"], "what full keeps here does not depend on them"),
    ],
)
def test_a_sequence_is_for_policies_that_read_it(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        "import sys, vllm_packcache.cli, vllm_packcache.tools.explain;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
