"""The cost of guidance as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.decode.plan import described
from benchmarks.decode.samples import CPU
from benchmarks.goals import judged
from benchmarks.guidance import report
from benchmarks.guidance.plan import (
    BLOCK_SIZE,
    FULL,
    LAST,
    NAMES,
    POLICY,
    QUICK,
    SEED,
    TEXTS,
    THREADS,
    VIDEOS,
    GuidancePlan,
)
from benchmarks.guidance.runs import Bench
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result

BOUNDS: dict[tuple[str, str], dict[str, float]] = {
    (TEXTS, "able / plain"): {"at_most": 1.01},
    (VIDEOS, "able / plain"): {"at_most": 1.01},
    (VIDEOS, "guided / two"): {"at_most": 1.03},
    (LAST, "guided / two"): {"at_most": 1.03},
    (LAST, "full / packcache"): {"at_least": 3.7},
}
"""Of ratios of processor time, by stage."""


def measure(plan: GuidancePlan, session: Session) -> dict[str, Any]:
    """Run every stage."""
    result: dict[str, Any] = {
        "machine": {"threads_per_engine": THREADS},
        "seed": SEED,
        "policy": described(POLICY),
        "engine": {"block_size": BLOCK_SIZE, "enforce_eager": True, "runner": "V2, interpreted"},
        "plan": dataclasses.asdict(plan),
        "names": NAMES,
    }
    with Bench.in_temporary_folder(plan, session.console) as bench:
        result["stages"] = bench.compare((TEXTS, VIDEOS)) | bench.compare((LAST,))
    return result


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    return [
        judged(
            report.named(stage, ratio),
            result["stages"][stage]["ratios"][ratio][CPU]["median"],
            **bound,
            judge=not result["quick"],
        )
        for (stage, ratio), bound in BOUNDS.items()
    ]


GUIDANCE = Benchmark(
    name="guidance",
    title="Guidance of causal videos",
    place=9,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
)
