"""The GPU measurement without a GPU: it says so and invents nothing. What it times is in `test_gpu_kernels`."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks.gpu import kernels as gpu
from tests.compiling import compiled
from vllm_packcache.core.layout import CONDITION

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_nothing_is_invented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "gpu.json"
    assert gpu.main(["--json", str(path)]) == 2
    sentence = f"not measured: torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU"
    assert capsys.readouterr().err == sentence + "\n"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["measured"] is False
    assert written["reason"] == sentence
    assert set(written) == {"benchmark", "date", "command", "seed", "versions", "measured", "reason"}
    assert set(written["versions"]) == {"python", "torch", "triton", "numpy", "vllm", "vllm-packcache"}
    assert datetime.datetime.fromisoformat(written["date"]).utcoffset() == datetime.timedelta(0)


def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        gpu.main(["--json", str(tmp_path)])


BARE = """
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        # All that the package may import elsewhere. What torch imports if it is there is torch's own affair.
        if name.partition(".")[0] in {"vllm", "pydantic", "yaml", "typer", "rich", "httpx", "PIL", "packaging"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Bare())
from benchmarks.gpu import attention, kernels as gpu
from vllm_packcache.worker.keys import kernel
print(gpu.main(["--json", sys.argv[1]]))
"""


@without_gpu
def test_a_bare_machine_is_enough(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BARE, str(tmp_path / "gpu.json")]
    outcome = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert outcome.stdout == "2\n", outcome.stderr
    assert (tmp_path / "gpu.json").is_file()


def test_the_papers_lengths() -> None:
    plan = gpu.LUMOS
    assert plan.tokens - plan.condition_tokens == 53_092
    assert plan.steps() == {
        "decode, batch 1": (1, 272 + 12 * 4084 + 2042, 1),
        "decode, batch 16": (16, 272 + 12 * 4084 + 2042, 1),
        "frame": (1, 272 + 12 * 4084, 4084),
    }


@pytest.mark.parametrize("plan", [gpu.LUMOS, gpu.EXACT], ids=["paper", "small"])
@pytest.mark.parametrize("step", ["decode, batch 1", "frame"])
def test_what_is_read_is_what_the_policies_keep(plan: gpu.KernelPlan, step: str) -> None:
    _, computed, scheduled = plan.steps()[step]
    blocks = np.random.default_rng(0).permutation(plan.blocks).astype(np.int32)
    logical = np.argsort(blocks)
    cases = gpu.reads(plan, computed, scheduled, blocks)
    read = {case: logical[own.block_table].tolist() for case, own in cases.items()}
    stop, size = computed + scheduled, plan.geometry.block_size
    assert read["full"] == list(range(-(-stop // size)))
    assert cases["full"].length == stop
    for case in ("packcache", "sliding_window"):
        policy = gpu.POLICIES[case]
        assert policy is not None
        retention = plan.retention(policy)
        assert read[case] == retention.live_blocks(stop - 1).tolist() + ([] if (stop - 1) % size else [stop // size])
        assert plan.layout.frame_of(stop - 1) == plan.frames - 1 != CONDITION
        assert cases[case].length == len(read[case]) * size - -stop % size
    assert cases["as_if_short"].length == cases["packcache"].length
    assert read["as_if_short"] == list(range(len(read["packcache"])))


@pytest.mark.parametrize(("rows", "splits", "warps"), [(16, 8, 4), (128, 1, 8)], ids=["decode", "frame"])
@pytest.mark.parametrize("capability", [86, 90], ids=["A40", "H200"])
def test_attention_compiles(capability: int, rows: int, splits: int, warps: int) -> None:
    from benchmarks.gpu.attention import KEYS_TILE, _attend

    pointers = dict.fromkeys(("query", "cache"), "*bf16") | dict.fromkeys(("block_table", "lengths"), "*i32")
    pointers |= {"parts": "*fp32" if splits > 1 else "*bf16", "weights": "*fp32"}
    numbers = dict.fromkeys(("stride_block", "stride_head", "stride_token", "stride_table", "tokens"), "i32")
    constants = {
        "HEADS": 24, "GROUP": 3, "HEAD_SIZE": 128, "BLOCK_SIZE": 16, "SPLITS": splits, "ROWS": rows, "KEYS": KEYS_TILE,
    }  # fmt: skip
    signature = pointers | numbers | {"scale": "fp32"}
    ptx = compiled(_attend, capability, signature, constants, num_warps=warps, num_stages=2)
    assert "mma" in ptx, "no tensor cores"


class FakeEvent:
    """The n-th event is recorded at n**2 ms: every interval is another one."""

    recorded: ClassVar[list[FakeEvent]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.number = len(self.recorded)
        self.recorded.append(self)

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.number**2 - self.number**2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> gpu.Clock:
    """A clock whose GPU is made up; work runs when it is enqueued."""
    FakeEvent.recorded.clear()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(L2_cache_size=16, multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return gpu.Clock(torch.device("cpu"))


def test_samples_are_interleaved_and_the_first_round_is_dropped(clock: gpu.Clock) -> None:
    done: list[str] = []
    works = {name: partial(done.append, name) for name in "abc"}
    samples = clock.seconds(works, 3)
    assert "".join(done) == "abcbcacababc"
    # An event before and one after each: of round 1 number 6 and 7 around b, 8 and 9 around c, 10 and 11 around a.
    assert samples["a"] == [(11**2 - 10**2) / 1000, (15**2 - 14**2) / 1000, (19**2 - 18**2) / 1000]
    assert samples["b"][0] == (7**2 - 6**2) / 1000
    assert all(len(own) == 3 for own in samples.values())


def test_what_a_graph_reads_lives_as_long_as_the_graph(clock: gpu.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses only: memory that is given to others meanwhile would be read, or written to."""

    class Attention:
        def __call__(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    attention = Attention()
    alive = weakref.ref(attention)
    replay = clock.captured(attention)
    del attention
    assert alive() is not None
    replay()
    del replay
    assert alive() is None


def test_keys_are_split_over_the_whole_gpu(clock: gpu.Clock) -> None:
    device = torch.device("cpu")
    assert gpu._splits(programs=8, length=10_000, device=device) == 5
    assert gpu._splits(programs=128, length=10_000, device=device) == 1
    assert gpu._splits(programs=1, length=100, device=device) == 2, "no split without keys"


def test_caches_are_shared_where_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, device = gpu.EXACT.geometry, torch.device("cpu")
    a_layer = shape.bytes_of(10 * shape.block_size)
    for free, layers in ((10 * a_layer, 2), (2 * a_layer, 1)):
        monkeypatch.setattr(gpu, "_free_bytes", lambda device, free=free: free)
        caches = gpu._make_caches(10, shape, device)
        assert [cache.shape for cache in caches] == [(10, 2, 16, 32)] * layers
        assert sum(cache.untyped_storage().nbytes() for cache in caches) == layers * a_layer
    monkeypatch.setattr(gpu, "_free_bytes", lambda device: a_layer)
    with pytest.raises(MemoryError, match="one layer's cache of 10 blocks does not fit: use a larger GPU"):
        gpu._make_caches(10, shape, device)


def test_ratios_are_judged() -> None:
    def timed(full: float, packcache: float) -> dict[str, Any]:
        ratios = {"full / packcache": {"median": full}, "packcache / as_if_short": {"median": packcache}}
        return {"kernels": {"triton": {"ratios": ratios}}}

    attention = {"decode, batch 1": timed(2.5, 1.02), "decode, batch 16": timed(3.9, 1.03), "frame": timed(3.7, 1)}
    rotation = {"bandwidth / copy bandwidth": {"median": 0.69}}
    judged = gpu.targets({"attention": attention, "rotation": rotation, gpu.SHARE: 0.01})
    missed = {target["ratio"] for target in judged if not target["met"]}
    assert len(judged) == 8
    assert missed == {
        "decode, batch 16, triton: full / packcache",
        "decode, batch 16, triton: packcache / as_if_short",
        "rotation: bandwidth / copy bandwidth",
    }
