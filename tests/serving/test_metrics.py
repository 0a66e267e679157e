"""What is counted is what the policy decided, and it reaches Prometheus and the log."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import generate, prompt, run, sampling
from vllm_packcache.config import ServerConfig
from vllm_packcache.engine.manager import PHASES
from vllm_packcache.engine.metrics import COUNTERS, GAUGES, PREFIX
from vllm_packcache.retention import Retention

BLOCK = 32
CONDITION, FRAME = 50, 41
CONFIG = {"window": 2, "history_frames": 1.5}


def metrics(llm: Any) -> dict[str, float]:
    """Ours by name, phases after a colon."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith(PREFIX):
            phase = metric.labels.get("phase", "")
            found[metric.name.removeprefix(PREFIX) + (phase and f":{phase}")] = metric.value
    return found


@pytest.fixture
def lines(engine: Any) -> Iterator[list[str]]:
    """What is logged of videos."""
    # The first engine of a process sets up vLLM's loggers anew.
    engine("packcache", CONFIG, disable_log_stats=False)
    logged: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.addFilter(lambda record: record.msg.startswith("Video "))
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.packcache")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_counts_are_what_the_policy_decides(engine: Any, lines: list[str]) -> None:
    llm = engine("packcache", CONFIG, disable_log_stats=False)
    before = metrics(llm)
    assert set(before) == {*COUNTERS, *GAUGES, *(f"videos:{phase}" for phase in PHASES)}
    frames = 9
    generate(llm, prompt(CONDITION, seed=1), frames * FRAME + 5, tokens_per_frame=FRAME)
    generate(llm, prompt(CONDITION, seed=2), 60)
    plan = ServerConfig.parse("packcache", CONFIG).plan({"packcache_tokens_per_frame": FRAME}, CONDITION)
    assert plan is not None
    retention = Retention(plan.layout, plan.policy, BLOCK)
    after = metrics(llm)
    # The last token that is computed is one of frame 9.
    held = len(retention.live_blocks(CONDITION + frames * FRAME + 4))
    logical = -(-(CONDITION + frames * FRAME + 4) // BLOCK)
    assert after["freed_blocks"] - before["freed_blocks"] == logical - held
    assert after["slides"] - before["slides"] == frames - CONFIG["window"]
    rotated = sum(len(retention.history_blocks(frame)) for frame in range(3, frames + 1))
    assert after["rotated_blocks"] - before["rotated_blocks"] == rotated
    assert after["preemptions"] == before["preemptions"]
    assert {name: after[name] for name in after if name not in COUNTERS} == dict.fromkeys(set(after) - set(COUNTERS), 0)
    (line,) = lines
    peak = max(len(retention.live_blocks(token)) for token in range(CONDITION, CONDITION + frames * FRAME + 4)) + 1
    assert f"9 frames, {CONDITION + frames * FRAME + 5} logical tokens" in line
    assert f"{logical - held} blocks freed by the policy, 0 preemptions" in line
    assert any(f"at most {blocks} of {logical} blocks resident" in line for blocks in (peak - 1, peak))


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
    llm.llm_engine.abort_request(["video-0", "video-1", "video-2", "text"], internal=False)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    generate(llm, prompt(20), 3)
    assert metrics(llm)["resident_tokens"] == 0


def test_preemptions_of_videos_are_counted(engine: Any, lines: list[str]) -> None:
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
    told = sum(int(line.split()[-2]) for line in lines)
    assert len(lines) == 4
    assert metrics(llm)["preemptions"] - before == told > 0


def test_switched_off_there_is_nothing(engine: Any, lines: list[str]) -> None:
    llm = engine(disable_log_stats=False, max_num_seqs=3)
    generate(llm, prompt(30), 5, tokens_per_frame=8)
    assert metrics(llm) == {}
    assert lines == []


def test_the_dashboard_shows_them_and_nothing_else() -> None:
    dashboard = (Path(__file__).parents[2] / "docker" / "grafana" / "packcache.json").read_text(encoding="utf-8")
    panels = json.loads(dashboard)["panels"]
    used = set(
        re.findall(rf"{PREFIX}(\w+)", " ".join(target["expr"] for panel in panels for target in panel["targets"]))
    )
    assert used == {*(f"{name}_total" for name in COUNTERS), *GAUGES, "videos"}
    assert len({panel["id"] for panel in panels}) == len(panels)
