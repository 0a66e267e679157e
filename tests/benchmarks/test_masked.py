"""The command works at a small size: everything is there, and what is counted or reckoned, not timed, is exact."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.decode.samples import CLOCKS
from benchmarks.engine_process import Burst, EngineFailed
from benchmarks.goals import judged
from benchmarks.masked import plot
from benchmarks.masked.benchmark import MASKED, targets
from benchmarks.masked.plan import ON_CPU, ON_GPU, QUICK, RATIOS, MaskedPlan, Work
from benchmarks.masked.process import Made, Watch
from benchmarks.masked.runs import frame_of, rates, readings, reckoned, summed
from benchmarks.report.markdown import Files
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.families import lumos

TIMED = ["full / packcache", "packcache / short", "together / apart"]
BLOCK = 32


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `run` returns, what it writes and what it prints."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    path, picture = folder / "lumos.json", folder / "lumos.png"
    environment = dict(os.environ)
    console = Console(file=io.StringIO(), width=120)
    result = MASKED.run(path, picture, quick=True, console=console)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.environ == environment
    assert isinstance(console.file, io.StringIO)
    return result, json.loads(path.read_text(encoding="utf-8")), console.file.getvalue()


def test_json_is_what_run_returns(measured):
    result, written, _ = measured
    assert json.loads(json.dumps(result)) == written


def test_json_says_how_to_repeat_it(measured):
    _, written, _ = measured
    assert written["benchmark"] == "masked"
    assert written["quick"] is True
    assert all(written["versions"].values())
    assert written["command"]
    assert written["engine"]["runner"] == "V2"
    assert written["engine"]["device"] == "cpu"
    assert written["engine"]["peak_bytes"] > 2**28
    assert (written["steps_timed"], written["steps_reported"]) == (2, 50)
    assert (written["layers_timed"], written["layers_reported"]) == (1, 3)
    assert "reckoned from 1 layer, 2 steps and the commit, which are timed" in written["is"]
    assert written["policy"]["name"] == "packcache"


def test_every_pass_is_timed_in_its_parts(measured):
    last, batch = measured[1]["last_frame"], measured[1]["batch"]
    for clock in CLOCKS:
        for part, rounds in ((last, QUICK.rounds), (batch, QUICK.batch_rounds)):
            for own in part["passes"][clock].values():
                assert list(own) == ["passes", "layers", "choosing", "entering", "encoding"]
                assert all(len(passes) == 3 for passes in own.values())
                assert all(len(samples) == rounds for passes in own.values() for samples in passes)
                for number in range(rounds):
                    whole, layers, choosing, entering, encoding = ([one[number] for one in own[what]] for what in own)
                    parts = zip(layers, choosing, entering, encoding, strict=True)
                    assert all(w > sum(own) for w, own in zip(whole, parts, strict=True))
                    assert min(layers) > 0
                    assert min(choosing[:2]) > choosing[2] == 0, "nothing is chosen in the commit"
                    assert entering[0] > entering[1] == entering[2] == 0, "a frame is entered once"
                    assert max(encoding) < min(layers) / 10, "the history is as it was written"


def test_ratios_are_those_of_the_samples(measured):
    last = measured[1]["last_frame"]
    for clock in CLOCKS:
        assert set(last["whole_frame"][clock]) == set(QUICK.cases)
        for name, (above, below) in RATIOS.items():
            for key in ("as_timed", "whole_frame"):
                pairs = zip(last[key][clock][above], last[key][clock][below], strict=True)
                assert last[key]["ratios"][name][clock]["samples"] == [a / b for a, b in pairs]
        for name, own in last["passes"][clock].items():
            together = [sum(samples) for samples in zip(*own["passes"], strict=True)]
            assert last["as_timed"][clock][name] == pytest.approx(together, rel=1e-12)
    assert set(measured[1]["batch"]["whole_frame"]["ratios"]) == {"together / apart"}


def test_blocks_and_live_tokens_are_counted(measured):
    videos = measured[1]["last_frame"]["videos"]
    # Frames of 8 rows of 13 tokens, and 4 more. 35 tokens of text, or 3; the image, 12 frames, the frame that is made.
    assert videos["full"]["live_tokens"] == [35 + 14 * 108, 3 + 14 * 108]
    assert videos["full"]["total_tokens"] == 35 + 14 * 108
    # With blocks kept whole, packcache reads somewhat more than the condition, two frames and the one that is made.
    for length, text in zip(videos["packcache"]["live_tokens"], (35, 3), strict=True):
        assert text + 4 * 108 <= length <= text + 4 * 108 + 6 * BLOCK
    assert videos["short"]["given_frames"] == 2
    for own in videos.values():
        held = sum(-(-length // BLOCK) for length in own["live_tokens"])
        assert held <= own["peak_blocks"] <= held + 2
    assert measured[1]["checks"] == {
        "short reads as many tokens as packcache": True,
        "blocks in use are those that retention decides": True,
    }


def test_memory_follows_from_the_blocks(measured):
    memory, videos = measured[1]["memory"], measured[1]["last_frame"]["videos"]
    for name, held in memory["kv_bytes"].items():
        # Keys and values, 3 layers, 1 head of 32 numbers of 2 bytes.
        assert held == videos[name]["peak_blocks"] * BLOCK * 2 * 3 * 1 * 32 * 2
    assert memory["published_mask_bytes"] == (13 * 108) ** 2 * 12
    # About 34 GB, and 3.67 MB a block.
    assert ON_CPU.published_mask_bytes == 53_092**2 * 12 == 33_825_125_568
    assert ON_CPU.cache_bytes(1) == ON_GPU.cache_bytes(1) == BLOCK * 2 * 28 * 8 * 128 * 2


def test_targets_of_a_quick_run_are_not_judged(measured):
    targets = measured[1]["targets"]
    assert [target["ratio"] for target in targets] == TIMED
    assert all(target["met"] is None for target in targets)
    assert [goal.verdict for goal in MASKED.report.goals(measured[1])] == ["not judged"] * 3


def test_a_full_run_is_judged_and_the_batch_on_a_gpu_alone(measured):
    full = measured[1] | {"quick": False}
    met = [target["met"] for target in targets(full)]
    assert [type(own) for own in met] == [bool, bool, type(None)]
    on_gpu = full | {"engine": {"device": "cuda"}}
    assert all(isinstance(target["met"], bool) for target in targets(on_gpu))
    assert judged("x", 2.3, at_least=2.3)["met"]
    assert not judged("x", 2.3, at_least=2.4)["met"]
    assert judged("x", 2.3, at_most=2.3)["met"]


def test_table_shows_every_ratio_and_check(measured):
    result, _, printed = measured
    names = [goal.name for goal in MASKED.report.goals(result)]
    assert len(names) == len(TIMED)
    for name in [*names, *RATIOS, *result["checks"]]:
        assert name in " ".join(printed.split())
    assert "MISSED" not in printed
    assert printed.count("not judged") == len(TIMED)


def test_the_report_has_a_section(measured, tmp_path: Path):
    paragraphs = list(MASKED.report.long(measured[1], Files(tmp_path, tmp_path)))
    text = "\n".join(map(str, paragraphs))
    assert "| sliding window over the last frame | 758 |" in text
    assert "reckoned from 1 layer, 2 steps and the commit" in text
    assert "12 bytes for each of 1,404 x 1,404 elements" in text
    assert "short reads as many tokens as packcache: yes" in text
    rows = {(row.name, row.measure, row.place): row.value for row in MASKED.report.rows(measured[1])}
    assert rows["packcache", "live tokens", "unconditional"] == 491
    assert rows["full / packcache", "floor", "last frame, whole frame"] == pytest.approx(2.2787, abs=1e-4)


def test_picture_of_another_kind_is_refused_at_once(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--plot .* \.png or \.svg, not 'lumos.gif'"):
        MASKED.run(None, tmp_path / "lumos.gif", quick=True)


def test_picture_tells_the_ratios(measured, tmp_path: Path):
    plot.draw(measured[1], tmp_path / "lumos.svg")
    drawn = (tmp_path / "lumos.svg").read_text(encoding="utf-8")
    for target in measured[1]["targets"]:
        assert f"{target['value']:.2f}" in drawn
    assert "published code: mask alone" in drawn


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_work_is_that_of_hand_numbers():
    full, frame = ON_CPU.cases["full"], 48 * 85 + 4
    assert (frame, full.total_tokens, full.tokens_per_frame) == (4084, 272 + 14 * 4084, 4084)
    # Queries and output, keys and values, gate, up and down.
    layer = 2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192
    assert ON_CPU.model.layer_weights == layer == 100_663_296
    passes, read = 3, (272 + 14 * 4084) + (3 + 14 * 4084)
    # Before the second of two steps floor(4032 cos(pi / 4)) tokens are unknown.
    assert ON_CPU.unknown(full, 2) == [4032, 2851]
    assert ON_CPU.work(full, layers=1, steps=2) == Work(
        linear=passes * 2 * 4084 * 2 * layer,
        attention=passes * 4 * 24 * 128 * 4084 * read,
        head=(4032 + 2851) * 2 * 2 * 3072 * 64_000,
    )
    whole = ON_CPU.work(full, layers=28, steps=50)
    assert whole.linear == 51 * 28 * 2 * 4084 * 2 * layer
    assert whole.attention == 51 * 28 * 4 * 24 * 128 * 4084 * read
    assert whole.total == sum(whole)


def test_the_floor_is_the_ratio_of_work():
    full, packcache = (ON_CPU.work(ON_CPU.cases[name], layers=28, steps=50) for name in ("full", "packcache"))
    floor = ON_CPU.floor(ON_CPU.cases["full"], ON_CPU.cases["packcache"], layers=28, steps=50)
    assert floor == full.total / packcache.total
    assert (full.linear, full.head) == (packcache.linear, packcache.head)
    # Whole frames: the condition's image, two of history, the frame itself; blocks are kept whole.
    least = (272 + 4 * 4084) + (3 + 4 * 4084)
    assert least <= sum(ON_CPU.live(ON_CPU.cases["packcache"])) < least + 2 * 6 * BLOCK


@pytest.mark.parametrize("plan", [QUICK, ON_CPU, ON_GPU])
def test_short_reads_as_many_tokens_as_packcache(plan: MaskedPlan):
    short, packcache = plan.cases["short"], plan.cases["packcache"]
    assert sum(plan.live(short)) == sum(plan.live(packcache))
    assert plan.live(short)[0] == short.total_tokens < packcache.total_tokens
    assert all(abs(a - b) <= 6 * BLOCK for a, b in zip(plan.live(short), plan.live(packcache), strict=True))


@pytest.mark.parametrize("plan", [QUICK, ON_CPU, ON_GPU])
def test_prompts_are_those_of_videos(plan: MaskedPlan):
    assert lumos.latent_frames(4, 12) == 13
    for name, video in plan.cases.items():
        made = plan.planned(video)
        assert (made.first_frame, made.frames) == (video.given, 1)
        assert video.given == (2 if name == "short" else 12)
        assert made.conditional.layout.condition_image_tokens == video.tokens_per_frame
        assert len(made.streams) == 2, "guided"
    assert plan.cases["last frame"].extra_args["packcache_window"] == 1
    frames = {name: [plan.reading(name).image, plan.reading(name).given] for name in plan.readings}
    assert frames == {"the image is the first of them": [True, 11], "no image": [False, 12]}


def test_a_frame_is_reckoned_from_its_parts():
    own = {
        "passes": [20.0, 13.0, 10.0],
        "layers": [4.0, 3.0, 5.0],
        "choosing": [6.0, 4.0, 0.0],
        "entering": [2.0, 0, 0],
        "encoding": [0, 0, 1.0],
    }
    video = QUICK.cases["full"]
    # Before the second of two steps floor(96 cos(pi / 4)) tokens are unknown.
    assert QUICK.unknown(video, 2) == [96, 67]
    unknown = sum(QUICK.unknown(video, 50))
    # Three layers: entering 3 x 2; steps of 3 x 3.5 and the rest, 8 and 6; the commit 3 x 5 and 4; encoding 3 x 1.
    assert reckoned(own, QUICK, video) == pytest.approx(6 + 50 * (10.5 + 7) + 10 / 163 * unknown + 15 + 4 + 3)
    whole = dataclasses.replace(QUICK, layers=1, steps_reported=2)
    assert reckoned(own, whole, video) == pytest.approx(20 + 13 + 10)
    assert whole.described.endswith("all of it timed")
    assert ON_GPU.described.endswith("all of it timed")


def test_other_videos_are_interpolated_and_rates_fitted():
    def last(seconds: dict[str, float]) -> dict[str, Any]:
        videos = {name: {"live_tokens": ON_CPU.live(ON_CPU.cases[name])} for name in seconds}
        return {"whole_frame": {"cpu_seconds": {name: [own] for name, own in seconds.items()}}, "videos": videos}

    work = {name: ON_CPU.work(ON_CPU.cases[name], layers=1, steps=2) for name in ("full", "packcache")}
    read = {name: sum(ON_CPU.live(ON_CPU.cases[name])) for name in work}
    found = readings(last({name: 100 + tokens / 1000 for name, tokens in read.items()}), ON_CPU)
    for own in found.values():
        full, packcache = (100 + sum(own["live_tokens"][name]) / 1000 for name in ("full", "packcache"))
        assert own["full / packcache"] == pytest.approx(full / packcache)
        assert 1 < own["floor"] < own["full / packcache"] * 3
    layers = {name: own.linear / 3e11 + own.attention / 2e11 for name, own in work.items()}
    passes = {
        name: {"layers": [[seconds / 3]] * 3, "choosing": [[work[name].head / 1e11], [0.0], [0.0]]}
        for name, seconds in layers.items()
    }
    fitted = rates({"passes": {"cpu_seconds": passes}}, ON_CPU)
    assert fitted == pytest.approx({"attention": 2e11, "linear": 3e11, "head": 1e11})


def test_a_frame_has_all_its_passes():
    parts = {"layers": dict.fromkeys(CLOCKS, 1.0)}
    burst = Burst([3.0] * 4, [4.0] * 4, [], [5] * 4)
    made = Made(burst, [{}, parts, parts, parts])
    frame = frame_of(made, 2)
    assert frame["cpu_seconds"]["passes"] == [3.0] * 3
    parts = {"layers": [1.0] * 3, "choosing": [0] * 3, "entering": [0] * 3, "encoding": [0] * 3}
    assert frame["wall_seconds"] == {"passes": [4.0] * 3} | parts
    assert summed([frame, frame])["wall_seconds"]["passes"] == [8.0] * 3
    with pytest.raises(EngineFailed, match="a frame of 3 steps and a commit was made in 3 passes"):
        frame_of(made, 3)


def test_a_watch_waits_for_the_device_and_adds_up():
    waited: list[int] = []
    watch = Watch(lambda: waited.append(1))
    part = watch.timed("layers", lambda number: number + 1)
    step = watch.step(lambda: [part(1), part(2)])
    assert step() == [2, 3]
    assert len(waited) == 5, "before and after each part, and at the end"
    step()
    assert [set(parts) for parts in watch.steps] == [{"layers"}] * 2
    assert all(seconds >= 0 for parts in watch.steps for seconds in parts["layers"].values())
