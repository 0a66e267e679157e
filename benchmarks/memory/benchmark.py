"""What is remembered as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

from typing import Any

from benchmarks.bundled import CAUSAL, identity
from benchmarks.memory import cached, plot, report
from benchmarks.memory.plan import CACHED_FULL, CACHED_QUICK, FILMS, FULL, QUICK, CachedPlan, MemoryPlan
from benchmarks.memory.runs import (
    MEASURES,
    REMEMBERED,
    UNSEEN,
    Counts,
    Values,
    processes,
    run_films,
    run_worlds,
    values_by_video,
)
from benchmarks.protocol import Benchmark, Session
from benchmarks.quality.variants import BLOCK_SIZE
from benchmarks.report.parts import Result
from benchmarks.statistics import Float64, mean_of_videos
from benchmarks.training.live import SPARSELY
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED

PAPER = "packcache, H = 2"
"""What others are compared with, video by video."""

Means = dict[str, dict[str, dict[str, float] | None]]
"""By variant and measure, over videos."""


def measure(plan: MemoryPlan, session: Session) -> dict[str, Any]:
    """Ask about every world and every film under every policy."""
    worlds = run_worlds(plan, processes(), session.console)
    films = run_films(plan, processes(), session.console)
    return {"machine": {"processes": processes(), "threads_per_process": 1}, **summary(plan, worlds, films)}


def measure_cached(plan: CachedPlan, session: Session) -> dict[str, Any]:
    """Ask about every world under every policy, its cache in every format."""
    counts = run_worlds(plan, processes(), session.console)
    return {"machine": {"processes": processes(), "threads_per_process": 1}, **cached.summary(plan, counts)}


def summary(plan: MemoryPlan, of_worlds: Counts, asked_of_films: Counts) -> dict[str, Any]:
    """What was right, over videos: the result."""
    worlds = values_by_video(of_worlds, slice(plan.first_frame - 1, plan.frames))
    films = of_films(asked_of_films)
    scores = _means(worlds)
    return {
        "model": identity(CAUSAL),
        "seeds": [FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.worlds - 1],
        "worlds": plan.worlds,
        "frames_counted": [plan.first_frame, plan.frames],
        "block_size": BLOCK_SIZE,
        "notes": [
            "every token is asked for after the true ones before it: mistakes do not add up",
            SPARSELY,
            "live tokens: what is held of the past when the last frame begins",
            "differences are of the same videos: the interval is that of the mean of the differences",
            "films: asked for is what differs from the frame before the cut, without what no frame of the scene showed",
            "films: what is right without the earlier shot is no memory: the model knows the toy world by heart, and "
            "the less it holds of the last frame, the less of the wrong scene it copies",
        ],
        "variants": {
            variant.name: {
                "family": variant.family,
                "config": variant.server.as_mapping(),
                "live_tokens": variant.live_tokens(plan.frames - 1),
                "scores": scores[variant.name],
            }
            for variant in plan.variants
        },
        "differences": _differences(worlds),
        "films": {
            "films": plan.films,
            "cuts": {kind: list(cuts) for kind, cuts in FILMS.items()},
            "variants": {
                variant.name: {"config": variant.server.as_mapping(), "scores": own}
                for variant, own in zip(plan.film_variants, _means(films).values(), strict=True)
            },
            "differences": _differences(films),
        },
    }


def of_films(counts: Counts) -> Values:
    """Shares right after a return, and by how much they are more than without the shot that it returns to."""
    values = values_by_video(counts, slice(None))
    return {
        name: {key: found for kind in FILMS for key, found in _of_kind(kind, own).items()}
        for name, own in values.items()
    }


def _of_kind(kind: str, own: dict[str, Float64]) -> dict[str, Float64]:
    return {kind: own[kind], kind + REMEMBERED: own[kind] - own[kind + UNSEEN]}


def _means(values: Values) -> Means:
    return {name: {key: mean_of_videos(found) for key, found in own.items()} for name, own in values.items()}


def _differences(values: Values) -> Means:
    """Of everybody and the paper's rule, video by video."""
    return _means(
        {
            f"{name} - {PAPER}": {key: found - values[PAPER][key] for key, found in own.items()}
            for name, own in values.items()
            if name != PAPER
        }
    )


def targets(result: Result) -> list[dict[str, Any]]:
    """What looks at changes against the paper's rule at H = 2: the smallest budget that remembers no less."""
    changed = {name: own["live_tokens"] for name, own in result["variants"].items() if own["family"] == "changed"}
    found = []
    for key in MEASURES:
        beside: dict[str, Any] = {name: result["differences"][f"{name} - {PAPER}"][key] for name in changed}
        good = [name for name, own in beside.items() if own is not None and own["mean"] >= 0]
        name = min(good or changed, key=changed.__getitem__)
        # Of a few worlds there may be nothing to tell.
        own = beside[name] or {"mean": None}
        found.append(
            {
                "ratio": f"{key}: {name} - {PAPER}",
                "measure": key,
                "name": name,
                "value": own["mean"],
                **own,
                "at_least": 0.0,
                "met": bool(good),
            }
        )
    return found


MEMORY = Benchmark(
    name="memory",
    title="What is remembered",
    place=12,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
    draw=plot.draw,
    same=lambda result, plan, quick: (
        result.get("worlds") == plan.worlds and result.get("films", {}).get("films") == plan.films
    ),
)


CACHED = Benchmark(
    name="memory-cached",
    title="What is remembered in fewer bits",
    place=12,
    plan=lambda quick: CACHED_QUICK if quick else CACHED_FULL,
    measure=measure_cached,
    judged={"targets": cached.targets},
    report=cached,
    same=lambda result, plan, quick: result.get("worlds") == plan.worlds,
)
