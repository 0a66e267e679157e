"""What ``python -m benchmarks.gpu`` measures, as a benchmark that is reported only: it runs where there is no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.protocol import Benchmark, Report
from benchmarks.report.markdown import Files, significant
from benchmarks.report.parts import (
    NOT_MEASURED,
    Goal,
    Result,
    Row,
    goals_of_ratios,
    provenance,
    row_of_ratio,
    rows_of_goals,
)
from benchmarks.report.table import Paragraph, Table


def goals(result: Result) -> list[Goal]:
    """All that have a bound."""
    return goals_of_ratios(result) if result["measured"] else [Goal("every goal", NOT_MEASURED, "", "")]


def rows(result: Result) -> Iterator[Row]:
    """Goals, errors of the checks, and everything that has a median."""
    for name, check in result.get("checks", {}).items():
        yield Row(name, "error", "", check["error"])
        yield Row(name, "error at most", "", check["bound"])
    if not result["measured"]:
        return
    yield from rows_of_goals(result["targets"])
    yield from _timed({key: result[key] for key in ("attention", "rotation", "compaction", "engine")}, ())


def _timed(own: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Row]:
    """Every summary of a ratio, every median, and the median of every list of samples, wherever it is."""
    for key, value in own.items():
        here = (*path, key)
        place = ", ".join(here[:-1])
        if isinstance(value, Mapping) and "quartiles" in value:
            yield row_of_ratio(key, "ratio", place, value)
        elif isinstance(value, Mapping):
            yield from _timed(value, here)
        elif isinstance(value, int | float):
            yield Row(key, "value", place, value)
        elif isinstance(value, list) and value and "seconds" in " ".join(path):
            low, middle, high = np.quantile(value, (0.25, 0.5, 0.75)).tolist()
            yield Row(key, "seconds", place, middle, low, high, "quartiles", "s")


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield provenance(result)
    if not result["measured"]:
        yield f"On a GPU {_reason(result)}."
        return
    yield Table(
        ("step", "kernel", "keys of packcache", "packcache, ms", "full, ms"),
        [
            (
                step,
                kernel,
                f"{timed['keys']['packcache']:,}",
                *(significant(1e3 * float(np.median(own["seconds"][case]))) for case in ("packcache", "full")),
            )
            for step, timed in result["attention"].items()
            for kernel, own in timed["kernels"].items()
        ],
    )
    yield f"A slide of the window takes {significant(1e3 * result['rotation']['median'])} ms."
    if not result["engine"]["measured"]:
        yield f"Whole steps: {result['engine']['reason']}."


def _reason(result: Result) -> str:
    return f"nothing has been measured: {result['reason'].removeprefix(f'{NOT_MEASURED}: ')}"


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    if result["measured"]:
        machine = result["machine"]["gpu"]
        yield f"**On a GPU** ({machine}): goals above, times in {files.link('report.md')} and {files.link('gpu.json')}."
    else:
        yield f"**On a GPU** {_reason(result)} ({files.link('gpu.json')})."


GPU = Benchmark(
    name="gpu",
    title="On a GPU",
    place=11,
    report=Report(goals, rows, long, short),
)
