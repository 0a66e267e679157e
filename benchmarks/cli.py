"""The command ``vllm-packcache bench``: one command a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_packcache.tools.console import one_sentence

Samples = Annotated[Path | None, typer.Option("--json", help="Write all samples and what is needed to repeat them.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A small geometry: shows that everything works, times say nothing.")
]

bench = typer.Typer(help="Measure what the policies cost and save.", no_args_is_help=True)


@bench.command("decode")
def bench_decode(
    json_path: Samples = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw the time of a step by frame and policy, as a PNG or SVG.")
    ] = None,
    quick: Quick = False,
) -> None:
    """Time decode steps with and without packcache and with other policies, as ratios of runs side by side."""
    from benchmarks.decode import run

    with one_sentence():
        run(json_path, plot_path, quick=quick)


@bench.command("overhead")
def bench_overhead(
    json_path: Samples = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few requests and steps: shows that everything works, times say nothing."),
    ] = False,
) -> None:
    """Count the host's time for a step of many requests, as ratios of runs side by side."""
    from benchmarks.overhead import run

    with one_sentence():
        run(json_path, quick=quick)


@bench.command("masked")
def bench_masked(
    json_path: Samples = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw ratios, goals and memory, as a PNG or SVG.")
    ] = None,
    quick: Quick = False,
) -> None:
    """Time a frame of a masked model (Lumos-1), all its passes, with and without packcache."""
    from benchmarks.masked import run

    with one_sentence():
        run(json_path, plot_path, quick=quick)


@bench.command("serve")
def bench_serve(
    json_path: Samples = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a video.")] = 13,
    tokens_per_frame: Annotated[int, typer.Option(min=1, help="Tokens of a frame.")] = 257,
    condition_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a video's prompt.")] = 17,
    pool_videos: Annotated[
        int, typer.Option(min=1, help="Size of the KV pool: videos that it holds with their full cache.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often both servers get the load.")] = 2,
) -> None:
    """Count the videos that a server holds at once with and without packcache, and load it with them over HTTP."""
    from benchmarks.serve import ServePlan, run

    with one_sentence():
        run(
            json_path,
            plan=ServePlan(
                condition_tokens=condition_tokens,
                tokens_per_frame=tokens_per_frame,
                frames=frames,
                pool_videos=pool_videos,
                rounds=rounds,
            ),
        )


@bench.command("quality")
def bench_quality(
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
    from benchmarks.quality.generators import Causal, Masked
    from benchmarks.quality.run import QualityPlan, run

    with one_sentence():
        run(out, plan=QualityPlan(generator=Masked() if masked else Causal(), videos=videos or 0))


@bench.command("long-video")
def bench_long_video(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results and what is needed to repeat them.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write curves over the frames, as PNG or SVG.")
    ] = None,
) -> None:
    """Measure the bundled model's quality over a video ten times as long as it was trained on."""
    from benchmarks.long_video import run

    with one_sentence():
        run(json_path, plot_path)


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
    from benchmarks.report import report

    with one_sentence():
        for path in report(folder, readme):
            typer.echo(f"wrote {path}")
