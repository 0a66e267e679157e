"""Sessions as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.goals import judged
from benchmarks.play import report
from benchmarks.play.plan import FULL, PACKCACHE, POLICIES, QUICK, SEED, THREADS, PlayPlan
from benchmarks.play.runs import Bench
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result
from vllm_packcache.tools.progress import counting


def measure(plan: PlayPlan, session: Session) -> dict[str, Any]:
    """Run every comparison."""
    with (
        counting(session.console, "frames") as progress,
        Bench.in_temporary_folder(plan, session.console, progress) as bench,
    ):
        return {
            "machine": {"threads_per_engine": THREADS},
            "seed": SEED,
            "model": dataclasses.asdict(plan.model),
            "policies": POLICIES,
            "plan": dataclasses.asdict(plan),
            "throughput": bench.throughput(),
            "late_frames": bench.late_frames(),
            "pauses": bench.pauses(),
            "held": bench.held(),
        }


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    timed = not result["quick"]
    throughput = result["throughput"]["ratios"][report.CPU]["median"]
    return [
        judged(report.THROUGHPUT, throughput, at_least=2.0, judge=timed),
        judged(report.LATE, result["late_frames"]["ratio"], at_most=1.05, judge=timed),
        judged(report.PAUSE, result["pauses"][PACKCACHE]["worst / median"], at_most=1.5, judge=timed),
        judged(report.HELD, float(result["held"]["sessions"]), at_least=3.0),
    ]


PLAY = Benchmark(
    name="play",
    title="World models that are played",
    place=8,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
)
