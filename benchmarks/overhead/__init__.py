"""What the plugin costs the host in a step of many requests.

A model of one layer leaves a step hardly anything but what the host does for it. Engines live side by side, each in
a process of its own with one thread; one computes at a time, in bursts. A round is one burst of each. Ratios are of
the processor time of bursts of the same round.

===============  =============================================================================================
case             what it runs
===============  =============================================================================================
``stock``        vLLM, no plugin loaded
``again``        the same once more: how far apart two equal engines are
``text``         vLLM with the plugin and a policy, on requests that are no videos
``room``         the same, on videos whose history is so long that nothing is dropped
``packcache``    the same, on videos under the rule of the paper
===============  =============================================================================================

**Time in our own functions** is measured afterwards, on both model runners (`benchmarks.overhead.clock`). Model Runner
V2 runs in Triton's interpreter there: its kernels are left out, what the host does for them is not.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.options import Samples


def command(
    json_path: Samples = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few requests and steps: shows that everything works, times say nothing."),
    ] = False,
) -> None:
    """Count the host's time for a step of many requests, as ratios of runs side by side."""
    from benchmarks.overhead.benchmark import OVERHEAD

    OVERHEAD.run(json_path, quick=quick)
