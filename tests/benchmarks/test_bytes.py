"""Videos at once in as many bytes: pools are equal, what is judged is judged, and engines count."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.bytes import benchmark
from benchmarks.bytes.benchmark import AT_LEAST, targets
from benchmarks.bytes.plan import BASE, CASES, FULL, JUDGED, QUICK, BytesPlan
from benchmarks.bytes.runs import PoolSettings, compare
from benchmarks.formats import BFLOAT16, FORMATS
from benchmarks.report.markdown import Files
from tests.benchmarks import results
from vllm_packcache.tools.progress import counting


def test_both_engines_have_the_same_bytes() -> None:
    case = CASES[JUDGED]
    common: dict[str, Any] = {
        "model": "m", "dtype": "bfloat16", "block_size": case.block_size, "max_model_len": 64, "threads": 1,
        "max_num_batched_tokens": 64, "additional_config": {"kv_cache_policy": "full"}, "case": case,
        "kv_cache_memory_bytes": FULL.pool_bytes(case.block_size),
    }  # fmt: skip
    base, fewer = (PoolSettings(cache=cache, **common).engine_args() for cache in (BASE, case.cache))
    assert fewer.pop("kv_cache_dtype") == case.cache
    assert fewer == base
    head = FULL.model.head_size
    assert FULL.model.kv_bytes_per_token == 2 * BFLOAT16.bytes_of_key(head)
    assert BFLOAT16.bytes_of_key(head) / FORMATS[case.cache].bytes_of_key(head) > AT_LEAST, "or no pool reaches it"


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_videos_are_at_their_largest_and_more_than_there_is_room_for(plan: BytesPlan) -> None:
    assert plan.queue > 1
    assert plan.given_frames > 4, "the window of the rule"
    if plan is FULL:
        assert plan.begun_tokens > CASES[JUDGED].block_size, "a frame's last block is held from the first step on"
        assert plan.begun_tokens + plan.made_tokens <= plan.tokens_per_frame
        assert plan.queue > 2, "or none would wait for the one in 8 bits"


def test_the_median_is_judged() -> None:
    result = results.fewer_bytes()
    (target,) = targets(result)
    assert (target["at_least"], target["met"]) == (1.9, True)
    result["cases"][JUDGED]["engines"][CASES[JUDGED].cache]["at_once"] = 18.9
    (target,) = targets(result)
    assert target["value"] == pytest.approx(1.89)
    assert target["met"] is False


def test_what_was_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(benchmark, "compare", lambda plan, name, progress: ran.append(name))
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    session = benchmark.Session(console=Console(file=io.StringIO()))
    found = benchmark.measure(FULL, session)
    assert ran == [JUDGED]
    assert found["left_out"] == ["floats"]
    shown = results.fewer_bytes() | {"left_out": ["floats"]}
    assert "they were not run" in next(iter(benchmark.BYTES.report.short(shown, Files(results.ROOT, results.ROOT))))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_engine_counts_those_that_run_while_others_wait() -> None:
    """Two engines are started, each with an import of vLLM."""
    plan = replace(QUICK, queue=4)
    with counting(Console(file=io.StringIO()), "engines") as progress:
        found = compare(plan, JUDGED, progress)
    base, fewer = (found["engines"][cache] for cache in (BASE, CASES[JUDGED].cache))
    for engine in (base, fewer):
        assert engine["about"]["attention"] == ["TRITON_ATTN"]
        assert engine["ended"] == plan.videos
        assert min(engine["running"]) > 0
        assert max(engine["running"]) < plan.videos
        assert engine["used_blocks"] < engine["about"]["kv_cache_blocks"]
    assert base["about"]["kv_cache_blocks"] == found["pool_bytes"] // (16 * 512)
    assert fewer["about"]["kv_cache_blocks"] == found["pool_bytes"] // (16 * 264)
