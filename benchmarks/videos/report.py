"""What `benchmarks.videos` measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.report.markdown import Files, listed, ratio, significant, with_quartiles
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, row_of_ratio, rows_of_goals
from benchmarks.report.table import Paragraph, Table
from benchmarks.videos.runs import API, COMPLETION, ENGINE, VIDEO, WALL

OVERHEAD = "engine's processor time, video / completion"
CLOCKS = {
    ENGINE: "the engine's processor time",
    API: "the API server's processor time",
    WALL: "the clock",
}
PARTS = {"decode": "decoding, by the clock", "storage": "storage, by the clock"}


def goals(result: Result) -> list[Goal]:
    """The one of the benchmark."""
    names = {OVERHEAD: "processor time of the engine, a video over HTTP / a completion of the same ids"}
    return goals_of_ratios(result, names, {OVERHEAD: result["overhead"]["ratios"][ENGINE]})


def rows(result: Result) -> Iterator[Row]:
    """Of each comparison."""
    yield from rows_of_goals(result["targets"])
    for clock, words in CLOCKS.items():
        yield row_of_ratio("video / completion", f"by {words}", "", result["overhead"]["ratios"][clock])
    for name in (VIDEO, COMPLETION):
        for clock, words in CLOCKS.items():
            yield _row(name, f"a frame, by {words}", [own[name][clock] for own in result["overhead"]["rounds"]])
    for part, words in PARTS.items():
        yield _row(VIDEO, f"a frame, {words}", [own[VIDEO][part] for own in result["overhead"]["rounds"]])
    for count in result["plan"]["followers"]:
        own = [each[str(count)] for each in result["followers"]["rounds"]]
        yield _row(f"{count} clients follow", "a frame", [each["frame"] for each in own])
        yield _row(f"{count} clients follow", f"a frame, by {CLOCKS[API]}", [each[API] for each in own])


def _row(name: str, measure: str, samples: list[float]) -> Row:
    return Row(name, measure, "", median(samples), min(samples), max(samples), "range of rounds", "s")


def _measured(result: Result) -> str:
    plan, tokens = result["plan"], result["overhead"]["tokens_per_frame"]
    return (
        f"{plan['frames']} frames of {tokens} tokens of the bundled model, asked for at `/v1/videos`, beside a "
        f"streamed completion of the same prompt, which makes the same ids; {plan['rounds']} rounds, in turn."
    )


def _table(result: Result) -> Table:
    overhead, followed = result["overhead"], result["followers"]["rounds"]

    def seconds(samples: list[float]) -> str:
        return f"{significant(median(samples))} s"

    lines = [(f"video / completion, by {CLOCKS[ENGINE]}", with_quartiles(overhead["ratios"][ENGINE]))]
    for name in (VIDEO, COMPLETION):
        samples = [own[name][API] for own in overhead["rounds"]]
        lines.append((f"a frame of a {name}, by {CLOCKS[API]}", seconds(samples)))
    for part, words in PARTS.items():
        lines.append((f"of a frame of a video, {words}", seconds([own[VIDEO][part] for own in overhead["rounds"]])))
    for count in result["plan"]["followers"]:
        samples = [own[str(count)]["frame"] for own in followed]
        lines.append((f"a frame while {_clients(count)} its events", seconds(samples)))
    return Table(("", "measured"), lines)


def _clients(count: int) -> str:
    return {0: "nobody follows", 1: "1 client follows"}.get(count, f"{count} clients follow")


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Videos over HTTP: {_measured(result)}"
    yield provenance(result)
    yield _table(result)
    ratios = result["overhead"]["ratios"]
    samples = listed([ratio(sample) for sample in ratios[ENGINE]["samples"]])
    yield f"Video / completion by {CLOCKS[ENGINE]}, round by round: {samples}."
    yield (
        f"By {CLOCKS[API]} {with_quartiles(ratios[API])}, by the clock {with_quartiles(ratios[WALL])}: a completion's "
        "API server sends every token, a video's decodes and writes frames."
    )


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Videos over HTTP**: {_measured(result)} All samples: {files.link('videos.json')}."
    yield _table(result)
