"""What `benchmarks.memory` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.memory.plan import FAMILIES
from benchmarks.memory.runs import FILM_MEASURES, MEASURES
from benchmarks.report.markdown import Files, number
from benchmarks.report.parts import Goal, Result, Row, notes, provenance, row_of_mean, rows_of_goals, verdict
from benchmarks.report.table import Paragraph, Table

Means = Mapping[str, Mapping[str, Mapping[str, float] | None]]
"""By name and measure."""


def goals(result: Result) -> list[Goal]:
    """What looks at changes remembers no less than the paper's rule, with fewer tokens."""
    return [
        Goal(
            f"{MEASURES[target['measure']]}: {target['name']} less packcache, H = 2",
            points(None if target["mean"] is None else target),
            ">= 0",
            verdict(result, target["met"]),
        )
        for target in result["targets"]
    ]


def rows(result: Result) -> Iterator[Row]:
    """Means of every policy with their intervals, and the paired differences; the same of films."""
    yield from rows_of_goals(result["targets"])
    for name, own in result["variants"].items():
        yield Row(name, "live tokens", "", own["live_tokens"])
    for place, part in (("", result), ("films", result["films"])):
        for name, own in (*_scores(part).items(), *part["differences"].items()):
            for measure, found in own.items():
                yield row_of_mean(name, measure, place, found, "share")


def _scores(part: Mapping[str, Any]) -> Means:
    return {name: own["scores"] for name, own in part["variants"].items()}


def measured(result: Result) -> str:
    """What of what, in words."""
    first, last = result["frames_counted"]
    return (
        f"what the bundled model remembers, given the true past: {result['worlds']} held-out worlds, frames {first} to "
        f"{last}, blocks of {result['block_size']} tokens; ± is the half-width of a 95 % interval over worlds."
    )


def points(found: Mapping[str, float] | None) -> str:
    """A mean and its interval, in points."""
    return "n/a" if found is None else f"{number(100 * found['mean'], 1)} ± {number(100 * found['ci95'], 1)}"


def _table(result: Result) -> Table:
    return Table(
        ("policy", "live tokens", *MEASURES.values()),
        [
            (name, f"{own['live_tokens']:,}", *(points(own["scores"][measure]) for measure in MEASURES))
            for name, own in result["variants"].items()
        ],
    )


def table_of_means(first: str, means: Means, measures: Mapping[str, str]) -> Table:
    """Every measure of every name."""
    return Table(
        (first, *measures.values()),
        [(name, *(points(own[measure]) for measure in measures)) for name, own in means.items()],
    )


def _films(films: Mapping[str, Any]) -> str:
    return (
        f"**Returns**: tokens right in the first frame after a cut back to a scene, {films['films']} films of two "
        "worlds; remembered: by how much that is more than without the shot that it returns to. The model was never "
        "trained on cuts."
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Memory: {measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield "\n".join(f"- {family}: {words}" for family, words in FAMILIES.items())
    yield _table(result)
    yield "**Differences**, world by world, in points."
    yield table_of_means("", result["differences"], MEASURES)
    films = result["films"]
    yield _films(films)
    yield table_of_means("policy", _scores(films), FILM_MEASURES)
    yield "**Differences**, film by film, in points."
    yield table_of_means("", films["differences"], FILM_MEASURES)
    yield from files.picture("memory", "What is remembered, against live tokens")


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Memory**: {measured(result)} More in {files.link('memory.json')}."
    yield _table(result)
    yield _films(result["films"])
    yield table_of_means("policy", _scores(result["films"]), FILM_MEASURES)
    yield from files.picture("memory", "What is remembered, against live tokens")
