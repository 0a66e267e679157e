"""Results as the benchmarks write them, without measuring anything: for tests of what is made of results."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bytes import benchmark as bytes_benchmark
from benchmarks.bytes.plan import CASES
from benchmarks.bytes.plan import FULL as BYTES_SIZES
from benchmarks.decode import benchmark as decode_benchmark
from benchmarks.decode.plan import FRAME_RATIOS, FULL, described
from benchmarks.decode.samples import CLOCKS, ratios_of, step_times, summed
from benchmarks.decode.samples import summary as summary_of_ratios
from benchmarks.engine_process import Burst
from benchmarks.guidance import benchmark as guidance_benchmark
from benchmarks.guidance.plan import FULL as GUIDANCE_SIZES
from benchmarks.guidance.plan import GUIDED_FULL, GUIDED_LAST, RATIOS, TWO_LAST
from benchmarks.masked import history as masked_history_benchmark
from benchmarks.masked import passes as masked_passes_benchmark
from benchmarks.masked.passes import DRAWING, PassesPlan
from benchmarks.masked.runs import Frame
from benchmarks.memory import cached as memory_cached_benchmark
from benchmarks.memory.plan import CachedPlan
from benchmarks.memory.runs import MEASURES as REMEMBERED
from benchmarks.quality.deviation import SETTINGS, WAYS
from benchmarks.quality.generators import Cached, Causal, Encoded, Generator, Guided, Masked, Passes
from benchmarks.quality.measures import MEASURES
from benchmarks.quality.passes import OFF
from benchmarks.quality.runs import QualityPlan, Videos, summary
from benchmarks.quality.variants import less_of
from benchmarks.registry import benchmarks
from benchmarks.statistics import Count
from benchmarks.videos import benchmark as videos_benchmark
from benchmarks.videos.plan import VideosPlan
from vllm_packcache.calibrate.command import ALL_QUERIES, analyse
from vllm_packcache.calibrate.mass import NEAREST, Mass
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS
from vllm_packcache.tools import files

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "results"

ABOUT = {
    "command": "vllm-packcache bench all --out here",
    "date": "2026-01-31",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "vllm": "0.32.0", "vllm_packcache": "0.1.0"},
    "machine": {"cpu": "Some CPU", "cores": 2, "load_average_before": [0.25, 1.5, 2.75]},
}

DISTANCES, LAYERS, HEADS, VIDEOS = 8, 3, 2, 4


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((COMMITTED / name).read_text(encoding="utf-8"))


def decode(*, quick: bool = False, frames: bool = True) -> dict[str, Any]:
    """The committed one, with another stage "every frame", or without."""
    result = read("decode.json") | {"quick": quick}
    result.pop("frames", None)
    if frames:
        result["frames"] = _frames()
        result["targets"] = decode_benchmark.targets(result)
    else:
        result["targets"] = [target for target in result["targets"] if not target["ratio"].startswith("end to end")]
    return result


def _frames() -> dict[str, Any]:
    """As `benchmarks.decode.runs.Bench.frames` makes it of two frames."""
    generator = np.random.default_rng(0)
    frames = []
    for number in range(2):
        bursts = {}
        for name in FULL.policies:
            steps = generator.uniform(0.01, 0.02, (4, 2)) * (4 if name == "full" else 1)
            bursts[name] = [Burst([cpu], [wall], [0], [1]) for cpu, wall in steps.tolist()]
        live = dict.fromkeys(FULL.policies, 1000 + 100 * number)
        times = step_times(bursts, FRAME_RATIOS)
        frames.append({"frame": number, "prompt_tokens": 2000 + number, "live_tokens": live, **times})
        frames[-1]["blocks_as_decided"] = True
    seconds = summed(frames, [FULL.tokens_per_frame] * 2)
    return {
        "tokens_per_frame": FULL.tokens_per_frame,
        "choosing": {"seconds": 0.004, "frame_seconds": 40.0, "share": 0.0001},
        "policies": {name: described(policy) for name, policy in FULL.policies.items()},
        "frames": frames,
        "end_to_end": {"is": "the sum"} | seconds | {"ratios": ratios_of(seconds, FRAME_RATIOS)},
        "last": {"ratios": frames[-1]["ratios"]},
        "blocks_as_decided": True,
    }


@cache
def _quality(model: Generator, videos: int, trained_frames: int) -> dict[str, Any]:
    plan = QualityPlan(generator=model, videos=videos, trained_frames=trained_frames, frontier_videos=2)
    generator = np.random.default_rng(0)

    def made(frames: int, count: int) -> Videos:
        scores = {
            name: Count(generator.uniform(0.2, 0.9, (count, frames)), np.ones((count, frames))) for name in MEASURES
        }
        return Videos(np.zeros((count, frames, 1), np.int64), scores)

    result = {
        "benchmark": model.benchmark,
        **ABOUT,
        "seconds_of_this_run": 12,
        "seeds": [10000, 10000 + videos - 1],
        "videos": videos,
        "trained_frames": trained_frames,
        "notes": ["greedy"],
        **summary(plan, {key: made(work.frames, work.videos) for key, work in plan.works.items()}),
    }
    if isinstance(model, Passes):
        result["model"] = {"name": "a model", "options": {"guidance": 1.5}}
        result["deviations"] = [
            {
                "guidance": guidance,
                "steps": steps,
                "name": less_of(less),
                **{label: {"mean": 0.25, "ci95": 0.1} for label in OFF},
            }
            for guidance, steps in SETTINGS
            for less in WAYS
        ]
    (benchmark,) = (own for own in benchmarks() if own.name == model.benchmark)
    return result | {name: judge(result) for name, judge in benchmark.judged.items()}


def quality(videos: int = 3, trained_frames: int = 2) -> dict[str, Any]:
    """Of videos with random scores."""
    return json.loads(json.dumps(_quality(Causal(), videos, trained_frames)))


def quality_masked() -> dict[str, Any]:
    """The same of a masked model."""
    model = {"name": "a model", "options": {"steps": 3, "guidance": 1.5}}
    return json.loads(json.dumps(_quality(Masked(), 3, 2) | {"model": model}))


def quality_passes() -> dict[str, Any]:
    """The same of frames of which less is computed."""
    return json.loads(json.dumps(_quality(Passes(), 3, 2)))


def frame_of_passes(rows: list[int], start: float, slope: float, drawing: float = 0.0) -> Frame:
    """A frame whose layers take so long to begin and for a row, and whose output layer takes so long in all."""
    layers = [start + slope * count for count in rows]
    drawn = [drawing, *[0.0] * (len(rows) - 1)]
    own = {
        "passes": [sum(parts) + 0.5 for parts in zip(layers, drawn, strict=True)],
        "layers": layers,
        "choosing": drawn,
        "entering": [0.0] * len(rows),
        "encoding": [0.0] * len(rows),
    }
    return dict.fromkeys(CLOCKS, own)


def masked_passes(plan: PassesPlan | None = None) -> dict[str, Any]:
    """Of frames whose passes take what their rows say, two rounds."""
    plan = plan or masked_passes_benchmark.sizes(quick=False)
    rows = {name: plan.rows(video) for name, video in plan.cases.items()}
    slopes = {"full": 3e-3, "packcache": 1e-3, "fewer rows": 1e-3}
    frames = {
        name: [frame_of_passes(own, 0.25, turn * slopes[name]) for turn in (1, 1.1)] for name, own in rows.items()
    }
    drawn = [frame_of_passes(rows["packcache"], 0.25, 1e-3, 30.0)] * 2
    result = {
        "benchmark": "masked-passes",
        **ABOUT,
        "quick": False,
        "seconds": 12,
        "engine": {"device": "cpu"},
        **masked_passes_benchmark.found(plan, frames, drawn),
    }
    assert set(result["passes"][CLOCKS[0]]) == {*rows, DRAWING}
    return json.loads(json.dumps(result | {"targets": masked_passes_benchmark.targets(result)}))


def masked_history() -> dict[str, Any]:
    """Of frames that take a little longer the fewer bits there are, two rounds."""
    plan = masked_history_benchmark.sizes(quick=False)
    frames = {
        name: [frame_of_passes([2 * 4084] * 2, 0.25, turn * (1 + 0.01 * more) * 1e-3) for turn in (1, 1.1)]
        for more, name in enumerate(masked_history_benchmark.FORMATS)
    }
    result = {
        "benchmark": "masked-history",
        **ABOUT,
        "quick": False,
        "seconds": 12,
        "engine": {"device": "cpu", "block_size": 32},
        **masked_history_benchmark.found(plan, frames),
    }
    return json.loads(json.dumps(result | {"targets": masked_history_benchmark.targets(result)}))


def quality_guided() -> dict[str, Any]:
    """The same of guided videos."""
    return json.loads(json.dumps(_quality(Guided(scales=(1.5, 3)), 3, 2)))


def quality_cached() -> dict[str, Any]:
    """The same of caches of fewer bits."""
    return json.loads(json.dumps(_quality(Cached(), 3, 2)))


def quality_history() -> dict[str, Any]:
    """The same of older frames in fewer bits."""
    model = {"name": "a model", "options": {"steps": 3, "guidance": 1.5}}
    return json.loads(json.dumps(_quality(Encoded(), 3, 2) | {"model": model}))


def memory_cached() -> dict[str, Any]:
    """Of three worlds with random shares that are right."""
    plan = CachedPlan(worlds=3, formats=("int8_per_token_head",))
    generator = np.random.default_rng(0)

    def count() -> Count:
        return Count(generator.uniform(0.2, 0.9, (plan.worlds, plan.frames)), np.ones((plan.worlds, plan.frames)))

    counts = {variant.name: {key: count() for key in REMEMBERED} for variant in plan.variants}
    result = {"benchmark": "memory-cached", **ABOUT, "seconds": 12, **memory_cached_benchmark.summary(plan, counts)}
    return json.loads(json.dumps(result | {"targets": memory_cached_benchmark.targets(result)}))


def fewer_bytes() -> dict[str, Any]:
    """Videos at once: nearly twice as many."""

    def engine(blocks: int, running: list[int]) -> dict[str, Any]:
        return {
            "about": {"kv_cache_blocks": blocks + 1},
            "most_at_once": max(running),
            "at_once": running[0],
            "mean_at_once": sum(running) / len(running),
            "running": running,
            "used_blocks": blocks,
            "preemptions": 2,
            "ended": 48,
        }

    cases = {
        name: {
            "case": dataclasses.asdict(case),
            "pool_bytes": BYTES_SIZES.pool_bytes(case.block_size),
            "engines": {"bfloat16": engine(100, [10, 11, 10]), case.cache: engine(194, [20, 21, 20])},
        }
        for name, case in CASES.items()
    }
    result = {
        "benchmark": "bytes",
        **ABOUT,
        "quick": False,
        "seconds": 12,
        "seed": 0,
        "plan": dataclasses.asdict(BYTES_SIZES),
        "videos": BYTES_SIZES.videos,
        "cases": cases,
        "left_out": [],
    }
    return json.loads(json.dumps(result | {"targets": bytes_benchmark.targets(result)}))


@cache
def _calibrate(videos: int, target: float, views: tuple[str, ...]) -> dict[str, Any]:
    server = ServerConfig.parse(PackCache.name, "demo")
    assert server.layout is not None
    frame = server.layout.frame_layout()
    layout = VideoLayout(frame, CONDITION_TOKENS, server.layout.condition_image_tokens)
    frames, blocks = 2 * DISTANCES, -(-layout.frame_start(2 * DISTANCES) // 16)
    generator = np.random.default_rng(0)
    weights = np.concatenate([np.full(NEAREST, 0.3), 0.6 ** np.arange(DISTANCES)])

    def mass() -> Mass:
        by_segment = weights * generator.uniform(0.9, 1.1, (LAYERS, HEADS, len(weights)))
        by_block = generator.uniform(size=(frames - DISTANCES, LAYERS, blocks))
        return Mass(layout, by_segment / by_segment.sum(-1, keepdims=True), by_block / by_block.sum(-1, keepdims=True))

    masses = {view: [mass() for _ in range(videos)] for view in views}
    return {
        "benchmark": "calibrate",
        **ABOUT,
        "seconds": 3,
        "model": "demo",
        "videos": videos,
        "frames": frames,
        "trained_frames": frames,
        "seeds": {"videos": [10000, 10000 + videos - 1], "bootstrap": 0},
        "largest_distance": DISTANCES,
        "query_frames": [DISTANCES + 1, frames],
        "block_size": 16,
        "target": target,
        "notes": ["shares"],
        **analyse(masses, frame, target, 16),
    }


def calibrate(videos: int = VIDEOS, target: float = 0.8) -> dict[str, Any]:
    """Of random attention that decays."""
    return json.loads(json.dumps(_calibrate(videos, target, (ALL_QUERIES,))))


def calibrate_masked() -> dict[str, Any]:
    """The same of two streams."""
    result = _calibrate(VIDEOS, 0.8, ("conditional, half-way", "unconditional, half-way"))
    return json.loads(json.dumps(result | {"benchmark": "calibrate-masked", "model": "demo_masked"}))


def gpu() -> dict[str, Any]:
    """One that was measured, of one step."""
    seconds = {"full": [0.004, 0.005, 0.006], "packcache": [0.001, 0.002, 0.003], "short": [0.001, 0.002, 0.003]}
    ratios = {"full / packcache": {"median": 2.5, "quartiles": [2.2, 3.1]}}
    return {
        **ABOUT,
        "benchmark": "gpu",
        "seed": 0,
        "machine": {"gpu": "Some GPU", "memory_bytes": 1000},
        "measured": True,
        "checks": {"rotation": {"error": 0.5, "bound": 1.0, "passed": True}},
        "attention": {
            "decode": {
                "keys": {"full": 50_000, "packcache": 10_000, "short": 10_000},
                "kernels": {"ours": {"seconds": seconds, "ratios": ratios}},
            }
        },
        "rotation": {"seconds": {"rotation": [0.01, 0.02]}, "median": 0.015},
        "compaction": {"decode": {"median": 1e-5}},
        "engine": {"measured": False, "reason": "not measured: vLLM is not installed here"},
        "targets": [{"ratio": "decode, ours: full / packcache", "value": 2.5, "at_least": 4.0, "met": False}],
    }


def guidance() -> dict[str, Any]:
    """One of three rounds, which meets every goal."""
    seconds = {"plain": 0.004, "able": 0.00402, "guided": 0.0041, GUIDED_FULL: 0.2, GUIDED_LAST: 0.051, TWO_LAST: 0.05}
    stages = {}
    for stage, ratios in RATIOS.items():
        own = {name: [seconds[name] * slow for slow in (1.0, 1.5, 1.25)] for pair in ratios.values() for name in pair}
        clocks = dict.fromkeys(CLOCKS, own)
        stages[stage] = clocks | {"ratios": ratios_of(clocks, ratios)}
    result = {
        "benchmark": "guidance",
        **ABOUT,
        "quick": False,
        "seconds": 12,
        "seed": 0,
        "plan": dataclasses.asdict(GUIDANCE_SIZES),
        "stages": stages,
    }
    return json.loads(json.dumps(result | {"targets": guidance_benchmark.targets(result)}))


def videos() -> dict[str, Any]:
    """One of three rounds."""
    ratios = [0.99, 1.01, 1.02]
    completion = {"engine_cpu": 0.4, "api_server_cpu": 0.1, "wall": 0.5}
    rounds = [
        {
            "completion": completion,
            "video": {clock: own * value for clock, value in completion.items()} | {"decode": 0.003, "storage": 0.004},
        }
        for own in ratios
    ]
    result = {
        "benchmark": "videos",
        **ABOUT,
        "quick": False,
        "seconds": 12,
        "model": {"name": "a model"},
        "plan": dataclasses.asdict(VideosPlan(frames=2, rounds=3, followed_rounds=2)),
        "overhead": {
            "tokens_per_frame": 257,
            "rounds": rounds,
            "ratios": dict.fromkeys(completion, summary_of_ratios(ratios)),
        },
        "followers": {"rounds": [{count: {"frame": 0.5, "api_server_cpu": 0.1} for count in ("0", "1", "4")}] * 2},
    }
    return json.loads(json.dumps(result | {"targets": videos_benchmark.targets(result)}))


def fill(folder: Path) -> dict[str, dict[str, Any]]:
    """Write one of each into a folder."""
    results = {
        "decode.json": decode(),
        "serve.json": read("serve.json"),
        "masked.json": read("masked.json"),
        "quality.json": quality(),
        "quality_cached.json": quality_cached(),
        "quality_guided.json": quality_guided(),
        "quality_history.json": quality_history(),
        "quality_passes.json": quality_passes(),
        "masked_history.json": masked_history(),
        "masked_passes.json": masked_passes(),
        "quality_masked.json": quality_masked(),
        "calibrate.json": calibrate(),
        "calibrate_masked.json": calibrate_masked(),
        "long_video.json": read("long_video.json"),
        "overhead.json": read("overhead.json"),
        "gpu.json": gpu(),
        "guidance.json": guidance(),
        "bytes.json": fewer_bytes(),
        "memory.json": read("memory.json"),
        "memory_cached.json": memory_cached(),
        "play.json": read("play.json"),
        "videos.json": videos(),
    }
    for name, result in results.items():
        files.write(folder / name, result)
    return results
