"""The command ``vllm-packcache bench``: a command for each benchmark that has one, for all of them, for the report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.registry import commands
from vllm_packcache.tools.console import one_sentence

bench = typer.Typer(help="Measure what the policies cost and save.", no_args_is_help=True)


def _in_one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def call(**options: object) -> None:
        with one_sentence():
            command(**options)

    return call


for _name, _command in commands():
    bench.command(_name)(_in_one_sentence(_command))


@bench.command("all")
def bench_all(
    out: Annotated[
        Path, typer.Option(help="Folder for all results and the report; a run goes on with what is there.")
    ] = Path("out/bench"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The smallest sizes: shows that everything works, numbers say nothing."),
    ] = False,
    videos: Annotated[int | None, typer.Option(min=2, help="Held-out videos that bench quality makes; 200.")] = None,
) -> None:
    """Run decode, serve, masked, quality and calibrate one after another, and write their report."""
    from benchmarks.everything import run

    with one_sentence():
        failed = run(out, quick=quick, videos=videos)
    if failed:
        typer.echo(f"vllm-packcache: failed: {', '.join(failed)}; the same command tries them again", err=True)
        raise typer.Exit(1)


@bench.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(help="Folder with the JSON of benchmarks, as bench all writes it.")],
    readme: Annotated[
        Path | None,
        typer.Option(help="Text whose part between <!-- results: begin --> and <!-- results: end --> is replaced."),
    ] = None,
) -> None:
    """Write results.csv and report.md anew from the results of a folder."""
    from benchmarks.report.writer import report

    with one_sentence():
        for path in report(folder, readme):
            typer.echo(f"wrote {path}")
