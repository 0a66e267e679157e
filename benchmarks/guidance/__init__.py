"""What guidance of causal videos costs: where it is used, and where it only could be.

Guided videos need Model Runner V2, whose kernels Triton's interpreter runs on a CPU, a Python program for each row.
Processor time is counted without what runs inside interpreted kernels: it is what the host does on a GPU, and what the
model and attention take here. The clock has them in it.

Engines live side by side, each in a process of its own with one thread; one computes at a time, in bursts. A round is
one burst of each. Ratios are of the processor time of bursts of the same round.

===================  ===========================================================================================
engine               what it runs
===================  ===========================================================================================
``plain``            a server with a policy that cannot guide
``able``             the same, one that could: ``guidance: true``
``guided``           the same, on half as many videos, each guided: of the same two streams
``guided, full``     a guided video that keeps everything, in the last frame of the paper's geometry
``guided``           the same under the rule of the paper
``two``              two videos that are not guided, of the lengths of its streams
===================  ===========================================================================================

The first three are of many requests of a one-layer model, which leaves a step hardly anything but what the host does.
"""

from __future__ import annotations

from benchmarks.options import Quick, Samples


def command(json_path: Samples = None, quick: Quick = False) -> None:
    """Count what guidance of causal videos costs, used and unused, as ratios of runs side by side."""
    from benchmarks.guidance.benchmark import GUIDANCE

    GUIDANCE.run(json_path, quick=quick)
