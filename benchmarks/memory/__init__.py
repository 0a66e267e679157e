"""What a policy lets the bundled model remember, at equal live tokens.

Every token is asked for after the true ones before it, so that mistakes do not add up and what is measured is what the
cache holds. Two things tell policies apart: tokens that differ from the frame before, and cells of objects that come
out from behind the pillar, which nothing but older frames knows. Films add a third: what a cut back to a scene shows,
which nothing but the frames before the cut away from it knows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Quick, Samples


def command(
    json_path: Samples = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw both measures against live tokens, as PNG or SVG.")
    ] = None,
    worlds: Annotated[int | None, typer.Option(min=2, help="Held-out worlds that every policy gets; 200.")] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="Format of 8 bits that keys and values are kept in, by vLLM's name. Full cache, packcache and changed "
            "are compared with those in bfloat16, at equal tokens and at equal bytes, on 50 worlds and no films; may "
            "be given several times."
        ),
    ] = None,
    quick: Quick = False,
) -> None:
    """Measure what every policy lets the bundled model remember, given the true past."""
    from benchmarks.formats import check_formats
    from benchmarks.memory.benchmark import CACHED, MEMORY
    from vllm_packcache.config.errors import ConfigError

    if cache:
        check_formats(tuple(cache))
        if plot_path is not None:
            raise ConfigError("--plot draws a curve a policy, which --cache has none of: leave one out")
        plan = replace(CACHED.plan(quick), formats=tuple(cache))
        CACHED.run(json_path, plan=plan if worlds is None else replace(plan, worlds=worlds), quick=quick)
        return
    plan = MEMORY.plan(quick)
    MEMORY.run(json_path, plot_path, plan=plan if worlds is None else replace(plan, worlds=worlds), quick=quick)
