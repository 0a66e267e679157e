"""All benchmarks, one after another, into one folder with a report.

What is complete in the folder is not measured again: an interrupted run goes on with the benchmark that it was in, that
of quality with the videos that it has not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.engine_process import EngineFailed
from benchmarks.protocol import Benchmark, Plan, is_there
from benchmarks.registry import benchmarks
from benchmarks.report import writer
from vllm_packcache.config.errors import ConfigError


def run(
    folder: Path, *, quick: bool = False, videos: int | None = None, console: Console | None = None
) -> dict[str, str]:
    """Run what is not complete in a folder, then write its report.

    Args:
        folder: gets the results; those that are there are gone on with.
        quick: the smallest sizes that show in minutes that everything works; the numbers say nothing.
        videos: of the benchmark of quality; None: its own number.
        console: where progress and tables go.

    Returns:
        Benchmarks that failed, and why.

    Raises:
        ConfigError: it is to be ``quick``, and the folder has results of a full run.
        OSError: the folder cannot be written.
        KeyboardInterrupt: it was interrupted; what is done is kept.
    """
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {benchmark: benchmark.plan(quick) for benchmark in benchmarks() if benchmark.required}
    if videos is not None:
        chosen |= {own: replace(plan, videos=videos) for own, plan in chosen.items() if own.name == "quality"}
    if quick:
        _check_nothing_is_lost(folder, chosen)
    failed: dict[str, str] = {}
    for number, (benchmark, plan) in enumerate(chosen.items(), 1):
        heading = f"\\[{number}/{len(chosen)}] {benchmark.name}"
        try:
            if _complete(folder, benchmark, plan, quick):
                console.print(f"{heading}: complete in {benchmark.file}, not measured again")
                _draw_what_is_lost(folder, benchmark)
            else:
                console.print(heading)
                # One that fails leaves nothing of other sizes then, or not whole, that looks like results.
                for name in (benchmark.file, *benchmark.drawn, *benchmark.made):
                    (folder / name).unlink(missing_ok=True)
                benchmark.run_in(folder, plan=plan, quick=quick, console=console)
        except KeyboardInterrupt:
            console.print(f"interrupted in {benchmark.name}: the same command goes on from there")
            raise
        except Exception as error:
            if not isinstance(error, ConfigError | OSError | EngineFailed):
                console.print_exception()
            failed[benchmark.name] = f"{error}"
            console.print(f"{benchmark.name} failed: {error}", style="red", markup=False, soft_wrap=True)
    for path in writer.write(folder):
        console.print(f"wrote {path}", soft_wrap=True)
    return failed


def _complete(folder: Path, benchmark: Benchmark, plan: Plan, quick: bool) -> bool:
    """Whether there is nothing left to measure."""
    result = benchmark.read(folder)
    whole = result is not None and benchmark.same(result, plan, quick)
    return whole and all(is_there(folder / name) for name in benchmark.made)


def _draw_what_is_lost(folder: Path, benchmark: Benchmark) -> None:
    result = benchmark.read(folder)
    assert result is not None
    for name, draw in benchmark.drawn.items():
        if not is_there(folder / name):
            draw(result, folder / name)


def _check_nothing_is_lost(folder: Path, chosen: Mapping[Benchmark, Plan]) -> None:
    """Make sure that a quick run does not take the place of hours.

    Raises:
        ConfigError: it would.
    """
    for benchmark, plan in chosen.items():
        result = benchmark.read(folder)
        if result is not None and not result.get("quick") and not benchmark.same(result, plan, True):
            raise ConfigError(
                f"--quick: {folder / benchmark.file} is of a full run and would be lost: name another folder with --out"
            )
