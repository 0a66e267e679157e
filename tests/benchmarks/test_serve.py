"""The command works at a small size: capacities are exact, whatever the machine does meanwhile."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from rich.console import Console

from benchmarks.model import ModelShape
from benchmarks.report.markdown import Files
from benchmarks.serve import plan as plans
from benchmarks.serve import report
from benchmarks.serve import runs as serve
from benchmarks.serve.benchmark import SERVE
from benchmarks.serve.plan import PACKCACHE, SERVERS, STOCK, ServePlan
from benchmarks.serve.runs import ServedVideo
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.serving.server import ServerError

SMALL = ServePlan(
    model=ModelShape(layers=1, heads=2, head_size=32, hidden=64, vocab=256, dtype="bfloat16", bytes_per_element=2),
    condition_tokens=40,
    tokens_per_frame=40,
    frames=13,
    pool_videos=2,
    load_videos=6,
    rounds=2,
)
PAPER_LIKE = ServePlan(condition_tokens=17, tokens_per_frame=257, frames=13, pool_videos=4, load_videos=16, rounds=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `run` returns, what it writes and what it prints."""
    path = tmp_path_factory.mktemp("bench") / "new" / "serve.json"
    environment, children = dict(os.environ), set(psutil.Process().children(recursive=True))
    console = Console(file=io.StringIO(), width=80)
    result = SERVE.run(path, plan=SMALL, console=console)
    assert os.environ == environment
    assert set(psutil.Process().children(recursive=True)) <= children
    assert isinstance(console.file, io.StringIO)
    return result, json.loads(path.read_text(encoding="utf-8")), console.file.getvalue()


def test_json_is_what_run_returns(measured):
    result, written, _ = measured
    assert json.loads(json.dumps(result)) == written


def test_json_says_how_to_repeat_it(measured):
    written = measured[1]
    assert all(written["versions"][name] for name in ("python", "torch", "vllm", "vllm_packcache"))
    assert written["machine"]["cpu"]
    assert written["command"]
    assert written["date"]
    assert written["video"] == {"condition_tokens": 40, "tokens_per_frame": 40, "frames": 13}
    assert written["model"]["kv_bytes_per_token"] == 2 * 1 * 2 * 32 * 2
    assert written["policy"]["window"] == 12
    stock, packcache = (written["engine"][name] for name in SERVERS)
    assert packcache.startswith(f"{stock} --kv-cache-policy packcache --kv-cache-policy-config ")
    assert f"--num-gpu-blocks-override {written['pool_blocks'] + 1}" in stock
    # 40 + 13 x 40 tokens but the last, in blocks of 32.
    assert written["peak_blocks_of_a_video"][STOCK] == 18
    assert written["pool_blocks"] == 36
    assert written["mean_blocks_of_a_video"][PACKCACHE] < written["mean_blocks_of_a_video"][STOCK] < 18


def test_capacity_is_where_preemption_begins(measured):
    for name in SERVERS:
        capacity = measured[1]["capacity"][name]
        tried = {load["videos"]: load for load in capacity["loads"]}
        assert len(tried) == len(capacity["loads"])
        assert SMALL.fitting_videos(name) <= capacity["videos"] < SMALL.max_videos
        assert tried[capacity["videos"]]["preemptions"] == 0
        assert tried[capacity["videos"]]["together"]
        assert tried[capacity["videos"] + 1]["preemptions"] > 0
    assert measured[1]["capacity"][PACKCACHE]["videos"] > measured[1]["capacity"][STOCK]["videos"]


def test_load_is_the_same_on_both_servers(measured):
    load = measured[1]["load"]
    assert load["videos"] == SMALL.load_videos
    assert len(load["rounds"]) == SMALL.rounds
    for own in load["rounds"]:
        assert set(own) == set(SERVERS)
        for result in own.values():
            assert result["videos"] == load["videos"]
            assert result["tokens"] == load["videos"] * 13 * 40
            assert len(result["video_seconds"]) == load["videos"]
            assert max(result["video_seconds"]) == result["seconds"]
            assert all(first > 0 for first in result["first_token_seconds"])
            assert 0 < result["peak_usage"] <= 1
            assert result["engine_cpu_seconds"] > 0
            assert result["tokens_per_second"] == result["tokens"] / result["seconds"]
        assert own[STOCK]["preemptions"] > 0
        # Those that find room because they happen not to be longest together may not find it again.
        if load["videos"] == SMALL.fitting_videos(PACKCACHE):
            assert own[PACKCACHE]["preemptions"] == 0
        assert own[PACKCACHE]["preemptions"] < own[STOCK]["preemptions"]
    for clock in serve.CLOCKS:
        ratio = load["throughput packcache / stock"][clock]
        assert ratio["samples"] == [own[STOCK][clock] / own[PACKCACHE][clock] for own in load["rounds"]]
        assert ratio["median"] == np.median(ratio["samples"])


def test_the_other_server_is_idle(measured):
    for own in measured[1]["load"]["rounds"]:
        for load in own.values():
            assert load["other_cpu_seconds"] < 0.2 * load["seconds"]


def test_targets_are_judged(measured):
    written = measured[1]
    peaks = written["peak_blocks_of_a_video"]
    capacity, throughput = written["targets"]
    assert capacity["at_least"] == 0.9 * peaks[STOCK] / peaks[PACKCACHE]
    assert throughput["at_least"] == 3
    assert all(target["met"] is (target["value"] >= target["at_least"]) for target in written["targets"])


def test_table_shows_every_row_and_target(measured):
    result, _, printed = measured
    # In a terminal as narrow as this one long names are wrapped; here they are not.
    console = Console(file=io.StringIO(), width=200)
    SERVE.print(result, console, Files(Path(), Path()))
    assert isinstance(console.file, io.StringIO)
    wide = console.file.getvalue()
    for heading in report._loads(result):
        assert f"  {heading} " in wide
    for goal in SERVE.report.goals(result):
        assert re.search(rf"  {re.escape(goal.name)} +{re.escape(goal.value)} +{re.escape(goal.aim)} ", wide)
    assert "…" not in printed


@pytest.mark.parametrize("plan", [SMALL, PAPER_LIKE])
@pytest.mark.parametrize("server", SERVERS)
def test_held_blocks_are_the_live_ones(plan, server):
    layout = VideoLayout(FrameLayout(plan.tokens_per_frame), plan.condition_tokens)
    retention = Retention(layout, plans.POLICIES[server], plans.BLOCK_SIZE, some_tokens)
    computed = range(plan.condition_tokens, plan.condition_tokens + plan.generated_tokens - 1)
    held = [len({*retention.live_blocks(token).tolist(), token // plans.BLOCK_SIZE}) for token in computed]
    assert plan.held_blocks(server) == held
    assert plan.peak_blocks(server) == max(held)


def test_default_geometry():
    assert PAPER_LIKE.pool_blocks == 4 * 105
    assert PAPER_LIKE.peak_blocks(PACKCACHE) == 1 + 9 + 9
    assert PAPER_LIKE.fitting_videos(STOCK) == 4
    assert PAPER_LIKE.fitting_videos(PACKCACHE) == 420 // (19 + 1)
    assert PAPER_LIKE.max_model_len == 3360


@pytest.mark.parametrize(
    ("guess", "limit", "most", "found", "asked"),
    [
        (4, 4, 9, 4, [4, 5]),
        (4, 6, 9, 6, [4, 5, 6, 7]),
        (4, 2, 9, 2, [4, 3, 2]),
        (4, 0, 9, 0, [4, 3, 2, 1]),
        (1, 0, 9, 0, [1]),
        (4, 99, 5, 5, [4, 5]),
        (4, 99, 3, 3, [3]),
    ],
)
def test_largest_is_found_from_any_guess(guess, limit, most, found, asked):
    questions: list[int] = []

    def holds(number: int) -> bool:
        questions.append(number)
        return number <= limit

    assert serve.largest(guess, holds, most) == found
    assert questions == asked


def test_percentiles():
    samples = np.random.default_rng(0).permutation(101).tolist()
    assert serve.percentiles(samples) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert serve.percentiles([]) == {}


def test_tokens_of_a_chunk_share_its_time():
    assert ServedVideo(arrivals=[5.0], sizes=[3]).gaps == []
    assert ServedVideo(arrivals=[1.0, 2.0, 5.0], sizes=[4, 1, 3]).gaps == [1, 1, 1, 1]


def generate(respond: Callable[[httpx.Request], httpx.Response]) -> ServedVideo:
    """A video from a server that answers with ``respond``."""
    video = ServedVideo()

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://server") as client:
            await serve._generate(client, [1, 2], SMALL, video, lambda received: None)

    asyncio.run(ask())
    return video


def chunks(*sizes: int) -> str:
    events = [json.dumps({"choices": [{"token_ids": list(range(size))}]}) for size in sizes]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


def test_a_video_is_asked_for_as_one():
    requests: list[dict[str, Any]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        return httpx.Response(200, text=chunks(1, 0, SMALL.generated_tokens - 1))

    assert generate(respond).sizes == [1, SMALL.generated_tokens - 1]
    (body,) = requests
    assert body["prompt"] == [1, 2]
    assert body["max_tokens"] == 13 * 40
    assert body["ignore_eos"] is True
    assert body["vllm_xargs"] == {"packcache_tokens_per_frame": 40}


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(400, text="no such model"), "refused a video: no such model"),
        (httpx.Response(200, text='data: {"error": {"message": "engine died"}}\n\n'), "engine died"),
        (httpx.Response(200, text=chunks(3, 4)), "a video of 520 tokens came with 7"),
    ],
)
def test_a_video_that_is_not_whole_stops_the_benchmark(response, words):
    with pytest.raises(ServerError, match=words):
        generate(lambda request: response)


def test_metrics_are_summed_over_their_labels():
    text = """\
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 2.0
vllm:num_preemptions_total{engine="1"} 3.0
vllm:num_requests_running{engine="0"} 1.0
vllm:other 9.0
"""

    async def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await function(client, *arguments)

    found = asyncio.run(ask(serve._metrics))
    assert found == {"vllm:num_preemptions_total": 5, "vllm:num_requests_running": 1}
    assert (
        serve._preemptions({serve.PREEMPTIONS: 1, serve.VIDEO_PREEMPTIONS: 0}, found | {serve.VIDEO_PREEMPTIONS: 0})
        == 4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "SETTLE_SECONDS", 0.2)
        with pytest.raises(ServerError, match="has not come to rest"):
            asyncio.run(ask(serve._settled, None))
