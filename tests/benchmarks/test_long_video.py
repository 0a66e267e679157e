"""A short form of the command: everything is there, and positions change nothing before the window slides."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks.long_video import benchmark, report, runs
from benchmarks.long_video import scores as scoring
from benchmarks.long_video.benchmark import LONG_VIDEO
from benchmarks.long_video.plan import COPY, FORCED, FULL, GENERATED, MEASUREMENTS, REFERENCES, TRUTH, LongVideoPlan
from benchmarks.long_video.runs import Answers
from benchmarks.statistics import Count
from vllm_packcache.demo.scores import true_frames
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import make_world

REBASE, ABSOLUTE = "packcache, rebase", "packcache, absolute"
SHORT = LongVideoPlan(
    videos=2,
    frames=6,
    trained_frames=3,
    variants=tuple(
        dataclasses.replace(variant, generates=variant.name == REBASE)
        for variant in FULL.variants
        if variant.name in (REBASE, ABSOLUTE)
    ),
)


def ask_here(plan: LongVideoPlan, console: Console | None = None) -> dict[str, Answers]:
    """`ask_all` without processes, each of which would import vLLM anew."""
    runs._counters = {name: [0] * len(plan.variants) for name in MEASUREMENTS}
    return {variant.name: runs._ask(plan, number) for number, variant in enumerate(plan.variants)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench") / "new"
    return folder / "long_video.json", folder / "long_video.png"


@pytest.fixture(scope="module")
def measured(files: tuple[Path, Path]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `run` returns, what it writes and what it prints."""
    console = Console(file=io.StringIO(), width=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "ask_all", ask_here)
        result = LONG_VIDEO.run(*files, plan=SHORT, console=console)
    assert isinstance(console.file, io.StringIO)
    return result, json.loads(files[0].read_text(encoding="utf-8")), console.file.getvalue()


def test_json_is_what_run_returns(measured):
    result, written, _ = measured
    assert json.loads(json.dumps(result)) == written


def test_json_says_how_to_repeat_it(measured):
    written = measured[1]
    assert all(written["versions"][name] for name in ("python", "torch", "vllm", "vllm_packcache"))
    assert written["machine"]["cpu"]
    assert written["command"]
    assert written["date"]
    assert written["seeds"] == [10_000, 10_001]
    assert written["frames"] == 6
    modes = {name: variant["config"]["positions"] for name, variant in written["variants"].items()}
    assert modes == {REBASE: "rebase", ABSOLUTE: "absolute"}


def test_every_measure_has_every_frame_and_span(measured):
    written = measured[1]
    assert set(written[FORCED]) == {REBASE, ABSOLUTE}
    assert set(written[GENERATED]) == {REBASE, *REFERENCES}
    for measurement in (FORCED, GENERATED):
        for scores in written[measurement].values():
            for measure in scores.values():
                assert len(measure["by_frame"]) == 6
                assert list(measure["spans"]) == ["frames 1-3", "4-6"], "the second span is the last one"


def test_positions_change_nothing_before_the_window_slides(measured):
    forced = measured[1][FORCED]
    for measure in ("tokens_right", "changed_tokens_right", "frame_token_right"):
        early = [forced[name][measure]["by_frame"][:5] for name in (REBASE, ABSOLUTE)]
        assert early[0] == early[1]
    # The model is good enough for right tokens to mean something.
    assert min(forced[REBASE]["tokens_right"]["by_frame"]) > 0.97


def test_rebase_needs_fewer_positions_for_as_many_tokens(measured):
    variants = measured[1]["variants"]
    assert variants[REBASE]["positions"] == 288 + 5 * 257
    assert variants[ABSOLUTE]["positions"] == 288 + 6 * 257
    assert variants[REBASE]["live_tokens"] == variants[ABSOLUTE]["live_tokens"]


def test_references_frame_the_scores(measured):
    generated = measured[1][GENERATED]
    true = generated[TRUTH]
    assert set(true["tokens_right"]["by_frame"]) == {1.0}
    assert set(true["whole_frames"]["by_frame"]) == {1.0}
    assert set(true["debris_cells"]["by_frame"]) == {0.0}
    assert set(generated[COPY]["moving_cells"]["by_frame"]) == {0.0}
    assert generated[REBASE]["tokens_right"]["by_frame"][0] > 0.9


def test_table_and_plot_show_every_variant(measured, files):
    printed = measured[2]
    for name in (REBASE, ABSOLUTE, *REFERENCES):
        assert printed.count(f"  {name}") >= 1
    for *_, heading, _ in report.SHOWN:
        assert heading in printed
    assert "…" not in printed
    with Image.open(files[1]) as picture:
        assert picture.format == "PNG"


def test_full_plan_is_ten_times_the_trained_length():
    assert FULL.trained_frames == 16
    assert FULL.frames == 160
    assert list(FULL.spans) == ["frames 1-16", "17-32", "145-160"]
    assert [variant.name for variant in FULL.variants if not variant.generates] == ["full cache, absolute"]


def test_means_are_over_videos_and_know_their_error():
    count = Count(np.array([[1.0, 3.0, 0.0], [2.0, 2.0, 0.0]]), np.array([[2.0, 4.0, 0.0], [2.0, 4.0, 0.0]]))
    summary = count.summary({"two": slice(0, 2), "none": slice(2, 3)})
    assert summary["by_frame"] == [0.75, 0.625, None]
    # Both videos have four of six right.
    assert summary["spans"] == {"two": {"mean": 0.6667, "ci95": 0.0}, "none": None}
    spread = Count(np.array([[1.0], [3.0]]), np.ones((2, 1))).summary({"all": slice(None)})["spans"]["all"]
    assert spread == {"mean": 2.0, "ci95": 1.96}


def test_debris_is_neither_background_nor_object():
    tokenizer, world = VideoTokenizer(), make_world(10_000)
    truth = true_frames(tokenizer, world, 2)
    spoilt = truth[1:].copy()
    # A plain patch, which no scene of these worlds shows.
    spoilt[1, 15, 7] = tokenizer.visual_offset
    ids = scoring._ids(spoilt[None], tokenizer)
    # A frame that begins with something else.
    ids[0, 0] = tokenizer.image_id
    counts = scoring._generated_counts(ids, [world], truth[None], tokenizer)
    assert counts["debris_cells"].total.tolist() == [[0, 1]]
    assert counts["whole_frames"].total.tolist() == [[0, 1]]
    assert counts["tokens_right"].total.tolist() == [[256, 255]]
    visible = [sum(len(world.object_cells(i, k)) for i in range(len(world.objects))) for k in (1, 2)]
    assert counts["object_cells"].total.tolist() == [visible]


@pytest.mark.long
def test_engines_in_processes_answer_as_one_here():
    plan = dataclasses.replace(SHORT, frames=2)
    environment = dict(os.environ)
    apart = runs.ask_all(plan, Console(file=io.StringIO()))
    assert os.environ == environment
    here = ask_here(plan)
    assert apart.keys() == here.keys()
    for name, answers in here.items():
        assert (apart[name].likeliest == answers.likeliest).all()
        assert np.array_equal(apart[name].generated, answers.generated)
