"""The engine of a measurement under async scheduling, as on a GPU; in this process, so that one can look inside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import engine_process
from benchmarks.engine_process import Engine, EngineSettings
from tests.serving.conftest import schedule_asynchronously


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    settings = EngineSettings(
        model=str(checkpoint),
        dtype="float32",
        block_size=32,
        kv_cache_memory_bytes=2**24,
        max_model_len=256,
        max_num_batched_tokens=64,
        threads=1,
        additional_config={},
        max_num_seqs=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        schedule_asynchronously(patch, True)
        yield Engine(settings)


PROMPTS = [list(range(150)), list(range(50, 150))]


def test_requests_advance_together_and_leave_nothing(engine: Engine) -> None:
    assert engine.about()["async_scheduling"] is True
    begun = engine.begin(PROMPTS, 50, {})
    # 250 tokens in steps of 64: the first request is ahead when the second has its first token.
    assert len(begun.tokens) > 2
    for _ in range(2):
        burst = engine.decode(8)
        assert len(burst.wall_seconds) == 8, "a step for each token, the first of which was begun before"
        assert len(burst.tokens) == 2 * 8
        assert len(engine._core.batch_queue) == 1, "a step is in flight"
    assert burst.used_blocks[-1] >= -(-(150 + 17) // 32) + -(-(100 + 17) // 32)
    assert engine.end() == 0
    assert not engine._core.batch_queue
    engine.begin(PROMPTS[:1], 50, {})
    assert len(engine.decode(8).tokens) == 8, "none of a request that has ended"
    assert engine.end() == 0


def test_a_burst_ends_when_the_gpu_is_idle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.begin(PROMPTS[:1], 50, {})
    # A clock that is half a second on whenever it is read, and a GPU that is busy for ten times as long.
    clock = count(0, 0.5)
    monkeypatch.setattr(engine_process, "time", SimpleNamespace(perf_counter=clock.__next__, process_time=lambda: 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: [next(clock) for _ in range(10)])
    monkeypatch.setattr(engine, "_on_gpu", True)
    burst = engine.decode(4)
    assert burst.wall_seconds == [0.5, 0.5, 0.5, 6]
    engine.end()


def test_requests_that_end_early_are_told(engine: Engine) -> None:
    engine.begin(PROMPTS, 10, {})
    with pytest.raises(RuntimeError, match="the requests ended before 10 more tokens of each"):
        engine.decode(10)
    assert engine.end() == 0
