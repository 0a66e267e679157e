"""How good videos stay under each policy, at equal live tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path, typer.Option(help="Folder for results and pictures; a run goes on with what is there.")
    ] = Path("out/bench/quality"),
    videos: Annotated[
        int | None, typer.Option(min=2, help="Held-out videos that every policy makes; 200, or 8 with --masked.")
    ] = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Videos of the bundled masked model: guided, a frame at a time.")
    ] = False,
) -> None:
    """Measure the videos that a bundled model makes under every policy, at equal live tokens."""
    from benchmarks.quality.benchmark import CAUSAL, MASKED

    benchmark = MASKED if masked else CAUSAL
    benchmark.run_in(out, plan=replace(benchmark.plan(False), videos=videos or 0))
