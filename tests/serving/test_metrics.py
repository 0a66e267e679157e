"""What is counted is what the policy decided, and it reaches Prometheus and the log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from vllm.v1.metrics import loggers

from tests.serving.conftest import generate, prompt, run, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.manager import PHASES
from vllm_packcache.engine.metrics import (
    BUCKETS,
    COUNTERS,
    ENDED,
    FRAME_SECONDS,
    GAUGES,
    INFO,
    PREFIX,
    REASONS,
    VIDEOS,
)
from vllm_packcache.engine.record import read_line
from vllm_packcache.videos.metrics import JobMetrics

BLOCK = 32
CONDITION, FRAME = 50, 41
CONFIG: dict[str, Any] = {"window": 2, "history_frames": 1.5, "selection": "spatial"}


ALL = {
    *COUNTERS,
    *GAUGES,
    INFO,
    f"{FRAME_SECONDS}:count",
    f"{FRAME_SECONDS}:sum",
    *(f"videos:{phase}" for phase in PHASES),
    *(f"{ENDED}:{reason}" for reason in REASONS),
}


def metrics(llm: Any) -> dict[str, float]:
    """Ours by name, phases and reasons after a colon."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if not metric.name.startswith(PREFIX):
            continue
        name = metric.name.removeprefix(PREFIX)
        if name == FRAME_SECONDS:
            found |= {f"{name}:count": metric.count, f"{name}:sum": metric.sum}
        else:
            label = metric.labels.get("phase") or metric.labels.get("reason")
            found[name + (f":{label}" if label else "")] = metric.value
    return found


def grown(llm: Any, before: dict[str, float]) -> dict[str, float]:
    """By how much each has grown since ``before``, if it has."""
    return {name: value - before[name] for name, value in metrics(llm).items() if value != before[name]}


def videos(logged: list[str]) -> list[str]:
    """What was logged of videos."""
    return [line for line in logged if line.startswith("Video ")]


def test_counts_are_what_the_policy_decides(engine: Any, logged: list[str]) -> None:
    llm = engine("packcache", CONFIG, disable_log_stats=False)
    before = metrics(llm)
    assert set(before) == ALL
    frames = 9
    generate(llm, prompt(CONDITION, seed=1), frames * FRAME + 5, tokens_per_frame=FRAME)
    generate(llm, prompt(CONDITION, seed=2), 60)
    plan = ServerConfig.parse("packcache", CONFIG).plan({"packcache_tokens_per_frame": FRAME}, CONDITION)
    assert plan is not None
    retention = Retention(plan.layout, plan.policy, BLOCK)
    # The last token that is computed is one of frame 9.
    held = len(retention.live_blocks(CONDITION + frames * FRAME + 4))
    logical = -(-(CONDITION + frames * FRAME + 4) // BLOCK)
    rotated = sum(len(retention.sliding_blocks(frame)) for frame in range(3, frames + 1))
    after = grown(llm, before)
    seconds = after.pop(f"{FRAME_SECONDS}:sum")
    assert after == {
        "frames": frames,
        "freed_blocks": logical - held,
        "slides": frames - CONFIG["window"],
        "rotated_blocks": rotated,
        f"{FRAME_SECONDS}:count": frames,
        f"{ENDED}:length": 1,
    }
    (line,) = videos(logged)
    record = read_line(line, "")
    assert record is not None
    starts = range(CONDITION, CONDITION + frames * FRAME + 4)
    peak = max(len(retention.live_blocks(token)) for token in starts) + 1
    assert record["peak_tokens"] in (BLOCK * (peak - 1), BLOCK * peak)
    assert record["peak_tokens"] == max(record["peak_tokens_by_frame"])
    ends = [len(retention.live_blocks(CONDITION + (frame + 1) * FRAME - 1)) for frame in range(frames)]
    assert record["peak_tokens_by_frame"][:frames] == [BLOCK * blocks for blocks in ends]
    assert len(record["peak_tokens_by_frame"]) == frames + 1
    assert record["seconds_per_frame"] == pytest.approx(seconds / frames, abs=1e-4)
    expected = {"reason": "length", "frames": frames, "tokens": CONDITION + frames * FRAME + 5, "preemptions": 0}
    assert record | expected | {"freed_blocks": logical - held} == record


def test_a_video_that_keeps_its_whole_cache_is_one_too(engine: Any, logged: list[str]) -> None:
    llm = engine("packcache", CONFIG, disable_log_stats=False)
    before = metrics(llm)
    generate(llm, prompt(CONDITION, seed=1), 3 * FRAME, tokens_per_frame=FRAME, policy="full")
    # Of this one nobody knows where its frames are.
    generate(llm, prompt(CONDITION, seed=1), 3 * FRAME, policy="full")
    after = grown(llm, before)
    after.pop(f"{FRAME_SECONDS}:sum")
    assert after == {"frames": 3, f"{FRAME_SECONDS}:count": 3, f"{ENDED}:length": 1}
    (line,) = videos(logged)
    record = read_line(line, "")
    assert record is not None
    tokens = [CONDITION + (frame + 1) * FRAME for frame in range(3)]
    # The last token is not computed.
    tokens[-1] -= 1
    assert record["peak_tokens_by_frame"] == [-(-count // BLOCK) * BLOCK for count in tokens]


def test_gauges_show_who_runs(engine: Any) -> None:
    llm = engine("packcache", CONFIG, disable_log_stats=False)
    params = {"tokens_per_frame": FRAME, "condition_tokens": CONDITION}
    # Prompts with 0, 2 and 6 frames: fill, pack and slide.
    for number, given in enumerate((0, 2, 6)):
        ids = prompt(CONDITION + given * FRAME + 3, seed=number)
        llm.llm_engine.add_request(f"video-{number}", {"prompt_token_ids": ids}, sampling(20, **params))
    llm.llm_engine.add_request("text", {"prompt_token_ids": prompt(40)}, sampling(20))
    for _ in range(12):
        llm.llm_engine.step()
    shown = metrics(llm)
    assert {phase: shown[f"videos:{phase}"] for phase in PHASES} == dict.fromkeys(PHASES, 1)
    computed = {given: CONDITION + given * FRAME + 3 for given in (0, 2, 6)}
    assert sum(computed.values()) < shown["logical_tokens"] <= sum(computed.values()) + 3 * 20
    assert 0 < shown["resident_tokens"] < shown["logical_tokens"]
    assert shown["resident_tokens"] % BLOCK == 0
    config = llm.llm_engine.vllm_config.model_config
    width = config.get_total_num_kv_heads() * config.get_head_size()
    # Keys and values of float32.
    assert shown["resident_bytes"] == shown["resident_tokens"] * config.hf_config.num_hidden_layers * 2 * width * 4
    before = shown
    llm.llm_engine.abort_request(["video-0", "video-1", "video-2", "text"], internal=False)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    generate(llm, prompt(20), 3)
    shown = metrics(llm)
    assert shown["resident_tokens"] == shown["resident_bytes"] == shown["logical_tokens"] == 0
    assert shown[f"{ENDED}:abort"] - before[f"{ENDED}:abort"] == 3


def test_a_video_that_waits_is_not_running(engine: Any) -> None:
    """Five want to run, and there are blocks for two or so."""
    llm = engine("packcache", CONFIG, disable_log_stats=False, num_gpu_blocks_override=16, max_model_len=300)
    for number in range(5):
        ids = prompt(130, seed=40 + number)
        llm.llm_engine.add_request(f"video-{number}", {"prompt_token_ids": ids}, sampling(3, tokens_per_frame=FRAME))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    seen = set()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if scheduler.running:
            shown = metrics(llm)
            # Those that have just ended are counted by the next step.
            assert sum(shown[f"videos:{phase}"] for phase in PHASES) == len(scheduler.running)
        seen.add((len(scheduler.running), len(scheduler.waiting)))
    assert any(running and waiting for running, waiting in seen), "all had room at once"


def test_preemptions_of_videos_are_counted(engine: Any, logged: list[str]) -> None:
    llm = engine(
        "packcache",
        CONFIG,
        disable_log_stats=False,
        num_gpu_blocks_override=24,
        max_model_len=700,
        max_num_batched_tokens=128,
    )
    before = metrics(llm)["preemptions"]
    requests = [(prompt(70 + i, seed=20 + i), sampling(500, tokens_per_frame=67 - 7 * i)) for i in range(4)]
    run(llm, [ids for ids, _ in requests], [params for _, params in requests])
    told = sum(record["preemptions"] for line in videos(logged) if (record := read_line(line, "")))
    assert len(videos(logged)) == 4
    assert metrics(llm)["preemptions"] - before == told > 0


def test_switched_off_there_is_nothing(engine: Any, logged: list[str]) -> None:
    llm = engine(disable_log_stats=False, max_num_seqs=3)
    generate(llm, prompt(30), 5)
    assert metrics(llm) == {}
    assert videos(logged) == []


DOCKER = Path(__file__).parents[2] / "docker"


def named_in(expressions: list[str]) -> set[str]:
    """Series of vLLM and of ours that expressions of Prometheus name."""
    return set(re.findall(r"vllm:\w+", " ".join(expressions)))


def published(metrics: type[JobMetrics]) -> set[str]:
    """Series that are there before anything has happened, of a histogram that of its buckets."""
    registry = CollectorRegistry()
    metrics("m", registry)
    kinds = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    return {metric.name + kinds[metric.type] for metric in registry.collect()}


def overlapping(places: list[dict[str, int]]) -> set[tuple[int, int]]:
    """Places of the grid that more than one panel has, or that lie outside."""
    taken = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    return {place for place in taken if taken.count(place) > 1 or place[0] >= 24}


def test_the_dashboard_and_the_alerts_name_what_there_is() -> None:
    ours = {
        *(f"{PREFIX}{name}_total" for name in (*COUNTERS, ENDED)),
        *(f"{PREFIX}{name}" for name in (*GAUGES, VIDEOS, INFO)),
        f"{PREFIX}{FRAME_SECONDS}_bucket",
    }
    of_jobs = {
        f"{PREFIX}jobs",
        f"{PREFIX}jobs_bytes",
        f"{PREFIX}jobs_ended_total",
        *(f"{PREFIX}{name}_bucket" for name in ("job_queue_seconds", "job_frame_seconds", "job_seconds")),
    }
    assert of_jobs == published(JobMetrics)
    ours |= of_jobs
    known = ours | named_in([Path(loggers.__file__).read_text(encoding="utf-8")])
    dashboard = json.loads((DOCKER / "grafana" / "packcache.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    shown = named_in([target["expr"] for panel in panels for target in panel.get("targets", ())])
    assert ours <= shown <= known
    assert len({panel["id"] for panel in panels}) == len(panels)
    # A row has no target, and everything else one.
    assert {panel["type"] for panel in panels if not panel.get("targets")} == {"row"}
    assert not overlapping([panel["gridPos"] for panel in panels])
    documented = (DOCKER.parent / "docs" / "operate.md").read_text(encoding="utf-8")
    for name in ours - {f"{PREFIX}{name}_total" for name in COUNTERS}:
        assert f"`{name.removesuffix('_bucket')}" in documented, name
    (group,) = yaml.safe_load((DOCKER / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    assert named_in([rule["expr"] for rule in group["rules"]]) <= known
    assert list(BUCKETS) == sorted(set(BUCKETS))
