"""What is remembered as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

from typing import Any

from benchmarks.memory import plot, report
from benchmarks.memory.plan import FULL, QUICK, MemoryPlan
from benchmarks.memory.runs import MEASURES, processes, run
from benchmarks.protocol import Benchmark, Session
from benchmarks.quality.variants import BLOCK_SIZE
from benchmarks.report.parts import Result
from benchmarks.statistics import mean_of_videos
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED

PAPER = "packcache, H = 2"
"""What others are compared with, world by world."""


def measure(plan: MemoryPlan, session: Session) -> dict[str, Any]:
    """Ask about every world under every policy."""
    counts = run(plan, processes(), session.console)
    span = slice(plan.first_frame - 1, plan.frames)
    values = {name: {key: own[key].of_videos(span) for key in MEASURES} for name, own in counts.items()}
    return {
        "machine": {"processes": processes(), "threads_per_process": 1},
        "model": "the bundled one",
        "seeds": [FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.worlds - 1],
        "worlds": plan.worlds,
        "frames_counted": [plan.first_frame, plan.frames],
        "block_size": BLOCK_SIZE,
        "notes": [
            "every token is asked for after the true ones before it: mistakes do not add up",
            "live tokens: what is held of the past when the last frame begins",
            "differences are of the same worlds: the interval is that of the mean of the differences",
        ],
        "variants": {
            variant.name: {
                "family": variant.family,
                "config": variant.server.as_mapping(),
                "live_tokens": variant.live_tokens(plan.frames - 1),
                "scores": {key: mean_of_videos(values[variant.name][key]) for key in MEASURES},
            }
            for variant in plan.variants
        },
        "differences": {
            f"{name} - {PAPER}": {key: mean_of_videos(own[key] - values[PAPER][key]) for key in MEASURES}
            for name, own in values.items()
            if name != PAPER
        },
    }


def targets(result: Result) -> list[dict[str, Any]]:
    """What looks at changes against the paper's rule at H = 2: the smallest budget that remembers no less."""
    changed = {name: own["live_tokens"] for name, own in result["variants"].items() if own["family"] == "changed"}
    found = []
    for key in MEASURES:
        beside: dict[str, Any] = {name: result["differences"][f"{name} - {PAPER}"][key] for name in changed}
        good = [name for name, own in beside.items() if own is not None and own["mean"] >= 0]
        name = min(good or changed, key=changed.__getitem__)
        found.append({"measure": key, "name": name, "beside": PAPER, **(beside[name] or {}), "met": bool(good)})
    return found


MEMORY = Benchmark(
    name="memory",
    title="What is remembered",
    place=12,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    goals=report.goals,
    rows=report.rows,
    long=report.long,
    short=report.short,
    draw=plot.draw,
    same=lambda result, plan, quick: result.get("worlds") == plan.worlds,
)
