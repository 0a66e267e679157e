"""What whole decode steps of vLLM take on a GPU, with its model runner and its CUDA graphs.

Part of `benchmarks.gpu`, where vLLM is installed. As in `benchmarks.decode`, engines live side by
side in processes of their own and bursts of steps are run right after one another. The model is made up: a step's
time does not depend on its weights.

================  ============================================================================================
engine            what it runs
================  ============================================================================================
``full``          stock vLLM, no plugin loaded
``packcache``     vLLM with the plugin, packcache switched on
``as_if_short``   stock vLLM on a prompt as long as what packcache reads: the limit for any policy
================  ============================================================================================

The frames before the one that is timed are part of the prompt. A step's time is linear in what it reads, so the steps
in the middle of a frame are its mean, and times F those of the whole frame, but for the slide before it, which
`benchmarks.gpu` times. Times are those of the host's clock. With async scheduling, which is vLLM's choice, a
step is begun before the one before it has ended: a burst is timed until the GPU is idle.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_process import Burst, Device, EngineFailed, EngineProcess, EngineSettings, interleave
from benchmarks.goals import judged
from benchmarks.gpu import kernels
from benchmarks.model import ModelShape, write_config
from benchmarks.statistics import frames_stood_for
from vllm_packcache.core.retention import Retention

FULL, PACKCACHE, SHORT = "full", "packcache", kernels.SHORT
FLOOR = "step / byte floor"
JUDGED_BATCH = 16

OVERHEAD = 4 * 2**30
"""Bytes of GPU memory that an engine takes besides weights and KV cache: a guess, to leave out what cannot fit."""

AHEAD = 1
"""Steps that async scheduling begins before the one in flight has ended."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Engines that live side by side.

    Args:
        engines: their names; packcache is one of them.
        batch: sequences of each.
        frames: the frames, counted from 0, in the middle of which steps are timed, ascending.
    """

    engines: tuple[str, ...]
    batch: int
    frames: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Sizes of everything that is run.

    Args:
        video: condition, frames and blocks.
        model: the model.
        positions: that the model has.
        chunk: tokens of a step at most.
        burst: decode steps of a sample.
        rounds: samples of each engine in each frame; one more is run, and dropped, to warm up.
        runs: what is run, by name.
        device: where.
    """

    video: kernels.KernelPlan
    model: ModelShape
    positions: int
    chunk: int
    burst: int
    rounds: int
    runs: Mapping[str, Run]
    device: Device = "cuda"

    @property
    def retention(self) -> Retention:
        """What packcache keeps of every sequence."""
        return self.video.retention(kernels.PACKCACHE)

    @property
    def room(self) -> int:
        """Tokens that are decoded at most: the second half of a frame."""
        return self.video.tokens_per_frame - self.video.tokens_per_frame // 2

    def prompt(self, frame: int) -> int:
        """Tokens before the middle of ``frame``."""
        return self.video.layout.frame_start(frame + 1) - self.room

    def longest(self, engine: str, run: Run) -> int:
        """Tokens of the longest sequence of an engine."""
        of = self.retention.live_tokens if engine == SHORT else int
        return max(of(self.prompt(frame)) for frame in run.frames) + self.room

    def blocks(self, engine: str, run: Run) -> int:
        """Blocks that a sequence of an engine holds at most."""
        blocks = -(-self.longest(engine, run) // self.video.geometry.block_size)
        most = self.retention.most_blocks(AHEAD)
        return blocks if engine != PACKCACHE or most is None else min(blocks, most)

    def cache_bytes(self, engine: str, run: Run) -> int:
        """Size of an engine's KV cache: a block more than its sequences hold is the null block."""
        blocks = run.batch * self.blocks(engine, run) + 1
        return blocks * self.video.geometry.block_size * self.model.kv_bytes_per_token

    def bytes_needed(self, run: Run) -> int:
        """GPU memory that the engines of ``run`` need together."""
        each = self.model.weight_bytes + OVERHEAD
        return sum(self.cache_bytes(engine, run) + each for engine in run.engines)

    def settings(self, engine: str, run: Run, model: Path) -> EngineSettings:
        """An engine on the model in the folder ``model``."""
        # With the size of a frame the plugin knows at start that a video of any length fits into the KV cache.
        layout = {"tokens_per_frame": self.video.tokens_per_frame}
        options = {**dataclasses.asdict(kernels.PACKCACHE), "layout": layout}
        switched_on = {"kv_cache_policy": kernels.PACKCACHE.name, "kv_cache_policy_config": options}
        return EngineSettings(
            model=str(model),
            dtype=self.model.dtype,
            block_size=self.video.geometry.block_size,
            kv_cache_memory_bytes=self.cache_bytes(engine, run),
            max_model_len=self.longest(engine, run),
            max_num_batched_tokens=self.chunk,
            threads=1,
            additional_config=switched_on if engine == PACKCACHE else {},
            max_num_seqs=run.batch,
            load_format="dummy",
            device=self.device,
        )


_GEOMETRY = kernels.LUMOS.geometry
LUMOS = EnginePlan(
    video=kernels.LUMOS,
    # Llama 3.2 3B, but for an output matrix of its own: as many weights are read in a step.
    model=ModelShape(
        layers=_GEOMETRY.layers,
        heads=_GEOMETRY.heads,
        kv_heads=_GEOMETRY.kv_heads,
        head_size=_GEOMETRY.head_size,
        hidden=3072,
        intermediate=8192,
        vocab=128_256,
        dtype="bfloat16",
        bytes_per_element=_GEOMETRY.dtype.itemsize,
    ),
    # 100 frames are longer than this: re-based positions are not.
    positions=131_072,
    chunk=8192,
    burst=128,
    rounds=12,
    runs={
        "13 frames, batch 1": Run(engines=(FULL, PACKCACHE, SHORT), batch=1, frames=(0, 2, 4, 8, 12)),
        "100 frames, batch 1": Run(engines=(PACKCACHE,), batch=1, frames=(0, 2, 4, 12, 25, 50, 99)),
        # All three would need 158 GB for their KV caches and weights.
        "13 frames, batch 16": Run(engines=(PACKCACHE, SHORT), batch=16, frames=(12,)),
        "13 frames, batch 16, full": Run(engines=(FULL, PACKCACHE), batch=16, frames=(12,)),
    },
)
QUICK = dataclasses.replace(
    LUMOS,
    rounds=4,
    runs={
        "13 frames, batch 1": dataclasses.replace(LUMOS.runs["13 frames, batch 1"], frames=(12,)),
        "13 frames, batch 16": LUMOS.runs["13 frames, batch 16"],
    },
)
"""For a GPU that is there for minutes: every ratio that is judged, of fewer samples."""


def measure(plan: EnginePlan, copy_bandwidth: float, free_bytes: int) -> dict[str, Any]:
    """Run everything that fits.

    Args:
        plan: what.
        copy_bandwidth: bytes a second that the GPU copies, read and written ones together.
        free_bytes: of GPU memory.

    Returns:
        The section ``engine`` of the measurement. A run of which an engine failed has ``failed``, what it said.
    """
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
        model = Path(folder) / "model"
        write_config(model, plan.model, plan.positions)
        for name, run in plan.runs.items():
            needed = plan.bytes_needed(run)
            if needed > free_bytes:
                sizes = f"{needed / 2**30:.0f} GiB of GPU memory, and {free_bytes / 2**30:.0f} GiB are free"
                own = {"measured": False, "reason": f"not measured: it needs about {sizes}"}
            else:
                try:
                    own = {"measured": True} | _measure_run(plan, run, model, copy_bandwidth)
                except EngineFailed as error:
                    own = {"measured": False, "reason": "not measured: an engine failed", "failed": str(error)}
            runs[name] = dataclasses.asdict(run) | own
    return {
        "measured": True,
        "model": dataclasses.asdict(plan.model)
        | {"positions": plan.positions, "load_format": "dummy", "step_weight_bytes": plan.model.step_weight_bytes},
        "max_num_batched_tokens": plan.chunk,
        "steps_per_burst": plan.burst,
        "copy_bytes_per_second": copy_bandwidth,
        "runs": runs,
    }


def _measure_run(plan: EnginePlan, run: Run, model: Path, copy_bandwidth: float) -> dict[str, Any]:
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for name in run.engines:
            engine = EngineProcess(name, plan.settings(name, run, model), model.parent / f"{name}.log")
            stack.callback(engine.close)
            # One after another: what the first compiles the others find.
            engine.answer()
            engines[name] = engine
        frames = {str(frame): _measure_frame(plan, run, frame, engines, copy_bandwidth) for frame in run.frames}
        about = {name: engine.call("about") for name, engine in engines.items()}
    medians = {
        name: [float(np.median(timed["seconds_per_step"][name])) for timed in frames.values()] for name in engines
    }
    return {
        "engines": about,
        "timed_frames": frames,
        "seconds_per_video": {name: video_seconds(run.frames, own, plan) for name, own in medians.items()},
    }


def video_seconds(frames: tuple[int, ...], step_seconds: list[float], plan: EnginePlan) -> float | None:
    """Time to decode all frames up to the last one, those between the timed ones interpolated; None: one was timed."""
    if len(frames) == 1:
        return None
    return float(np.dot(frames_stood_for(frames), step_seconds)) * plan.video.tokens_per_frame


def _measure_frame(
    plan: EnginePlan, run: Run, frame: int, engines: Mapping[str, EngineProcess], copy_bandwidth: float
) -> dict[str, Any]:
    """Time the engines in the middle of ``frame``."""
    retention, prompt, room = plan.retention, plan.prompt(frame), plan.room
    # No two sequences alike: they would share blocks.
    tokens = np.random.default_rng(kernels.SEED).integers(plan.model.vocab, size=(run.batch, prompt)).tolist()

    def begin(name: str, length: int, room: int, options: dict[str, Any]) -> Burst:
        return engines[name].call("begin", [own[:length] for own in tokens], room, options)

    video = {
        "packcache_condition_tokens": plan.video.condition_tokens,
        "packcache_tokens_per_frame": plan.video.tokens_per_frame,
    }
    # While the last prompts are prefilled the first sequences decode: what is read is as long as their mean.
    lead = len(begin(PACKCACHE, prompt, room, video).tokens) // run.batch
    live = retention.live_tokens(prompt + lead)
    for name, length, left in ((FULL, prompt, room), (SHORT, live, room - lead)):
        if name in engines:
            begin(name, length, left, {})
    bursts = interleave(engines, plan.rounds + 1, plan.burst)
    for engine in engines.values():
        engine.end()
    held, most = bursts[PACKCACHE][-1].used_blocks[-1], run.batch * plan.blocks(PACKCACHE, run)
    if held > most:
        raise EngineFailed(f"engine {PACKCACHE!r} holds {held} blocks, and the policy keeps {most}: it is not at work")
    seconds = {name: [sum(burst.wall_seconds) / plan.burst for burst in own[1:]] for name, own in bursts.items()}
    # In the middle of the bursts that count.
    decoded = plan.burst + plan.rounds * plan.burst // 2
    keys = {name: (prompt + lead if name == FULL else live) + decoded for name in engines}
    floor = {name: floor_seconds(plan.model, run.batch, own, copy_bandwidth) for name, own in keys.items()}
    return {
        "prompt_tokens": prompt,
        "keys": keys,
        "blocks_at_the_end": {name: own[-1].used_blocks[-1] for name, own in bursts.items()},
        "seconds_per_step": seconds,
        "seconds_per_frame": {
            name: plan.video.tokens_per_frame * float(np.median(own)) for name, own in seconds.items()
        },
        "floor_seconds_per_step": floor,
        FLOOR: {name: float(np.median(own)) / floor[name] for name, own in seconds.items()},
        "ratios": {
            ratio: kernels.summary([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])
            for ratio, (above, below) in kernels.RATIOS.items()
            if above in seconds and below in seconds
        },
    }


def floor_seconds(model: ModelShape, batch: int, keys: int, copy_bandwidth: float) -> float:
    """Time to read the weights, and ``keys`` keys and values of each sequence, once at ``copy_bandwidth``."""
    return (model.step_weight_bytes + batch * keys * model.kv_bytes_per_token) / copy_bandwidth


def targets(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound that it should keep in the last frame, and whether it does."""
    found = []
    ratio = f"{PACKCACHE} / {SHORT}"
    for name, run in section["runs"].items():
        if not run["measured"] or SHORT not in run["engines"]:
            continue
        last = run["timed_frames"][str(run["frames"][-1])]
        step = f"whole step, {name}"
        found.append(judged(f"{step}: {ratio}", last["ratios"][ratio]["median"], at_most=1.02))
        if run["batch"] == JUDGED_BATCH:
            found.append(judged(f"{step}: {FLOOR}", last[FLOOR][PACKCACHE], at_most=1.5))
    return found


def lines(section: Mapping[str, Any]) -> list[str]:
    """What is printed of it."""
    printed = []
    for name, run in section["runs"].items():
        if not run["measured"]:
            printed.append(f"whole steps, {name}: {run['reason']}")
            continue
        for frame, timed in run["timed_frames"].items():
            printed.append(f"whole steps, {name}, frame {int(frame) + 1}:")
            for engine, own in timed["seconds_per_step"].items():
                numbers = f"{timed['keys'][engine]:>7,} keys  {np.median(own) * 1e3:>10.3f} ms a step"
                printed.append(f"  {engine:<16} {numbers}  {timed[FLOOR][engine]:>6.2f} x its byte floor")
    return printed
