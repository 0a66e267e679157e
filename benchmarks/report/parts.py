"""What a benchmark gives to the report: goals, rows of the CSV, and its section in a long and in a short form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report.markdown import ratio, with_quartiles

Result = Mapping[str, Any]
"""What a benchmark has written as JSON."""

GOAL_HEADINGS = ("goal", "measured", "aim", "verdict")

NOT_MEASURED = "not measured"
MET = "met"

BOUNDS = {"at_least": ">=", "at_most": "<="}


class Row(NamedTuple):
    """A number for the CSV.

    Args:
        name: what it is of: a ratio, a policy, an engine.
        measure: what is measured of it.
        place: which frames, where in a frame, which load; empty: all there is.
        value: the number; None: there is none.
        low: lower end of its spread; None: there is none.
        high: upper end.
        spread: what the ends are.
        unit: of the number; empty: it has none.
    """

    name: str
    measure: str
    place: str
    value: float | None
    low: float | None = None
    high: float | None = None
    spread: str = ""
    unit: str = ""


class Goal(NamedTuple):
    """A goal and what came of it.

    Args:
        name: what should keep a bound.
        value: as measured.
        aim: the bound.
        verdict: whether it does.
    """

    name: str
    value: str
    aim: str
    verdict: str


def read(path: Path) -> Result | None:
    """A measurement; None: there is none, or it was not written to its end."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def verdict(result: Result, met: bool | None, *, close: bool = False, by: str = "") -> str:
    """Whether a goal is met, in words: those of a quick run are not judged.

    Args:
        result: that has the goal.
        met: what the benchmark says; None: it does not judge.
        close: whether the bound lies within the spread of what was measured.
        by: what misses it.
    """
    if met is None or result.get("quick"):
        return "not judged"
    return (MET if met else "**MISSED**") + by + (", within the spread" if close else "")


def goals_of_ratios(
    result: Result, names: Mapping[str, str] | None = None, summaries: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Goal]:
    """Goals of a result's ``targets``, ratios that have one bound each.

    Args:
        result: with ``targets``.
        names: of ratios, for people.
        summaries: median and quartiles of the ratios that have them.
    """
    names, summaries = names or {}, summaries or {}
    goals = []
    for target in result["targets"]:
        summary, (sign, bound) = summaries.get(target["ratio"]), _bound(target)
        goals.append(
            Goal(
                names.get(target["ratio"], target["ratio"]),
                ratio(target["value"]) if summary is None else with_quartiles(summary),
                f"{sign} {bound:.3g}",
                verdict(result, target["met"], close=summary is not None and _holds(summary, bound)),
            )
        )
    return goals


def rows_of_goals(targets: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The same for the CSV."""
    for target in targets:
        name, (sign, bound) = target["ratio"], _bound(target)
        yield Row(name, "goal", "", target["value"])
        yield Row(name, f"goal {sign}", "", bound)
        yield Row(name, "goal met", "", target["met"])


def _bound(target: Mapping[str, Any]) -> tuple[str, float]:
    (own,) = ((sign, target[key]) for key, sign in BOUNDS.items() if key in target)
    return own


def _holds(summary: Mapping[str, Any], bound: float) -> bool:
    low, high = summary["quartiles"]
    return low <= bound <= high


def row_of_ratio(name: str, measure: str, place: str, summary: Mapping[str, Any]) -> Row:
    """Median and quartiles of a ratio."""
    low, high = summary["quartiles"]
    return Row(name, measure, place, summary["median"], low, high, "quartiles")


def rows_of_count(name: str, measure: str, count: Mapping[str, Any], unit: str) -> Iterator[Row]:
    """A `benchmarks.statistics.Count.summary`: the mean of each span, then of each frame."""
    for span, found in count["spans"].items():
        yield row_of_mean(name, measure, span, found, unit)
    for frame, value in enumerate(count["by_frame"], 1):
        yield Row(name, measure, f"frame {frame}", value, unit=unit)


def row_of_mean(name: str, measure: str, place: str, found: Mapping[str, float] | None, unit: str) -> Row:
    """A mean over videos and its confidence interval."""
    if found is None:
        return Row(name, measure, place, None, unit=unit)
    mean, error = found["mean"], found["ci95"]
    return Row(name, measure, place, mean, mean - error, mean + error, "95 % CI", unit)


def provenance(result: Result) -> str:
    """What is needed to repeat a measurement, and what it was made on, as a list."""
    machine = dict(result.get("machine", {}))
    loads = [
        f"{_words(machine.pop(key))} {when} the run"
        for key, when in (("load_average_before", "before"), ("load_average_after", "after"))
        if key in machine
    ]
    # What is measured of the machine is no property of it.
    facts = {name: value for name, value in machine.items() if not isinstance(value, dict | list)}
    took = next((result[key] for key in ("seconds", "seconds_of_this_run") if key in result), None)
    facts_of = {
        "Command": f"`{result['command']}`" if "command" in result else None,
        "Versions": _words(result.get("versions")),
        "Machine": _words(facts),
        "Load average of 1, 5 and 15 minutes": "; ".join(loads),
        "Seeds": _words(result.get("seeds", result.get("seed"))),
        "Date": result.get("date"),
        "Took": None if took is None else f"{took:,.0f} s",
    }
    return "\n".join(f"- {heading}: {fact or 'not recorded'}" for heading, fact in facts_of.items())


def notes(result: Result) -> Iterator[str]:
    """What a benchmark says about its own numbers."""
    yield "How to read it:"
    yield "\n".join(f"- {note}" for note in result["notes"])


def _words(value: Any) -> str:
    """Data as words."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_words(own)}" for key, own in value.items() if own is not None)
    if isinstance(value, list):
        parts = [_words(own) for own in value]
        return " to ".join(parts) if len(parts) == 2 else ", ".join(parts)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
