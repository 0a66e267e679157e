"""Videos at once in as many bytes as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.bytes import report
from benchmarks.bytes.plan import BASE, CASES, FULL, JUDGED, POLICY, QUICK, SEED, THREADS, BytesPlan
from benchmarks.bytes.runs import compare
from benchmarks.decode.plan import described
from benchmarks.goals import judged
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result
from vllm_packcache.tools.progress import counting

AT_LEAST = 1.9
"""Videos at once, in 8 bits / in bfloat16."""


def measure(plan: BytesPlan, session: Session) -> dict[str, Any]:
    """Fill the pool of every case that this processor can run, in both formats."""
    # vLLM stores 8 bits on processors with AVX-512 only.
    names = [name for name, case in CASES.items() if case.backend != "CPU_ATTN" or torch.cpu._is_avx512_supported()]
    with counting(session.console, "engines") as progress:
        cases = {name: compare(plan, name, progress) for name in names}
    return {
        "machine": {"threads_per_engine": THREADS},
        "seed": SEED,
        "policy": described(POLICY),
        "plan": dataclasses.asdict(plan),
        "videos": plan.videos,
        "cases": cases,
        "left_out": sorted(CASES.keys() - cases.keys()),
    }


def targets(result: Result) -> list[dict[str, Any]]:
    """Integers beside bfloat16; a quick run's pool is too small to tell."""
    engines = result["cases"][JUDGED]["engines"]
    ratio = engines[CASES[JUDGED].cache]["at_once"] / engines[BASE]["at_once"]
    return [judged(report.named(CASES[JUDGED].cache), ratio, at_least=AT_LEAST, judge=not result["quick"])]


BYTES = Benchmark(
    name="bytes",
    title="Videos at once in fewer bytes",
    place=10,
    plan=lambda quick: QUICK if quick else FULL,
    measure=measure,
    judged={"targets": targets},
    report=report,
)
