"""Many videos at once as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
import shlex
from statistics import fmean
from typing import Any

from benchmarks.decode.plan import described
from benchmarks.goals import judged
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result
from benchmarks.serve import report
from benchmarks.serve.plan import PACKCACHE, POLICIES, QUICK, SEED, SERVERS, STOCK, THREADS, USUAL, ServePlan
from benchmarks.serve.runs import CPU, Bench, servers
from vllm_packcache.tools.progress import counting

CAPACITY_SHARE = 0.9
"""Of full length / bounded length, which the capacity must grow by."""

THROUGHPUT_RATIO = 3.0


def measure(plan: ServePlan, session: Session) -> dict[str, Any]:
    """Find what each server has room for, then load both."""
    result: dict[str, Any] = {
        "machine": {"threads_per_engine": THREADS},
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "policy": described(POLICIES[PACKCACHE]),
        **sizes(plan),
        "peak_blocks_of_a_video": {name: plan.peak_blocks(name) for name in SERVERS},
        "mean_blocks_of_a_video": {name: fmean(plan.held_blocks(name)) for name in SERVERS},
    }
    with servers(plan, session.console) as running, counting(session.console, "tokens") as progress:
        bench = Bench(plan, running, progress)
        result["engine"] = {name: shlex.join(server.arguments) for name, server in running.items()}
        bench.warm_up()
        result["capacity"] = {name: bench.capacity(name) for name in SERVERS}
        result["load"] = bench.load(plan.load_videos)
    return result


def sizes(plan: ServePlan) -> dict[str, Any]:
    """What a result says of its plan."""
    video = {name: getattr(plan, name) for name in ("condition_tokens", "tokens_per_frame", "frames")}
    return {"video": video, "pool_blocks": plan.pool_blocks}


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does."""
    peaks, capacity = result["peak_blocks_of_a_video"], result["capacity"]
    held = capacity[PACKCACHE]["videos"] / capacity[STOCK]["videos"]
    return [
        judged("capacity packcache / stock", held, at_least=CAPACITY_SHARE * peaks[STOCK] / peaks[PACKCACHE]),
        judged(report.RATIO, result["load"][report.RATIO][CPU]["median"], at_least=THROUGHPUT_RATIO),
    ]


SERVE = Benchmark(
    name="serve",
    title="Many videos at once",
    place=2,
    required=True,
    plan=lambda quick: QUICK if quick else USUAL,
    measure=measure,
    judged={"targets": targets},
    report=report,
    same=lambda result, plan, quick: sizes(plan).items() <= result.items(),
)
