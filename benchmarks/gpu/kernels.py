"""What attention, compaction and key rotation take on a GPU, at the lengths of the PackCache paper.

::

    python -m benchmarks.gpu --json FILE

runs in a checkout on a machine that has torch, Triton and numpy, and no more. Where vLLM is installed it also times
whole steps: see `benchmarks.gpu.engine`. First it checks what it is about to time against PyTorch in
float64; a wrong kernel is not timed. Times are those of CUDA events around a step's work in all
layers, in a CUDA graph as in a server, with the L2 cache full of something else. What is reported are ratios of
samples taken right after one another, in another order each round.

==================  ==========================================================================================
case                what a step reads
==================  ==========================================================================================
``full``            all keys
``packcache``       what the policy keeps, through a compacted block table
``sliding_window``  the condition and the last two frames whole: as many keys as packcache
``as_if_short``     the first blocks of the sequence, as many as packcache keeps: the limit for any policy
==================  ==========================================================================================

The blocks of a sequence lie scattered over the cache, as in a server that has run for a while.

xformers' paged gappy keys, which skip dropped keys without compacting, are not among the kernels: a mask of theirs
holds one run of keys a sequence, while a thinned frame is hundreds of runs. In xformers 0.0.35 the mask cannot be made
(`from_seqlens` refuses what it asks for), and the Triton kernel uses block pointers, which Triton 3.9 has not.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.goals import judged
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PAPER, Policy, SlidingWindow
from vllm_packcache.core.positions import Float64, Int64, Positions, slide_angles
from vllm_packcache.core.retention import Retention
from vllm_packcache.tools import files
from vllm_packcache.worker.blocks.compaction import Int32, compact
from vllm_packcache.worker.step import Row, Step

SEED = 0
PACKCACHE = PAPER
POLICIES: dict[str, Policy | None] = {"full": None, "packcache": PACKCACHE, "sliding_window": SlidingWindow()}
SHORT = "as_if_short"
RATIOS = {
    "full / packcache": ("full", "packcache"),
    "full / sliding_window": ("full", "sliding_window"),
    f"packcache / {SHORT}": ("packcache", SHORT),
}
FRAME_STEP = "frame"
SHARE = "compaction and rotation / attention of a decoded frame"
OWN_KERNEL = "triton"

Work = Callable[[], Any]
"""Enqueues what is timed."""

MakeAttention = Callable[..., Callable[[Tensor], Tensor]]
"""Makes the attention of a step: see `benchmarks.gpu.attention.PagedAttention`."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Attention of a model.

    Args:
        layers: of the model.
        heads: attention heads.
        kv_heads: heads of the cache.
        head_size: numbers of a head.
        block_size: tokens of a KV-cache block.
        dtype: of cache and queries.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens in one layer."""
        return 2 * tokens * self.kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """Sizes of everything that is run.

    Args:
        geometry: the model.
        condition_tokens: C, of every sequence.
        tokens_per_frame: F.
        frames: frames of the video, the last one, which is timed, included.
        batches: sequences of the decode steps.
        rounds: samples of each case.
    """

    geometry: Geometry
    condition_tokens: int
    tokens_per_frame: int
    frames: int
    batches: tuple[int, ...]
    rounds: int

    @property
    def layout(self) -> VideoLayout:
        """Every sequence."""
        return VideoLayout(FrameLayout(self.tokens_per_frame), self.condition_tokens)

    @property
    def tokens(self) -> int:
        """Of a whole sequence."""
        return self.layout.frame_start(self.frames)

    @property
    def blocks(self) -> int:
        """Of a whole sequence."""
        return -(-self.tokens // self.geometry.block_size)

    def retention(self, policy: Policy) -> Retention:
        """What ``policy`` keeps of a sequence."""
        return Retention(self.layout, policy, self.geometry.block_size)

    def steps(self) -> dict[str, tuple[int, int, int]]:
        """Each step: its sequences, and of each sequence the tokens computed before it and in it.

        A decode step's time is linear in what it reads, so the one in the middle of the frame is the frame's mean.
        """
        start = self.layout.frame_start(self.frames - 1)
        decode = {f"decode, batch {batch}": (batch, start + self.tokens_per_frame // 2, 1) for batch in self.batches}
        return decode | {FRAME_STEP: (1, start, self.tokens_per_frame)}


LUMOS = KernelPlan(
    # The attention of Llama 3.2 3B, which has the size and the 28 layers of Lumos-1 3B.
    geometry=Geometry(layers=28, heads=24, kv_heads=8, head_size=128, block_size=16, dtype=torch.bfloat16),
    condition_tokens=272,
    tokens_per_frame=4084,
    frames=13,
    batches=(1, 16),
    rounds=30,
)
EXACT = KernelPlan(
    geometry=Geometry(layers=2, heads=4, kv_heads=2, head_size=16, block_size=16, dtype=torch.float32),
    condition_tokens=21,
    tokens_per_frame=27,
    frames=7,
    batches=(1,),
    rounds=2,
)
"""Small enough to be compared number by number, with frames that begin and end inside blocks."""

AS_TIMED = dataclasses.replace(EXACT, geometry=LUMOS.geometry)
"""The same with the heads and the dtype that are timed."""


class Reads(NamedTuple):
    """What a step reads of one sequence: its block table, [blocks], and the number of keys."""

    block_table: Int32
    length: int


def reads(plan: KernelPlan, computed: int, scheduled: int, blocks: Int32) -> dict[str, Reads]:
    """What every case reads.

    Args:
        plan: the sequence.
        computed: tokens computed before the step.
        scheduled: tokens of the step, all of one frame.
        blocks: where the sequence's blocks lie, [blocks].
    """
    block_size = plan.geometry.block_size

    def of(retention: Retention | None, computed: int) -> Reads:
        batch = compact(Step([Row(retention, computed, scheduled)], blocks[None], block_size), block_size)
        return Reads(batch.block_table[0], int(batch.seq_lens[0]))

    cases = {
        name: of(policy and plan.retention(policy), computed)  # type: ignore[arg-type]
        for name, policy in POLICIES.items()
    }
    return cases | {SHORT: of(None, cases["packcache"].length - scheduled)}


class Check(NamedTuple):
    """What a kernel is off by at most, and by how much it may be."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it is right; not a number is wrong."""
        return self.error <= self.bound


def check(device: torch.device, plans: Sequence[KernelPlan] = (EXACT, AS_TIMED)) -> dict[str, Check]:
    """Compare everything that is timed with PyTorch in float64, at the sizes of ``plans``."""
    from triton import knobs

    torch.manual_seed(SEED)
    with knobs.language.scope():
        # Triton rounds the factors of float32 products to 10 bits unless it is told otherwise; ours is told in its
        # source. Nothing is timed so.
        knobs.language.fp32_default = "ieee"
        return _checks(device, plans)


def _checks(device: torch.device, plans: Sequence[KernelPlan]) -> dict[str, Check]:
    checks = {}
    for plan in plans:
        dtype = str(plan.geometry.dtype).removeprefix("torch.")
        for kernel, make in kernels().items():
            for step in plan.steps():
                # A rounding of the result and one of the weights.
                exact = plan.geometry.dtype is torch.float32
                bound = 1e-5 if exact else 2 * torch.finfo(plan.geometry.dtype).eps
                error = _attention_error(make, plan, step, device)
                checks[f"attention, {kernel}, {dtype}, {step}"] = Check(error, bound)
        for interleaved in (False, True):
            error = _rotation_error(plan.geometry, interleaved, device)
            checks[f"rotation, {dtype}, {'neighbours' if interleaved else 'halves'}"] = Check(error, 1.0)
        checks[f"compaction, block size {plan.geometry.block_size}"] = Check(_compaction_error(plan, device), 0.0)
    return checks


def _attention_error(make: MakeAttention, plan: KernelPlan, step: str, device: torch.device) -> float:
    """Largest error as a part of the largest number.

    The reference is dense attention with a mask that is made of the policy's blocks and not of the compacted table.
    """
    shape = plan.geometry
    sequences, computed, scheduled = plan.steps()[step]
    frame, stop = plan.layout.frame_of(computed), computed + scheduled
    blocks = np.random.default_rng(SEED).permutation(plan.blocks).astype(np.int32)
    cache = _make_cache(plan.blocks, shape, device)
    query = torch.randn(sequences, scheduled, shape.heads, shape.head_size, device=device).to(shape.dtype)
    rows = cache[torch.from_numpy(blocks).to(device).long()].transpose(1, 2).flatten(0, 1)[:stop].double()
    keys, values = rows.repeat_interleave(shape.heads // shape.kv_heads, 1).split(shape.head_size, -1)
    scores = torch.einsum("qhc,khc->hqk", query[0].double(), keys) * shape.head_size**-0.5
    worst = 0.0
    for case, read in reads(plan, computed, scheduled, blocks).items():
        block_of = torch.arange(stop, device=device) // shape.block_size
        if case == SHORT:
            seen = torch.arange(stop, device=device) < read.length
        elif (policy := POLICIES[case]) is None:
            seen = torch.ones(stop, dtype=torch.bool, device=device)
        else:
            retention = plan.retention(policy)
            past = torch.from_numpy(policy.past_blocks(retention.blocks, frame)).to(device)
            seen = torch.isin(block_of, past) | (block_of >= retention.blocks.tail_start(frame))
        expected = torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
        table, lengths = _on_device([read], device)
        found = make(query, table, lengths, shape.kv_heads, 3 if scheduled == 1 else 1)(cache)
        error = (found.view(expected.shape).double() - expected).abs().max()
        worst = max(worst, (error / expected.abs().max()).item())
    return worst


def _rotation_error(shape: Geometry, interleaved: bool, device: torch.device) -> float:
    """Largest error as a part of what rounding to the dtype, and arithmetic in float32 before it, may come to."""
    from vllm_packcache.worker.keys.kernel import RotationKernel
    from vllm_packcache.worker.keys.stored import CachedKeys

    pairs = shape.head_size // 2
    angles = np.random.default_rng(SEED).uniform(-100, 100, (2, pairs))
    caches = [_make_cache(9, shape, device) for _ in range(shape.layers)]
    blocks, kinds = torch.tensor([7, 2, 4]), torch.randint(2, (3, shape.block_size))
    expected = []
    for cache in caches:
        keys = cache[..., : shape.head_size].double()
        left, right = (keys[..., ::2], keys[..., 1::2]) if interleaved else keys.split(pairs, -1)
        turn = np.zeros((9, shape.block_size, pairs))
        turn[blocks.numpy()] = angles[kinds.numpy()]
        cos, sin = (torch.from_numpy(table[:, None]).to(device) for table in (np.cos(turn), np.sin(turn)))
        turned = torch.stack([left * cos - right * sin, right * cos + left * sin], -1 if interleaved else -2)
        expected.append(torch.cat([turned.flatten(-2), cache[..., shape.head_size :].double()], -1))
    RotationKernel(CachedKeys.in_rows(cache[..., : shape.head_size]) for cache in caches).rotate(
        blocks, kinds, angles, interleaved
    )
    rounding = torch.finfo(shape.dtype).eps
    return max(
        ((cache.double() - exact).abs() / (rounding * exact.abs() + 2e-6)).max().item()
        for cache, exact in zip(caches, expected, strict=True)
    )


def _compaction_error(plan: KernelPlan, device: torch.device) -> float:
    """How many numbers of compacted rows are not those that the host's compaction makes."""
    wrong = 0
    for frame in range(plan.frames):
        step = _compaction(plan, 3, plan.layout.frame_start(frame) + plan.tokens_per_frame // 2, device)
        step.run()
        for row, read in enumerate(step.reads):
            table = step.out.block_table[row, : len(read.block_table)].cpu().numpy()
            wrong += int((table != read.block_table).sum()) + int(step.out.seq_lens[row] != read.length)
    return float(wrong)


class Compaction(NamedTuple):
    """A decode step's compaction on the device.

    Attributes:
        run: enqueues it.
        out: what it writes to, a `vllm_packcache.worker.blocks.kernel.CompactedRows`.
        reads: what each row should come to.
    """

    run: Work
    out: Any
    reads: list[Reads]


def _compaction(plan: KernelPlan, sequences: int, computed: int, device: torch.device) -> Compaction:
    """The compaction of a decode step of packcache."""
    from vllm_packcache.worker.blocks.kernel import CompactedRows, compact_rows

    tables = np.random.default_rng(SEED).permutation(sequences * plan.blocks).astype(np.int32).reshape(sequences, -1)
    retention, frame = plan.retention(PACKCACHE), plan.layout.frame_of(computed)
    past = retention.past(frame)
    kept = torch.tensor([len(past), retention.blocks.tail_start(frame), *past.tolist()], dtype=torch.int32)
    kept = kept.repeat(sequences, 1).to(device)
    table, slots = torch.from_numpy(tables).to(device), torch.arange(sequences, device=device)
    seq_lens = torch.full((sequences,), computed + 1, dtype=torch.int32, device=device)
    out = CompactedRows.empty(sequences, plan.blocks, device)

    def run() -> None:
        compact_rows(table, seq_lens, kept, slots, out, plan.geometry.block_size, 1)

    return Compaction(run, out, [reads(plan, computed, 1, blocks)["packcache"] for blocks in tables])


def kernels() -> dict[str, MakeAttention]:
    """The paged attention kernels at hand: our own, and vLLM's where it is installed."""
    from benchmarks.gpu.attention import PagedAttention, UnifiedAttention

    found: dict[str, MakeAttention] = {OWN_KERNEL: PagedAttention}
    return found | ({"vllm, triton": UnifiedAttention} if find_spec("vllm") else {})


class Clock:
    """Times work on a GPU.

    Args:
        device: the GPU.
    """

    WAIT_CYCLES = 1_000_000
    """Of the GPU before each sample, so that it never waits for the host meanwhile: about half a millisecond."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def captured(self, work: Work) -> Work:
        """``work`` as a CUDA graph."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()

        # A graph knows addresses only: what lies there lives as long as the work that made it.
        def replay(kept: Work = work) -> None:
            graph.replay()

        return replay

    def seconds(self, works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
        """Samples of each of ``works``; one round more is run, and dropped, to warm up."""
        names = list(works)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            turn = number % len(names)
            events = {}
            for name in (*names[turn:], *names[:turn]):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._scratch.zero_()
                torch.cuda._sleep(self.WAIT_CYCLES)
                start.record()
                works[name]()
                stop.record()
                events[name] = start, stop
            torch.cuda.synchronize()
            if number:
                for name, (start, stop) in events.items():
                    samples[name].append(start.elapsed_time(stop) / 1000)
        return samples


def measure(plan: KernelPlan, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Time everything."""
    torch.manual_seed(SEED)
    attention = {step: _time_attention(plan, step, device, clock) for step in plan.steps()}
    rotation = _time_rotation(plan, device, clock)
    compaction = {
        step: _time_compaction(plan, sequences, computed, device, clock)
        for step, (sequences, computed, scheduled) in plan.steps().items()
        if scheduled == 1
    }
    # A frame is a decode step for each of its tokens, or one step for all of them; both take longer than attention.
    frames = {
        "decoded": plan.tokens_per_frame * _median(attention, f"decode, batch {plan.batches[0]}"),
        "in parallel": _median(attention, FRAME_STEP),
    }
    rotation["share_of_attention_of_a_frame"] = {name: rotation["median"] / own for name, own in frames.items()}
    ours = plan.tokens_per_frame * compaction[f"decode, batch {plan.batches[0]}"]["median"] + rotation["median"]
    return {
        "attention": attention,
        "rotation": rotation,
        "compaction": compaction,
        SHARE: ours / frames["decoded"],
    }


def _median(attention: Mapping[str, Any], step: str) -> float:
    return float(np.median(attention[step]["kernels"][OWN_KERNEL]["seconds"]["packcache"]))


def _time_attention(plan: KernelPlan, step: str, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Time a step's attention in all layers, with every kernel."""
    shape = plan.geometry
    sequences, computed, scheduled = plan.steps()[step]
    tables = np.random.default_rng(SEED).permutation(sequences * plan.blocks).astype(np.int32).reshape(sequences, -1)
    by_sequence = [reads(plan, computed, scheduled, blocks) for blocks in tables]
    by_case = {case: [own[case] for own in by_sequence] for case in by_sequence[0]}
    caches = _make_caches(sequences * plan.blocks, shape, device)
    query = torch.randn(sequences, scheduled, shape.heads, shape.head_size, device=device).to(shape.dtype)
    timed: dict[str, Any] = {}
    for kernel, make in kernels().items():
        works = {}
        for case, own in by_case.items():
            splits = _splits(sequences * shape.kv_heads, own[0].length, device) if scheduled == 1 else 1
            attend = make(query, *_on_device(own, device), shape.kv_heads, splits)
            works[case] = clock.captured(_in_all_layers(attend, caches, shape.layers))
        timed[kernel] = _with_ratios(clock.seconds(works, plan.rounds))
    lengths = {case: own[0].length for case, own in by_case.items()}
    if step == FRAME_STEP:
        timed["torch, keys gathered before"] = _time_gathered(plan, lengths, query, clock)
    return {
        "sequences": sequences,
        "queries": scheduled,
        "keys": lengths,
        "bytes": {case: sequences * shape.layers * shape.bytes_of(length) for case, length in lengths.items()},
        "layers_in_memory": len(caches),
        "kernels": timed,
    }


def _time_gathered(plan: KernelPlan, lengths: Mapping[str, int], query: Tensor, clock: Clock) -> dict[str, Any]:
    """The same step with torch's attention on keys that lie side by side: what a kernel tuned for the GPU takes."""
    shape = plan.geometry
    works = {}
    for case, length in lengths.items():
        rows = torch.randn(2, 1, shape.kv_heads, length, shape.head_size, device=query.device).to(shape.dtype)

        def attend(rows: Tensor) -> Tensor:
            keys, values = rows
            return scaled_dot_product_attention(query.transpose(1, 2), keys, values, enable_gqa=True)

        works[case] = clock.captured(_in_all_layers(attend, [rows], shape.layers))
    return _with_ratios(clock.seconds(works, plan.rounds))


def _time_rotation(plan: KernelPlan, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Time the slide before the last frame, beside a copy of as many bytes as it turns."""
    from vllm_packcache.worker.keys.kernel import RotationKernel
    from vllm_packcache.worker.keys.stored import CachedKeys

    shape = plan.geometry
    logical = plan.retention(PACKCACHE).sliding_blocks(plan.frames - 1)
    blocks = torch.from_numpy(np.random.default_rng(SEED).permutation(plan.blocks)[logical])
    angles = _angles(plan)
    kinds = torch.zeros(len(blocks), shape.block_size, dtype=torch.int64)
    caches = _make_caches(plan.blocks, shape, device)
    kernel = RotationKernel(CachedKeys.in_rows(cache[..., : shape.head_size]) for cache in caches)
    turned = len(caches) * len(blocks) * shape.bytes_of(shape.block_size) // 2
    source, target = torch.zeros(2, turned, dtype=torch.int8, device=device)
    works = {
        "rotation": lambda: kernel.rotate(blocks, kinds, angles, interleaved=False),
        "copy": lambda: target.copy_(source),
    }
    samples = clock.seconds(works, plan.rounds)
    ratios = [copy / own for copy, own in zip(samples["copy"], samples["rotation"], strict=True)]
    return {
        "layers": len(caches),
        "blocks": len(blocks),
        "bytes_read_and_written": 2 * turned,
        "seconds": samples,
        "median": float(np.median(samples["rotation"])),
        "copy_bytes_per_second": 2 * turned / float(np.median(samples["copy"])),
        "bandwidth / copy bandwidth": summary(ratios),
    }


def _time_compaction(
    plan: KernelPlan, sequences: int, computed: int, device: torch.device, clock: Clock
) -> dict[str, Any]:
    """Time the compaction of a decode step, which all layers share."""
    step = _compaction(plan, sequences, computed, device)
    samples = clock.seconds({"compaction": clock.captured(step.run)}, plan.rounds)["compaction"]
    # A block is read out of the table, and where it is of the past out of what is kept, and written.
    blocks = sum(len(read.block_table) for read in step.reads)
    return {"blocks": blocks, "bytes": 3 * 4 * blocks, "seconds": samples, "median": float(np.median(samples))}


def _angles(plan: KernelPlan) -> Float64:
    pairs = np.arange(plan.geometry.head_size // 2)
    frequencies = 10_000.0 ** (-pairs / len(pairs))
    axis_of: Int64 = np.zeros_like(pairs)
    return slide_angles(Positions(plan.layout, PACKCACHE.window), frequencies, axis_of)


def _make_cache(blocks: int, shape: Geometry, device: torch.device) -> Tensor:
    """A layer's cache, [blocks, KV heads, tokens of a block, 2 x head size], the tokens of a block outermost."""
    memory = torch.empty(
        blocks, shape.block_size, shape.kv_heads, 2 * shape.head_size, dtype=shape.dtype, device=device
    )
    return memory.normal_().transpose(1, 2)


def _make_caches(blocks: int, shape: Geometry, device: torch.device) -> list[Tensor]:
    """A cache for every layer, or as many as fit: each is far larger than the L2 cache, so layers may share them."""
    free = _free_bytes(device)
    fit = int(0.7 * free) // shape.bytes_of(blocks * shape.block_size)
    if fit == 0:
        raise MemoryError(
            f"{free / 2**30:.1f} GiB of GPU memory are free, and one layer's cache of {blocks} blocks does not fit: "
            "use a larger GPU, or end what else runs on it"
        )
    return [_make_cache(blocks, shape, device) for _ in range(min(fit, shape.layers))]


def _free_bytes(device: torch.device) -> int:
    # What the step before has used is torch's to keep until it is told otherwise.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _splits(programs: int, length: int, device: torch.device) -> int:
    """So many that a step has four programs for every multiprocessor, and each some keys to read."""
    from benchmarks.gpu.attention import KEYS_TILE

    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-wanted // programs), -(-length // KEYS_TILE)))


def _on_device(own: Sequence[Reads], device: torch.device) -> tuple[Tensor, Tensor]:
    """Block tables and lengths of a batch."""
    table = torch.from_numpy(np.stack([read.block_table for read in own])).to(device)
    return table, torch.tensor([read.length for read in own], dtype=torch.int32, device=device)


def _in_all_layers(attend: Callable[[Tensor], Any], caches: Sequence[Tensor], layers: int) -> Work:
    def work() -> None:
        for layer in range(layers):
            attend(caches[layer % len(caches)])

    return work


def _with_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Samples of a step and ratios of those of the same round."""
    ratios = {
        ratio: summary([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])
        for ratio, (above, below) in RATIOS.items()
    }
    return {"seconds": seconds, "ratios": ratios}


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "quartiles": [low, high]}


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound that it should keep, and whether it does."""
    bounds = {"decode, batch 1": 2.5, "decode, batch 16": 4.0, FRAME_STEP: 3.7}
    found = []
    for step, timed in result["attention"].items():
        for kernel, own in timed["kernels"].items():
            prefix, medians = f"{step}, {kernel}: ", {name: ratio["median"] for name, ratio in own["ratios"].items()}
            if step in bounds:
                name = "full / packcache"
                found.append(judged(f"{prefix}{name}", medians[name], at_least=bounds[step]))
            name = f"packcache / {SHORT}"
            found.append(judged(f"{prefix}{name}", medians[name], at_most=1.02))
    name = "bandwidth / copy bandwidth"
    found.append(judged(SHARE, result[SHARE], at_most=0.01))
    return [*found, judged(f"rotation: {name}", result["rotation"][name]["median"], at_least=0.7)]


def not_measurable() -> str | None:
    """Why nothing can be measured here; None: it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device: run this on a machine with a GPU"
    if find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return None


def _about() -> dict[str, Any]:
    """What is needed to repeat a measurement, wherever it is made."""
    return {
        "benchmark": "gpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "seed": SEED,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "triton", "numpy", "vllm", "vllm-packcache")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _machine(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def run(json_path: Path | None, *, quick: bool = False) -> int:
    """Check, time, print, and write to ``json_path``, if there is one.

    Args:
        json_path: the file.
        quick: few samples of whole steps.

    Returns:
        0; 1 if a kernel is wrong, and 2 if nothing can be measured here: then no times are written. 1 also if an
        engine failed: then its times are missing.
    """
    files.claim(json_path)
    result = _about()
    reason = not_measurable()
    if reason is None:
        device = torch.device("cuda", torch.cuda.current_device())
        result["machine"] = _machine(device)
        status = _measure_if_right(result, LUMOS, device)
    else:
        status = 2
        result |= {"measured": False, "reason": f"not measured: {reason}"}
    if result["measured"]:
        _print(result)
        if json_path is not None:
            # Engines take minutes: what there is by now outlives whatever ends them.
            files.write(json_path, result)
        status = _add_engines(result, device, quick)
    else:
        print(result["reason"], file=sys.stderr)
    if json_path is not None:
        files.write(json_path, result)
    return status


def _measure_if_right(result: dict[str, Any], plan: KernelPlan, device: torch.device) -> int:
    start = time.monotonic()
    checks = check(device)
    result["checks"] = {name: own._asdict() | {"passed": own.passed} for name, own in checks.items()}
    wrong = [name for name, own in checks.items() if not own.passed]
    if wrong:
        result |= {"measured": False, "reason": f"not measured: wrong results of {', '.join(wrong)}"}
        return 1
    result |= {
        "measured": True,
        "plan": dataclasses.asdict(plan) | {"tokens": plan.tokens},
        "policies": {
            name: {"name": policy.name} | dataclasses.asdict(policy) for name, policy in POLICIES.items() if policy
        },
    }
    result["plan"]["geometry"]["dtype"] = str(plan.geometry.dtype)
    result |= measure(plan, device, Clock(device))
    result["engine"] = {"measured": False, "reason": "not measured: the measurement was ended before"}
    result["targets"] = targets(result)
    result["seconds"] = time.monotonic() - start
    return 0


def _add_engines(result: dict[str, Any], device: torch.device, quick: bool) -> int:
    start = time.monotonic()
    section, judged_steps = _measure_engines(result["rotation"]["copy_bytes_per_second"], device, quick)
    result["engine"] = section
    result["targets"] += judged_steps
    result["seconds"] += time.monotonic() - start
    _print_engines(section)
    _print_targets(result["targets"])
    failed = [own["failed"] for own in section.get("runs", {}).values() if "failed" in own]
    print(*failed, sep="\n", end="", file=sys.stderr)
    return 1 if failed else 0


def _measure_engines(
    copy_bandwidth: float, device: torch.device, quick: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whole steps of vLLM, where it is installed, and their ratios with bounds."""
    if find_spec("vllm") is None:
        return {"measured": False, "reason": "not measured: vLLM is not installed here"}, []
    if _version("vllm-packcache") is None:
        # vLLM finds plugins by what is installed; a checkout on the path is none.
        remedy = "run `pip install --no-deps -e .` in the checkout"
        return {"measured": False, "reason": f"not measured: vllm-packcache is not installed here: {remedy}"}, []
    from benchmarks.gpu import engine

    plan = engine.QUICK if quick else engine.LUMOS
    section = engine.measure(plan, copy_bandwidth, _free_bytes(device))
    return section, engine.targets(section)


def _print(result: Mapping[str, Any]) -> None:
    for name, own in result["checks"].items():
        print(f"checked: {name}: off by {own['error']:.1e}, at most {own['bound']:.1e}")
    for step, timed in result["attention"].items():
        for kernel, own in timed["kernels"].items():
            print(f"{step}, {kernel}:")
            for case, samples in own["seconds"].items():
                print(f"  {case:<16} {timed['keys'][case]:>7,} keys  {np.median(samples) * 1e3:>10.3f} ms a step")
    rotation = result["rotation"]
    print(f"rotation: {rotation['median'] * 1e3:.3f} ms a slide", end="")
    for name, share in rotation["share_of_attention_of_a_frame"].items():
        print(f", {share:.3%} of the attention of a frame {name}", end="")
    print()
    for step, own in result["compaction"].items():
        print(f"compaction, {step}: {own['median'] * 1e6:.1f} us a step")


def _print_engines(section: Mapping[str, Any]) -> None:
    if section["measured"]:
        from benchmarks.gpu import engine

        print(*engine.lines(section), sep="\n")
    else:
        print(f"whole steps: {section['reason']}")


def _print_targets(judged_ratios: Sequence[Mapping[str, Any]]) -> None:
    for target in judged_ratios:
        bound = f">= {target['at_least']}" if "at_least" in target else f"<= {target['at_most']}"
        print(f"{target['ratio']:<60} {target['value']:>7.3f}  {bound:<8} {'met' if target['met'] else 'MISSED'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and what is needed to repeat them")
    parser.add_argument("--quick", action="store_true", help="of whole steps measure what is judged, with few samples")
    given = parser.parse_args(arguments)
    return run(given.json, quick=given.quick)
