"""What `benchmarks.overhead` measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.decode.samples import CLOCK_NAMES, CPU, WALL, summary
from benchmarks.overhead.plan import CASES, STOCK
from benchmarks.report.markdown import Files, number, percent, ratio, with_quartiles
from benchmarks.report.parts import (
    Goal,
    Result,
    Row,
    goals_of_ratios,
    provenance,
    row_of_ratio,
    rows_of_goals,
)
from benchmarks.report.table import Paragraph, Table

NAMES = {
    f"{case} / {STOCK}": f"processor time of a step, {name} / stock" for case, name in CASES.items() if case != STOCK
}


def goals(result: Result) -> list[Goal]:
    """The two ratios that have a bound."""
    return goals_of_ratios(result, NAMES, {name: own[CPU] for name, own in result["ratios"].items()})


def rows(result: Result) -> Iterator[Row]:
    """Of each case; ratios with their quartiles; time inside our functions, by function."""
    yield from rows_of_goals(result["targets"])
    for case, name in CASES.items():
        for clock, words in CLOCK_NAMES.items():
            samples = summary(result[clock][case])
            yield row_of_ratio(name, f"seconds of a step by {words}", "", samples)._replace(unit="s")
    for name, own in result["ratios"].items():
        for clock, words in CLOCK_NAMES.items():
            yield row_of_ratio(name, f"a step by {words}", "", own[clock])
    for runner, cases in result["host"].items():
        for case, own in cases.items():
            place = f"runner {runner}"
            for which, value in own["microseconds_per_step"].items():
                yield Row(CASES[case], f"in our functions, {which} of steps", place, value, unit="us")
            per_request = own["microseconds_per_step_and_request"]
            yield Row(CASES[case], "in our functions, a step and request", place, per_request, unit="us")
            yield Row(CASES[case], "in our functions", place, own["share_of_step"], unit="share")
            for function, value in own["functions"].items():
                yield Row(CASES[case], f"in {function}, mean of steps", place, value, unit="us")


def _measured(result: Result) -> str:
    return (
        f"processor time of a decode step of {result['requests']} requests of a one-layer model on a CPU, "
        f"{result['steps']} steps in {result['rounds']} interleaved rounds; ratios are of the same round, with "
        "quartiles."
    )


def _ratio_table(result: Result) -> Table:
    rows = []
    for case, name in CASES.items():
        own = result["ratios"].get(f"{case} / {STOCK}")
        ratios = ("", "") if own is None else (with_quartiles(own[CPU]), ratio(own[WALL]["median"]))
        rows.append((name, number(1e3 * median(result[CPU][case]), 2), *ratios))
    return Table(("", "ms a step", "times stock", "times stock, by the clock"), rows)


def _host_table(result: Result) -> Table:
    return Table(
        ("", "runner", "µs a step", "µs a step and request", "µs of the longest step", "share of the step"),
        [
            (
                CASES[case],
                runner,
                number(own["microseconds_per_step"]["median"], 0),
                number(own["microseconds_per_step_and_request"], 2),
                number(own["microseconds_per_step"]["max"], 0),
                percent(own["share_of_step"]),
            )
            for runner, cases in result["host"].items()
            for case, own in cases.items()
        ],
        texts=2,
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Host cost: {_measured(result)}"
    yield provenance(result)
    yield _ratio_table(result)
    yield (
        "Time inside our own functions, median over steps: from where vLLM calls one to its return, without the "
        "functions of vLLM that it calls in turn and without interpreted kernels. V2 runs under Triton's interpreter: "
        "its share of a step says nothing about a GPU."
    )
    yield _host_table(result)


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Host cost**: {_measured(result)} All samples: {files.link('overhead.json')}."
    yield _ratio_table(result)
