"""Videos over HTTP as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.bundled import CAUSAL, identity
from benchmarks.goals import judged
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result
from benchmarks.videos import report
from benchmarks.videos.plan import FULL, QUICK, THREADS, VideosPlan
from benchmarks.videos.runs import ENGINE, Bench, served
from vllm_packcache.tools.progress import counting


def measure(plan: VideosPlan, session: Session) -> dict[str, Any]:
    """Run every comparison."""
    with counting(session.console, "videos") as progress, served() as server:
        bench = Bench(plan, server, progress)
        return {
            "machine": {"threads_per_engine": THREADS},
            "model": identity(CAUSAL),
            "plan": dataclasses.asdict(plan),
            "overhead": bench.overhead(),
            "followers": bench.followers(),
        }


def targets(result: Result) -> list[dict[str, Any]]:
    """What a video may cost, and whether it does no more: None for the times of a quick run."""
    median = result["overhead"]["ratios"][ENGINE]["median"]
    return [judged(report.OVERHEAD, median, at_most=1.03, judge=not result["quick"])]


VIDEOS = Benchmark(
    name="videos",
    title="Videos over HTTP",
    place=8,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
)
