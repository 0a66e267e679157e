"""What `benchmarks.guidance` measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.decode.samples import CLOCK_NAMES, CPU, WALL, summary
from benchmarks.guidance.plan import LAST, NAMES, TEXTS, VIDEOS
from benchmarks.report.markdown import Files, number, ratio, with_quartiles
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, row_of_ratio, rows_of_goals
from benchmarks.report.table import Paragraph, Table


def named(stage: str, own: str) -> str:
    """A ratio of a stage, as goals have it."""
    return f"{stage}: {own}"


WORDS = {
    named(TEXTS, "able / plain"): "texts of a server that could guide / of one that cannot",
    named(VIDEOS, "able / plain"): "videos that are not guided, of a server that could guide / of one that cannot",
    named(VIDEOS, "guided / two"): "many guided videos / twice as many of the same lengths, host",
    named(LAST, "guided / two"): "a guided video / two of the same lengths, last frame",
    named(LAST, "full / packcache"): "guided full / guided packcache, last frame",
}
"""Goals, for people."""


def goals(result: Result) -> list[Goal]:
    """All ratios: each has a bound."""
    summaries = {
        named(stage, own): by_clock[CPU]
        for stage, found in result["stages"].items()
        for own, by_clock in found["ratios"].items()
    }
    return goals_of_ratios(result, WORDS, summaries)


def rows(result: Result) -> Iterator[Row]:
    """Seconds of a step, and ratios, with quartiles over rounds."""
    yield from rows_of_goals(result["targets"])
    for stage, found in result["stages"].items():
        for clock, words in CLOCK_NAMES.items():
            for name, samples in found[clock].items():
                yield row_of_ratio(name, f"seconds of a step by {words}", stage, summary(samples))._replace(unit="s")
        for own, by_clock in found["ratios"].items():
            for clock, words in CLOCK_NAMES.items():
                yield row_of_ratio(own, f"ratio by {words}", stage, by_clock[clock])


def _measured(result: Result) -> str:
    plan = result["plan"]
    host, last = plan["host"], plan["last_frame"]
    return (
        f"{plan['requests']} requests of a one-layer model, and a video in the middle of the last frame of "
        f"{1 + last['given_tokens'] // last['tokens_per_frame']} x {last['tokens_per_frame']:,} tokens, on Model "
        "Runner V2, which Triton's interpreter runs here. Guided videos have conditions of "
        f"{host['condition_tokens']} and {host['negative_tokens']} tokens, in the last frame of "
        f"{last['condition_tokens']} and {last['negative_tokens']}; what they are compared with are videos of these "
        "lengths. Ratios are of bursts of decode steps of the same round, with quartiles, by processor time without "
        "what runs in interpreted kernels; the clock has it in it."
    )


def _table(result: Result) -> Table:
    rows = []
    for stage, found in result["stages"].items():
        for name in found[CPU]:
            milliseconds = (number(1e3 * median(found[clock][name]), 2) for clock in (CPU, WALL))
            rows.append((stage, NAMES[name], *milliseconds))
    return Table(("", "engine", "ms a step", "ms a step, by the clock"), rows, texts=2)


def _ratio_table(result: Result) -> Table:
    return Table(
        ("", "by processor time", "by the clock"),
        [
            (WORDS[named(stage, own)], with_quartiles(by_clock[CPU]), ratio(by_clock[WALL]["median"]))
            for stage, found in result["stages"].items()
            for own, by_clock in found["ratios"].items()
        ],
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Guidance: {_measured(result)}"
    yield provenance(result)
    yield _ratio_table(result)
    yield _table(result)


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Guidance**: {_measured(result)} All samples: {files.link('guidance.json')}."
    yield _ratio_table(result)
