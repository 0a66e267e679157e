"""All benchmarks, one after another, into one folder with a report.

What is complete in the folder is not measured again: an interrupted run goes on with the benchmark that it was in, that
of quality with the videos that it has not made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import decode, masked, report, serve
from benchmarks.decode import plan as decode_plan
from benchmarks.decode import plot as decode_plot
from benchmarks.engine_process import EngineFailed
from benchmarks.masked import plot as masked_plot
from benchmarks.quality import run as quality
from benchmarks.quality import show as quality_show
from benchmarks.report.parts import Part, Result
from vllm_packcache.calibrate import command as calibrate
from vllm_packcache.calibrate import report as calibrate_report
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import FORMATS

SERVE = serve.ServePlan(condition_tokens=17, tokens_per_frame=257, frames=13, pool_videos=4, rounds=2)
SERVE_QUICK = serve.ServePlan(
    model=decode_plan.QUICK.model, condition_tokens=40, tokens_per_frame=40, frames=13, pool_videos=2, rounds=1
)

QUALITY_QUICK = {"videos": 4, "frontier_videos": 2, "trained_frames": 2}
"""Sizes of `quality.QualityPlan` that are not the usual ones."""

CALIBRATE_VIDEOS, CALIBRATE_VIDEOS_QUICK = calibrate.DEMO_VIDEOS, 2
CALIBRATE_TARGET = 0.8
"""Share of attention; within the frames that are told apart the bundled model cannot reach much more."""

Draw = Callable[[Result, Path], None]


@dataclass(frozen=True)
class Benchmark:
    """One that `run` runs.

    Args:
        part: of the report, which names it.
        measure: what makes its result in a folder, and shows progress.
        same: whether a result is of the sizes that are asked for.
        drawn: what is made of the result alone, by name of the file.
        made: other files that it leaves, the last things that it does.
    """

    part: Part
    measure: Callable[[Path, Console], object]
    same: Callable[[Result], bool]
    drawn: Mapping[str, Draw] = field(default_factory=dict)
    made: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Its subcommand."""
        return self.part.benchmark

    def complete(self, folder: Path) -> bool:
        """Whether there is nothing left to measure."""
        result = self.part.read(folder)
        return result is not None and self.same(result) and all(_there(folder / name) for name in self.made)

    def forget(self, folder: Path) -> None:
        """Remove what is of other sizes, or not whole: one that fails then leaves nothing that looks like results."""
        for name in (self.part.file, *self.drawn, *self.made):
            (folder / name).unlink(missing_ok=True)

    def finish(self, folder: Path, quick: bool) -> None:
        """Say in the result and its plots that it is ``quick``, and draw what is missing."""
        result = self.part.read(folder)
        assert result is not None
        if quick and not result.get("quick"):
            result = {**result, "quick": True}
            files.write(folder / self.part.file, result)
            for name in self.drawn:
                (folder / name).unlink(missing_ok=True)
        for name, draw in self.drawn.items():
            if not _there(folder / name):
                draw(result, folder / name)


def _there(path: Path) -> bool:
    """Whether a file has been written; an empty one only keeps the place."""
    return path.is_file() and path.stat().st_size > 0


def benchmarks(*, quick: bool = False, videos: int | None = None) -> list[Benchmark]:
    """All benchmarks, in order.

    Args:
        quick: the smallest sizes that show that everything works.
        videos: V, of the benchmark of quality; None: its own number.
    """
    served = SERVE_QUICK if quick else SERVE
    sizes: dict[str, Any] = (QUALITY_QUICK if quick else {}) | ({} if videos is None else {"videos": videos})
    judged = quality.QualityPlan(**sizes)
    calibrated = CALIBRATE_VIDEOS_QUICK if quick else CALIBRATE_VIDEOS

    def measure_decode(folder: Path, console: Console) -> None:
        decode.run(folder / report.decode.PART.file, quick=quick, console=console)

    def measure_serve(folder: Path, console: Console) -> None:
        serve.run(folder / report.serve.PART.file, plan=served, console=console)

    def measure_masked(folder: Path, console: Console) -> None:
        masked.run(folder / report.masked.PART.file, quick=quick, console=console)

    def measure_quality(folder: Path, console: Console) -> None:
        quality.run(folder, plan=judged, console=console)

    def measure_calibrate(folder: Path, console: Console) -> None:
        calibrate.run(
            out=folder / "calibrated.yaml",
            videos=calibrated,
            target=CALIBRATE_TARGET,
            json_path=folder / report.calibrate.PART.file,
            console=console,
        )

    return [
        Benchmark(
            report.decode.PART,
            measure_decode,
            # Results of before there were frames lack them.
            lambda result: _says(result, quick=quick) and "frames" in result,
            {f"decode{suffix}": decode_plot.draw for suffix in FORMATS},
        ),
        Benchmark(
            report.serve.PART,
            measure_serve,
            lambda result: _says(result, video=_video(served), pool_blocks=served.pool_blocks),
        ),
        Benchmark(
            report.masked.PART,
            measure_masked,
            lambda result: _says(result, quick=quick),
            {f"masked{suffix}": masked_plot.draw for suffix in FORMATS},
        ),
        Benchmark(
            report.quality.PART,
            measure_quality,
            lambda result: _says(
                result, videos=judged.videos, spans=list(judged.spans), variants=quality.described(judged)
            ),
            {"quality.csv": quality_show.write_csv}
            | {
                f"{stem}{suffix}": lambda result, path: quality_show.draw(result, path.parent)
                for stem in ("frontier", "by_frame")
                for suffix in FORMATS
            },
            [f"videos{suffix}" for suffix in FORMATS],
        ),
        Benchmark(
            report.calibrate.PART,
            measure_calibrate,
            lambda result: _says(result, videos=calibrated, target=CALIBRATE_TARGET),
            {f"calibrate{suffix}": calibrate_report.draw for suffix in FORMATS},
        ),
    ]


def _says(result: Result, **sizes: object) -> bool:
    return all(result.get(name) == size for name, size in sizes.items())


def _video(plan: serve.ServePlan) -> dict[str, int]:
    return {name: getattr(plan, name) for name in ("condition_tokens", "tokens_per_frame", "frames")}


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
    chosen = benchmarks(quick=quick, videos=videos)
    if quick:
        _check_nothing_is_lost(folder, chosen)
    failed: dict[str, str] = {}
    for number, benchmark in enumerate(chosen, 1):
        heading = f"\\[{number}/{len(chosen)}] {benchmark.name}"
        try:
            if benchmark.complete(folder):
                console.print(f"{heading}: complete in {benchmark.part.file}, not measured again")
            else:
                console.print(heading)
                benchmark.forget(folder)
                benchmark.measure(folder, console)
            benchmark.finish(folder, quick)
        except KeyboardInterrupt:
            console.print(f"interrupted in {benchmark.name}: the same command goes on from there")
            raise
        except Exception as error:
            if not isinstance(error, ConfigError | OSError | EngineFailed):
                console.print_exception()
            failed[benchmark.name] = f"{error}"
            console.print(f"{benchmark.name} failed: {error}", style="red", markup=False, soft_wrap=True)
    for path in report.write(folder):
        console.print(f"wrote {path}", soft_wrap=True)
    return failed


def _check_nothing_is_lost(folder: Path, chosen: Sequence[Benchmark]) -> None:
    """Make sure that a quick run does not take the place of hours.

    Raises:
        ConfigError: it would.
    """
    for benchmark in chosen:
        result = benchmark.part.read(folder)
        if result is not None and not result.get("quick") and not benchmark.same(result):
            raise ConfigError(
                f"--quick: {folder / benchmark.part.file} is of a full run and would be lost: name another folder "
                "with --out"
            )
