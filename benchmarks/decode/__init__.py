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
``changed``     packcache with ``selection: changed`` over a window of 12, at the same budget
``changed, ..`` the same at the smallest budget that remembers as much as packcache (see `benchmarks.memory`)
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

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Quick, Samples


def command(
    json_path: Samples = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw the time of a step by frame and policy, as a PNG or SVG.")
    ] = None,
    quick: Quick = False,
) -> None:
    """Time decode steps with and without packcache and with other policies, as ratios of runs side by side."""
    from benchmarks.decode.benchmark import DECODE

    DECODE.run(json_path, plot_path, quick=quick)
