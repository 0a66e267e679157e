"""What a decode step costs with and without packcache, on the geometry of the PackCache paper.

Absolute times on a shared machine mean nothing. What is reported are ratios of bursts of decode steps that
were run right after one another, by engines that live side by side in processes of their own, one computing
at a time. A step of an engine with one thread never waits: its processor time is what it takes on an idle
machine, and leaves out what other processes do meanwhile. Ratios are judged by it; those by the clock are
given as well, and differ from them on a busy machine only.

==============  ==============================================================================================
engine          what it runs
==============  ==============================================================================================
``full``        stock vLLM, no plugin loaded
``short``       the same, on a prompt as long as what packcache reads: the limit for any policy
``packcache``   vLLM with the plugin, packcache switched on
``opt_out``     the same, on a request that keeps its whole cache (``packcache_policy=full``)
``absolute``    packcache with absolute positions: no key is ever rotated
==============  ==============================================================================================
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from vllm_packcache.bench import files
from vllm_packcache.bench.decode import report
from vllm_packcache.bench.decode.plan import BLOCK_SIZE, FULL, POLICY, QUICK, SEED, THREADS
from vllm_packcache.bench.decode.runs import Bench, engines
from vllm_packcache.bench.machine import about

__all__ = ["run"]


def run(json_path: Path | None, *, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table and write everything measured to ``json_path``.

    Args:
        json_path: file for the samples and all that is needed to repeat them; None: only the table.
        quick: a small geometry that shows in a minute that everything works; its times say nothing.
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
        **about("decode", threads_per_engine=THREADS),
        "quick": quick,
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "engine": {"block_size": BLOCK_SIZE, "max_num_batched_tokens": plan.chunk, "enforce_eager": True},
        "policy": {"name": POLICY.name} | dataclasses.asdict(POLICY),
        "steps_per_burst": plan.burst,
    }
    start = time.monotonic()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, engines(plan) as started:
        bench = Bench(plan, started, progress)
        bench.start_engines()
        result["last_frame"] = bench.last_frame()
        result["machine"]["huge_page_kib"] = bench.huge_page_kib()
        result["control"] = bench.control()
        result["sliding_frame"] = bench.sliding_frame()
        result["early_and_late_frame"] = bench.early_and_late_frame()
        result["generated"] = bench.generated()
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["share_of_reading"] = report.share_of_reading(result)
    result["checks"] = report.checks(result)
    result["targets"] = report.targets(result)
    if json_path is not None:
        files.write(json_path, result)
    report.print_table(result, console)
    return result
