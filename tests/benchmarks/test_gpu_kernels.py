"""What `bench.gpu` times is right, and it times everything: interpreted, or on a GPU."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import engine as gpu_engine
from benchmarks.gpu import kernels as gpu
from benchmarks.gpu.attention import PagedAttention
from tests.runner import V2

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Without a GPU vLLM has its kernels only where it has found a Triton that interprets.
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not V2, reason="needs a GPU, or Triton's interpreter with VLLM_USE_V2_MODEL_RUNNER=1"
)


def dense(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """One sequence in float64: [tokens, heads, head size]."""
    heads, head_size = query.shape[1:]
    rows = cache[table.long()].transpose(1, 2).flatten(0, 1)[:length].double()
    group = heads // rows.shape[1]
    keys, values = rows.repeat_interleave(group, 1).split(head_size, dim=-1)
    scores = torch.einsum("qhc,khc->hqk", query.double(), keys) * head_size**-0.5
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), values)


# Triton's interpreter multiplies no bf16 matrices.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 6, 2), (50, 3, 1)])
def test_paged_attention(tokens: int, heads: int, kv_heads: int, splits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head_size, block_size, blocks = 32, 16, 40
    # Some sequences leave a split without keys; blocks lie as backends of GPUs have them.
    lengths = [1, 150, 64]
    cache = torch.randn(blocks, block_size, kv_heads, 2 * head_size, device=DEVICE).to(dtype).transpose(1, 2)
    query = 2 * torch.randn(len(lengths), tokens, heads, head_size, device=DEVICE).to(dtype)
    table = torch.randperm(blocks, device=DEVICE)[:30].int().view(3, 10)
    attention = PagedAttention(query, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), kv_heads, splits)
    found = attention(cache)
    # The shares and the result are rounded to the dtype.
    error = 2e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    for sequence, length in enumerate(lengths):
        expected = dense(query[sequence], cache, table[sequence], length)
        largest = expected.abs().max().item()
        torch.testing.assert_close(found[sequence].double(), expected, rtol=0, atol=error * largest)


AS_TIMED = dataclasses.replace(gpu.AS_TIMED, geometry=dataclasses.replace(gpu.AS_TIMED.geometry, dtype=HALF))
if DEVICE.type == "cpu":
    # The interpreter is slow.
    AS_TIMED = dataclasses.replace(
        AS_TIMED, geometry=dataclasses.replace(AS_TIMED.geometry, layers=1, kv_heads=2, heads=6)
    )


def test_everything_timed_is_right() -> None:
    checks = gpu.check(DEVICE, (gpu.EXACT, AS_TIMED))
    names = " ".join(checks)
    assert all(word in names for word in ("triton, float32, frame", "vllm, triton", "decode, batch 1", "neighbours"))
    assert [(name, own) for name, own in checks.items() if not own.passed] == []
    assert all(own.error > 0 for own in checks.values() if own.bound), "compared with itself"
    assert checks["compaction, block size 16"].bound == 0


def test_a_wrong_compaction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_packcache.worker.blocks import kernel as compaction_kernel

    right = compaction_kernel.compact_rows

    def wrong(block_table: torch.Tensor, seq_lens: torch.Tensor, *rest: Any) -> None:
        right(block_table, seq_lens - 1, *rest)

    monkeypatch.setattr(compaction_kernel, "compact_rows", wrong)
    assert gpu._compaction_error(gpu.EXACT, DEVICE) > 0


@pytest.mark.parametrize("fault", ["a block too early", "a key too few"])
def test_a_wrong_kernel_is_found_and_not_timed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(query: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, *rest: Any) -> PagedAttention:
        if fault == "a key too few":
            return PagedAttention(query, table, lengths - 1, *rest)
        return PagedAttention(query, table.roll(1, dims=1), lengths, *rest)

    monkeypatch.setattr(gpu, "kernels", lambda: {"triton": make})
    result: dict[str, Any] = {}
    checks = gpu.check
    monkeypatch.setattr(gpu, "check", lambda device: checks(device, (gpu.EXACT,)))
    assert gpu._measure_if_right(result, gpu.EXACT, DEVICE) == 1
    assert result["measured"] is False
    assert result["reason"].startswith(
        "not measured: wrong results of attention, triton, float32, decode, batch 1, att"
    )
    assert set(result) == {"checks", "measured", "reason"}


class HostClock(gpu.Clock):
    """Times on the host: what it says means nothing."""

    def __init__(self, device: torch.device) -> None: ...

    def captured(self, work: gpu.Work) -> gpu.Work:
        return work

    def seconds(self, works: Mapping[str, gpu.Work], rounds: int) -> dict[str, list[float]]:
        return {name: [_seconds(work) for _ in range(rounds)] for name, work in works.items()}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `run` writes: on a GPU as it is, otherwise with what only a GPU can tell made up. Small either way."""
    shape = dataclasses.replace(gpu.EXACT.geometry, heads=2, kv_heads=1)
    small = dataclasses.replace(gpu.EXACT, geometry=shape, batches=(1, 2))
    monkeypatch.setattr(gpu, "LUMOS", small)
    monkeypatch.setattr(gpu, "check", lambda device: {"all": gpu.Check(0.5, 1.0)})
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gpu, "Clock", HostClock)
        monkeypatch.setattr(gpu, "_free_bytes", lambda device: 2**30)
        monkeypatch.setattr(gpu, "_splits", lambda *_: 2)
        monkeypatch.setattr(gpu, "_machine", lambda device: {"gpu": "none"})
        monkeypatch.setattr(gpu, "not_measurable", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch, "device", lambda *_: DEVICE)
    # Engines have a test of their own: none fits.
    monkeypatch.setattr(gpu_engine.EnginePlan, "bytes_needed", lambda *_: 2**60)
    path = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "rotation: bandwidth / copy bandwidth" in printed
    assert "whole steps, 13 frames, batch 16: not measured: it needs about" in printed
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_is_measured(measured: dict[str, Any]) -> None:
    assert measured["measured"] is True
    assert set(measured["attention"]) == {"decode, batch 1", "decode, batch 2", "frame"}
    for step, timed in measured["attention"].items():
        assert set(timed["kernels"]) >= {"triton", "vllm, triton"}
        assert ("torch, keys gathered before" in timed["kernels"]) == (step == "frame")
        for own in timed["kernels"].values():
            assert set(own["seconds"]) == {"full", "packcache", "sliding_window", "as_if_short"}
            assert all(len(samples) == 2 and min(samples) > 0 for samples in own["seconds"].values())
            ratio = sorted(a / b for a, b in zip(own["seconds"]["full"], own["seconds"]["packcache"], strict=True))
            assert own["ratios"]["full / packcache"]["median"] == pytest.approx(sum(ratio) / 2)
    keys = measured["attention"]["frame"]["keys"]
    assert keys["full"] == 21 + 7 * 27
    assert keys["packcache"] == keys["as_if_short"] < keys["full"]
    rotation = measured["rotation"]
    # Read and written, in 2 layers, blocks of 16 keys of 16 numbers of 4 bytes.
    assert rotation["bytes_read_and_written"] == 2 * 2 * rotation["blocks"] * 16 * 16 * 4
    assert set(rotation["share_of_attention_of_a_frame"]) == {"decoded", "in parallel"}
    compaction = measured["compaction"]
    assert set(compaction) == {"decode, batch 1", "decode, batch 2"}
    blocks = compaction["decode, batch 1"]["blocks"]
    assert blocks * 16 >= measured["attention"]["decode, batch 1"]["keys"]["packcache"] > (blocks - 1) * 16
    assert compaction["decode, batch 2"]["blocks"] == 2 * blocks
    ours = 27 * compaction["decode, batch 1"]["median"] + rotation["median"]
    attention = measured["attention"]["decode, batch 1"]["kernels"]["triton"]["seconds"]["packcache"]
    assert measured[gpu.SHARE] == pytest.approx(ours / (27 * sum(attention) / 2))
    judged = [target["ratio"] for target in measured["targets"]]
    assert "decode, batch 1, triton: full / packcache" in judged
    assert "decode, batch 2, triton: full / packcache" not in judged, "nothing is aimed at there"
    assert judged[-1] == "rotation: bandwidth / copy bandwidth"
    engine = measured["engine"]
    assert engine["copy_bytes_per_second"] == rotation["copy_bytes_per_second"]
    assert {name for name, run in engine["runs"].items() if not run["measured"]} == set(gpu_engine.LUMOS.runs)
    assert measured["versions"]["torch"]
    assert measured["date"].startswith("20")
