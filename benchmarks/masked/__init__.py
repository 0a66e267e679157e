"""What a frame of a masked model costs with and without packcache, with all its passes and both streams of guidance.

One engine makes all frames, one request after another in interleaved rounds, so that nothing but the request differs:

==============  ==============================================================================================
video           what it is
==============  ==============================================================================================
``full``        a conditioning image, 12 frames, and the frame that is made; the whole cache is kept
``packcache``   the same, under packcache
``short``       the whole cache of a video that has as many tokens as packcache reads: the limit for any policy
``last frame``  the first one, under a sliding window over one frame
==============  ==============================================================================================

**Given frames are not computed** (`benchmarks.masked.process.MaskedEngine`): what is cached does not matter
to time. Timed is the frame that is made: entering it, with the rotation of its window's keys and the compaction of the
block tables, its steps and its commit.

**On a CPU** a pass of the whole model takes minutes. One layer and some steps are timed, in parts, and the frame of all
layers and steps is ``enter + steps x step + commit`` (`benchmarks.masked.runs.reckoned`). On a GPU all is
timed, and nothing is reckoned.

**The floor** is the same ratio of floating-point operations: of the layers' matrices, of the output layer and of
attention over what is read. Where attention is slower an operation than matrices are, the ratio of times lies above it.

**Memory** is counted in blocks, which the engine says, and given for the model that is reported.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.decode.plan import described
from benchmarks.masked import plot, report
from benchmarks.masked.plan import BLOCK_SIZE, ON_CPU, ON_GPU, POLICY, PUBLISHED_FRAMES, QUICK, SEED
from benchmarks.masked.runs import Bench, rates, readings
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import check_format
from vllm_packcache.tools.machine import about
from vllm_packcache.tools.progress import counting

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
        EngineFailed: the engine raised or died.
    """
    import torch

    console = console or Console()
    check_format("--plot", plot_path)
    files.claim(json_path, plot_path)
    on_gpu = torch.cuda.is_available()
    plan = dataclasses.replace(QUICK, device="cuda" if on_gpu else "cpu") if quick else ON_GPU if on_gpu else ON_CPU
    gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    result: dict[str, Any] = {
        **about("masked", **gpu, threads_per_engine=plan.threads),
        "quick": quick,
        "seed": SEED,
        "is": plan.described,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "policy": described(POLICY),
        "grid": list(plan.grid),
        "tokens_per_frame": plan.last_frame().tokens_per_frame,
        "frames": plan.frames,
        "layers_timed": plan.model.layers,
        "layers_reported": plan.layers,
        "steps_timed": plan.steps,
        "steps_reported": plan.steps_reported,
    }
    start = time.monotonic()
    with counting(console, "frames") as progress:
        # One frame warms up.
        frames = 1 + plan.rounds * len(plan.cases) + plan.batch_rounds * (1 + plan.videos)
        task = progress.add_task("making frames", total=frames)
        with Bench.in_temporary_folder(plan, lambda: progress.advance(task)) as bench:
            result["last_frame"] = bench.last_frame()
            result["batch"] = bench.batch()
            result["engine"] = {"device": plan.device, "block_size": BLOCK_SIZE, **bench.about()}
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["readings"] = readings(result["last_frame"], plan)
    result["rates"] = None if quick else rates(result["last_frame"], plan)
    result["memory"] = {
        "kv_bytes": {
            name: plan.cache_bytes(own["peak_blocks"]) for name, own in result["last_frame"]["videos"].items()
        },
        "published_frames": PUBLISHED_FRAMES,
        "published_mask_bytes": plan.published_mask_bytes,
    }
    result["checks"] = report.checks(result)
    result["targets"] = report.targets(result)
    if json_path is not None:
        files.write(json_path, result)
    if plot_path is not None:
        plot.draw(result, plot_path)
    report.print_table(result, console)
    return result
