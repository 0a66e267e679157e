"""The command works at a small size: everything is there, and what is counted, not timed, is exact."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.decode import plan as plans
from benchmarks.decode import plot
from benchmarks.decode.benchmark import DECODE, targets
from benchmarks.decode.runs import Request, Run
from benchmarks.decode.samples import CLOCKS
from benchmarks.engine_process import Burst, EngineFailed, EngineProcess, EngineSettings
from benchmarks.goals import judged
from benchmarks.model import write_model
from benchmarks.report.markdown import Files
from vllm_packcache.config.errors import ConfigError

ENGINES = {"full", "short", "packcache", "opt_out"}
TIMED = [
    "full / packcache",
    "packcache / short",
    "opt_out / full",
    "rebase / absolute",
    "frame 30 / frame 10",
    "end to end: full / packcache",
    "full / changed, least, the middle of the last frame",
    "end to end: full / changed, least",
    "end to end: changed / packcache",
    "choosing what changed / a frame",
]
COUNTED = ["peak blocks, prompted", "peak blocks, generated"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `run` returns, what it writes and what it prints."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    path, picture = folder / "decode.json", folder / "decode.png"
    environment = dict(os.environ)
    console = Console(file=io.StringIO(), width=80)
    result = DECODE.run(path, picture, quick=True, console=console)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.environ == environment
    assert isinstance(console.file, io.StringIO)
    return result, json.loads(path.read_text(encoding="utf-8")), console.file.getvalue()


def test_json_is_what_run_returns(measured):
    result, written, _ = measured
    assert json.loads(json.dumps(result)) == written


def test_json_says_how_to_repeat_it(measured):
    _, written, _ = measured
    assert written["quick"] is True
    assert set(written["versions"]) == {"python", "torch", "vllm", "vllm_packcache"}
    assert all(written["versions"].values())
    assert written["machine"]["cpu"]
    assert written["machine"]["threads_per_engine"] == plans.THREADS
    assert written["model"]["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
    assert written["policy"] == {
        "name": "packcache",
        "history_frames": 2.0,
        "window": 4,
        "decay": 0.5,
        "gamma_text": 1.0,
        "gamma_condition": 1.0,
        "selection": "spatial",
        "changed_tokens": 1,
        "episodes": 0,
    }
    assert written["command"]


def test_every_target_is_there(measured):
    targets = measured[1]["targets"]
    assert [target["ratio"] for target in targets] == TIMED + COUNTED
    assert all(("at_least" in target) != ("at_most" in target) for target in targets)
    assert all(target["met"] is None for target in targets[: len(TIMED)]), "times of a quick run are not judged"
    assert all(target["met"] is True for target in targets[len(TIMED) :])


def test_full_run_judges_times(measured):
    assert all(isinstance(target["met"], bool) for target in targets(measured[1] | {"quick": False}))
    assert not judged("x", 3.6, at_least=3.7)["met"]
    assert judged("x", 3.7, at_least=3.7)["met"]
    assert judged("x", 1.05, at_most=1.05)["met"]
    assert not judged("x", 1.06, at_most=1.05)["met"]


def test_ratios_are_those_of_the_samples(measured):
    last = measured[1]["last_frame"]
    for place, clock in itertools.product(last["places"].values(), CLOCKS):
        samples = place[clock]
        assert set(samples) == ENGINES
        assert all(len(own) == plans.QUICK.rounds and min(own) > 0 for own in samples.values())
        for name, (above, below) in plans.RATIOS.items():
            summary = place["ratios"][name][clock]
            pairs = zip(samples[above], samples[below], strict=True)
            assert summary["samples"] == [a / b for a, b in pairs]
            assert 0 < summary["min"] <= summary["quartiles"][0] <= summary["median"]
            assert summary["median"] <= summary["quartiles"][1] <= summary["max"] < math.inf
    for ratio, clock in itertools.product(last["ratios"].values(), CLOCKS):
        assert len(ratio[clock]["samples"]) == plans.QUICK.rounds
    late_by_early = measured[1]["early_and_late_frame"]["ratios"]["late / early"]
    assert len(late_by_early["cpu_seconds"]["samples"]) == 2 * (131 // 32 - 1)


def test_opt_out_samples_the_tokens_of_stock_vllm(measured):
    assert measured[1]["checks"]["tokens of opt_out equal those of full"] is True


def test_blocks_in_use_are_those_that_retention_decides(measured):
    assert measured[1]["checks"]["blocks in use are those that retention decides"] is True


def test_short_is_as_long_as_what_packcache_reads(measured):
    # A budget of 2 x 197 tokens at 1/2, 1/4, 1/8, 1/8: frames of 197, 98, 49 and 49 tokens, in blocks of 32;
    # the 197 of the last one reach into seven blocks.
    plan = plans.QUICK
    for place in measured[1]["last_frame"]["places"].values():
        blocks = place["blocks_at_the_end"]
        assert blocks["packcache"] == blocks["short"] == math.ceil((place["live_tokens"] + plan.span) / 32)
        assert blocks["full"] == blocks["opt_out"] == math.ceil((place["prompt_tokens"] + plan.span) / 32)
    start = measured[1]["last_frame"]["places"]["start"]
    assert start["prompt_tokens"] == 70 + 12 * 197
    tail = start["prompt_tokens"] % 32
    condition, history = 3, 7 + 4 + 2 + 2
    assert start["live_tokens"] == (condition + history) * 32 + tail


def test_the_frame_that_slides_is_whole(measured):
    sliding = measured[1]["sliding_frame"]
    assert sliding["prompt_tokens"] == 70 + 12 * 197
    for clock in CLOCKS:
        times = sliding[clock]
        assert times["rebase / absolute"] == times["frame"]["packcache"] / times["frame"]["absolute"]
        assert 0 < times["slide"] < times["frame"]["packcache"]
        assert times["share_of_slide"] < 1


def test_every_frame_is_timed_with_every_policy(measured):
    plan, frames = plans.QUICK, measured[1]["frames"]
    half = (197 - 3 * 32) // 2
    assert [frame["frame"] for frame in frames["frames"]] == [0, 1, 2, 3, 7, 12]
    assert list(frames["policies"]) == list(plan.policies)
    assert frames["policies"]["attention sink"] == {
        "name": "attention_sink",
        "sink_tokens": 32,
        "recent_tokens": 70 + 2 * 197 - 32,
    }
    for frame in frames["frames"]:
        assert frame["blocks_as_decided"] is True
        assert frame["prompt_tokens"] == 70 + frame["frame"] * 197 + half
        for clock in CLOCKS:
            assert set(frame[clock]) == set(plan.policies)
            assert all(len(own) == plan.frame_rounds and min(own) > 0 for own in frame[clock].values())
        ratios = {f"full / {name}" for name in plan.policies if name != "full"}
        assert set(frame["ratios"]) == {*ratios, "changed / packcache"}


def test_policies_keep_equally_many_tokens(measured):
    history = {
        "packcache": 2,
        "changed": 2,
        "changed, least": 1.0625,
        "last 2 frames": 2,
        "attention sink": 2,
        "last frame": 1,
    }
    # What is kept of a frame is rounded up to blocks, and so is the condition; packcache keeps something of four.
    # What changed has whole blocks beside the one that the last frame leaves to the frame being made.
    most_blocks = dict.fromkeys(history, 2) | {"packcache": 5, "changed": 3, "changed, least": 3}
    for frame in measured[1]["frames"]["frames"]:
        live = frame["live_tokens"]
        assert live["full"] == frame["prompt_tokens"]
        for name, frames in history.items():
            dropped = int(max(0, frame["frame"] - frames) * 197)
            rounding = most_blocks[name] * 32 if dropped else 0
            assert 0 <= live[name] - (frame["prompt_tokens"] - dropped) <= rounding


def test_what_is_read_grows_evenly_between_timed_frames():
    """So their steps' time may be interpolated, but for whole blocks."""
    plan = plans.FULL
    for policy in plan.policies.values():
        retention = plan.retention(4084, policy)
        live = [retention.live_tokens(retention.layout.frame_start(frame) + 2042) for frame in range(13)]
        between = np.interp(range(13), plans.TIMED_FRAMES, [live[frame] for frame in plans.TIMED_FRAMES])
        assert np.abs(between / live - 1).max() < 0.01, policy


def test_end_to_end_is_the_sum_of_the_frames(measured):
    frames = measured[1]["frames"]
    whole = frames["end_to_end"]
    assert "Without the prefill of the condition" in whole["is"]
    # Frames 3 to 6 are 1, 3/4, 1/2 and 1/4 of the third and the rest of the seventh, and so on.
    stand_for = [1, 1, 1, 2.5, 4.5, 3]
    for clock, name in itertools.product(CLOCKS, plans.QUICK.policies):
        by_round = zip(*(frame[clock][name] for frame in frames["frames"]), strict=True)
        expected = [197 * np.dot(stand_for, steps) for steps in by_round]
        assert whole[clock][name] == pytest.approx(expected, rel=1e-12)
    for name, (above, below) in plans.FRAME_RATIOS.items():
        for clock in CLOCKS:
            pairs = zip(whole[clock][above], whole[clock][below], strict=True)
            assert whole["ratios"][name][clock]["samples"] == [a / b for a, b in pairs]
    assert frames["last"]["ratios"] == frames["frames"][-1]["ratios"]
    judged = {target["ratio"]: target["value"] for target in measured[1]["targets"]}
    for ratio in ("full / packcache", "full / changed, least", "changed / packcache"):
        assert judged[f"end to end: {ratio}"] == whole["ratios"][ratio]["cpu_seconds"]["median"]
    last = frames["last"]["ratios"]["full / changed, least"]["cpu_seconds"]["median"]
    assert judged["full / changed, least, the middle of the last frame"] == last


def test_choosing_is_timed_against_a_frame(measured):
    frames = measured[1]["frames"]
    choosing = frames["choosing"]
    assert choosing["frame_seconds"] == np.median(frames["end_to_end"]["cpu_seconds"]["changed"]) / 13
    assert 0 < choosing["share"] == choosing["seconds"] / choosing["frame_seconds"] < 1


def test_picture_tells_the_ratios(measured, tmp_path):
    plot.draw(measured[1], tmp_path / "decode.svg")
    drawn = (tmp_path / "decode.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn
    frames = measured[1]["frames"]
    for name in plans.QUICK.policies:
        if name != "full":
            whole, last = (frames[part]["ratios"][f"full / {name}"]["cpu_seconds"] for part in ("end_to_end", "last"))
            assert f"{name}: {whole['median']:.2f} x as fast end to end, {last['median']:.2f} x" in drawn


def test_picture_of_another_kind_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"--plot .* \.png or \.svg, not 'decode.gif'"):
        DECODE.run(None, tmp_path / "decode.gif", quick=True)


def test_blocks_decided_are_those_of_the_live_set():
    retention = plans.QUICK.retention(197)
    # Within the condition; then at the start of frame 12, its first block shared with the frame before it.
    assert Request(30, retention).blocks_decided(4) == [1, 1, 2, 2]
    assert (70 + 12 * 197) % 32 == 2
    condition, history = 3, 7 + 4 + 2 + 2
    blocks = [condition + history + 1] * 30 + [condition + history + 2]
    assert Request(70 + 12 * 197, retention).blocks_decided(31) == blocks
    used = Burst([], [], [], blocks)
    requests = {"a": Request(70 + 12 * 197, retention)}
    assert Run(requests, {}, {"a": [used]}, {"a": Burst([], [], [], [])}).blocks_as_decided
    one_more = Burst([], [], [], [*blocks[:-1], blocks[-1] + 1])
    assert not Run(requests, {}, {"a": [one_more]}, {"a": Burst([], [], [], [])}).blocks_as_decided


def test_peak_blocks_do_not_grow(measured):
    growth, generated = measured[1]["early_and_late_frame"], measured[1]["generated"]
    for run in (growth, generated):
        assert run["blocks_as_decided"] is True
        assert abs(run["peak_blocks"]["late"] - run["peak_blocks"]["early"]) <= 6
    assert growth["peak_blocks"]["early"] * 32 < growth["prompt_tokens"]["early"]
    assert generated["peak_blocks"]["late"] >= generated["peak_blocks"]["early"]


def test_table_shows_every_ratio_and_check(measured):
    result, _, printed = measured
    # In a terminal as narrow as this one long names are wrapped; here they are not.
    console = Console(file=io.StringIO(), width=200)
    DECODE.print(result, console, Files(Path(), Path()))
    wide = console.file.getvalue()
    goals = DECODE.report.goals(result)
    assert len(goals) == len(TIMED + COUNTED)
    policies = [name for name in result["frames"]["policies"] if name != "full"]
    for name in [*(goal.name for goal in goals), *plans.FRAME_RATIOS, *policies, *result["checks"]]:
        assert name in wide
    for text in (printed, wide):
        assert text.count("not judged") == len(goals), "as in the report, nothing of a quick run is judged"
        assert "MISSED" not in text
        assert "…" not in text


@pytest.mark.parametrize("plan", [plans.FULL, plans.QUICK])
def test_places_lie_in_the_last_frame(plan):
    starts = list(plan.places.values())
    assert starts[0] == 0
    assert starts[-1] + plan.span == plan.tokens_per_frame
    assert all(earlier < later for earlier, later in itertools.pairwise(starts))
    assert plan.tokens_per_frame % plans.BLOCK_SIZE != 0
    assert plan.rounds % 2 == 0, "with an odd number of rounds one order comes more often than the other"


def test_full_geometry_is_the_papers():
    plan = plans.FULL
    assert (plan.condition_tokens, plan.tokens_per_frame, plan.frames) == (272, 4084, 13)
    assert plan.retention(4084).layout.frame_start(13) - plan.condition_tokens == 53_092


def test_failure_of_an_engine_is_told(tmp_path):
    settings = EngineSettings(
        model=str(tmp_path / "model"),
        dtype="float32",
        block_size=32,
        kv_cache_memory_bytes=1,
        max_model_len=64,
        max_num_batched_tokens=64,
        threads=1,
        additional_config={},
    )
    write_model(tmp_path / "model", plans.QUICK.model, 64, seed=0)
    engine = EngineProcess("small", settings, tmp_path / "log")
    with pytest.raises(EngineFailed, match=r"engine 'small' failed(?s:.)*Error"):
        engine.answer()
    engine.close()
