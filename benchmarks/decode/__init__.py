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
``last 2 ...``  sliding window over as many frames as packcache's budget
``attention``   attention sink: the first block and as many of the last tokens
``last frame``  sliding window over one frame, the baseline of the paper
==============  ==============================================================================================

**Frame by frame and end to end.** Frame k of a video is timed without generating k frames: they and half of frame k
are the prompt. A step's time is linear in the number of tokens that it reads, so a step in the middle of a frame
stands for the mean over the frame, and the time of all frames is the sum, over frames, of tokens per frame x seconds
of a step in the middle, round by round. Prefill of the condition is left out, and so is the slide of the window, which
is in the first step of a frame (`sliding_frame` times it).

Prompts of consecutive frames begin alike. Stock vLLM has prefix caching on, which is its default, and prefills what is
new only; engines with a policy share no more than the condition: a frame's keys depend on what its tokens could see.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks.decode import plot, report
from benchmarks.decode.plan import (
    BESIDE_FRAMES,
    BESIDE_LAST_FRAME,
    BLOCK_SIZE,
    FULL,
    LASTING,
    POLICY,
    QUICK,
    SEED,
    THREADS,
    described,
)
from benchmarks.decode.runs import Bench
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import check_format
from vllm_packcache.tools.machine import about

__all__ = ["run"]


def run(
    json_path: Path | None, plot_path: Path | None = None, *, quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Measure, print a table, write everything measured to ``json_path`` and a picture to ``plot_path``.

    Args:
        json_path: file for the samples and all that is needed to repeat them; None: only the table.
        plot_path: PNG or SVG, by its suffix; None: no picture.
        quick: a small geometry that shows in a minute that everything works; its times say nothing.
        console: where progress and table go.

    Returns:
        What is written to ``json_path``.

    Raises:
        ConfigError: ``plot_path`` has another suffix.
        EngineFailed: an engine raised or died.
    """
    console = console or Console()
    check_format("--plot", plot_path)
    files.claim(json_path, plot_path)
    plan = QUICK if quick else FULL
    result: dict[str, Any] = {
        **about("decode", threads_per_engine=THREADS),
        "quick": quick,
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "engine": {"block_size": BLOCK_SIZE, "max_num_batched_tokens": plan.chunk, "enforce_eager": True},
        "policy": described(POLICY),
        "steps_per_burst": plan.burst,
    }
    start = time.monotonic()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        Bench.in_temporary_folder(plan, progress) as bench,
        bench.engines("that stay", LASTING),
    ):
        with bench.engines("for the last frame", BESIDE_LAST_FRAME):
            result["last_frame"] = bench.last_frame()
            result["machine"]["huge_page_kib"] = bench.huge_page_kib()
            result["control"] = bench.control()
            result["sliding_frame"] = bench.sliding_frame()
            result["early_and_late_frame"] = bench.early_and_late_frame()
            result["generated"] = bench.generated()
        with bench.engines("of other policies", BESIDE_FRAMES):
            result["frames"] = bench.frames()
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["share_of_reading"] = report.share_of_reading(result)
    result["checks"] = report.checks(result)
    result["targets"] = report.targets(result)
    if json_path is not None:
        files.write(json_path, result)
    if plot_path is not None:
        plot.draw(result, plot_path)
    report.print_table(result, console)
    return result
