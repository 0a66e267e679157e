"""What `benchmarks.bytes` measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bytes.plan import BASE
from benchmarks.report.markdown import Files, listed, number, ratio
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, rows_of_goals
from benchmarks.report.table import Paragraph, Table

MEASURES = {
    "at_once": "videos at once, median of steps",
    "mean_at_once": "mean",
    "most_at_once": "most",
    "preemptions": "preemptions",
}


def named(cache: str) -> str:
    """A ratio, as goals have it."""
    return f"videos at once in a fixed pool, {cache} / {BASE}"


def goals(result: Result) -> list[Goal]:
    """The one of the benchmark."""
    return goals_of_ratios(result)


def rows(result: Result) -> Iterator[Row]:
    """Of every engine; ratios."""
    yield from rows_of_goals(result["targets"])
    for own in result["cases"].values():
        place = own["case"]["backend"]
        for cache, engine in own["engines"].items():
            yield Row(cache, "blocks of the pool", place, _pool(engine))
            for key, words in MEASURES.items():
                yield Row(cache, words, place, engine[key])
        yield Row(named(own["case"]["cache"]), "ratio", place, _ratio(own, "at_once"))


def _pool(engine: dict[str, Any]) -> int:
    """Blocks that requests can hold: one is vLLM's own."""
    blocks: int = engine["about"]["kv_cache_blocks"]
    return blocks - 1


def _ratio(case: dict[str, Any], key: str) -> float:
    engines = case["engines"]
    found: float = engines[case["case"]["cache"]][key] / engines[BASE][key]
    return found


def _measured(result: Result) -> str:
    plan, names = result["plan"], [own["case"]["cache"] for own in result["cases"].values()]
    left_out = " The processor cannot store 8-bit floats: they were not run." if result["left_out"] else ""
    given = f"{plan['condition_tokens']} + {plan['given_frames']} x {plan['tokens_per_frame']} + {plan['begun_tokens']}"
    return (
        f"{result['videos']} videos of {given} given tokens and {plan['made_tokens']} made ones, all sent at once to "
        f"engines with KV pools of the same size in bytes, in {listed([*names, BASE])}: a one-layer model with one "
        f"head of {plan['model']['head_size']} channels, the rule of the paper. Counted are those that run at each "
        "step at which others wait. As they begin together more are let in than stay: the mean has that in it, more "
        f"of it where a queue takes more rounds, the median has not.{left_out}"
    )


def _table(result: Result) -> Table:
    lines = []
    for own in result["cases"].values():
        case = own["case"]
        for cache, engine in own["engines"].items():
            lines.append(
                (
                    f"{case['backend']}, {case['runner']}",
                    cache,
                    f"{own['pool_bytes'] / 1024:,.0f}",
                    f"{_pool(engine):,}",
                    f"{engine['at_once']:g}",
                    number(engine["mean_at_once"], 1),
                    f"{engine['most_at_once']}",
                    f"{engine['preemptions']}",
                    "" if cache == BASE else ratio(_ratio(own, "at_once")),
                )
            )
    headings = ("engine", "cache", "KiB", "blocks", *MEASURES.values(), f"times {BASE}")
    return Table(headings, lines, texts=2)


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Videos at once in fewer bytes: {_measured(result)}"
    yield provenance(result)
    yield _table(result)


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Videos at once in fewer bytes**: {_measured(result)} More in {files.link('bytes.json')}."
    yield _table(result)
