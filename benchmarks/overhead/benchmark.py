"""The host's cost as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.decode.plan import described
from benchmarks.decode.samples import CPU
from benchmarks.goals import judged
from benchmarks.overhead import report
from benchmarks.overhead.plan import BLOCK_SIZE, CASES, FULL, POLICY, QUICK, SEED, THREADS, OverheadPlan
from benchmarks.overhead.runs import Bench
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result

GOALS = {"room / stock": 1.10, "packcache / stock": 1.25}
"""At most so many times stock vLLM's processor time."""


def measure(plan: OverheadPlan, session: Session) -> dict[str, Any]:
    """Run every case on both model runners."""
    result: dict[str, Any] = {
        "machine": {"threads_per_engine": THREADS},
        "seed": SEED,
        "model": dataclasses.asdict(plan.model),
        "engine": {"block_size": BLOCK_SIZE, "enforce_eager": True},
        "policy": described(POLICY),
        "cases": CASES,
        "requests": plan.requests,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "condition_tokens": plan.condition_tokens,
        "tokens_per_frame": plan.tokens_per_frame,
    }
    with Bench.in_temporary_folder(plan, session.console) as bench:
        result |= bench.v1()
        result["host"]["V2"] = bench.v2()
    return result


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    found = {ratio: result["ratios"][ratio][CPU]["median"] for ratio in GOALS}
    return [judged(ratio, found[ratio], at_most=bound, judge=not result["quick"]) for ratio, bound in GOALS.items()]


OVERHEAD = Benchmark(
    name="overhead",
    title="Host cost of a step",
    place=9,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
)
