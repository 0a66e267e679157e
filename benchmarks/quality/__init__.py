"""How good videos stay under each policy, at equal live tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path, typer.Option(help="Folder for results and pictures; a run goes on with what is there.")
    ] = Path("out/bench/quality"),
    videos: Annotated[
        int | None,
        typer.Option(
            min=2, help="Held-out videos that every policy makes; 200, or 50 with --masked, --guidance or --cache."
        ),
    ] = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Videos of the bundled masked model: guided, a frame at a time.")
    ] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Name of a policy that is compared besides, with its defaults; may be given several times."),
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(
            help="Scale of guidance of the causal model, away from the same picture with an empty text. Full cache, "
            "packcache and changed are compared with it and without; may be given several times."
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="Format of 8 bits that keys and values of the causal model are kept in, by vLLM's name. Full cache, "
            "packcache and changed are compared with those in bfloat16, at equal tokens and at equal bytes; may be "
            "given several times."
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history",
            help="With --masked: older frames in int8, int4 and int2 beside frames as they were written, at equal "
            "tokens and at equal bytes.",
        ),
    ] = False,
    passes: Annotated[
        bool,
        typer.Option("--passes", help="With --masked: quality against what is computed of a frame's passes."),
    ] = False,
    made: Annotated[
        list[str] | None,
        typer.Option(
            help="With --passes: options of requests that are compared besides, such as steps=8,refresh=4; may be "
            "given several times."
        ),
    ] = None,
) -> None:
    """Measure the videos that a bundled model makes under every policy, at equal live tokens."""
    from benchmarks.formats import check_formats
    from benchmarks.quality.benchmark import CACHED, CAUSAL, GUIDED, HISTORY, MASKED, PASSES
    from benchmarks.quality.generators import Cached, Causal, Encoded, Generator, Guided, Masked, Passes, made_of
    from benchmarks.quality.runs import QualityPlan
    from vllm_packcache.config.errors import ConfigError

    if masked and guidance:
        raise ConfigError("--guidance is for the causal model, the masked one is always guided: leave --masked out")
    for option, given in (("--passes", passes), ("--history", history)):
        if given and not masked:
            raise ConfigError(f"{option} is for the masked model: give --masked too")
    if passes and history:
        raise ConfigError("--history and --passes are two comparisons: leave one out")
    if made and not passes:
        raise ConfigError("--made is for what passes compute: give --passes too")
    if passes and policy:
        raise ConfigError("--policy: passes are compared under one policy, the default: leave it out")
    if history and policy:
        raise ConfigError("--policy: histories are compared under one policy, the last frames: leave it out")
    policies = tuple(policy or ())
    if cache and (masked or guidance or policies):
        raise ConfigError("--cache is for the yardsticks of the causal model: leave --masked, --guidance, --policy out")
    generator: Generator
    if cache:
        check_formats(tuple(cache))
        benchmark, generator = CACHED, Cached(formats=tuple(cache))
    elif guidance:
        benchmark, generator = GUIDED, Guided(policies, tuple(guidance))
    elif passes:
        benchmark, generator = PASSES, Passes(also=tuple(map(made_of, made or ())))
    elif history:
        benchmark, generator = HISTORY, Encoded()
    elif masked:
        benchmark, generator = MASKED, Masked(policies=policies)
    else:
        benchmark, generator = CAUSAL, Causal(policies)
    # A policy or an option that there is none of is refused here, before anything is made.
    typer.echo(f"comparing {', '.join(variant.name for variant in generator.variants.named)}")
    plan = QualityPlan(generator=generator, videos=videos or 0)
    benchmark.run_in(out, plan=plan)
