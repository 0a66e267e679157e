"""Decoding as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.progress import Progress, TimeElapsedColumn

from benchmarks.decode import plot, report
from benchmarks.decode.plan import (
    AT_ONE_BUDGET,
    BESIDE_FRAMES,
    BESIDE_LAST_FRAME,
    BLOCK_SIZE,
    FULL,
    LASTING,
    POLICY,
    QUICK,
    SEED,
    THREADS,
    DecodePlan,
    described,
)
from benchmarks.decode.runs import Bench
from benchmarks.decode.samples import CPU
from benchmarks.goals import judged
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result


def measure(plan: DecodePlan, session: Session) -> dict[str, Any]:
    """Run everything."""
    result: dict[str, Any] = {
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "engine": {"block_size": BLOCK_SIZE, "max_num_batched_tokens": plan.chunk, "enforce_eager": True},
        "policy": described(POLICY),
        "steps_per_burst": plan.burst,
    }
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with (
        Progress(*columns, console=session.console, transient=True) as progress,
        Bench.in_temporary_folder(plan, progress) as bench,
        bench.engines("that stay", LASTING),
    ):
        with bench.engines("for the last frame", BESIDE_LAST_FRAME):
            result["last_frame"] = bench.last_frame()
            result["machine"] = {"threads_per_engine": THREADS, "huge_page_kib": bench.huge_page_kib()}
            result["control"] = bench.control()
            result["sliding_frame"] = bench.sliding_frame()
            result["early_and_late_frame"] = bench.early_and_late_frame()
            result["generated"] = bench.generated()
        with bench.engines("of other policies", BESIDE_FRAMES):
            result["frames"] = bench.frames()
    return result


def share_of_reading(result: Mapping[str, Any]) -> dict[str, float]:
    """Part of a step in the middle of the last frame that a sequence of one block does not need."""
    tiny = median(sample for own in result["control"]["tiny"][CPU].values() for sample in own)
    steps = result["last_frame"]["places"]["middle"][CPU]
    return {name: 1 - tiny / median(own) for name, own in steps.items()}


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What does not depend on time."""
    runs = ("last_frame", "sliding_frame", "early_and_late_frame", "generated", "frames")
    return {
        "tokens of opt_out equal those of full": result["last_frame"]["tokens_equal"],
        "blocks in use are those that retention decides": all(result[run]["blocks_as_decided"] for run in runs),
    }


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    last = {name: by_clock[CPU]["median"] for name, by_clock in result["last_frame"]["ratios"].items()}
    growth, generated = result["early_and_late_frame"], result["generated"]
    rebase = result["sliding_frame"][CPU]["rebase / absolute"]
    late = growth["ratios"]["late / early"][CPU]["median"]
    whole, middle = (
        {name: own[CPU]["median"] for name, own in result["frames"][part]["ratios"].items()}
        for part in ("end_to_end", "last")
    )
    judge = not result["quick"]
    return [
        judged("full / packcache", last["full / packcache"], at_least=3.7, judge=judge),
        judged("packcache / short", last["packcache / short"], at_most=1.05, judge=judge),
        judged("opt_out / full", last["opt_out / full"], at_most=1.02, judge=judge),
        judged("rebase / absolute", rebase, at_most=1.02, judge=judge),
        judged(report.late(result), late, at_most=1.03, judge=judge),
        judged(f"{report.END_TO_END}full / packcache", whole["full / packcache"], at_least=2.2, judge=judge),
        judged(report.LAST_OF_CHANGED, middle["full / changed, least"], at_least=5.0, judge=judge),
        judged(f"{report.END_TO_END}full / changed, least", whole["full / changed, least"], at_least=2.7, judge=judge),
        judged(f"{report.END_TO_END}{AT_ONE_BUDGET}", whole[AT_ONE_BUDGET], at_most=1.01, judge=judge),
        judged(report.CHOOSING, result["frames"]["choosing"]["share"], at_most=0.01, judge=judge),
        _peak_target("peak blocks, prompted", growth["peak_blocks"]),
        _peak_target("peak blocks, generated", generated["peak_blocks"]),
    ]


def _peak_target(name: str, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Late over early: equal, but for one block at each boundary of the condition and of the window's frames."""
    boundaries = 1 + POLICY.window + 1
    return judged(name, peaks["late"] / peaks["early"], at_most=1 + boundaries / peaks["early"])


DECODE = Benchmark(
    name="decode",
    title="Decoding, one request",
    place=1,
    required=True,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"share_of_reading": share_of_reading, "checks": checks, "targets": targets},
    report=report,
    draw=plot.draw,
    # Results of before there were frames lack them.
    same=lambda result, plan, quick: result.get("quick") == quick and "frames" in result,
)
