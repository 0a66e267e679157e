"""What the plugin costs the host in a step of many requests.

A model of one layer leaves a step hardly anything but what the host does for it. Engines live side by side, each in
a process of its own with one thread; one computes at a time, in bursts. A round is one burst of each. Ratios are of
the processor time of bursts of the same round.

===============  =============================================================================================
case             what it runs
===============  =============================================================================================
``stock``        vLLM, no plugin loaded
``again``        the same once more: how far apart two equal engines are
``text``         vLLM with the plugin and the default policy, on requests that are no videos
``room``         the same, on videos whose history is so long that nothing is dropped
``packcache``    the same, on videos under the default policy
===============  =============================================================================================

**Time in our own functions** is measured afterwards, on both model runners (`benchmarks.overhead.clock`). Model Runner
V2 runs in Triton's interpreter there: its kernels are left out, what the host does for them is not.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.overhead.plan import BLOCK_SIZE, CASES, FULL, POLICY, QUICK, SEED, THREADS
from benchmarks.overhead.runs import Bench
from benchmarks.overhead.show import print_table, targets
from vllm_packcache.tools import files
from vllm_packcache.tools.machine import about

__all__ = ["run"]


def run(json_path: Path | None, *, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, and write everything measured to ``json_path``.

    Args:
        json_path: file for the samples and all that is needed to repeat them; None: only the table.
        quick: few requests and steps: shows in seconds that everything works; its times say nothing.
        console: where progress and table go.

    Returns:
        What is written to ``json_path``.

    Raises:
        EngineFailed: an engine raised or died.
    """
    console = console or Console()
    files.claim(json_path)
    plan = QUICK if quick else FULL
    result: dict[str, Any] = {
        **about("overhead", threads_per_engine=THREADS),
        "quick": quick,
        "seed": SEED,
        "model": dataclasses.asdict(plan.model),
        "engine": {"block_size": BLOCK_SIZE, "enforce_eager": True},
        "policy": {"name": POLICY.name} | dataclasses.asdict(POLICY),
        "cases": CASES,
        "requests": plan.requests,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "condition_tokens": plan.condition_tokens,
        "tokens_per_frame": plan.tokens_per_frame,
    }
    start = time.monotonic()
    with Bench.in_temporary_folder(plan, console) as bench:
        result |= bench.v1()
        result["host"]["V2"] = bench.v2()
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["targets"] = targets(result)
    if json_path is not None:
        files.write(json_path, result)
    print_table(result, console)
    return result
