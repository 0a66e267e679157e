"""How good the bundled model's video stays when it gets ten times as long as those it was trained on.

The model has seen the positions of 16 frames. With ``absolute`` positions a longer video goes past them; with
``rebase`` no position is larger than those of a full window, however long the video. Every variant runs in the real
engine on the same held-out worlds, float32 and greedy, and is asked two questions for every frame:

* teacher-forced: given the true video up to a token, is that token the most likely one? Mistakes do not add up, so
  this shows what cache and positions do;
* generated: from the condition alone, is the video the true one, and is it still a video?
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results and what is needed to repeat them.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write curves over the frames, as PNG or SVG.")
    ] = None,
) -> None:
    """Measure the bundled model's quality over a video ten times as long as it was trained on."""
    from benchmarks.long_video.benchmark import LONG_VIDEO

    LONG_VIDEO.run(json_path, plot_path)
