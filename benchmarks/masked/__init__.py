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

**Less computed** in the passes (``--passes``): see `benchmarks.masked.passes`. **Older frames in fewer bits**
(``--history``): see `benchmarks.masked.history`.

**Memory** is counted in blocks, which the engine says, and given for the model that is reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Quick, Samples


def command(
    json_path: Samples = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw ratios, goals and memory, as a PNG or SVG.")
    ] = None,
    quick: Quick = False,
    passes: Annotated[
        bool, typer.Option("--passes", help="Frames of which less is computed: settled rows, reused passes.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Frames that read older ones in 8, 4 and 2 bits, and as written.")
    ] = False,
) -> None:
    """Time a frame of a masked model (Lumos-1), all its passes, with and without packcache."""
    from benchmarks.masked.benchmark import HISTORY, MASKED, PASSES
    from vllm_packcache.config.errors import ConfigError

    if passes and history:
        raise ConfigError("--passes and --history are two benchmarks: give one of them")
    (PASSES if passes else HISTORY if history else MASKED).run(json_path, plot_path, quick=quick)
